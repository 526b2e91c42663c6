"""The engine: token ids in, token ids out.

It schedules, caches, runs the model and samples; it knows nothing of text or of the wire.
"""
