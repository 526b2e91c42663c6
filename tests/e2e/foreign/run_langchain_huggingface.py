"""langchain-huggingface against a server: text, chat, a tool. Prints one JSON document."""

import json
import sys

from langchain_core.tools import tool
from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint

URL, QUESTION, WEATHER_QUESTION = sys.argv[1:]


@tool
def get_weather(location: str) -> str:
    """Get the current weather in a location."""
    return location


llm = HuggingFaceEndpoint(endpoint_url=URL, max_new_tokens=100, do_sample=False)
chat = ChatHuggingFace(llm=llm, model_id="tgi", temperature=0.0, max_tokens=100)
with_tool = chat.bind_tools([get_weather])
print(
    json.dumps(
        {
            "text": llm.invoke(QUESTION),
            "chat": chat.invoke(QUESTION).content,
            "stream": "".join(chunk.content for chunk in chat.stream(QUESTION)),
            "calls": [
                [call["name"], call["args"]]
                for call in with_tool.invoke(WEATHER_QUESTION).tool_calls
            ],
        }
    )
)
