"""The values of JSON that a message holds as `Value`."""

from __future__ import annotations

from typing import Any

from ..pb.google.protobuf import ListValue, Struct, Value


def plain(value: Any) -> Any:
    """Plain JSON values. A `Value` has doubles only: whole ones become integers where exact."""
    match value:
        case Value(list_value=ListValue(values=items)):
            return [plain(item) for item in items]
        case Value(struct_value=Struct(fields=members)) | Struct(fields=members):
            return {key: plain(item) for key, item in members.items()}
        case Value(number_value=float(number)):
            return int(number) if number.is_integer() and abs(number) <= 2**53 else number
        case Value(string_value=str(text)):
            return text
        case Value(bool_value=bool(truth)):
            return truth
        case Value():
            return None  # null, or nothing at all
    return value
