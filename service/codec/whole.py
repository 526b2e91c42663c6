"""Whole answers to gRPC callers of `/generate` as bytes, framed by hand where they may be long.

`convert` says the same with the generated classes, which take 20 microseconds for each token, and a
test compares both for any answer.
"""

from __future__ import annotations

from ..generation.generation import Generation
from ..pb.tokenwire import v1 as pb
from . import convert, framing


def generate_response(result: Generation) -> bytes:
    """GenerateResponse, whose fields come in the order of their numbers."""
    details = framing.sized(b"\x12", _details(result)) if result.request.wants_details else b""
    return b"".join(
        (
            bytes(pb.GenerateResponse(generated_text=result.generated_text)),
            details,
            framing.numbers(b"\x1a", (token.id for token in result.tokens)),
            bytes(pb.GenerateResponse(**convert.end(result))),
        )
    )


def _details(result: Generation) -> bytes:
    """Details."""
    others = (framing.sized(b"\x32", _best_of_sequence(one)) for one in result.best_of_sequences)
    return b"".join(
        (
            bytes(pb.Details(**convert.head(result))),
            framing.prefill(b"\x22", result.prefill),
            framing.tokens(b"\x2a", result.tokens),
            *others,
            framing.token_lists(b"\x3a", result.top_tokens),
        )
    )


def _best_of_sequence(result: Generation) -> bytes:
    """BestOfSequence."""
    known = pb.BestOfSequence(generated_text=result.generated_text, **convert.head(result))
    parts = (
        bytes(known),
        framing.prefill(b"\x2a", result.prefill),
        framing.tokens(b"\x32", result.tokens),
        framing.token_lists(b"\x3a", result.top_tokens),
    )
    return b"".join(parts)
