"""Cancelled requests, processes that die, overload, shutdown, and failing starts."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest

from tests.e2e.long_winded import LONG, long_winded
from tests.e2e.reflection_client import ReflectionClient, details, retry_seconds
from tests.e2e.stack import DEADLINE_S, ENDLESS, PROMPT, Stack, run_to_end, running, wait_until
from tests.paths import REPOSITORY

OVERLOADED = {"error": "Model is overloaded", "error_type": "overloaded"}
ENDLESS_BODY = {"inputs": PROMPT, "parameters": ENDLESS}


class Replaceable:
    """A small server for tests that end it: the next test gets a new one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._contexts = ExitStack()
        self._stack: Stack | None = None
        self._count = 0

    def get(self) -> Stack:
        if self._stack is None or self._stack.process.poll() is not None:
            self.close()
            self._count += 1
            log_path = self._directory / f"log{self._count}"
            model = self._directory / f"model{self._count}"
            flags = ("--max-concurrent-requests=2", *long_winded(model))
            self._stack = self._contexts.enter_context(running(log_path, *flags))
        return self._stack

    def close(self) -> None:
        self._contexts.close()
        self._stack = None


@pytest.fixture(scope="module")
def replaceable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replaceable]:
    holder = Replaceable(tmp_path_factory.mktemp("small"))
    yield holder
    holder.close()


@pytest.fixture
def small(replaceable: Replaceable) -> Stack:
    """A server that takes two requests at a time."""
    return replaceable.get()


def payloads(lines: Iterator[str]) -> list[dict[str, Any]]:
    """The JSON of all events of /generate_stream; a silent stream has comments between them."""
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def bounded(num_tokens: int, **more: Any) -> dict[str, Any]:
    """A request that generates exactly `num_tokens` tokens, with details."""
    parameters = {**ENDLESS, "max_new_tokens": num_tokens, "details": True, **more}
    return {"inputs": PROMPT, "parameters": parameters}


