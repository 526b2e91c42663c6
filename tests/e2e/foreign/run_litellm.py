"""litellm against a server: chat, stream, a tool, completions. Prints one JSON document."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm

URL, QUESTION, WEATHER_QUESTION = sys.argv[1:]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a location",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}},
            "required": ["location"],
        },
    },
}
litellm.telemetry = False
common = {"api_base": f"{URL}/v1", "api_key": "-", "temperature": 0.0, "max_tokens": 100}
messages = [{"role": "user", "content": QUESTION}]
chat = litellm.completion(model="openai/tgi", messages=messages, **common)
stream = litellm.completion(model="openai/tgi", messages=messages, stream=True, **common)
weather = [{"role": "user", "content": WEATHER_QUESTION}]
called = litellm.completion(model="openai/tgi", messages=weather, tools=[TOOL], **common)
pieces = litellm.completion(
    model="openai/tgi", messages=weather, tools=[TOOL], stream=True, **common
)
whole = litellm.stream_chunk_builder(list(pieces))
text = litellm.text_completion(model="text-completion-openai/tgi", prompt=QUESTION, **common)
choices = (called.choices[0], whole.choices[0])
print(
    json.dumps(
        {
            "text": chat.choices[0].message.content,
            "reason": chat.choices[0].finish_reason,
            "stream": "".join(item.choices[0].delta.content or "" for item in stream),
            "calls": [
                [call.function.name, json.loads(call.function.arguments)]
                for choice in choices
                for call in choice.message.tool_calls
            ],
            "call reasons": [choice.finish_reason for choice in choices],
            "completion": text.choices[0].text,
        }
    )
)
