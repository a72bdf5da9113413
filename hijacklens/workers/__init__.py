"""Workers: copies of a model in other processes, on the GPUs of one machine or of many."""
