"""Older architectures, whose layers compute attention themselves: here they call an interface.

Each module has the classes that take the place of those of transformers, in `CLASSES`, and may
have `linear_bias`, which finds out the bias of a model's heads.
"""
