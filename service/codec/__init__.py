"""Between the domain and the wire, both ways: typed messages, JSON and SSE bytes, headers.

It decides nothing: what an answer is was settled before.
"""
