"""Counts what a request consists of, before anything costly is made of it.

A body and a message have the same fields under the same names, so most of it serves both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from ..errors import ErrorKind, ServiceError
from ..generation.json_values import count_bytes, count_values, most_values, nesting
from ..generation.limits import Limits, check_count
from .message_size import TooManyFieldsError, check_fields
from .strict_json import MAX_DEPTH, too_deep

# Of a message, for each value of a body: a member of an object takes so many.
_FIELDS_PER_VALUE = 4
_ITEM_LISTS = ("content", "output", "summary")  # what an item of the Responses API may list


def check_body(data: bytes, limits: Limits) -> None:
    """Counts the values of a JSON body.

    Raises:
        ServiceError: there are too many; kind `JSON` if they are also nested too deep, as for a
            body with fewer.
    """
    # A value has a comma or a bracket with it, and most of these stand in texts.
    if count_bytes(data, b",[{") < limits.max_request_values:
        return
    count = count_values(data)
    if count > limits.max_request_values:
        if nesting(data) > MAX_DEPTH:
            raise too_deep()
        field = most_values(data)
        where = "" if field is None else f", most of them in `{field}`"
        raise ServiceError(
            ErrorKind.VALIDATION,
            f"the body must have at most {limits.max_request_values} JSON values. "
            f"Given: {count}{where}",
            field=field,
        )


def check_message(data: bytes, kind: type[Message], limits: Limits) -> None:
    """Counts the fields of a message, given as bytes, with those of the messages in it.

    Raises:
        ServiceError: there are too many.
    """
    max_fields = _FIELDS_PER_VALUE * limits.max_request_values
    try:
        check_fields(data, cast("Descriptor", kind.DESCRIPTOR), max_fields)
    except TooManyFieldsError as error:
        where = "" if error.field is None else f", in `{error.field}`"
        raise ServiceError(
            ErrorKind.VALIDATION,
            f"the message must have at most {max_fields} fields, with those of its parts. "
            f"Given: more{where}",
            field=error.field,
        ) from None


def check_counts(wire: Any, limits: Limits) -> None:
    """Counts messages or items, their parts, and tools.

    Args:
        wire: a body as msgspec has read it, or a message of google's classes.
        limits: those in force.

    Raises:
        ServiceError: there are too many.
    """
    messages = getattr(wire, "messages", None) or ()
    check_count("messages", len(messages), limits.max_messages, "messages")
    for index, message in enumerate(messages):
        parts = _num_parts(message.content)
        check_count(f"messages[{index}].content", parts, limits.max_message_parts, "parts")
        typed = len(getattr(message, "parts", ()))
        check_count(f"messages[{index}].parts", typed, limits.max_message_parts, "parts")
    _check_items(_values(getattr(wire, "input", None)), limits)
    tools = getattr(wire, "tools", None) or ()
    check_count("tools", len(tools), limits.max_tools, "tools")


def _check_items(items: Sequence[Any], limits: Limits) -> None:
    """Counts the items of the Responses API, and their parts.

    Raises:
        ServiceError: there are too many.
    """
    check_count("input", len(items), limits.max_messages, "items")
    for index, item in enumerate(items):
        members = item.struct_value.fields if isinstance(item, Message) else item  # type: ignore[attr-defined]
        for name in _ITEM_LISTS if isinstance(members, Mapping) else ():
            if name in members:
                parts = _num_parts(members[name])
                check_count(f"input[{index}].{name}", parts, limits.max_message_parts, "parts")


def _num_parts(content: Any) -> int:
    return len(_values(content))


def _values(value: Any) -> Sequence[Any]:
    """The values of a list; none of anything else."""
    if isinstance(value, Message):
        is_list = value.WhichOneof("kind") == "list_value"
        return value.list_value.values if is_list else ()  # type: ignore[attr-defined]
    return value if isinstance(value, list) else ()
