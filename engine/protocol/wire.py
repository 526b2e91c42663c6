"""Messages between a service and the engine: length-prefixed msgpack over a Unix socket.

A frame is a big-endian uint32 length and that many bytes of msgpack: a list of the message's kind
and its fields. Each service gets one `STEP` per step, with the outputs of its own requests; one of
them is told the figures of the step itself.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import astuple
from enum import IntEnum
from typing import Any

import msgpack

from .adapters import AdapterInfo, LoadAdapter
from .config import EngineInfo, RankMemory
from .errors import AdapterError, AdapterFault
from .images import Image
from .request import (
    EngineStats,
    FinishReason,
    Moment,
    MomentKind,
    Request,
    SamplingParams,
    SequenceOutput,
    StepOutput,
    Token,
)

HEADER = struct.Struct(">I")
MAX_FRAME_BYTES = 512 * 1024 * 1024  # a prompt of a million tokens takes 5 MB; images take more


class Kind(IntEnum):
    """The kinds of messages."""

    SUBMIT = 1  # to the engine: a request
    ABORT = 2  # to the engine: a request's id
    READY = 3  # from the engine, once per connection: EngineInfo
    STEP = 4  # from the engine: StepOutput; an idle engine sends empty ones
    BEAT = 5  # from the engine, several times a second: seconds without progress
    LOAD = 6  # to the engine: a number, and LoadAdapter
    UNLOAD = 7  # to the engine: a number, the name of an adapter, and the call that asks
    SETTLED = 8  # from the engine, once for each of these: its number, and what was wrong
    ADAPTERS = 9  # from the engine, whenever they change: a list of AdapterInfo
    TAKEN = 10  # from the engine, before it does anything with a request: its id
    LEAVING = 11  # from the engine, once: it will end, and takes no more requests


def framed(message: Any) -> bytes:
    """Packs anything that msgpack takes, with its length in front."""
    body = msgpack.packb(message)
    return HEADER.pack(len(body)) + bytes(body)


def frame(kind: Kind, *fields: Any) -> bytes:
    """Packs a message between service and engine, with its length in front."""
    return framed([kind, *fields])


def parse(body: bytes) -> tuple[Kind, tuple[Any, ...]]:
    """The kind and fields of a frame's body.

    Raises:
        ValueError: the body is not a message.
    """
    message = msgpack.unpackb(body, use_list=False)  # most of what comes is kept, as tuples
    if not isinstance(message, tuple) or not message:
        raise ValueError("a message is a list that begins with its kind")
    return Kind(message[0]), message[1:]


def submit(request: Request) -> bytes:
    """A frame that submits a request."""
    return frame(
        Kind.SUBMIT,
        request.request_id,
        _packed(request.prompt_token_ids),
        request.max_new_tokens,
        astuple(request.sampling),
        sorted(request.eos_token_ids),
        sorted(request.stop_token_ids),
        request.min_new_tokens,
        request.prompt_logprobs,
        request.grammar,
        _packed(request.resumed_token_ids),
        request.caller,
        request.priority,
        request.prompt_top_n,
        request.adapter,
        [image.packed() for image in request.images],
    )


def parse_request(fields: tuple[Any, ...]) -> Request:
    """The request of a `SUBMIT`.

    Raises:
        ValueError: the fields are not those of a request.
    """
    try:
        request_id, prompt, max_new_tokens, sampling, eos, stop, min_new_tokens, *rest = fields
        logprobs, grammar, resumed, caller, priority, prompt_top_n, adapter, images = rest
        if not all(isinstance(text, str) for text in (request_id, grammar, caller, adapter)):
            raise ValueError("id, grammar, caller and adapter must be text")
        return Request(
            request_id=request_id,
            prompt_token_ids=_token_ids(prompt),
            max_new_tokens=int(max_new_tokens),
            sampling=_sampling(sampling),
            eos_token_ids=frozenset(_token_ids(eos)),
            stop_token_ids=frozenset(_token_ids(stop)),
            min_new_tokens=int(min_new_tokens),
            prompt_logprobs=bool(logprobs),
            grammar=grammar,
            resumed_token_ids=_token_ids(resumed),
            caller=caller,
            priority=int(priority),
            prompt_top_n=int(prompt_top_n),
            adapter=adapter,
            images=tuple(map(Image.unpacked, images)),
        )
    except (TypeError, OverflowError, LookupError) as error:
        raise ValueError(f"not a request: {error}") from error


def _sampling(values: tuple[Any, ...]) -> SamplingParams:
    """How to choose tokens.

    Raises:
        ValueError: the seed has more than 64 bits.
    """
    named = dict(zip(SamplingParams.__slots__, values, strict=True))
    if named["seed"] >> 64:
        raise ValueError("a seed has at most 64 bits")
    biases = tuple((int(token_id), float(bias)) for token_id, bias in named.pop("logit_bias"))
    return SamplingParams(**named, logit_bias=biases)


def _packed(token_ids: tuple[int, ...]) -> bytes:
    """Token ids as this machine's uint32s: a long prompt takes a third of the time of a list."""
    return array("I", token_ids).tobytes()


def _token_ids(values: bytes | tuple[Any, ...]) -> tuple[int, ...]:
    """Whole numbers of 0 … 2**32 - 1, packed or as a list; `array` checks them in C."""
    return tuple(array("I", values))


