"""Chat, completions and tools: what they mean in terms of generations.

It knows neither messages nor the JSON of replies, which `codec` writes.
"""
