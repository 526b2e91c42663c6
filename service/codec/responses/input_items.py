"""The items of an input, which become the messages of a chat.

Reasoning, text and calls of the assistant that follow each other are one turn, as chat templates
expect them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import ErrorKind, ServiceError, missing_field
from ...images.source import ImageSource
from ...openai.chat import Message

_ROLES = ("user", "assistant", "system", "developer")
_KINDS = ("message", "function_call", "function_call_output", "reasoning")
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
_IMAGE = "input_image"
_DETAILS = ("auto", "low", "high", "original")
_OTHER_PARTS = ("input_file", "input_audio", "computer_screenshot")
_REASONING_PARTS = {"reasoning_text": "text"}
_SUMMARY_PARTS = {"summary_text": "text"}


@dataclass(slots=True)
class Input:
    """What an input says, item by item.

    Attributes:
        messages: the conversation so far.
        arguments: the arguments of its calls, each with its path.
    """

    messages: list[Message] = field(default_factory=list)
    arguments: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, items: str | list[Any], instructions: str | None) -> Input:
        """Reads an input: a text that the user says, or a list of items.

        Raises:
            ServiceError: an item is malformed, or none that can be served.
        """
        result = cls()
        if instructions is not None:
            result.messages.append(Message(role="system", content=instructions))
        if isinstance(items, str):
            result.messages.append(Message(role="user", content=items))
            return result
        if not items:
            raise _invalid("input", "`input` must have at least one item")
        for index, item in enumerate(items):
            result._add(f"input[{index}]", item)
        return result

    def _add(self, path: str, item: Any) -> None:
        if not isinstance(item, dict):
            raise _shape(path, "expected an object")
        kind = item.get("type") or ("message" if "role" in item else "item_reference")
        match kind:
            case "message":
                self._add_message(path, item)
            case "function_call":
                self._add_call(path, item)
            case "function_call_output":
                self._add_output(path, item)
            case "reasoning":
                self._add_reasoning(path, item)
            case "item_reference":
                text = (
                    f"{path} refers to a stored item, and nothing is stored: send the item itself"
                )
                raise _invalid(path, text)
            case _:
                known = ", ".join(f"`{name}`" for name in _KINDS)
                text = f"{path}.type must be one of {known}. Given: {kind}"
                raise _invalid(f"{path}.type", text)

    def _add_message(self, path: str, item: dict[str, Any]) -> None:
        role = _text(path, item, "role")
        if role not in _ROLES:
            known = ", ".join(f"`{name}`" for name in _ROLES)
            text = f"{path}.role must be one of {known}. Given: {role}"
            raise _invalid(f"{path}.role", text)
        content = _mixed(path, item, "content")
        if role == "assistant" and not isinstance(content, str):
            raise _invalid(f"{path}.content", f"{path}.content: an assistant shows no images")
        turn = self._turn()
        if role == "assistant" and turn is not None and not turn.content and not turn.tool_calls:
            self.messages[-1] = replace(turn, content=content)
        else:
            self.messages.append(Message(role=role, content=content))

    def _add_call(self, path: str, item: dict[str, Any]) -> None:
        name, arguments = _text(path, item, "name"), _text(path, item, "arguments")
        function = {"name": name, "arguments": arguments}
        call = {"id": _text(path, item, "call_id"), "type": "function", "function": function}
        self.arguments.append((f"{path}.arguments", arguments))
        turn = self._turn()
        if turn is None:
            turn = Message(role="assistant", content="")
            self.messages.append(turn)
        self.messages[-1] = replace(turn, tool_calls=(*turn.tool_calls, call))

    def _add_output(self, path: str, item: dict[str, Any]) -> None:
        call_id = _text(path, item, "call_id")
        content = _mixed(path, item, "output")
        self.messages.append(Message(role="tool", content=content, tool_call_id=call_id))

    def _add_reasoning(self, path: str, item: dict[str, Any]) -> None:
        """What the assistant thought, for templates that show it; a summary where that is all."""
        text = _content(path, {"content": item.get("content") or []}, "content", _REASONING_PARTS)
        if not text:
            summary = {"summary": item.get("summary") or []}
            text = _content(path, summary, "summary", _SUMMARY_PARTS)
        turn = self._turn()
        if text and turn is not None and not turn.content and not turn.tool_calls:
            text = (turn.reasoning_content or "") + text
            self.messages[-1] = replace(turn, reasoning_content=text)
        elif text:
            self.messages.append(Message(role="assistant", content="", reasoning_content=text))

    def _turn(self) -> Message | None:
        """The assistant's turn that can go on, if the last message is one."""
        last = self.messages[-1] if self.messages else None
        return last if last is not None and last.role == "assistant" else None


def _text(path: str, item: dict[str, Any], name: str) -> str:
    """A field that must be a text.

    Raises:
        ServiceError: it is none, or absent.
    """
    value = item.get(name)
    if value is None:
        raise missing_field(f"{path}.{name}")
    if not isinstance(value, str):
        raise _shape(f"{path}.{name}", "expected a string")
    return value


def _mixed(path: str, item: dict[str, Any], name: str) -> str | list[Any]:
    """A field of texts and images: a text if it has no images, otherwise its parts.

    Raises:
        ServiceError: a part is malformed, or neither.
    """
    value, parts = item.get(name), list[Any]()
    if not isinstance(value, list) or not any(map(_is_image, value)):
        return _content(path, item, name, _TEXT_PARTS)
    for at, part in enumerate(value):
        place = f"{path}.{name}[{at}]"
        if _is_image(part):
            parts.append(_image(place, part))
        else:
            parts.append({"type": "text", "text": _part(place, part, _TEXT_PARTS)})
    return parts


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == _IMAGE


def _image(path: str, part: dict[str, Any]) -> ImageSource:
    """Where an image is. `detail` is checked: how large an image is seen is up to the model.

    Raises:
        ServiceError: it is a stored file, or malformed.
    """
    if part.get("file_id") is not None:
        raise _invalid(f"{path}.file_id", f"{path}.file_id: nothing is stored: send `image_url`")
    detail = part.get("detail")
    if detail is not None and detail not in _DETAILS:
        known = ", ".join(f"`{name}`" for name in _DETAILS)
        raise _invalid(f"{path}.detail", f"{path}.detail must be one of {known}")
    return ImageSource(f"{path}.image_url", _text(path, part, "image_url"))


def _content(path: str, item: dict[str, Any], name: str, kinds: dict[str, str]) -> str:
    """The text of a field: itself, or that of its parts, without a separator.

    Raises:
        ServiceError: a part is malformed, or no text.
    """
    value, path = item.get(name), f"{path}.{name}"
    if value is None:
        raise missing_field(path)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _shape(path, "expected a string or a list")
    return "".join(_part(f"{path}[{at}]", part, kinds) for at, part in enumerate(value))


def _part(path: str, part: Any, kinds: dict[str, str]) -> str:
    if not isinstance(part, dict):
        raise _shape(path, "expected an object")
    kind = _text(path, part, "type")
    if kind in _OTHER_PARTS:
        raise _invalid(path, f"the model takes text only; `{kind}` is not supported")
    if kind not in kinds:
        known = ", ".join(f"`{name}`" for name in kinds)
        raise _invalid(f"{path}.type", f"{path}.type must be one of {known}. Given: {kind}")
    return _text(path, part, kinds[kind])


def _invalid(path: str, text: str) -> ServiceError:
    return ServiceError(ErrorKind.VALIDATION, text, field=path)


def _shape(path: str, text: str) -> ServiceError:
    return ServiceError(ErrorKind.SHAPE, f"{path}: {text}", field=path)
