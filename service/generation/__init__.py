"""One generation: limits, validation, permits, the engine's client, text events.

It knows neither messages nor JSON. Its parameters have the names of `/generate`; the other
endpoints' names are mapped to these in `codec`.
"""
