"""A model's layers divided among ranks, and the collectives that put their results together."""
