"""openai-agents over chat completions: text, a tool, a stream. Prints one JSON document."""

import asyncio
import json
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

URL, QUESTION, WEATHER_QUESTION = sys.argv[1:]
set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="-")
asked = []


@function_tool
def get_weather(location: str) -> str:
    """Get the current weather in a location."""
    asked.append(location)
    return json.dumps({"temperature": 20, "unit": "C"})


async def main() -> None:
    model = OpenAIChatCompletionsModel("tgi", openai_client=client)
    settings = ModelSettings(temperature=0.0, max_tokens=100)
    plain = Agent(name="plain", model=model, model_settings=settings)
    with_tool = Agent(name="tool", model=model, model_settings=settings, tools=[get_weather])
    found = {"text": (await Runner.run(plain, QUESTION)).final_output}
    found["tool answer"] = (await Runner.run(with_tool, WEATHER_QUESTION)).final_output
    streamed = Runner.run_streamed(with_tool, WEATHER_QUESTION)
    kinds = {event.type async for event in streamed.stream_events()}
    found["streamed answer"] = streamed.final_output
    found["kinds"] = sorted(kinds)
    found["asked"] = asked
    print(json.dumps(found))


asyncio.run(main())
