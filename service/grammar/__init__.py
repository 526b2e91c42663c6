"""Grammars as callers ask for them, and the processes in which each is tried out before it is used.

It does not know which endpoint or tool a grammar came from.
"""
