"""Streams text over gRPC; the server describes its messages, so no generated code is needed.

It needs grpcio, grpcio-reflection and protobuf, and a running `tokenwire serve`:

    python examples/grpc_client.py "What is Deep Learning?"
    python examples/grpc_client.py --chat "What is Deep Learning?"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

SERVICE = "tokenwire.v1.TextGenerationService"


def stream(channel: grpc.Channel, method: str, request: dict[str, Any]) -> Iterator[Any]:
    """Calls a streaming method; the types of its messages come from the server by reflection."""
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    descriptor = pool.FindServiceByName(SERVICE).methods_by_name[method]
    request_class = GetMessageClass(descriptor.input_type)
    reply_class = GetMessageClass(descriptor.output_type)
    call = channel.unary_stream(
        f"/{SERVICE}/{method}",
        request_serializer=request_class.SerializeToString,
        response_deserializer=reply_class.FromString,
    )
    yield from call(ParseDict(request, request_class()))


def continue_text(channel: grpc.Channel, prompt: str, max_new_tokens: int) -> Iterator[str]:
    """The most likely continuation of a prompt, piece by piece."""
    request = {"inputs": prompt, "parameters": {"max_new_tokens": max_new_tokens}}
    for reply in stream(channel, "GenerateStream", request):
        if not reply.token.special:
            yield reply.token.text


def answer(channel: grpc.Channel, prompt: str, max_new_tokens: int) -> Iterator[str]:
    """The most likely answer of the assistant, piece by piece."""
    request = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_new_tokens,
        "temperature": 0.0,
        "stream": True,
    }
    for reply in stream(channel, "Chat", request):
        yield reply.chunk.choices[0].delta.content


def main() -> None:
    """Reads the command line and writes the text as it arrives."""
    parser = argparse.ArgumentParser(description="Stream text from a Tokenwire server over gRPC.")
    parser.add_argument("prompt", nargs="?", default="What is Deep Learning?")
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port of the server")
    parser.add_argument("--chat", action="store_true", help="answer instead of continuing the text")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    arguments = parser.parse_args()

    produce = answer if arguments.chat else continue_text
    try:
        with grpc.insecure_channel(arguments.address) as channel:
            for text in produce(channel, arguments.prompt, arguments.max_new_tokens):
                sys.stdout.write(text)
                sys.stdout.flush()
    except grpc.RpcError as error:
        sys.exit(f"{error.code().name}: {error.details()}")
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
