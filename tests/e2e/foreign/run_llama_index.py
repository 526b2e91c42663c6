"""llama-index's OpenAILike against a server: complete, chat, stream, tools; prints JSON."""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

URL, QUESTION, WEATHER_QUESTION = sys.argv[1:]


def get_weather(location: str) -> str:
    """Get the current weather in a location."""
    return location


llm = OpenAILike(
    model="tgi",
    api_base=f"{URL}/v1",
    api_key="-",
    is_chat_model=True,
    is_function_calling_model=True,
    temperature=0.0,
    max_tokens=100,
)
question = [ChatMessage(role="user", content=QUESTION)]
completer = llm.model_copy(update={"is_chat_model": False})
called = llm.chat_with_tools([FunctionTool.from_defaults(get_weather)], WEATHER_QUESTION)
calls = llm.get_tool_calls_from_response(called)
print(
    json.dumps(
        {
            "chat": llm.chat(question).message.content,
            "stream": "".join(item.delta or "" for item in llm.stream_chat(question)),
            "completion": completer.complete(QUESTION).text,
            "calls": [[call.tool_name, call.tool_kwargs] for call in calls],
        }
    )
)
