"""Several service processes in front of one engine: one server to callers and to operators."""

from __future__ import annotations

import itertools
import json
import operator
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.access.keys import key_line, make_key
from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import ENDLESS, PROMPT, SERVICE, Stack, running, wait_until
from tests.engine.adapters.made import make_adapter
from tests.paths import DEMO_MODEL

NUM_WORKERS = 2
ADMIN_KEY = make_key()
GREEDY, MODEST = {"x-tenant": "greedy"}, {"x-tenant": "modest"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server with two service processes, which restarts frozen ones soon.

    Admins may load the adapters `good` and `slow`; the latter takes a second, and is refused.
    """
    path = tmp_path_factory.mktemp("workers")
    for name, pattern in (("good", {}), ("slow", {r"(?:(.+?)|\3){40}\d": 4})):
        made = make_adapter(DEMO_MODEL, path / "adapters" / name, 1, r=4, lora_alpha=1)
        config = json.loads((made / "adapter_config.json").read_text())
        (made / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": pattern}))
    (path / "admins").write_text(key_line("admin", ADMIN_KEY) + "\n")
    flags = (
        "--service-workers=2",
        "--engine-stall-seconds=2",
        "--max-concurrent-requests=24",
        f"--lora-adapter-directory={path / 'adapters'}",
        f"--admin-key-file={path / 'admins'}",
    )
    with running(path / "log", *flags) as stack:
        yield stack


def body(num_tokens: int = 8, **parameters: Any) -> dict[str, Any]:
    """A greedy request of exactly so many tokens."""
    fixed = {"max_new_tokens": num_tokens, "ignore_eos": True}
    return {"inputs": PROMPT, "parameters": fixed | parameters}


class Streams:
    """Endless streams, so many that each service process has some."""

    def __init__(self, stack: Stack, count: int, **request: Any) -> None:
        self._context = ExitStack()
        self.replies = [
            self._context.enter_context(
                stack.http.stream(
                    "POST",
                    "/generate_stream",
                    json={"inputs": PROMPT, "parameters": ENDLESS},
                    **request,
                )
            )
            for _ in range(count)
        ]
        self.lines = [reply.iter_lines() for reply in self.replies]
        for lines in self.lines:
            next(lines)

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()


def by_worker(stack: Stack, series: str) -> dict[str, float]:
    """The values of a series by its label `worker`."""
    text = stack.http.get("/metrics").raise_for_status().text
    samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
    return {s.labels["worker"]: s.value for s in samples if s.name == series}


def have_both(stack: Stack) -> bool:
    """Whether both service processes answer."""
    return len(stack.all_of("service")) == NUM_WORKERS and set(
        by_worker(stack, "process_start_time_seconds")
    ) == {"1", "2"}


@pytest.fixture(autouse=True)
def _whole(server: Stack) -> Iterator[None]:
    """Each test leaves an idle server whose processes both get calls from Envoy."""
    yield
    wait_until(lambda: server.is_healthy() and have_both(server), "both service processes")
    before = [len(lines_of(server, worker)) for worker in (1, 2)]

    def both_get_calls() -> bool:
        assert server.http.post("/generate", json=body(1)).status_code == 200
        now = [len(lines_of(server, worker)) for worker in (1, 2)]
        return all(map(operator.lt, before, now))

    wait_until(both_get_calls, "calls served by both")
    server.wait_until_idle()


def lines_of(stack: Stack, worker: int) -> list[str]:
    """The lines of the access log of a service process."""
    return [line for line in stack.log().splitlines() if f"service.access #{worker}:" in line]


def test_both_serve_and_log_lines_say_which(server: Stack) -> None:
    def both_have() -> bool:
        assert server.http.post("/generate", json=body()).status_code == 200
        return all(lines_of(server, worker) for worker in (1, 2))

    wait_until(both_have, "calls served by both")
    assert not lines_of(server, 3)


def test_series_are_right_in_sum(server: Stack) -> None:
    names = (
        "tgi_request_success",
        "tokenwire_generated_tokens_total",
        "tgi_request_duration_count",
    )
    before = {name: server.metric(name) for name in names}
    steps = 'tgi_batch_inference_count{method="decode"}'
    prefills, decodes = 'tgi_batch_inference_count{method="prefill"}', server.metric(steps)
    before_prefills = server.metric(prefills)
    for number in range(10):
        request = body(5) | {"inputs": f"{number} is a number"}
        assert server.http.post("/generate", json=request).status_code == 200
    after = {name: server.metric(name) for name in names}
    assert [after[name] - before[name] for name in names] == [10, 50, 10]
    assert server.metric(prefills) - before_prefills == 10, "each step is counted once"
    assert server.metric(steps) - decodes == 40
    with Streams(server, 6):
        server.wait_until_running(6)
        assert server.metric("tokenwire_requests_active") == 6
        assert server.metric("tgi_batch_current_size") == 6
    assert server.metric("tokenwire_requests_limit") == 24
    assert len(by_worker(server, "process_resident_memory_bytes")) == NUM_WORKERS


def test_any_port_and_process_shows_the_same_series(server: Stack) -> None:
    """Also when it is asked directly, where the kernel chooses the process."""
    counts = set()
    for _ in range(6):
        with grpc.insecure_channel(server.grpc_address) as channel:
            reply = ReflectionClient(channel).call("Metrics")
        counts |= {line for line in _lines(reply) if line.startswith("tgi_request_success ")}
    assert len(counts) == 1


def test_the_engine_has_nothing_that_works_on_text_or_messages(server: Stack) -> None:
    """Neither gRPC, protobuf, JSON bodies nor templates: that is what service processes are for."""
    engine, service = (server.all_of(name)[0] for name in ("engine", "service"))
    libraries = ("cygrpc", "_upb", "msgspec")
    assert not [name for name in libraries if name in _mapped(engine)]
    assert [name for name in libraries if name in _mapped(service)] == [*libraries]


def test_permits_are_shared(server: Stack) -> None:
    """A connection of gRPC stays with one process, which may give all permits."""
    with Streams(server, 24, headers=GREEDY):
        for _ in range(4):
            assert server.http.post("/generate", json=body(), headers=GREEDY).status_code == 429
        assert server.http.post("/generate", json=body(), headers=MODEST).status_code == 200


def test_a_call_is_ended_by_its_id_wherever_it_runs(server: Stack) -> None:
    api = ReflectionClient(server.through_envoy)
    assert api.call("Abort", {"request_id": "none"}).aborted == 0  # and it knows the messages
    for number in range(6):
        request_id = f"call-{number}"
        with Streams(server, 1, headers={"x-request-id": request_id}):
            assert api.call("Abort", {"request_id": request_id}).aborted == 1
    assert api.call("Abort", {"request_id": "call-0"}).aborted == 0


def keep_asking(stack: Stack, stop: threading.Event, statuses: list[int]) -> None:
    """Makes one unary call after the other."""
    with httpx.Client(base_url=stack.url, timeout=120) as client:
        while not stop.is_set():
            statuses.append(client.post("/generate", json=body(20)).status_code)


def statuses_during(stack: Stack, event: Callable[[], None]) -> Counter[int]:
    """The statuses of unary calls that are made from before something happens until after it."""
    stop, statuses = threading.Event(), list[int]()
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(keep_asking, stack, stop, statuses) for _ in range(6)]
        try:
            wait_until(lambda: len(statuses) >= 6, "calls that are answered")
            event()
            reached = len(statuses) + 12
            wait_until(lambda: len(statuses) >= reached, "calls that are answered after it")
        finally:
            stop.set()
        for caller in asking:
            caller.result()
    return Counter(statuses)


@pytest.mark.parametrize(
    "signal_number",
    [
        pytest.param(signal.SIGKILL, id="dies"),
        pytest.param(signal.SIGSTOP, id="freezes"),
        pytest.param(signal.SIGTERM, id="is-told-to-end"),
    ],
)
def test_no_unary_call_is_lost_when_one_process_ends(
    server: Stack, signal_number: signal.Signals
) -> None:
    victim, other = server.all_of("service")
    engine = server.child("engine")

    def end_one() -> None:
        victim.send_signal(signal_number)
        wait_until(lambda: not _runs(victim), "the end of the process")
        wait_until(lambda: have_both(server), "another one in its place")

    assert set(statuses_during(server, end_one)) == {200}
    assert other.is_running()
    assert server.child("engine").pid == engine.pid


def adapter_order(stack: Stack, verb: str, **fields: str) -> httpx.Response:
    """The answer to an admin who loads or unloads an adapter."""
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    return stack.http.post(f"/v1/{verb}_lora_adapter", json=fields, headers=headers)


def test_adapters_of_a_process_that_dies_are_loaded_once_and_their_calls_answered(
    server: Stack,
) -> None:
    """The engine loads them for calls that are made again meanwhile, of the other process."""
    names = [*map(str, range(8))]
    in_progress = f'grpc_server_in_progress{{method="/{SERVICE}/LoadAdapter"}}'
    with ThreadPoolExecutor(len(names) + 1) as pool:
        slow = pool.submit(adapter_order, server, "load", lora_name="slow", lora_path="slow")
        wait_until(lambda: server.metric(in_progress) == 1, "the slow one is read")
        calls = [
            pool.submit(adapter_order, server, "load", lora_name=name, lora_path="good")
            for name in names
        ]
        wait_until(lambda: server.metric(in_progress) == 1 + len(names), "others wait for it")
        server.all_of("service")[0].kill()
        assert [call.result().text for call in calls] == [
            f"Success: LoRA adapter '{name}' added successfully." for name in names
        ]
        assert slow.result().json()["error_type"] == "adapter"
    for name in names:
        reply = adapter_order(server, "load", lora_name=name, lora_path="good")
        assert (reply.status_code, reply.json()["error_type"]) == (400, "adapter_loaded")
        assert adapter_order(server, "unload", lora_name=name).status_code == 200


def test_only_the_streams_of_a_process_that_dies_break(server: Stack) -> None:
    """And no sum falls, neither while it is gone nor when another one is in its place."""
    victim, _ = server.all_of("service")
    names = ("tgi_request_success", "tokenwire_generated_tokens_total", "tgi_request_count")
    with Streams(server, 8) as streams:
        server.wait_until_running(8)
        sums = [[server.metric(name) for name in names]]
        victim.kill()
        ended = [_ended(lines) for lines in streams.lines]
    assert 0 < ended.count(True) < 8, "the less busy process is likelier to get the next one"
    sums.append([server.metric(name) for name in names])
    wait_until(lambda: have_both(server), "another one in its place")
    sums.append([server.metric(name) for name in names])
    for earlier, later in itertools.pairwise(sums):
        assert all(map(operator.le, earlier, later))
    assert sums[1][0] >= sums[0][0] + ended.count(True)


def test_a_new_engine_is_counted_once(server: Stack) -> None:
    before = server.metric("tokenwire_engine_restarts_total")
    engine = server.child("engine")
    with Streams(server, 4):
        engine.kill()
        wait_until(lambda: not _runs(engine), "the end of the engine")
        wait_until(lambda: not server.is_healthy(), "that all have noticed")
        wait_until(server.is_healthy, "a healthy server")
    assert server.metric("tokenwire_engine_restarts_total") == before + 1


def test_all_drain_at_the_end(server: Stack, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Requests that run in any of them end well, and the server ends with 0."""
    log_path = tmp_path_factory.mktemp("draining") / "log"
    with running(log_path, "--service-workers=2") as draining, ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(draining.http.post, "/generate", json=body(1400)) for _ in range(8)]
        draining.wait_until_running(8)
        draining.process.send_signal(signal.SIGTERM)
        assert {call.result().status_code for call in calls} == {200}
        assert draining.process.wait(60) == 0
        drained = [line for line in draining.log().splitlines() if "draining" in line]
    assert any("service.app #1:" in line for line in drained)
    assert any("service.app #2:" in line for line in drained)


def _mapped(process: psutil.Process) -> str:
    """The files of libraries that a process has loaded."""
    return " ".join(item.path for item in process.memory_maps())


def _lines(reply: Any) -> list[str]:
    """The text of a document."""
    text: str = reply.data.decode()
    return text.splitlines()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _ended(lines: Iterator[str]) -> bool:
    """Whether a stream came to its end; false if it broke."""
    try:
        *_, last = (line for line in lines if line)
    except httpx.HTTPError:
        return False
    event: dict[str, Any] = json.loads(last.removeprefix("data:"))
    return bool(event.get("generated_text"))
