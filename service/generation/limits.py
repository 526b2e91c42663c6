"""The limits on a generation: for each the value, the check and TGI's text, in TGI's order.

The order and the texts are those of router/src/validation.rs at v2.1.1; what TGI does not know
stands where it fits. What only one endpoint restricts is checked in `service/openai`, and grammars
in `service/grammar`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.protocol.adapters import MAX_NAME, MAX_PATH_BYTES, has_control_characters

from ..errors import ErrorKind, ServiceError
from .parameters import Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The values in force. Sizes are tokens unless the name says otherwise.

    `max_images` is 0 for models that take none. Images are fetched only from hosts that the
    operator lists, if `fetches_images`.
    """

    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    max_client_batch_size: int
    max_choices: int
    vocab_size: int
    max_request_values: int
    max_messages: int
    max_message_parts: int
    max_tools: int
    max_stop_sequence_bytes: int
    max_tokenize_bytes: int
    max_images: int = 0
    max_image_bytes: int = 0
    max_image_pixels: int = 0
    image_fetch_seconds: float = 0.0
    fetches_images: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit on one parameter: `broken` tells whether a request breaks it, `text` is the error.

    The text may contain `{given}`, the offending value, and any field of `Limits`.
    """

    field: str
    broken: Callable[[Parameters, Limits], bool]
    text: str
    given: Callable[[Parameters], object] = lambda _: None


def _outside(value: float | None, low: float, high: float) -> bool:
    """Whether a number is not strictly between two others; NaN never is."""
    return value is not None and not low < value < high


def _longest(texts: tuple[str, ...]) -> int:
    """The bytes of the longest text in UTF-8."""
    return max((len(text.encode()) for text in texts), default=0)


_INFINITY = float("inf")

_MAX_BIASES = 1024  # tokens
_MAX_BIAS = 100.0  # OpenAI's bounds
_MAX_PRIORITY = 100
TOO_LONG = "context_length_exceeded"  # OpenAI's name, which clients shorten conversations at

STREAM_RULES = (
    Rule(
        "best_of",
        lambda p, _: p.best_of is not None and p.best_of != 1,
        "`best_of` != 1 is not supported when streaming tokens",
    ),
    Rule(
        "decoder_input_details",
        lambda p, _: p.decoder_input_details,
        "`decoder_input_details` == true is not supported when streaming tokens",
    ),
)

BEST_OF_RULES = (
    Rule(
        "best_of",
        lambda p, limits: (p.best_of or 1) > 1 and limits.max_best_of == 1,
        "`best_of` != 1 is not allowed for this endpoint",
    ),
    Rule(
        "best_of",
        lambda p, limits: (p.best_of or 1) > limits.max_best_of,
        "`best_of` must be > 0 and <= {max_best_of}. Given: {given}",
        lambda p: p.best_of,
    ),
)

RULES = (
    Rule(
        "best_of",
        lambda p, _: (p.best_of or 1) > 1 and not p.samples,
        "you must use sampling when `best_of` is > 1",
    ),
    Rule(
        "temperature",
        lambda p, _: _outside(p.temperature, 0, _INFINITY),
        "`temperature` must be strictly positive",
    ),
    Rule(
        "repetition_penalty",
        lambda p, _: _outside(p.repetition_penalty, 0, _INFINITY),
        "`repetition_penalty` must be strictly positive",
    ),
    Rule(
        "frequency_penalty",
        lambda p, _: p.frequency_penalty is not None and not -2 <= p.frequency_penalty <= 2,
        "`frequency_penalty` must be >= -2.0 and <= 2.0",
    ),
    Rule("top_p", lambda p, _: _outside(p.top_p, 0, 1), "`top_p` must be > 0.0 and < 1.0"),
    Rule(
        "typical_p", lambda p, _: _outside(p.typical_p, 0, 1), "`typical_p` must be > 0.0 and < 1.0"
    ),
    Rule(
        "min_p",
        lambda p, _: p.min_p is not None and not 0 <= p.min_p <= 1,
        "`min_p` must be >= 0.0 and <= 1.0",
    ),
    Rule(
        "top_k",
        lambda p, _: p.top_k is not None and p.top_k <= 0,
        "`top_k` must be strictly positive",
    ),
    Rule(
        "max_new_tokens",
        lambda p, _: p.max_new_tokens == 0,
        "`max_new_tokens` must be strictly positive",
    ),
    Rule(
        "stop",
        lambda p, limits: len(p.stop) > limits.max_stop_sequences,
        "`stop` supports up to {max_stop_sequences} stop sequences. Given: {given}",
        lambda p: len(p.stop),
    ),
    Rule(
        "stop",
        lambda p, limits: _longest(p.stop) > limits.max_stop_sequence_bytes,
        "`stop` sequences must have at most {max_stop_sequence_bytes} bytes. Given: {given}",
        lambda p: _longest(p.stop),
    ),
    Rule(
        "min_new_tokens",
        lambda p, _: p.max_new_tokens is not None and (p.min_new_tokens or 0) > p.max_new_tokens,
        "`min_new_tokens` must be <= `max_new_tokens`. Given: {given}",
        lambda p: p.min_new_tokens,
    ),
    Rule(
        "min_new_tokens",
        lambda p, _: bool(p.min_new_tokens) and p.grammar is not None,
        "`min_new_tokens` must not be set with a grammar, which decides where the text ends",
    ),
    Rule(
        "ignore_eos",
        lambda p, _: p.ignore_eos and p.grammar is not None,
        "`ignore_eos` must not be set with a grammar, which decides where the text ends",
    ),
    Rule(
        "stop_token_ids",
        lambda p, limits: len(p.stop_token_ids) > limits.max_stop_sequences,
        "`stop_token_ids` supports up to {max_stop_sequences} token ids. Given: {given}",
        lambda p: len(p.stop_token_ids),
    ),
    Rule(
        "stop_token_ids",
        lambda p, limits: any(token_id >= limits.vocab_size for token_id in p.stop_token_ids),
        "`stop_token_ids` must be < {vocab_size}. Given: {given}",
        lambda p: max(p.stop_token_ids),
    ),
    Rule(
        "logit_bias",
        lambda p, _: len(p.logit_bias) > _MAX_BIASES,
        f"`logit_bias` supports up to {_MAX_BIASES} tokens. Given: {{given}}",
        lambda p: len(p.logit_bias),
    ),
    Rule(
        "logit_bias",
        lambda p, limits: any(token_id >= limits.vocab_size for token_id, _ in p.logit_bias),
        "token ids in `logit_bias` must be < {vocab_size}. Given: {given}",
        lambda p: max(token_id for token_id, _ in p.logit_bias),
    ),
    Rule(
        "logit_bias",
        lambda p, _: any(not -_MAX_BIAS <= bias <= _MAX_BIAS for _, bias in p.logit_bias),
        f"`logit_bias` must be >= {-_MAX_BIAS} and <= {_MAX_BIAS}",
    ),
    Rule(
        "priority",
        lambda p, _: abs(p.priority or 0) > _MAX_PRIORITY,
        f"`priority` must be >= {-_MAX_PRIORITY} and <= {_MAX_PRIORITY}. Given: {{given}}",
        lambda p: p.priority,
    ),
    Rule(
        "detokenize",
        lambda p, _: not p.detokenize and bool(p.stop),
        "`detokenize` must not be false with `stop`, whose sequences are looked for in text",
    ),
    Rule(
        "seed",
        lambda p, _: p.seed is not None and (p.best_of or 1) > 1,
        "`seed` must not be set when `best_of` > 1",
    ),
    Rule(
        "top_n_tokens",
        lambda p, limits: (p.top_n_tokens or 0) > limits.max_top_n_tokens,
        "`top_n_tokens` must be >= 0 and <= {max_top_n_tokens}. Given: {given}",
        lambda p: p.top_n_tokens,
    ),
)

INPUT_RULES = (
    Rule(
        "truncate",
        lambda p, limits: p.truncate is not None and not 0 < p.truncate <= limits.max_input_tokens,
        "`truncate` must be strictly positive and less than {max_input_tokens}. Given: {given}",
        lambda p: p.truncate,
    ),
)


def check(rules: tuple[Rule, ...], parameters: Parameters, limits: Limits) -> None:
    """Applies rules in order.

    Raises:
        ServiceError: the first rule that is broken, with its field.
    """
    for rule in rules:
        if rule.broken(parameters, limits):
            values = {name: getattr(limits, name) for name in Limits.__slots__}
            text = rule.text.format(given=rule.given(parameters), **values)
            raise ServiceError(ErrorKind.VALIDATION, text, field=f"parameters.{rule.field}")


def check_token_ids(token_ids: tuple[int, ...], limits: Limits) -> None:
    """Checks a prompt that is given as token ids.

    Raises:
        ServiceError: it has none, or one that the model does not know.
    """
    if not token_ids:
        raise ServiceError(
            ErrorKind.VALIDATION, "a prompt's token ids cannot be empty", field="input_ids"
        )
    if (largest := max(token_ids)) >= limits.vocab_size:
        raise ServiceError(
            ErrorKind.VALIDATION,
            f"a prompt's token ids must be < {limits.vocab_size}. Given: {largest}",
            field="input_ids",
        )


def check_vocabulary(token_ids: tuple[int, ...], limits: Limits) -> None:
    """Checks what the tokenizer has made of a text.

    Raises:
        ServiceError: the text has a token that the model does not have.
    """
    if (largest := max(token_ids)) >= limits.vocab_size:
        raise ServiceError(
            ErrorKind.VALIDATION,
            f"`inputs` has a token that only the tokenizer knows: the model's token ids are "
            f"< {limits.vocab_size}. Given: {largest}",
            field="inputs",
        )


def check_choices(n: int | None, limits: Limits) -> None:
    """Checks how many answers are wanted.

    Raises:
        ServiceError: none, or too many.
    """
    if n is not None and not 1 <= n <= limits.max_choices:
        raise ServiceError(
            ErrorKind.VALIDATION,
            f"`n` must be > 0 and <= {limits.max_choices}. Given: {n}",
            field="n",
        )


def check_count(field: str, count: int, limit: int, noun: str) -> None:
    """Checks the number of items in a field.

    Raises:
        ServiceError: there are more than the limit.
    """
    if count > limit:
        raise ServiceError(
            ErrorKind.VALIDATION,
            f"`{field}` supports up to {limit} {noun}. Given: {count}",
            field=field,
        )


def check_text(field: str, text: str, limits: Limits) -> None:
    """Checks the length of a text whose tokens are to be listed.

    Raises:
        ServiceError: it is too long.
    """
    size = len(text.encode())
    if size > limits.max_tokenize_bytes:
        raise ServiceError(
            ErrorKind.VALIDATION,
            f"`{field}` must have at most {limits.max_tokenize_bytes} bytes to be tokenised. "
            f"Given: {size}",
            field=field,
        )


def check_adapter_name(name: str, *, is_base: bool) -> None:
    """Checks the name that an adapter is to have; `is_base`: whether it is one of the model's own.

    Raises:
        ServiceError: it cannot have it.
    """
    if not 0 < len(name) <= MAX_NAME:
        text = f"`lora_name` must have 1 to {MAX_NAME} characters. Given: {len(name)}"
    elif has_control_characters(name):
        text = "`lora_name` must have no control characters"
    elif is_base:
        text = f"`lora_name` must not be a name of the model itself. Given: {name}"
    else:
        return
    raise ServiceError(ErrorKind.VALIDATION, text, field="lora_name")


def check_adapter_path(path: str) -> None:
    """Checks the length of the path of an adapter to load.

    Raises:
        ServiceError: it is too long, or empty.
    """
    size = len(path.encode())
    if not 0 < size <= MAX_PATH_BYTES:
        text = f"`lora_path` must have 1 to {MAX_PATH_BYTES} bytes. Given: {size}"
        raise ServiceError(ErrorKind.VALIDATION, text, field="lora_path")


def check_lengths(num_input: int, max_new_tokens: int, limits: Limits) -> None:
    """Checks the numbers of tokens, known only after tokenising; TGI checks the sum first.

    Raises:
        ServiceError: the prompt, or the prompt and its continuation, are too long.
    """
    if num_input + max_new_tokens > limits.max_total_tokens:
        raise ServiceError(
            ErrorKind.VALIDATION,
            f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. "
            f"Given: {num_input} `inputs` tokens and {max_new_tokens} `max_new_tokens`",
            field="parameters.max_new_tokens",
            code=TOO_LONG,
        )
    if num_input > limits.max_input_tokens:
        raise ServiceError(
            ErrorKind.VALIDATION,
            f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {num_input}",
            field="inputs",
            code=TOO_LONG,
        )
