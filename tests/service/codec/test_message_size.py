"""The fields of a message are counted in its bytes, no further than to the limit."""

from __future__ import annotations

import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from service.codec.message_size import TooManyFieldsError, check_fields

DESCRIPTOR = struct_pb2.Struct.DESCRIPTOR


def message(num_members: int) -> struct_pb2.Struct:
    """An object of numbers: each is an entry, its key, its value, and the number in that."""
    made = struct_pb2.Struct()
    made.update({f"k{index}": index for index in range(num_members)})
    return made


@pytest.mark.parametrize("num_members", [5, 50, 500])
def test_fields_of_the_messages_inside_count(num_members: int) -> None:
    data = message(num_members).SerializeToString()
    check_fields(data, DESCRIPTOR, 4 * num_members)
    with pytest.raises(TooManyFieldsError) as refused:
        check_fields(data, DESCRIPTOR, 4 * num_members - 1)
    assert refused.value.field == "fields"


def test_one_long_text_is_one_field() -> None:
    value = struct_pb2.Value(string_value="x" * 1_000_000)
    check_fields(value.SerializeToString(), struct_pb2.Value.DESCRIPTOR, 1)


@given(st.binary(max_size=300), st.integers(0, 50))
def test_any_bytes_can_be_counted(data: bytes, limit: int) -> None:
    try:
        check_fields(data, DESCRIPTOR, limit)
    except TooManyFieldsError:
        assert len(data) > 2 * limit
