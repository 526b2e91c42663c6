"""A step's work as tensors: what there is in it, how a scheduled batch is packed, and copies.

It does not know the model.
"""
