"""pydantic-ai against a server: text, a tool, structured output, streams; prints JSON."""

import json
import sys

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, QUESTION, WEATHER_QUESTION = sys.argv[1:]


class Place(BaseModel):
    """A place on earth."""

    city: str


model = OpenAIChatModel("tgi", provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="-"))
settings = {"temperature": 0.0, "max_tokens": 100}
plain = Agent(model, model_settings=settings)
with_tool = Agent(model, model_settings=settings)
asked = []


@with_tool.tool_plain
def get_weather(location: str) -> str:
    """Get the current weather in a location."""
    asked.append(location)
    return json.dumps({"temperature": 20, "unit": "C"})


found = {"text": plain.run_sync(QUESTION).output}
streamed = plain.run_stream_sync(QUESTION)
found["stream"] = "".join(streamed.stream_text(delta=True))
found["tool answer"] = with_tool.run_sync(WEATHER_QUESTION).output
found["asked"] = asked
structured = Agent(model, model_settings=settings, output_type=Place)
found["structured"] = structured.run_sync(WEATHER_QUESTION).output.model_dump()
print(json.dumps(found))
