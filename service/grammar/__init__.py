"""Grammars of requests, and the worker processes in which each is compiled on trial before its use.

It does not know which endpoint or tool a grammar came from.
"""
