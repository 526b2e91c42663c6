"""From the engine's steps to text: what ends a text, what is reported, and failures."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol.request import FinishReason, Request, SamplingParams, SequenceOutput
from service.errors import ErrorKind, ServiceError
from service.generation.float32 import shortest_float32, shortest_float32s
from service.generation.generation import Generation, PrefillToken, Timings, Token, TokenEvent
from service.generation.generator import Generator
from service.generation.parameters import GenerationRequest
from tests.service.fakes import (
    TIMEOUT_S,
    FakeEngineClient,
    Script,
    WordTokenizer,
    generation_request,
    script,
    step,
)

WORDS = WordTokenizer("<bos>", "Once", " upon", " a", " time", "\n", "<eos>", ".", "<x>", "me")
BOS, ONCE, UPON, A, TIME, NEWLINE, EOS, DOT, SPECIAL = range(9)
LENGTH, EOS_TOKEN, STOP_TOKEN = FinishReason


def make(engine_script: Script) -> tuple[Generator, FakeEngineClient]:
    client = FakeEngineClient(engine_script)
    return Generator(client, WORDS), client  # type: ignore[arg-type]


async def collect(engine_script: Script, request: GenerationRequest) -> list[TokenEvent]:
    """The events of a stream; also after a failure the engine's stream must be closed."""
    generator, client = make(engine_script)
    try:
        return [event async for event in generator.stream(request, 1.0, 2.0)]
    finally:
        assert client.num_open == 0


async def run(engine_script: Script, request: GenerationRequest) -> Generation:
    generator, client = make(engine_script)
    try:
        return await generator.run(request, 1.0, 2.0)
    finally:
        assert client.num_open == 0


async def test_a_text_ends_where_the_engine_ends_it() -> None:
    result = await run(script(step(A), step(TIME, finish=LENGTH)), generation_request())
    assert result.text == result.generated_text == " a time"
    assert result.finish_reason == "length"
    assert [token.id for token in result.tokens] == [A, TIME]
    assert result.num_prompt_tokens == 3


async def test_the_last_event_has_the_text() -> None:
    events = await collect(script(step(A), step(EOS, finish=EOS_TOKEN)), generation_request())
    assert [event.token.text for event in events] == [" a", "<eos>"]
    assert events[0].generation is None
    result = events[1].generation
    assert result is not None
    assert result.text == " a"
    assert result.tokens[-1] == Token(EOS, "<eos>", -0.5, True)


async def test_the_text_begins_with_the_prompt_if_requested() -> None:
    request = generation_request(inputs="the text as it came", return_full_text=True)
    result = await run(script(step(A, finish=LENGTH)), request)
    assert result.generated_text == "the text as it came a"
    assert result.text == " a"


@pytest.mark.parametrize(
    ("stop", "ids", "num_tokens"),
    [
        ((" time",), (A, TIME, DOT), 2),
        (("a time",), (A, TIME, DOT), 2),  # across tokens
        (("ime",), (A, TIME, DOT), 2),  # in the middle of one, up to its end
        (("tim",), (A, TIME, DOT), 3),  # ends inside a token: missed, as in TGI
        ((" time",), (A, TIME, NEWLINE), 2),
        (("zzz", " a"), (A, TIME, DOT), 1),  # any of them
        ((" a", " a time"), (A, TIME, DOT), 1),
        (("<x>",), (A, SPECIAL, DOT), 2),  # special tokens count
        (("",), (A, TIME, DOT), 1),  # the end of any text
        ((), (A, TIME, DOT), 3),
        ((" once",), (A, TIME, DOT), 3),
        (("time.*",), (A, TIME, DOT), 3),  # literally
    ],
)
async def test_stop_sequences_end_a_text(
    stop: tuple[str, ...], ids: tuple[int, ...], num_tokens: int
) -> None:
    engine_script = script(*map(step, ids), step(EOS, finish=EOS_TOKEN))
    result = await run(engine_script, generation_request(stop=stop))
    if num_tokens < len(ids) or any(stop):
        expected = "stop_sequence" if num_tokens < 3 else "eos_token"
        assert result.finish_reason == expected
    assert len(result.tokens) == (num_tokens if result.finish_reason == "stop_sequence" else 4)


