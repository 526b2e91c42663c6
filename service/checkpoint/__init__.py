"""What a checkpoint on this machine has, and what keeps it from being loaded, without loading it.

A checkpoint is a directory or a GGUF file. What a server does with it is not known here.
"""