class TestCancellation:
    """A caller that leaves ends its generation and frees its blocks."""

    def test_leaving_a_rest_stream(self, stack: Stack) -> None:
        with stack.http.stream("POST", "/generate_stream", json=ENDLESS_BODY) as reply:
            lines = reply.iter_lines()  # held, since dropping it would close the connection
            assert next(lines).startswith("data: ")
            stack.wait_until_running(1)
        stack.wait_until_idle()

    def test_leaving_a_rest_stream_of_several_prompts(self, stack: Stack) -> None:
        body = {"prompt": ["a", "b", "c", "d"], "temperature": 1e6, "seed": 2, "stream": True}
        body["max_tokens"] = 1000
        with stack.http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()  # held, since dropping it would close the connection
            assert next(lines).startswith("data: ")
            stack.wait_until_running(4)
        stack.wait_until_idle()

    def test_leaving_before_the_rest_answer(self, stack: Stack) -> None:
        host, port = stack.address.split(":")
        content = json.dumps(ENDLESS_BODY).encode()
        head = (
            "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
            connection.sendall(head.encode() + content)
            stack.wait_until_running(1)
        stack.wait_until_idle()

    @pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
    def test_cancelling_a_grpc_call(self, stack: Stack, api: ReflectionClient, method: str) -> None:
        request = api.request(method, ENDLESS_BODY)
        path = f"/{api.describe().full_name}/{method}"
        if method == "Generate":
            call: Any = api.channel.unary_unary(path).future(request.SerializeToString())
        else:
            call = api.channel.unary_stream(path)(request.SerializeToString())
        stack.wait_until_running(1)
        call.cancel()
        stack.wait_until_idle()

    def test_closing_the_grpc_channel(self, stack: Stack) -> None:
        with grpc.insecure_channel(stack.address) as channel:
            call = ReflectionClient(channel).call("GenerateStream", ENDLESS_BODY)
            next(call)
            stack.wait_until_running(1)
        stack.wait_until_idle()


def _mixed_requests() -> list[tuple[str, dict[str, Any]]]:
    """40 requests of all kinds, greedy or seeded, so that their answers are reproducible."""
    prompts = [PROMPT, "The capital of France is", "1, 2, 3,", "def add(a, b):", "Once upon a"]
    requests: list[tuple[str, dict[str, Any]]] = []
    for index in range(40):
        prompt = prompts[index % len(prompts)] + " " * (index % 3)
        seeded = {"do_sample": True, "temperature": 2.0, "seed": index}
        chosen = seeded if index % 2 else {}
        parameters = {"max_new_tokens": 6 + index % 7, "details": True, **chosen}
        openai: dict[str, Any] = {"max_tokens": 6 + index % 7, "seed": index}
        openai["temperature"] = 2.0 if index % 2 else 0.0
        messages = [{"role": "user", "content": prompt}]
        requests.append(
            [
                ("/generate", {"inputs": prompt, "parameters": parameters}),
                ("/generate_stream", {"inputs": prompt, "parameters": parameters}),
                ("/v1/chat/completions", {"messages": messages, **openai, "stream": True}),
                ("/v1/completions", {"prompt": [prompt, prompts[0]], **openai}),
            ][index // 2 % 4]
        )
    return requests


def _answer(stack: Stack, request: tuple[str, dict[str, Any]]) -> Any:
    """The JSON of a reply without its time; log-probabilities are the same to the last bit."""
    path, body = request
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    text = reply.text.strip()
    events = text.split("\n\n") if text.startswith("data: ") else [text]
    parts = [event.removeprefix("data: ") for event in events]
    return [_comparable(json.loads(part)) for part in parts if part != "[DONE]"]


def _is_own(name: str, value: Any) -> bool:
    return name == "created" or (name == "id" and isinstance(value, str))


def _comparable(value: Any) -> Any:
    """A JSON value without what every answer has of its own, at every level.

    The ids of tokens are numbers.
    """
    if isinstance(value, dict):
        return {name: _comparable(item) for name, item in value.items() if not _is_own(name, item)}
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    return value


def test_concurrent_requests_get_the_same_answers_as_alone(stack: Stack) -> None:
    requests = _mixed_requests()
    alone = [_answer(stack, request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: _answer(stack, request), requests))
    assert together == alone
    stack.wait_until_idle()


def test_request_with_penalties_does_not_disturb_a_running_stream(stack: Stack) -> None:
    with stack.http.stream("POST", "/generate_stream", json=bounded(60)) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert stack.generate(repetition_penalty=1.5, frequency_penalty=0.5)["details"]
        assert payloads(lines)[-1]["details"]["generated_tokens"] == 60


def test_overload_is_refused_at_once(small: Stack) -> None:
    api = ReflectionClient(small.direct)
    body = {"inputs": PROMPT, "parameters": LONG}
    calls = [api.call("GenerateStream", body) for _ in range(2)]
    for call in calls:
        next(call)
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 1}}
    reply = small.http.post("/generate", json=body)
    assert (reply.status_code, reply.json()) == (429, OVERLOADED)
    assert int(reply.headers["retry-after"]) >= 1
    invalid = {"inputs": PROMPT, "parameters": {"temperature": 0.0}}
    assert small.http.post("/generate", json=invalid).status_code == 429
    stream = small.http.post("/generate_stream", json=body)
    assert (stream.status_code, json.loads(stream.text.removeprefix("data: "))) == (200, OVERLOADED)
    with pytest.raises(grpc.RpcError) as caught:
        api.call("Generate", body)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(caught.value) == ("overloaded", None)
    assert retry_seconds(caught.value) >= 1
    # What tokenises needs a permit, too; what only tells something does not.
    for path, asked in (("/tokenize", {"inputs": PROMPT}), ("/chat_tokenize", {"messages": []})):
        assert small.http.post(path, json=asked).status_code == 429
    assert small.is_healthy()
    assert small.http.get("/info").status_code == 200
    for call in calls:
        call.cancel()
    small.wait_until_idle()
    assert small.http.post("/generate", json=body).status_code == 200


def test_stream_survives_the_death_of_the_engine(small: Stack) -> None:
    # Long enough to be still running when the engine is killed, even on a busy machine.
    num_tokens = 1900
    usual = {"temperature": 1.0, "seed": 4, "ignore_eos": True, "top_n_tokens": 2}
    requests = [bounded(num_tokens), bounded(num_tokens, **usual)]
    unbroken = [small.http.post("/generate", json=request).json() for request in requests]
    engine = small.child("engine")
    with ExitStack() as context:
        streams = []
        for request in requests:
            stream = small.http.stream("POST", "/generate_stream", json=request)
            streams.append(context.enter_context(stream).iter_lines())
        for lines in streams:
            next(lines)
        with small.without_engine():
            reply = small.http.post("/generate", json=requests[0])
        error = {"error": "unhealthy", "error_type": "healthcheck"}
        assert (reply.status_code, reply.json()) in [(503, error), (429, OVERLOADED)]
        broken = [payloads(lines) for lines in streams]
    for events, expected in zip(broken, unbroken, strict=True):
        assert events[-1]["generated_text"] == expected["generated_text"]
        assert events[-1]["details"]["generated_tokens"] == num_tokens
        tokens = [event["token"] for event in events]  # with log-probabilities, bit for bit
        assert tokens == expected["details"]["tokens"][-len(tokens) :]
        tops = [event["top_tokens"] for event in events if "top_tokens" in event]
        assert tops == expected["details"].get("top_tokens", [])[num_tokens - len(tops) :]
        assert [event["index"] for event in events] == list(
            range(num_tokens + 1 - len(tokens), num_tokens + 1)
        )
    assert small.child("engine").pid != engine.pid
    wait_until(small.is_healthy, "a healthy server")
    wait_until(lambda: "the engine is gone; 2 requests wait" in small.log(), "a line about them")
    small.wait_until_idle()