async def test_a_stop_sequence_stays_in_the_text() -> None:
    result = await run(script(step(A), step(TIME)), generation_request(stop=("time",)))
    assert result.text == " a time"


async def test_a_newline_after_a_stop_sequence_is_allowed() -> None:
    """Both in one token: TGI's expression ends with `$`, which matches before a last newline."""
    words = WordTokenizer(" end\n", " end\n\n")
    client = FakeEngineClient(script(step(1), step(0), step(0, finish=LENGTH)))
    generator = Generator(client, words)  # type: ignore[arg-type]
    request = generation_request(stop=(" end",), prompt_token_ids=())
    result = await generator.run(request, 1.0, 2.0)
    assert (result.finish_reason, len(result.tokens)) == ("stop_sequence", 2)


async def test_a_stop_sequence_in_the_prompt_does_not_count() -> None:
    request = generation_request(stop=("upon a",), prompt_token_ids=(ONCE, UPON))
    result = await run(script(step(A), step(TIME, finish=LENGTH)), request)
    assert result.finish_reason == "length"


@pytest.mark.parametrize(("finish", "expected"), [(LENGTH, "length"), (EOS_TOKEN, "eos_token")])
async def test_the_finish_reason_of_the_engine_precedes_a_stop_sequence(
    finish: FinishReason, expected: str
) -> None:
    engine_script = script(step(A, finish=finish))
    assert (await run(engine_script, generation_request(stop=(" a",)))).finish_reason == expected


@given(st.lists(st.integers(1, 9), max_size=12), st.lists(st.text("at imeonc.", max_size=6)))
async def test_stop_sequences_are_found_as_in_the_whole_text(
    ids: list[int], stop: list[str]
) -> None:
    result = await run(
        script(*map(step, ids), step(BOS, finish=LENGTH)), generation_request(stop=tuple(stop))
    )
    text, expected = "", len(ids) + 1
    for number, token_id in enumerate(ids, start=1):
        text += WORDS.words[token_id]
        if any(text.removesuffix("\n").endswith(item) or text.endswith(item) for item in stop):
            expected = number
            break
    assert len(result.tokens) == expected


async def test_a_stop_sequence_counts_from_the_fewest_tokens_on() -> None:
    engine_script = script(step(A), step(A), step(A), step(DOT, finish=LENGTH))
    result = await run(engine_script, generation_request(stop=(" a",), min_new_tokens=2))
    assert (result.finish_reason, len(result.tokens)) == ("stop_sequence", 2)


async def test_a_stop_token_is_a_stop_sequence_to_callers() -> None:
    result = await run(script(step(A), step(DOT, finish=STOP_TOKEN)), generation_request())
    assert (result.finish_reason, result.text) == ("stop_sequence", " a.")


@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_the_engine_is_told_where_a_text_may_end(ignore_eos: bool) -> None:
    sent: list[Request] = []

    def engine_script(request: Request) -> AsyncGenerator[SequenceOutput]:
        sent.append(request)
        return script(step(DOT, finish=LENGTH))(request)

    await run(
        engine_script,
        generation_request(
            stop_token_ids=frozenset({DOT}), min_new_tokens=2, ignore_eos=ignore_eos
        ),
    )
    [request] = sent
    assert request.eos_token_ids == (frozenset() if ignore_eos else WORDS.eos_token_ids)
    assert (request.stop_token_ids, request.min_new_tokens) == ({DOT}, 2)


async def test_a_stop_sequence_ends_the_work_in_the_engine() -> None:
    generator, client = make(script(step(A), step(TIME), step(DOT, finish=LENGTH)))
    await generator.run(generation_request(stop=("a",)), 1.0, 2.0)
    assert (client.num_open, client.num_aborted) == (0, 1)


async def test_closing_a_stream_ends_the_work_in_the_engine() -> None:
    generator, client = make(script(step(A), asyncio.Event()))
    events = generator.stream(generation_request(), 1.0, 2.0)
    await anext(events)
    assert client.num_open == 1
    await events.aclose()
    assert (client.num_open, client.num_aborted) == (0, 1)


async def test_cancelling_a_run_ends_the_work_in_the_engine() -> None:
    started = asyncio.Event()

    async def engine_script(_: Request) -> AsyncGenerator[SequenceOutput]:
        started.set()
        await asyncio.Event().wait()
        yield step(A)

    generator, client = make(engine_script)
    task = asyncio.create_task(generator.run(generation_request(best_of=1), 1.0, 2.0))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.num_open == 0


