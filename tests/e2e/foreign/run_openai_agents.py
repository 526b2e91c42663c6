"""openai-agents over its default API and over chat completions. Prints one JSON document.

With each: a text, a tool, a stream, and an answer of a type, without and with a tool.
"""

import asyncio
import json
import sys
from typing import Literal

from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIProvider,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

URL, QUESTION, WEATHER_QUESTION = sys.argv[1:]
set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="-")
asked = []


@function_tool
def get_weather(location: str) -> str:
    """Get the current weather in a location."""
    asked.append(location)
    return json.dumps({"temperature": 20, "unit": "C"})


class City(BaseModel):
    city: str


class Weather(BaseModel):
    is_warm: bool
    unit: Literal["C", "F"]


@function_tool(is_enabled=lambda *_: not asked)
def get_weather_once(location: str) -> str:
    """Get the current weather in a location."""
    asked.append(location)
    return json.dumps({"temperature": 20, "unit": "C"})


async def typed_answer(agent: Agent, *, streamed: bool) -> list[object]:
    """What an agent with a tool asked it, and the type of its answer.

    The small model never stops calling what it can call, so the tool is there until it is asked.
    """
    asked.clear()
    if streamed:
        run = Runner.run_streamed(agent, WEATHER_QUESTION)
        async for _ in run.stream_events():
            pass
    else:
        run = await Runner.run(agent, WEATHER_QUESTION)
    return [*asked, type(run.final_output).__name__]


async def ask(model: Model) -> dict[str, object]:
    settings = ModelSettings(temperature=0.0, max_tokens=100)
    plain = Agent(name="plain", model=model, model_settings=settings)
    with_tool = Agent(name="tool", model=model, model_settings=settings, tools=[get_weather])
    typed = Agent(name="typed", model=model, model_settings=settings, output_type=City)
    found: dict[str, object] = {"text": (await Runner.run(plain, QUESTION)).final_output}
    found["tool answer"] = (await Runner.run(with_tool, WEATHER_QUESTION)).final_output
    streamed = Runner.run_streamed(with_tool, WEATHER_QUESTION)
    kinds = {event.type async for event in streamed.stream_events()}
    found["streamed answer"] = streamed.final_output
    found["kinds"] = sorted(kinds)
    found["asked"] = list(asked)
    asked.clear()
    found["typed"] = type((await Runner.run(typed, QUESTION)).final_output).__name__
    both = with_tool.clone(name="both", tools=[get_weather_once], output_type=Weather)
    found["typed with tool"] = [await typed_answer(both, streamed=it) for it in (False, True)]
    asked.clear()
    return found


async def main() -> None:
    by_default = OpenAIProvider(openai_client=client).get_model("tgi")
    over_chat = OpenAIChatCompletionsModel("tgi", openai_client=client)
    found = {"responses": await ask(by_default), "chat": await ask(over_chat)}
    found["responses"]["model"] = type(by_default).__name__
    print(json.dumps(found))


asyncio.run(main())
