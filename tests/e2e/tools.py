"""Tools that the bundled model can call, and questions that need them."""

from __future__ import annotations

from typing import Any

WEATHER_QUESTION = "What is the weather in Paris?"
TIME_QUESTION = "What time is it in Oslo?"


def tool(name: str, description: str, argument: str) -> dict[str, Any]:
    """A function with one string argument, in the form of OpenAI."""
    parameters = {
        "type": "object",
        "properties": {argument: {"type": "string"}},
        "required": [argument],
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


WEATHER = tool("get_weather", "Get the current weather in a location", "location")
TIME = tool("get_time", "Get the current time in a city", "city")
CALCULATOR = tool("calculator", "Evaluate an arithmetic expression", "expression")
TOOLS = [WEATHER, TIME, CALCULATOR]


def by_contract(defined: dict[str, Any]) -> dict[str, Any]:
    """The same function as the REST contract defines it: `arguments` instead of `parameters`."""
    function = dict(defined["function"])
    function["arguments"] = function.pop("parameters")
    return {**defined, "function": function}


CONTRACT_TOOLS = [by_contract(item) for item in TOOLS]