async def test_an_error_of_the_engine_is_a_generation_error() -> None:
    with pytest.raises(ServiceError) as failed:
        await run(script(step(A), step(error="out of luck")), generation_request())
    assert failed.value.kind is ErrorKind.GENERATION
    assert str(failed.value) == "Request failed during generation: Server error: out of luck"


async def test_a_stream_without_a_finish_reason_is_incomplete() -> None:
    with pytest.raises(ServiceError) as failed:
        await run(script(step(A)), generation_request())
    assert failed.value.kind is ErrorKind.INCOMPLETE
    assert str(failed.value) == "Incomplete generation"


async def test_prefill_pairs_the_prompt_with_its_logprobs() -> None:
    engine_script = script(
        step(prompt_logprobs=(None, -1.5)), step(A, prompt_logprobs=(-2.5,)), step(A, finish=LENGTH)
    )
    request = generation_request(decoder_input_details=True, prompt_token_ids=(BOS, ONCE, UPON))
    generator, client = make(engine_script)
    result = await generator.run(request, 1.0, 2.0)
    assert client.requests[0].prompt_logprobs
    assert list(result.prefill) == [
        PrefillToken(BOS, "<bos>", None),
        PrefillToken(ONCE, "Once", -1.5),
        PrefillToken(UPON, " upon", -2.5),
    ]


async def test_a_stream_has_no_event_for_a_step_without_a_token() -> None:
    engine_script = script(step(), step(prompt_logprobs=(None,)), step(A, finish=LENGTH))
    assert len(await collect(engine_script, generation_request())) == 1


async def test_top_tokens_are_reported_when_asked_for() -> None:
    top = [(TIME, -0.25), (EOS, -2.0)]
    request = generation_request(sampling=SamplingParams(top_n_tokens=2))
    events = await collect(script(step(A, top=top), step(A, finish=LENGTH)), request)
    expected = [Token(TIME, " time", -0.25, False), Token(EOS, "<eos>", -2.0, True)]
    assert list(events[0].top_tokens) == expected
    assert events[1].generation is not None
    assert list(events[1].generation.top_tokens) == [expected, []]


async def test_without_top_tokens_there_is_no_list_of_them() -> None:
    result = await run(script(step(A, finish=LENGTH)), generation_request())
    assert not result.top_tokens


@pytest.mark.parametrize(("do_sample", "seed"), [(True, 7), (False, None)])
async def test_a_seed_is_reported_when_sampling(do_sample: bool, seed: int | None) -> None:
    request = generation_request(sampling=SamplingParams(do_sample=do_sample, seed=7))
    assert (await run(script(step(A, finish=LENGTH)), request)).seed == seed


async def test_the_engine_is_asked_for_what_was_requested() -> None:
    generator, client = make(script(step(A, finish=LENGTH)))
    request = generation_request(max_new_tokens=9, stop=("x",))
    await generator.run(request, 1.0, 2.0)
    assert client.requests == [
        Request(
            request_id="0",
            prompt_token_ids=request.prompt_token_ids,
            max_new_tokens=9,
            sampling=request.sampling,
            eos_token_ids=frozenset({EOS}),
        )
    ]


def by_turn(*scripts: Script) -> Script:
    """A different script for each candidate, in order."""
    turns = iter(scripts)
    return lambda request: next(turns)(request)


BEST_OF_2 = generation_request(best_of=2, sampling=SamplingParams(do_sample=True, seed=7))


async def test_the_likeliest_candidate_is_chosen() -> None:
    """By the mean: the sum of the chosen candidate is the lower one."""
    worse = script(step(A, logprob=-1.0, finish=EOS_TOKEN))
    better = script(step(TIME, logprob=-0.75), step(TIME, logprob=-0.75, finish=LENGTH))
    result = await run(by_turn(worse, better), BEST_OF_2)
    assert result.text == " time time"
    assert [item.text for item in result.best_of_sequences] == [" a"]


async def test_the_first_of_equal_candidates_is_chosen() -> None:
    first, second = script(step(A, finish=LENGTH)), script(step(TIME, finish=LENGTH))
    result = await run(by_turn(first, second), BEST_OF_2)
    assert result.text == " a"
    assert [item.text for item in result.best_of_sequences] == [" time"]


