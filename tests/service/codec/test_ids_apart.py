"""A message whose token ids are read apart is the same as if betterproto2 had read all of it."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import message_factory
from hypothesis import given
from hypothesis import strategies as st

from service.api.rpc import load_pool
from service.codec import ids_apart
from service.pb.google.protobuf import Struct, Value
from service.pb.tokenwire import v1 as pb

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=20).map(lambda ids: pb.TokenIds(ids=ids))
SCHEMA = Value(struct_value=Struct(fields={"z": Value(number_value=1), "a": Value()}))
FORMAT = pb.ResponseFormat(type=pb.ResponseFormatType.JSON, value=SCHEMA)
POOL = load_pool()


def read(message: Any) -> Any:
    data, kind = bytes(message), type(message)
    descriptor = POOL.FindMessageTypeByName(f"tokenwire.v1.{kind.__name__}")
    return ids_apart.parse(kind, data, message_factory.GetMessageClass(descriptor).FromString(data))


@given(IDS, st.booleans())
def test_ids_of_one_prompt(ids: pb.TokenIds, stream: bool) -> None:
    parameters = pb.GenerateParameters(max_new_tokens=300, temperature=0.5, stop=["a", "b"])
    message = pb.CompatGenerateRequest(
        parameters=parameters, stream=stream, input_ids=ids, request_id="x"
    )
    assert read(message) == message


@given(st.lists(IDS, max_size=3), st.lists(st.text(max_size=3), max_size=3))
def test_ids_of_several_prompts(ids: list[pb.TokenIds], texts: list[str]) -> None:
    message = pb.CompletionsRequest(prompt=texts, prompt_ids=ids, n=2, seed=2**63)
    assert read(message) == message


@pytest.mark.parametrize("ids", [None, pb.TokenIds(), pb.TokenIds(ids=[1, 2**32 - 1])])
def test_other_fields_keep_their_order(ids: pb.TokenIds | None) -> None:
    message = pb.InvocationsRequest(input_ids=ids, response_format=FORMAT, inputs="a text")
    found = read(message)
    assert found == message
    assert list(found.response_format.value.struct_value.fields) == ["z", "a"]
