"""The processes of the ranks: how they are started, told what to compute, watched and ended.

It does not know what a step computes.
"""
