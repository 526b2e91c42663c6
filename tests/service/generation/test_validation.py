"""Every rule on a request: its error text, its field and its order; and the defaults."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol.request import SamplingParams
from service.errors import ErrorKind, ServiceError
from service.generation.parameters import GenerationRequest, Parameters
from service.generation.validation import Validator, random_seed
from service.grammar.spec import Grammar
from service.text.tokenizer import TextTokenizer
from tests.service.fakes import LIMITS, NO_GRAMMARS, demo_ids, demo_tokenizer, simple_tokenizer

NAN, INFINITY = math.nan, math.inf
GRAMMAR = Grammar(kind="regex", value="a+")

_SAMPLING = "you must use sampling when `best_of` is > 1"
_TEMPERATURE = "`temperature` must be strictly positive"
_REPETITION = "`repetition_penalty` must be strictly positive"
_FREQUENCY = "`frequency_penalty` must be >= -2.0 and <= 2.0"
_TOP_P = "`top_p` must be > 0.0 and < 1.0"
_TYPICAL_P = "`typical_p` must be > 0.0 and < 1.0"
_MIN_P = "`min_p` must be >= 0.0 and <= 1.0"
_WITH_GRAMMAR = "`{}` must not be set with a grammar, which decides where the text ends"
_TOP_K = "`top_k` must be strictly positive"
_NEW_TOKENS = "`max_new_tokens` must be strictly positive"
_STOP = "`stop` supports up to 4 stop sequences. Given: 5"
_SEED = "`seed` must not be set when `best_of` > 1"
_TOP_N = "`top_n_tokens` must be >= 0 and <= 5. Given: 6"
_EMPTY = "`inputs` cannot be empty"
_TRUNCATE = "`truncate` must be strictly positive and less than 90. Given: {}"
_SUM = (
    "`inputs` tokens + `max_new_tokens` must be <= 200. "
    "Given: {} `inputs` tokens and {} `max_new_tokens`"
)

# In the order in which they are checked: the parameters that break a rule, its field and its text.
RULES: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 2}, "best_of", _SAMPLING),
    ({"temperature": 0.0}, "temperature", _TEMPERATURE),
    ({"temperature": -1.0}, "temperature", _TEMPERATURE),
    ({"temperature": NAN}, "temperature", _TEMPERATURE),
    ({"temperature": INFINITY}, "temperature", _TEMPERATURE),
    ({"repetition_penalty": 0.0}, "repetition_penalty", _REPETITION),
    ({"repetition_penalty": -0.5}, "repetition_penalty", _REPETITION),
    ({"repetition_penalty": NAN}, "repetition_penalty", _REPETITION),
    ({"repetition_penalty": INFINITY}, "repetition_penalty", _REPETITION),
    ({"frequency_penalty": -2.1}, "frequency_penalty", _FREQUENCY),
    ({"frequency_penalty": 2.1}, "frequency_penalty", _FREQUENCY),
    ({"frequency_penalty": NAN}, "frequency_penalty", _FREQUENCY),
    ({"frequency_penalty": INFINITY}, "frequency_penalty", _FREQUENCY),
    ({"top_p": 0.0}, "top_p", _TOP_P),
    ({"top_p": 1.0}, "top_p", _TOP_P),
    ({"top_p": NAN}, "top_p", _TOP_P),
    ({"typical_p": 0.0}, "typical_p", _TYPICAL_P),
    ({"typical_p": 1.0}, "typical_p", _TYPICAL_P),
    ({"typical_p": NAN}, "typical_p", _TYPICAL_P),
    ({"min_p": -0.1}, "min_p", _MIN_P),
    ({"min_p": 1.1}, "min_p", _MIN_P),
    ({"min_p": NAN}, "min_p", _MIN_P),
    ({"top_k": 0}, "top_k", _TOP_K),
    ({"top_k": -1}, "top_k", _TOP_K),
    ({"max_new_tokens": 0}, "max_new_tokens", _NEW_TOKENS),
    ({"stop": ("a",) * 5}, "stop", _STOP),
    (
        {"min_new_tokens": 101},
        "min_new_tokens",
        "`min_new_tokens` must be <= `max_new_tokens`. Given: 101",
    ),
    (
        {"min_new_tokens": 1, "grammar": GRAMMAR},
        "min_new_tokens",
        _WITH_GRAMMAR.format("min_new_tokens"),
    ),
    ({"ignore_eos": True, "grammar": GRAMMAR}, "ignore_eos", _WITH_GRAMMAR.format("ignore_eos")),
    (
        {"stop_token_ids": (1,) * 5},
        "stop_token_ids",
        "`stop_token_ids` supports up to 4 token ids. Given: 5",
    ),
    (
        {"stop_token_ids": (1, 5000)},
        "stop_token_ids",
        "`stop_token_ids` must be < 5000. Given: 5000",
    ),
    ({"best_of": 2, "do_sample": True, "seed": 0}, "seed", _SEED),
    ({"top_n_tokens": 6}, "top_n_tokens", _TOP_N),
]

STREAM_RULES: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 2}, "best_of", "`best_of` != 1 is not supported when streaming tokens"),
    ({"best_of": 0}, "best_of", "`best_of` != 1 is not supported when streaming tokens"),
    (
        {"decoder_input_details": True},
        "decoder_input_details",
        "`decoder_input_details` == true is not supported when streaming tokens",
    ),
]

# Values just inside a bound.
ALLOWED: list[dict[str, Any]] = [
    {},
    {"best_of": 0},
    {"best_of": 1},
    {"best_of": 2, "temperature": 1.0},
    {"best_of": 2, "top_k": 1},
    {"temperature": 1e-6},
    {"repetition_penalty": 1e-6},
    {"frequency_penalty": -2.0},
    {"frequency_penalty": 2.0},
    {"top_p": 1e-6},
    {"top_p": 0.999999},
    {"typical_p": 0.999999},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"min_new_tokens": 0},
    {"min_new_tokens": 100},
    {"stop_token_ids": (4999,) * 4},
    {"ignore_eos": True},
    {"best_of": 2, "min_p": 0.5},
    {"top_k": 1},
    {"max_new_tokens": 1},
    {"stop": ("a",) * 4},
    {"seed": 0},
    {"seed": 2**64 - 1},
    {"top_n_tokens": 0},
    {"top_n_tokens": 5},
    {"truncate": 1},
    {"truncate": 90},
    {"adapter_id": ""},
    {"adapter_id": "unknown", "names_model": True},
]


def validator(num_tokens: int = 3) -> Validator:
    """A validator whose tokenizer finds so many tokens in every text."""
    return Validator(LIMITS, simple_tokenizer(range(num_tokens)), NO_GRAMMARS)  # type: ignore[arg-type]


async def refusal(
    parameters: Parameters, inputs: str = "hello", num_tokens: int = 3
) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        await validator(num_tokens).validate(inputs, parameters)
    return refused.value


async def valid(parameters: Parameters, num_tokens: int = 3) -> GenerationRequest:
    return await validator(num_tokens).validate("hello", parameters)


def assert_is(error: ServiceError, field: str, text: str) -> None:
    assert error.kind is ErrorKind.VALIDATION
    assert error.message == f"Input validation error: {text}"
    assert error.field == field


@pytest.mark.parametrize(("changes", "field", "text"), RULES)
async def test_a_broken_rule_has_the_error_text_of_tgi(
    changes: dict[str, Any], field: str, text: str
) -> None:
    assert_is(await refusal(Parameters(**changes)), f"parameters.{field}", text)


@pytest.mark.parametrize("changes", ALLOWED, ids=str)
async def test_values_just_inside_a_bound_are_accepted(changes: dict[str, Any]) -> None:
    await valid(Parameters(**changes))


@given(st.data())
async def test_the_first_broken_rule_is_reported(data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(RULES) - 1))
    changes, field, text = RULES[first]
    later = {
        key: value
        for other, _, _ in data.draw(st.lists(st.sampled_from(RULES[first + 1 :] or [RULES[-1]])))
        for key, value in other.items()
    }
    harmless = {"seed": None} if field == "best_of" else {}
    if field != "seed":  # together these would break an earlier rule, or none
        for key in ("best_of", "do_sample") if field != "best_of" else ("do_sample",):
            later.pop(key, None)
    if field == "best_of":
        for key in ("temperature", "top_k", "top_p", "typical_p", "min_p"):
            later.pop(key, None)
    error = await refusal(Parameters(**(later | harmless | changes)), inputs="")
    assert_is(error, f"parameters.{field}", text)


async def test_parameters_are_checked_before_the_text() -> None:
    assert_is(await refusal(Parameters(truncate=0), inputs=""), "inputs", _EMPTY)
    assert_is(await refusal(Parameters(top_k=0), inputs=""), "parameters.top_k", _TOP_K)


@pytest.mark.parametrize("truncate", [0, 91, 2**32 - 1])
async def test_truncate_is_limited_by_max_input_tokens(truncate: int) -> None:
    error = await refusal(Parameters(truncate=truncate), num_tokens=500)
    assert_is(error, "parameters.truncate", _TRUNCATE.format(truncate))


async def test_a_text_without_tokens_counts_as_empty() -> None:
    assert_is(await refusal(Parameters(), num_tokens=0), "inputs", _EMPTY)


@pytest.mark.parametrize("token_id", [LIMITS.vocab_size, LIMITS.vocab_size + 7])
async def test_a_token_that_only_the_tokenizer_has_is_refused(token_id: int) -> None:
    with_images = Validator(LIMITS, simple_tokenizer([1, token_id, 2]), NO_GRAMMARS)  # type: ignore[arg-type]
    with pytest.raises(ServiceError) as refused:
        await with_images.validate("hello", Parameters())
    text = "`inputs` has a token that only the tokenizer knows: the model's token ids are < {}."
    assert_is(refused.value, "inputs", f"{text.format(LIMITS.vocab_size)} Given: {token_id}")


async def test_the_sum_of_the_lengths_is_checked_before_the_input() -> None:
    error = await refusal(Parameters(max_new_tokens=101), num_tokens=100)
    assert_is(error, "parameters.max_new_tokens", _SUM.format(100, 101))
    error = await refusal(Parameters(max_new_tokens=100), num_tokens=100)
    assert_is(error, "inputs", "`inputs` must have less than 90 tokens. Given: 100")


async def test_lengths_may_reach_their_limits() -> None:
    request = await valid(Parameters(max_new_tokens=110), num_tokens=90)
    assert len(request.prompt_token_ids) == 90


async def test_lengths_are_checked_after_truncation() -> None:
    request = await valid(Parameters(truncate=4, max_new_tokens=196), num_tokens=5000)
    assert request.prompt_token_ids == (4996, 4997, 4998, 4999)


@pytest.mark.parametrize(("changes", "field", "text"), STREAM_RULES)
def test_streams_have_rules_of_their_own(changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ServiceError) as refused:
        validator().check_stream(Parameters(**changes))
    assert_is(refused.value, f"parameters.{field}", text)


def test_best_of_is_the_first_rule_for_streams() -> None:
    with pytest.raises(ServiceError, match="best_of"):
        validator().check_stream(Parameters(best_of=2, decoder_input_details=True))


@pytest.mark.parametrize("best_of", [None, 1])
def test_a_stream_with_best_of_one_is_accepted(best_of: int | None) -> None:
    validator().check_stream(Parameters(best_of=best_of))


def test_best_of_is_bounded() -> None:
    with pytest.raises(ServiceError) as refused:
        validator().check_best_of(Parameters(best_of=3))
    text = "`best_of` must be > 0 and <= 2. Given: 3"
    assert_is(refused.value, "parameters.best_of", text)


def test_best_of_can_be_switched_off() -> None:
    limits = replace(LIMITS, max_best_of=1)
    one = Validator(limits, simple_tokenizer([1]), NO_GRAMMARS)  # type: ignore[arg-type]
    with pytest.raises(ServiceError) as refused:
        one.check_best_of(Parameters(best_of=2))
    text = "`best_of` != 1 is not allowed for this endpoint"
    assert_is(refused.value, "parameters.best_of", text)
    one.check_best_of(Parameters(best_of=1))


async def test_defaults_are_filled_in() -> None:
    request = await valid(Parameters())
    assert request == GenerationRequest(
        inputs="hello",
        prompt_token_ids=(0, 1, 2),
        sampling=SamplingParams(seed=request.sampling.seed),
        max_new_tokens=100,
        stop=(),
        return_full_text=False,
        details=False,
        decoder_input_details=False,
        best_of=1,
    )


async def test_given_values_are_kept() -> None:
    request = await valid(
        Parameters(
            temperature=0.7,
            repetition_penalty=1.2,
            frequency_penalty=-0.5,
            top_k=3,
            top_p=0.9,
            typical_p=0.8,
            min_p=0.25,
            min_new_tokens=3,
            ignore_eos=True,
            stop_token_ids=(5, 7),
            seed=0,
            top_n_tokens=2,
            watermark=True,
            stop=("a", "b"),
            return_full_text=True,
            details=True,
            decoder_input_details=True,
        )
    )
    assert request.sampling == SamplingParams(
        do_sample=True,
        seed=0,
        temperature=0.7,
        top_k=3,
        top_p=0.9,
        typical_p=0.8,
        min_p=0.25,
        repetition_penalty=1.2,
        frequency_penalty=-0.5,
        top_n_tokens=2,
        watermark=True,
    )
    assert request.stop == ("a", "b")
    assert request.stop_token_ids == {5, 7}
    assert request.min_new_tokens == 3
    assert request.ignore_eos
    assert request.return_full_text
    assert request.details
    assert request.decoder_input_details


@pytest.mark.parametrize(
    ("changes", "samples"),
    [
        ({}, False),
        ({"do_sample": True}, True),
        ({"temperature": 1.0}, False),
        ({"temperature": 0.7}, True),
        ({"top_k": 5}, True),
        ({"top_p": 0.5}, True),
        ({"typical_p": 0.5}, True),
        ({"min_p": 0.0}, False),
        ({"min_p": 0.5}, True),
        ({"repetition_penalty": 1.5, "frequency_penalty": 1.0, "seed": 3}, False),
        ({"watermark": True}, False),
    ],
    ids=str,
)
async def test_what_turns_sampling_on(changes: dict[str, Any], samples: bool) -> None:
    assert (await valid(Parameters(**changes))).sampling.do_sample is samples


async def test_a_seed_is_drawn_when_none_is_given() -> None:
    seeds = {(await valid(Parameters())).sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**64 for seed in seeds | {random_seed()})


async def test_a_huge_text_is_refused_before_it_is_tokenised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TextTokenizer, "encode", pytest.fail)
    with pytest.raises(ServiceError) as refused:
        await Validator(LIMITS, demo_tokenizer(), NO_GRAMMARS).validate(
            "word " * 400_000, Parameters()
        )
    text = "`inputs` must have less than 90 tokens. Given: 2000000 characters"
    assert_is(refused.value, "inputs", text)


async def test_truncation_keeps_the_end_and_the_special_tokens() -> None:
    text = "one two three four five six seven eight nine ten"
    whole = await demo_tokenizer().encode(text)
    num_special = len(whole) - len(demo_ids(text))
    truncate = num_special + 3
    validator = Validator(LIMITS, demo_tokenizer(), NO_GRAMMARS)
    request = await validator.validate(text, Parameters(truncate=truncate))
    assert len(request.prompt_token_ids) == truncate
    assert request.prompt_token_ids[:num_special] == whole[:num_special]
    assert request.prompt_token_ids[num_special:] == whole[-3:]
    assert request.inputs == text


async def test_truncation_to_more_tokens_than_there_are_changes_nothing() -> None:
    encode = demo_tokenizer().encode
    assert await encode("one two", truncate=80) == await encode("one two")


@given(st.text(min_size=1, max_size=60), st.integers(1, 20))
async def test_truncation_never_keeps_more_than_asked_for(text: str, truncate: int) -> None:
    whole = await demo_tokenizer().encode(text)
    kept = await demo_tokenizer().encode(text, truncate=truncate)
    assert len(kept) == min(truncate, len(whole))


async def test_a_grammar_is_checked_last() -> None:
    wanted = Parameters(grammar=GRAMMAR)
    assert_is(await refusal(wanted), "parameters.grammar", "grammar is not supported")
    too_long = Parameters(grammar=GRAMMAR, max_new_tokens=198)
    assert (await refusal(too_long)).field == "parameters.max_new_tokens"