def test_dead_service_is_restarted(small: Stack) -> None:
    service = small.child("service")
    with small.http.stream("POST", "/generate_stream", json=ENDLESS_BODY) as reply:
        lines = reply.iter_lines()
        next(lines)
        service.kill()
        assert _ends_early(lines)
    wait_until(lambda: not service.is_running(), "the end of the service")
    wait_until(small.is_healthy, "a healthy service")
    assert small.child("service").pid != service.pid
    small.wait_until_idle()  # the engine aborted the requests of the dead service
    assert small.generate()["details"]


def _ends_early(lines: Iterator[str]) -> bool:
    """Whether a stream fails, or ends without its last event."""
    try:
        return all(event.get("generated_text") is None for event in payloads(lines))
    except httpx.TransportError:
        return True


def test_dead_envoy_is_restarted(small: Stack) -> None:
    envoy = small.child("envoy")
    envoy.kill()
    wait_until(lambda: not envoy.is_running(), "the end of Envoy")
    wait_until(small.is_healthy, "a healthy gateway")
    assert small.child("envoy").pid != envoy.pid


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_port_in_use_is_an_error_of_one_line(small: Stack, flag: str) -> None:
    address = small.address if flag == "--port" else small.grpc_address
    port = address.rpartition(":")[2]
    done = run_to_end(f"{flag}={port}")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line == f"tokenwire serve: port {port} on 127.0.0.1 is in use"
    assert done.stdout == ""
    assert small.is_healthy()


def test_streams_finish_after_sigterm(small: Stack) -> None:
    children = small.children()
    assert len(children) >= 3
    request = bounded(100)
    with small.http.stream("POST", "/generate_stream", json=request) as reply:
        lines = reply.iter_lines()
        first = next(lines)
        small.process.send_signal(signal.SIGTERM)
        wait_until(lambda: _is_refused(small), "a refused request")
        events = payloads(iter([first, *lines]))
    assert len(events) == 100
    assert events[-1]["details"]["finish_reason"] == "length"
    assert small.process.wait(DEADLINE_S) == 0
    gone, alive = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert (len(gone), alive) == (len(children), [])


def _is_refused(stack: Stack) -> bool:
    """Whether a new request is refused: by the service, by Envoy, or because the port is closed."""
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 1}}
    try:
        reply = httpx.post(f"{stack.url}/generate", json=body, timeout=DEADLINE_S)
    except httpx.TransportError:
        return True
    assert reply.status_code in (200, 503)
    return reply.status_code == 503


def test_missing_model_ends_the_start(tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    done = run_to_end(f"--model-id={path}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"tokenwire serve: --model-id: there is no such directory: {path}\n"


def broken_model(path: Path) -> Path:
    """A copy of the bundled model, to be broken."""
    path.mkdir()
    for source in (REPOSITORY / "models" / "demo").iterdir():
        if source.is_file() and source.suffix != ".py":
            shutil.copy(source, path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("config.json", "{ this is not JSON", "config.json is not JSON: "),
        ("model.safetensors", "these are no weights", "model.safetensors is truncated or damaged"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "tokenizer.json is a"),
    ],
    ids=["no JSON", "no weights", "a pointer"],
)
def test_broken_files_end_the_start_before_anything_is_started(
    tmp_path: Path, name: str, content: str, error: str
) -> None:
    path = broken_model(tmp_path / "broken")
    (path / name).write_text(content)
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that a look at ports would fail
        done = run_to_end(
            f"--model-id={path}", f"--port={taken.getsockname()[1]}", "--hostname=127.0.0.1"
        )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith(f"tokenwire serve: --model-id: {path}/{error}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model_type": "no-such-model"}, ".*no-such-model.*"),
        (
            {"intermediate_size": 512},
            r"model\.layers\.0\.mlp\.down_proj\.weight has shape \[256, \d+\], and by its "
            r"configuration \[256, 512\]; wrong shapes: \d+",
        ),
    ],
    ids=["unknown architecture", "wrong shape"],
)
def test_a_model_that_cannot_be_built_ends_the_start(
    tmp_path: Path, changes: dict[str, object], error: str
) -> None:
    path = broken_model(tmp_path / "broken")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    done = run_to_end(f"--model-id={path}")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    start = f"tokenwire serve: engine ended with status 1: .*cannot load {re.escape(str(path))}: "
    assert re.fullmatch(start + error, line)
