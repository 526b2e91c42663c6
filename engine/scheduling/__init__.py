"""Which sequences compute how many tokens in a step, and in which blocks of the cache.

Plain Python: it knows no tensor, no device and no text.
"""
