"""Processes for work that may hang, grow or crash: how they are asked, ended and started again.

What they work on is not known here.
"""