def abort(request_id: str) -> bytes:
    """A frame that ends a request."""
    return frame(Kind.ABORT, request_id)


def taken(request_id: str) -> bytes:
    """A frame that says that the engine has a request, and may end because of it from now on."""
    return frame(Kind.TAKEN, request_id)


def parse_id(fields: tuple[Any, ...]) -> str:
    """The id in an `ABORT` or a `TAKEN`.

    Raises:
        ValueError: the fields are not an id.
    """
    (request_id,) = fields
    if not isinstance(request_id, str):
        raise ValueError("an id must be text")
    return request_id


def ready(info: EngineInfo) -> bytes:
    """A frame that describes the engine."""
    return frame(Kind.READY, info.to_dict())


def parse_info(fields: tuple[Any, ...]) -> EngineInfo:
    """The description in a `READY`."""
    named = dict(fields[0])
    lists = {
        "adapters": parse_adapters((named.get("adapters", ()),)),
        "notes": tuple(named.get("notes", ())),
        "ranks": tuple(RankMemory(*item) for item in named.get("ranks", ())),
    }
    return EngineInfo(**named | lists)


def load(number: int, wanted: LoadAdapter) -> bytes:
    """A frame that asks for an adapter to be loaded."""
    return frame(Kind.LOAD, number, astuple(wanted))


def parse_load(fields: tuple[Any, ...]) -> tuple[int, LoadAdapter]:
    """The number and the adapter of a `LOAD`.

    Raises:
        ValueError: the fields are something else.
    """
    number, (name, source, replaces, digest, call) = fields
    if not all(isinstance(text, str) for text in (name, source, digest, call)):
        raise ValueError("name, source, digest and call must be text")
    wanted = LoadAdapter(
        name=name, source=source, replaces=bool(replaces), digest=digest, call=call
    )
    return int(number), wanted


def unload(number: int, name: str, call: str = "") -> bytes:
    """A frame that asks for an adapter to be taken away."""
    return frame(Kind.UNLOAD, number, name, call)


def settled(number: int, error: AdapterError | None) -> bytes:
    """A frame that says how a `LOAD` or `UNLOAD` ended."""
    return frame(Kind.SETTLED, number, *(() if error is None else (error.fault, str(error))))


def parse_settled(fields: tuple[Any, ...]) -> tuple[int, AdapterError | None]:
    """The number in a `SETTLED`, and what was wrong, if anything was."""
    number, *wrong = fields
    return number, AdapterError(AdapterFault(wrong[0]), wrong[1]) if wrong else None


def adapters(listed: tuple[AdapterInfo, ...]) -> bytes:
    """A frame that says which adapters are loaded."""
    return frame(Kind.ADAPTERS, listed)


def parse_adapters(fields: tuple[Any, ...]) -> tuple[AdapterInfo, ...]:
    """The adapters of an `ADAPTERS`."""
    return tuple(AdapterInfo(*item) for item in fields[0])


def step(output: StepOutput) -> bytes:
    """A frame with the outcome of a step."""
    return frame(
        Kind.STEP,
        output.outputs,
        astuple(output.stats),
        output.num_scheduled_tokens,
        output.num_prefill_tokens,
        output.forward_s,
        output.sample_s,
        output.duration_s,
        output.moments,
        output.num_seqs,
        output.num_started_seqs,
        output.schedule_s,
        output.collect_s,
        output.release_s,
        output.has_failed,
        output.is_replayed,
    )


def beat(quiet_s: float) -> bytes:
    """A frame that says for how long the engine has not got on, 0 if it does."""
    return frame(Kind.BEAT, quiet_s)


def parse_beat(fields: tuple[Any, ...]) -> float:
    """The seconds in a `BEAT`."""
    return float(fields[0])


def parse_step(fields: tuple[Any, ...]) -> StepOutput:
    """The outcome in a `STEP`."""
    outputs, stats, num_scheduled, num_prefill, forward_s, sample_s, duration_s, *rest = fields
    moments, num_seqs, num_started_seqs, schedule_s, collect_s, release_s, *flags = rest
    has_failed, is_replayed = flags
    return StepOutput(
        outputs=_parse_outputs(outputs),
        stats=EngineStats(**dict(zip(EngineStats.__slots__, stats, strict=True))),
        num_scheduled_tokens=num_scheduled,
        num_prefill_tokens=num_prefill,
        forward_s=forward_s,
        sample_s=sample_s,
        duration_s=duration_s,
        moments=tuple(Moment(key, MomentKind(kind), at) for key, kind, at in moments),
        num_seqs=num_seqs,
        num_started_seqs=num_started_seqs,
        schedule_s=schedule_s,
        collect_s=collect_s,
        release_s=release_s,
        has_failed=has_failed,
        is_replayed=is_replayed,
    )


def _parse_outputs(items: tuple[Any, ...]) -> tuple[SequenceOutput, ...]:
    """The outputs of a step: one for each token that is streamed, so this is short."""
    return tuple(
        [
            _made(
                SequenceOutput,
                (
                    request_id,
                    None if token is None else _made(Token, token),
                    None if reason is None else FinishReason(reason),
                    logprobs,
                    error,
                    is_first,
                    num_cached,
                    tops,
                ),
            )
            for request_id, token, reason, logprobs, error, is_first, num_cached, tops in items
        ]
    )


_made = tuple.__new__  # a named tuple of its values, all of them: half the time of its own way
