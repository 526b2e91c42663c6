"""A checkpoint made ready and run: loaded, checked against transformers, fused, quantised.

It knows no request, no sequence and no sampling: packed tokens in, logits out.
"""
