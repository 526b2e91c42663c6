"""The first day on a GPU: one script per question, each of at most ten minutes and independent.

See docs/gpu.md for the commands, their order, and the figures that are awaited. Each script writes
one file into benchmarks/results/, after each of its parts, so that nothing is lost if it is killed.
With `--smoke --device cpu` each runs on tiny sizes without a GPU, and its file says so.
"""
