"""The commands of `hijacklens`; each is a thin layer over the library."""
