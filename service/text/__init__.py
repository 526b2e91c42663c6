"""Between text and token ids: the tokenizer, its chat template, and text out of a stream of tokens.

It knows no request and no wire.
"""
