"""Between text and token ids: the tokenizer, its chat template, and text out of a stream of tokens.

It knows neither requests nor the wire.
"""
