"""Attention over a paged KV cache: the seam, the cache, and the reference that is always right.

It knows no kernel that computes the same faster, and nothing of scheduling.
"""
