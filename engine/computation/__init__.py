"""What computes an engine's steps, put together: model, cache, adapters and recordings.

`computation.py` joins the parts, each of which has a file. It knows no request and no scheduler.
"""
