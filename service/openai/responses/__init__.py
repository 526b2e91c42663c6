"""Conversations in the shape of OpenAI's Responses API, without stored state."""
