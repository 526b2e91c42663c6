"""Forward passes recorded once and replayed: CUDA graphs on a GPU, our own on a CPU.

It does not know what a model computes, nor for whom.
"""
