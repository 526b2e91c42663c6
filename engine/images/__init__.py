"""Images of prompts: the model's own encoder, and its results put in the place of tokens.

It does not know how an image became tensors, nor attention.
"""
