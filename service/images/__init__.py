"""Images in conversations: read from data: URLs, decoded and made ready for the model.

It does not know the encoder, nor who sent them.
"""
