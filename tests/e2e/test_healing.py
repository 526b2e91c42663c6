"""Processes that freeze or die in the middle of work: they are replaced, and the work goes on."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import ENDLESS, PROMPT, Stack, running, wait_until

NUM_TOKENS = 1000  # enough to be still running when a process is frozen, even on a busy machine
UNHEALTHY = {"error": "unhealthy", "error_type": "healthcheck"}


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server that leaves frozen processes alone for longer than a test takes."""
    with running(tmp_path_factory.mktemp("patient") / "log", "--engine-stall-seconds=900") as stack:
        yield stack


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server that restarts frozen processes soon, and whose engine speculates."""
    flags = ("--engine-stall-seconds=2", "--speculate=4")
    with running(tmp_path_factory.mktemp("quick") / "log", *flags) as stack:
        yield stack


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def body(num_tokens: int = NUM_TOKENS, **parameters: Any) -> dict[str, Any]:
    """A greedy request of exactly so many tokens, unless parameters say otherwise."""
    fixed = {"max_new_tokens": num_tokens, "ignore_eos": True, "details": True}
    return {"inputs": PROMPT, "parameters": fixed | parameters}


class Streams:
    """Requests that have begun to stream, and that are read to their end later."""

    def __init__(self, stack: Stack, bodies: list[dict[str, Any]]) -> None:
        self._context = ExitStack()
        self._lines = []
        for request in bodies:
            reply = self._context.enter_context(
                stack.http.stream("POST", "/generate_stream", json=request)
            )
            self._lines.append(reply.iter_lines())
        self._first = [next(lines) for lines in self._lines]

    def last_events(self) -> list[dict[str, Any]]:
        """The last event of each, with the whole text and the details."""
        last = []
        with self._context:
            for first, lines in zip(self._first, self._lines, strict=True):
                *_, line = (line for line in [first, *lines] if line)
                last.append(json.loads(line.removeprefix("data: ")))
        return last


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ended(answer: dict[str, Any]) -> tuple[str, str, int]:
    """Text, reason and number of tokens of an answer or of a stream's last event."""
    details = answer["details"]
    return answer["generated_text"], details["finish_reason"], details["generated_tokens"]


@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
def test_a_frozen_engine_is_not_healthy_and_goes_on_when_it_thaws(
    patient: Stack, is_busy: bool
) -> None:
    engine = patient.child("engine")
    bodies = [body()] if is_busy else []
    unbroken = [patient.http.post("/generate", json=request).json() for request in bodies]
    streams = Streams(patient, bodies)
    engine.suspend()
    wait_until(lambda: not patient.is_healthy(), "an unhealthy server")
    engine.resume()
    wait_until(patient.is_healthy, "a healthy server")
    assert [ended(event) for event in streams.last_events()] == [*map(ended, unbroken)]
    assert patient.child("engine").pid == engine.pid


def test_operators_see_that_an_engine_is_frozen_and_can_end_calls(patient: Stack) -> None:
    """Envoy sends callers nowhere then, but Prometheus is to know, and a call may be the cause."""
    api = ReflectionClient(patient.through_envoy)
    assert api.call("Abort", {"request_id": "none"}).aborted == 0
    engine = patient.child("engine")
    headers = {"x-request-id": "the-cause"}
    long = body(1900)
    with patient.http.stream("POST", "/generate_stream", json=long, headers=headers) as stream:
        lines = stream.iter_lines()
        next(lines)
        engine.suspend()
        try:
            wait_until(
                lambda: patient.http.get("/info").status_code == 503, "that Envoy knows of it"
            )
            assert patient.metric("tokenwire_engine_up") == 0
            assert b"\ntokenwire_engine_up 0.0\n" in api.call("Metrics").data
            assert api.call("Abort", {"request_id": "the-cause"}).aborted == 1
            *_, last = (line for line in lines if line)
            assert json.loads(last.removeprefix("data:"))["error_type"] == "cancelled"
            assert patient.http.post("/generate", json=body()).status_code == 503
        finally:
            engine.resume()
    wait_until(patient.is_healthy, "a healthy server")
    patient.wait_until_idle()


def test_a_step_of_many_tokens_does_not_make_an_engine_look_frozen(quick: Stack) -> None:
    """All blocks of the machine's processors are busy with one step after the other."""
    engine = quick.child("engine")
    prompt = "What is Deep Learning? " * 150
    request = {"inputs": prompt, "parameters": {"max_new_tokens": 4, "truncate": 1900}}
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: quick.http.post("/generate", json=request), range(8)))
    assert {reply.status_code for reply in replies} == {200}
    assert quick.child("engine").pid == engine.pid


@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
def test_a_frozen_engine_is_replaced_and_streams_go_on(quick: Stack, is_busy: bool) -> None:
    bodies = [body(), body(**ENDLESS | {"max_new_tokens": NUM_TOKENS})] if is_busy else []
    unbroken = [quick.http.post("/generate", json=request).json() for request in bodies]
    streams = Streams(quick, bodies)
    engine = quick.child("engine")
    with quick.losing_engine():
        engine.suspend()
        wait_until(lambda: is_gone(engine), "the end of the frozen engine")
        assert [ended(event) for event in streams.last_events()] == [*map(ended, unbroken)]
    assert quick.child("engine").pid != engine.pid
    assert "engine was killed: no sign of life for 2 s; restarting it" in quick.log()
    quick.wait_until_idle()


