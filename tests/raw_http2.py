"""A client that speaks HTTP/2 frame by frame: it can stop to read, and sees how streams end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

import h2.config
import h2.connection
import h2.events
import h2.settings
from hyperframe.frame import ContinuationFrame, Frame, HeadersFrame

Headers = Iterable[tuple[str, str]]
_Event = TypeVar("_Event", bound=h2.events.Event)

_DEFAULT_WINDOW = 65535  # bytes: HTTP/2's


class RawConnection:
    """One connection.

    Args:
        reader: bytes of the server.
        writer: bytes for the server.
        window: bytes that the server may send on each stream before it is told to go on.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._reads_on = window >= _DEFAULT_WINDOW
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.h2.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window,
                h2.settings.SettingCodes.ENABLE_PUSH: 0,
            },
        )
        self.h2.initiate_connection()
        self.events: list[h2.events.Event] = []
        self.is_closed = False
        self._buffer = b""

    def send(self) -> None:
        """Writes the frames that are due."""
        self._writer.write(self.h2.data_to_send())

    def post(self, path: str, headers: Headers, body: bytes, *, end: bool = True) -> int:
        """Sends a request; returns its stream's number."""
        stream_id = self._begin(path, headers)
        self.h2.send_data(stream_id, body, end_stream=end)
        self.send()
        return stream_id

    def post_in_pieces(self, path: str, headers: Headers, body: bytes, *, piece: int) -> int:
        """Sends a request whose header block is split; returns its stream's number.

        Args:
            path: the path.
            headers: those beside the pseudo-headers.
            body: the whole body.
            piece: bytes of the block in HEADERS, and in each CONTINUATION.
        """
        self.send()
        stream_id = self._begin(path, headers)
        block = _header_block(self.h2.data_to_send())
        pieces = [block[start : start + piece] for start in range(0, len(block), piece)]
        frames: list[Frame] = [HeadersFrame(stream_id, pieces[0])]
        frames += [ContinuationFrame(stream_id, rest) for rest in pieces[1:]]
        frames[-1].flags.add("END_HEADERS")
        self._writer.write(b"".join(frame.serialize() for frame in frames))
        self.h2.send_data(stream_id, body, end_stream=True)
        self.send()
        return stream_id

    async def flood(self, path: str, piece: bytes, num_bytes: int) -> None:
        """Sends a header block that has no end, in one CONTINUATION after the other.

        Args:
            path: of the request.
            piece: what each frame holds.
            num_bytes: the most that is sent.

        Raises:
            OSError: the server has closed the connection.
        """
        self.send()
        stream_id = self._begin(path, [])
        begin = HeadersFrame(stream_id, _header_block(self.h2.data_to_send()))
        self._writer.write(begin.serialize())
        frame = ContinuationFrame(stream_id, piece).serialize()
        burst = frame * max(65536 // len(frame), 1)
        for _ in range(num_bytes // len(burst)):
            self._writer.write(burst)
            await self._writer.drain()

    def _begin(self, path: str, headers: Headers) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        fields = [(":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "x")]
        self.h2.send_headers(stream_id, [*fields, *headers])
        return stream_id

    def grpc(self, path: str, message: bytes, metadata: Headers = ()) -> int:
        """Sends a gRPC call."""
        framed = b"\0" + len(message).to_bytes(4, "big") + message
        fields = [("content-type", "application/grpc"), ("te", "trailers"), *metadata]
        return self.post(path, fields, framed)

    def read_on(self, stream_id: int, num_bytes: int) -> None:
        """Lets the server send more on a stream."""
        self.h2.increment_flow_control_window(num_bytes, stream_id)
        self.h2.increment_flow_control_window(num_bytes)
        self.send()

    def _next_frame(self) -> bytes | None:
        """Takes a whole frame off what was read: h2 accepts none after a GOAWAY."""
        end = 9 + int.from_bytes(self._buffer[:3], "big")
        if len(self._buffer) < end:
            return None
        frame, self._buffer = self._buffer[:end], self._buffer[end:]
        return frame

    def _receive(self, frame: bytes) -> None:
        if any(isinstance(event, h2.events.ConnectionTerminated) for event in self.events):
            return
        for event in self.h2.receive_data(frame):
            self.events.append(event)
            if isinstance(event, h2.events.DataReceived) and self._reads_on:
                num_bytes = event.flow_controlled_length or 0
                self.h2.acknowledge_received_data(num_bytes, event.stream_id)

    async def until(self, is_it: Callable[[h2.events.Event], bool]) -> h2.events.Event:
        """Reads until such an event; all events so far are looked at first.

        Raises:
            EOFError: the server closes the connection before.
        """
        seen = 0
        while True:
            for event in self.events[seen:]:
                seen += 1
                if is_it(event):
                    return event
            data = await self._reader.read(65536)
            if not data:
                self.is_closed = True
                raise EOFError
            self._buffer += data
            while (frame := self._next_frame()) is not None:
                self._receive(frame)
            self.send()

    async def of(self, kind: type[_Event], stream_id: int | None = None) -> _Event:
        """The first event of a kind, on any stream or on one."""
        event = await self.until(
            lambda event: (
                isinstance(event, kind) and stream_id in (None, getattr(event, "stream_id", None))
            )
        )
        assert isinstance(event, kind)
        return event

    def data(self, stream_id: int) -> bytes:
        """What has come of a stream's body."""
        return b"".join(
            event.data or b""
            for event in self.events
            if isinstance(event, h2.events.DataReceived) and event.stream_id == stream_id
        )


def _header_block(data: bytes) -> bytes:
    """The header block in frames that h2 has made: HEADERS, and CONTINUATIONs if it is long."""
    block = b""
    while data:
        frame, length = Frame.parse_frame_header(memoryview(data[:9]))
        assert isinstance(frame, HeadersFrame | ContinuationFrame)
        assert not {"PADDED", "PRIORITY"} & set(frame.flags)
        block += data[9 : 9 + length]
        data = data[9 + length :]
    return block


@asynccontextmanager
async def raw_connection(port: int, window: int = _DEFAULT_WINDOW) -> AsyncGenerator[RawConnection]:
    """A connection to a server on this machine."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    connection = RawConnection(reader, writer, window)
    connection.send()
    try:
        yield connection
    finally:
        writer.close()
