"""The bundled model with the chat template, and the tags, of other models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.paths import DEMO_MODEL

_TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "<|end|>{% endfor %}"
    "{% if documents %}<|system|>"
    "{% for d in documents %}{{ d.text }};{% endfor %}<|end|>{% endif %}"
    "{% if reasoning_effort %}<|system|>effort {{ reasoning_effort }}<|end|>{% endif %}"
)
_ANSWER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
HERMES = (
    "{% if tools %}<|system|>Tools: {{ tools | tojson }} Write <tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|end|>{% endif %}'
    + _TURNS
    + _ANSWER
)
# As Qwen's: the reasoning is open, or empty and closed.
THINKING = (
    _TURNS
    + "{% if add_generation_prompt %}<|assistant|>"
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    + "{% else %}<think>\n{% endif %}{% endif %}"
)
THINK, END_OF_THOUGHT = 4094, 4095  # their ids


def model_with(directory: Path, template: str, *, with_tags: bool = False) -> Path:
    """A copy of the bundled model with another template; `with_tags` with tokens for think tags.

    The tags replace the last two pieces of the vocabulary. One is special to the tokenizer, as in
    some models, and one is not, as in others.
    """
    shutil.copytree(DEMO_MODEL, directory)
    (directory / "chat_template.jinja").write_text(template)
    if with_tags:
        path = directory / "tokenizer.json"
        path.write_text(json.dumps(_with_tags(json.loads(path.read_text()))))
    return directory


def _with_tags(spec: dict[str, Any]) -> dict[str, Any]:
    model = spec["model"]
    model["vocab"] = {piece: i for piece, i in model["vocab"].items() if i < THINK}
    del model["merges"][-2:]  # they make these pieces
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for token_id, text in ((THINK, "<think>"), (END_OF_THOUGHT, "</think>")):
        token = {"id": token_id, "content": text, "special": token_id == END_OF_THOUGHT, **flags}
        spec["added_tokens"].append(token)
    return spec