@pytest.mark.parametrize("name", ["service", "envoy"])
def test_a_frozen_service_or_envoy_is_replaced(quick: Stack, name: str) -> None:
    process, engine = quick.child(name), quick.child("engine")
    process.suspend()
    wait_until(lambda: is_gone(process), f"the end of the frozen {name}")
    wait_until(quick.is_healthy, "a healthy server")
    assert quick.child(name).pid != process.pid
    assert quick.child("engine").pid == engine.pid
    assert f"{name} was killed: no sign of life for " in quick.log()
    assert quick.generate()["details"]


def _late_stop(answer: dict[str, Any]) -> str:
    """The text of a few tokens that first come up in the last fifth of an answer."""
    text, tokens = answer["generated_text"], [t["text"] for t in answer["details"]["tokens"]]
    for end in range(len(tokens) * 4 // 5, len(tokens)):
        piece = "".join(tokens[end - 4 : end])
        if piece.isascii() and text.find(piece) > len(text) // 2:
            return piece
    raise AssertionError("this text repeats itself")


def test_killed_engine_with_all_kinds_of_requests(quick: Stack, pool: ThreadPoolExecutor) -> None:
    """Grammars, stop sequences, best_of and speculation go on with the same tokens."""
    random = ENDLESS | {"max_new_tokens": NUM_TOKENS, "details": True}
    whole = quick.http.post("/generate", json=body(**random)).json()
    item = {"type": "string", "pattern": "[a-f]{4}", "minLength": 4, "maxLength": 4}
    array = {"type": "array", "items": item, "minItems": 120, "maxItems": 120}
    bodies = [
        body(),  # repeats itself, so that draft tokens are accepted
        body(**random, stop=[_late_stop(whole)]),
        body(ignore_eos=False, grammar={"type": "json", "value": array}),
        body(ignore_eos=False, grammar={"type": "regex", "value": "([a-d]{5} ){150}"}),
        body(frequency_penalty=0.5, repetition_penalty=1.1),
    ]
    best_of = body(do_sample=True, top_k=1, best_of=2)  # which takes no seed, and needs none here
    unbroken = [quick.http.post("/generate", json=item).json() for item in [*bodies, best_of]]
    assert [answer["details"]["finish_reason"] for answer in unbroken[1:4]] == [
        "stop_sequence",
        "eos_token",
        "eos_token",
    ]
    best = _running(quick, pool, best_of)
    engine, logged = quick.child("engine"), len(quick.log())
    streams = Streams(quick, bodies)
    engine.kill()
    answers = [*streams.last_events(), best.result().json()]
    assert [ended(answer) for answer in answers] == [*map(ended, unbroken)]
    assert quick.child("engine").pid != engine.pid
    waiting = re.findall(r"the engine is gone; (\d+) requests wait", quick.log()[logged:])
    assert int(waiting[0]) >= 2  # those with grammars; quicker ones may have ended before
    quick.wait_until_idle()


def _running(stack: Stack, pool: ThreadPoolExecutor, best_of: Any) -> Future[httpx.Response]:
    """A call with two texts that was seen to run, which takes tries where it ends unseen."""

    def is_seen(call: Future[httpx.Response]) -> bool:
        return call.done() or stack.metric("tgi_batch_current_size") >= 2

    while True:
        call = pool.submit(stack.http.post, "/generate", json=best_of)
        wait_until(partial(is_seen, call), "two texts")
        if not call.done():
            return call


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_unary_call_of_a_service_that_ends_is_answered_or_refused(
    quick: Stack, pool: ThreadPoolExecutor, signal_number: signal.Signals
) -> None:
    """Envoy asks the new service again; if that takes too long to come, the answer is 503."""
    request = body(200)
    expected = quick.http.post("/generate", json=request).json()
    service = quick.child("service")
    waiting = pool.submit(quick.http.post, "/generate", json=body(**ENDLESS))
    quick.wait_until_running(1)
    service.send_signal(signal_number)
    reply = pool.submit(quick.http.post, "/generate", json=request).result()
    wait_until(lambda: is_gone(service), "the end of the service")
    for answer, is_same in ((waiting.result(), False), (reply, True)):
        assert answer.status_code in (200, 503), answer.text
        if answer.status_code == 503:
            assert answer.json() == UNHEALTHY
        elif is_same:
            assert ended(answer.json()) == ended(expected)
    wait_until(quick.is_healthy, "a healthy server")
    quick.wait_until_idle()


def test_hangup_is_ignored_by_all(quick: Stack) -> None:
    quick.process.send_signal(signal.SIGHUP)
    for name in ("engine", "service"):
        quick.child(name).send_signal(signal.SIGHUP)
    wait_until(lambda: quick.log().count("SIGHUP is ignored") == 3, "three lines about SIGHUP")
    assert quick.generate()["details"]
