"""The commands of `hijacklens`, one module each; each is a thin layer over the library."""
