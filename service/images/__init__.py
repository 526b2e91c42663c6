"""Images of prompts: read or fetched, decoded, and made ready for the model in processes.

It does not know the encoder, nor who sent them.
"""
