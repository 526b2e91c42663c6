"""How much memory the largest possible step takes, and what that leaves for the KV cache.

It knows no request: the answer is found once, before the first one.
"""
