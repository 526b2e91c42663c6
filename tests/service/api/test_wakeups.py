"""The event loop of a service handles all that gRPC has finished when it is woken once."""

from __future__ import annotations

import asyncio
import os
import socket
import threading

import grpc
from grpc import aio

from service.api.wakeups import GrpcEventLoop, handle_once

NUM_MESSAGES = 50
NUM_CALLS = 20
METHOD = "/a.B/C"


def test_one_byte_is_left_for_what_handles_them() -> None:
    left, right = socket.socketpair()
    with left, right:
        for count in (1, 2, 300):
            left.send(b"1" * count)
            read: list[bytes] = []
            handle_once(right, lambda read=read: read.append(right.recv(4096)))
            assert read == [b"1"]


def test_streams_are_complete_and_in_order() -> None:
    async def send(request: bytes, context: aio.ServicerContext[bytes, bytes]) -> None:
        for number in range(NUM_MESSAGES):
            await context.write(request + bytes([number]))

    async def run() -> list[list[bytes]]:
        server = aio.server()
        handlers = {"C": grpc.unary_stream_rpc_method_handler(send)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            method = channel.unary_stream(METHOD)

            async def one(name: bytes) -> list[bytes]:
                return [message async for message in method(name)]

            got = await asyncio.gather(*(one(bytes([number])) for number in range(NUM_CALLS)))
        await server.stop(0)
        return got

    with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
        got = runner.run(asyncio.wait_for(run(), 60))
    for number, messages in enumerate(got):
        assert messages == [bytes([number, index]) for index in range(NUM_MESSAGES)]


def test_the_thread_of_grpc_does_not_take_the_processor_from_the_loop() -> None:
    async def policies() -> set[int]:
        server = aio.server()
        server.add_insecure_port("127.0.0.1:0")
        await server.start()
        found = {
            os.sched_getscheduler(thread.native_id)
            for thread in threading.enumerate()
            if "_poll_wrapper" in thread.name and thread.native_id is not None
        }
        await server.stop(0)
        return found

    with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
        assert os.SCHED_BATCH in runner.run(policies())
