"""A model's layers divided among ranks, and the exchanges that put their results together.

It does not know how ranks are started.
"""
