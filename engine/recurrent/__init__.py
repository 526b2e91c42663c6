"""Layers that remember a text in a state of fixed size, beside those that cache keys and values.

Short convolutions, linear attention and state-space models are such layers. Each sequence has a
slot, in which each of these layers has its state.
"""
