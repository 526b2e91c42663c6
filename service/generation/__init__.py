"""The life of one generation: limits, validation, permits, the engine's client, text events.

It knows neither messages nor JSON, and no endpoint but its own parameters.
"""
