"""The parameters of a request as received, and the valid request that `validation.py` makes.

Both transports and all generation endpoints use these types, so there is one set of rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from engine.protocol.images import Image
from engine.protocol.request import SamplingParams

from ..grammar.spec import Grammar
from ..images.source import ImageSource

DEFAULT_MAX_NEW_TOKENS: Final = 100

Prompt = str | tuple[int, ...]  # a text, or the ids of its tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The parameters of the contract; None is absent. Names are the wire's.

    For `max_new_tokens`, None means as many as fit beside the prompt. `prompt_top_n_tokens` is not
    the contract's: it makes the entries of `decoder_input_details` tell the likeliest tokens.
    `names_model` says that `adapter_id` came as the name of a model, which the model's own may be.
    """

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS
    return_full_text: bool | None = None
    min_new_tokens: int | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    truncate: int | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None
    names_model: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    priority: int | None = None
    detokenize: bool = True
    prompt_top_n_tokens: int = 0

    @property
    def samples(self) -> bool:
        """Whether any parameter asks for sampling, which `best_of` needs."""
        return (
            self.do_sample
            or bool(self.min_p)
            or any(
                value is not None
                for value in (self.temperature, self.top_k, self.top_p, self.typical_p)
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """A text to continue, as it came; `stream` says so where an endpoint does both.

    `images` are those that the text shows by number.
    """

    inputs: Prompt
    parameters: Parameters
    stream: bool = False
    images: tuple[ImageSource, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A valid request: every default is filled in, every value is inside its limits.

    `inputs` is the text as received, empty if its tokens were received instead; `prompt_token_ids`
    are its tokens after truncation. `sampling` always has a seed, which is reported only if
    sampling is on. `grammar` is a checked source for the engine, or empty, and `adapter` the name
    of one that is served, or empty. `images` are at the places of their tokens.
    """

    inputs: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_new_tokens: int
    stop: tuple[str, ...]
    return_full_text: bool
    details: bool
    decoder_input_details: bool
    best_of: int
    grammar: str = ""
    adapter: str = ""
    stop_token_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    ignore_eos: bool = False
    priority: int = 0
    detokenize: bool = True
    prompt_top_n_tokens: int = 0
    images: tuple[Image, ...] = ()

    @property
    def wants_details(self) -> bool:
        """Whether the response has details."""
        return self.details or self.decoder_input_details
