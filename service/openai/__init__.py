"""Chat, completions and tools: what they mean in terms of generations.

It knows neither messages nor JSON: `codec` writes what it decides.
"""
