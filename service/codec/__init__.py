"""Between the domain and the wire, both ways: typed messages, JSON and SSE bytes, headers.

It makes no decisions: what an answer contains is settled in `openai` and `generation`.
"""