async def test_candidates_have_seeds_of_their_own() -> None:
    result = await run(script(step(A, finish=LENGTH)), BEST_OF_2)
    seeds = {result.seed, *(item.seed for item in result.best_of_sequences)}
    assert len(seeds) == 2
    assert 7 not in seeds


async def test_a_failed_candidate_fails_the_request() -> None:
    """The error is raised itself, not in a group, and the other candidates end."""
    generator, client = make(by_turn(script(step(A), asyncio.Event()), script(step(error="bad"))))
    with pytest.raises(ServiceError, match="Server error: bad"):
        await generator.run(BEST_OF_2, 1.0, 2.0)
    assert client.num_open == 0


async def test_candidates_run_at_the_same_time_once_one_has_computed_the_prompt() -> None:
    all_started = asyncio.Barrier(3)
    first_token = asyncio.Event()

    async def engine_script(request: Request) -> AsyncGenerator[SequenceOutput]:
        assert first_token.is_set() == (request.request_id != "0")
        yield step()  # the prompt is not computed to its end
        first_token.set()
        yield step(A)
        await all_started.wait()
        yield step(A, finish=LENGTH)

    async with asyncio.timeout(TIMEOUT_S):
        await run(engine_script, generation_request(best_of=3, sampling=SamplingParams()))


async def test_first_choice_that_fails_keeps_no_other_waiting() -> None:
    generator, client = make(script(step(error="broken")))
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(ServiceError, match="broken"):
            await generator.run_choices(generation_request(), 3, 0.0, 0.0)
    assert client.num_open == 0


async def test_choices_have_seeds_that_the_first_decides() -> None:
    async def seeds(seed: int, n: int) -> list[int]:
        generator, client = make(script(step(A, finish=LENGTH)))
        request = generation_request(sampling=SamplingParams(do_sample=True, seed=seed))
        results = await generator.run_choices(request, n, 0.0, 0.0)
        assert [result.seed for result in results] == [r.sampling.seed for r in client.requests]
        return [item.sampling.seed for item in client.requests]

    four = await seeds(7, 4)
    assert four[0] == 7
    assert len(set(four)) == 4
    assert all(0 <= seed < 2**64 for seed in four)
    assert await seeds(7, 2) == four[:2]
    assert not set((await seeds(8, 4))[1:]) & set(four)
    assert len(set(await seeds(2**64 - 1, 3))) == 3


async def test_timings_follow_the_stages() -> None:
    generator, _ = make(script(step(A, finish=LENGTH)))
    async with aclosing(generator.stream(generation_request(), 1.0, 2.0)) as events:
        result = (await anext(events)).generation
    assert result is not None
    timings = result.timings
    assert timings.validation == 1.0
    assert timings.queue > 0
    assert timings.inference >= 0
    assert timings.total == pytest.approx(timings.validation + timings.queue + timings.inference)
    assert timings.first_token is not None
    assert timings.started <= timings.first_token <= timings.finished
    expected = Timings(1.0, 2.0, timings.started, timings.finished, timings.first_token)
    assert timings == expected


@pytest.mark.parametrize(
    ("first_token", "num_tokens", "expected"), [(3.0, 5, 0.25), (3.0, 1, None), (None, 5, None)]
)
def test_time_per_token_is_that_after_the_first(
    first_token: float | None, num_tokens: int, expected: float | None
) -> None:
    timings = Timings(0.0, 1.0, 2.0, 4.0, first_token)
    assert timings.per_output_token(num_tokens) == expected


@given(st.floats(width=32))
def test_logprobs_print_as_the_shortest_decimal_of_a_float32(value: float) -> None:
    short = shortest_float32(value)
    if not math.isfinite(value):
        assert short is None
    else:
        assert short is not None
        assert np.float32(short) == np.float32(value)
        digits = repr(short).lstrip("-0.").split("e")[0].replace(".", "").rstrip("0")
        assert len(digits) <= 9


@given(st.lists(st.none() | st.floats(width=32)))
def test_many_logprobs_are_the_same_as_each(values: list[float | None]) -> None:
    assert shortest_float32s(values) == list(map(shortest_float32, values))


def test_no_logprob_stays_none() -> None:
    assert shortest_float32(None) is None
