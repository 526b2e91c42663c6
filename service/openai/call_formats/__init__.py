"""The forms in which models write tool calls and reasoning: how each is told, enforced and read."""
