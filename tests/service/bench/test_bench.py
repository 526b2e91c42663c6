"""`tokenwire bench` without a server: arrivals, moments, percentiles, prompts, both transports."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import statistics
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from service import cli
from service.bench.arrivals import poisson_arrivals
from service.bench.command import bench
from service.bench.grpc_transport import GrpcTransport
from service.bench.load import RealClock, measure, run_closed, run_open
from service.bench.options import BenchOptions, add_arguments, from_arguments
from service.bench.prompts import PromptMaker
from service.bench.queue_time import mean_queue_s
from service.bench.report import Report
from service.bench.rest_transport import RestTransport
from service.bench.sample import Sample
from service.bench.summary import Percentiles, percentiles, summarise
from service.bench.target import Target, TargetError, parse_target
from service.bench.transport import INCOMPLETE, Failure, RequestFailed, Task
from service.launch.options import SettingsError
from service.pb.google.api import HttpBody
from service.pb.tokenwire import v1 as pb

OVERLOADED = Failure("overloaded", "429", "Model is overloaded")
TASK = Task("hello", 2, 7)


def options(*flags: str) -> BenchOptions:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return from_arguments(vars(parser.parse_args(flags)))


def sample(*arrivals: float, due: float = 0.0, failure: Failure | None = None) -> Sample:
    ended = arrivals[-1] if arrivals else due
    return Sample(due=due, sent=due, arrivals=arrivals, ended=ended, failure=failure)


class FakeClock:
    """Time that passes only when someone says so."""

    def __init__(self, oversleeps: float = 0.0) -> None:
        self.time = 100.0
        self.oversleeps = oversleeps

    def now(self) -> float:
        return self.time

    async def sleep_until(self, moment: float) -> None:
        for _ in range(20):  # whatever others still do at this time
            await asyncio.sleep(0)
        self.time = max(self.time, moment) + self.oversleeps


class FakeTransport:
    """A server whose every token takes a second, with a token for each word; EOS by seed."""

    def __init__(
        self,
        clock: FakeClock,
        failures: Iterable[Failure | None] = (),
        early_seeds: tuple[int, ...] = (),
    ) -> None:
        self.clock = clock
        self.failures = iter(failures)
        self.early_seeds = early_seeds
        self.tasks: list[Task] = []
        self.running = self.most_running = 0

    async def token_stops(self, text: str) -> list[int]:
        return [0, *(match.end() for match in re.finditer(r"\S+", text))]

    async def metrics(self) -> str:
        count = len(self.tasks)
        return (
            f"tgi_request_queue_duration_count {count}\n"
            f"tgi_request_queue_duration_sum {count * 0.25}\n"
        )

    async def stream(self, task: Task) -> AsyncGenerator[None]:
        self.tasks.append(task)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            failure = next(self.failures, None)
            if failure is not None:
                raise RequestFailed(failure)
            for _ in range(1 if task.seed in self.early_seeds else task.max_new_tokens):
                await asyncio.sleep(0)
                self.clock.time += 1.0
                yield
        finally:
            self.running -= 1

    async def close(self) -> None:
        pass


class TestArrivals:
    def test_are_reproducible_and_begin_at_once(self) -> None:
        times = poisson_arrivals(5.0, 100, seed=3)
        assert times == poisson_arrivals(5.0, 100, seed=3) != poisson_arrivals(5.0, 100, seed=4)
        assert (len(times), times[0]) == (100, 0.0)
        assert times == sorted(times)

    def test_have_the_rate_and_the_spread_of_a_poisson_process(self) -> None:
        times = poisson_arrivals(5.0, 20_001, seed=0)
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.03)
        assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.03)

    def test_twice_the_rate_is_the_same_pattern_in_half_the_time(self) -> None:
        slow, fast = (poisson_arrivals(rate, 50, seed=1) for rate in (1.0, 2.0))
        assert slow == pytest.approx([2 * moment for moment in fast])


class TestMoments:
    async def test_latencies_of_an_open_loop_count_from_when_a_request_was_due(self) -> None:
        clock = FakeClock(oversleeps=0.5)
        transport = FakeTransport(clock)

        async def send(index: int, due: float) -> Sample:
            return await measure(transport, TASK, due, limit_s=9, clock=clock)

        first, second = await run_open(send, [0.0, 60.0], clock)
        assert [first.due, second.due] == [100.0, 160.0]
        assert first.lateness == second.lateness == 0.5
        assert second.first_token == 1.5
        assert second.end_to_end == 2.5
        assert second.gaps == [1.0]

    async def test_an_open_loop_does_not_wait_for_answers(self) -> None:
        release = asyncio.Event()
        begun: list[int] = []

        async def send(index: int, due: float) -> Sample:
            begun.append(index)
            if len(begun) == 5:
                release.set()
            await release.wait()
            return sample(due=due)

        samples = await run_open(send, [0.0, 0.001, 0.002, 0.002, 0.003], RealClock())
        assert begun == [0, 1, 2, 3, 4]
        assert [round(item.due - samples[0].due, 6) for item in samples] == [
            0.0, 0.001, 0.002, 0.002, 0.003,
        ]  # fmt: skip

    async def test_a_closed_loop_keeps_so_many_running(self) -> None:
        clock = FakeClock()
        transport = FakeTransport(clock)

        async def send(index: int, due: float) -> Sample:
            return await measure(transport, TASK, due, limit_s=9, clock=clock)

        samples = await run_closed(send, 10, 3, clock)
        assert len(samples) == 10
        assert transport.most_running == 3
        assert all(item.lateness == 0 for item in samples)

    async def test_a_failure_is_a_sample(self) -> None:
        clock = FakeClock()
        seen = await measure(FakeTransport(clock, [OVERLOADED]), TASK, 0, limit_s=9, clock=clock)
        assert (seen.failure, seen.arrivals) == (OVERLOADED, ())

    async def test_a_request_that_hangs_fails_and_is_left(self) -> None:
        left = False

        class Hanging(FakeTransport):
            async def stream(self, task: Task) -> AsyncGenerator[None]:
                nonlocal left
                try:
                    yield
                    await asyncio.Event().wait()
                finally:
                    left = True

        transport = Hanging(FakeClock())
        seen = await measure(transport, TASK, 0, limit_s=0.005, clock=FakeClock())
        assert seen.failure == Failure("timeout", "", "no end within 0.005 s")
        assert len(seen.arrivals) == 1
        assert left


class TestSummary:
    @pytest.mark.parametrize("count", [2, 5, 100, 1001])
    def test_percentiles_are_those_of_the_statistics_module(self, count: int) -> None:
        values = [(index * 7919) % 1009 / 10 for index in range(count)]
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        found = percentiles(values)
        assert found is not None
        assert (found.p50, found.p90, found.p99) == pytest.approx((cuts[49], cuts[89], cuts[98]))

    def test_percentiles_of_few(self) -> None:
        assert percentiles([]) is None
        assert percentiles([3.0]) == Percentiles(3.0, 3.0, 3.0)

    def test_only_what_succeeded_counts(self) -> None:
        result = summarise(
            [
                sample(1.0, 2.0, 4.0),
                sample(3.0, 5.0, due=1.0),
                sample(9.0, due=1.0, failure=Failure("generation", "424", "x")),
                sample(due=2.0, failure=OVERLOADED),
                sample(due=2.0, failure=OVERLOADED),
            ],
            output_tokens=3,
        )
        assert (result.succeeded, result.failed, result.ended_early) == (2, 3, 1)
        assert (result.duration_s, result.generated_tokens) == (9.0, 5)
        assert (result.requests_per_s, result.output_tokens_per_s) == (2 / 9, 5 / 9)
        assert result.first_token == percentiles([1.0, 2.0])
        assert result.inter_token == percentiles([1.0, 2.0, 2.0])
        assert result.end_to_end == percentiles([4.0, 4.0])
        assert [(item.error_type, item.code, item.count) for item in result.failures] == [
            ("overloaded", "429", 2),
            ("generation", "424", 1),
        ]

    def test_nothing_but_failures(self) -> None:
        result = summarise([sample(failure=OVERLOADED)], 3)
        assert (result.succeeded, result.failed, result.requests_per_s) == (0, 1, 0.0)
        assert result.first_token is result.end_to_end is None


class TestReport:
    def report(self, *flags: str, failure: Failure | None = None) -> Report:
        samples = [sample(0.1, 0.2, failure=failure), sample(0.1, 0.3)]
        return Report(
            options=options("--requests=2", "--output-tokens=2", *flags),
            prompt_tokens=128.0,
            summary=summarise(samples, 2),
            queue_s=0.0125,
        )

    def test_table(self) -> None:
        assert self.report(failure=OVERLOADED).table() == (
            "http://127.0.0.1:8080: 2 requests, 8 at a time, 128 tokens in, 2 out\n"
            "\n"
            "ms                       p50         p90         p99\n"
            "first token            100.0       100.0       100.0\n"
            "between tokens         200.0       200.0       200.0\n"
            "whole answer           300.0       300.0       300.0\n"
            "\n"
            "6.7 output tokens/s, 3.33 requests/s, 12.5 ms in the queue\n"
            "1 succeeded, 1 failed in 0.3 s\n"
            "  1 x overloaded 429: Model is overloaded\n"
        )

    def test_table_of_an_open_loop_says_how_late_requests_were_sent(self) -> None:
        assert "sent late" in self.report("--rate=2").table()

    def test_json_is_one_line(self) -> None:
        text = self.report("--rate=2", "--seed=5", failure=OVERLOADED).json()
        assert "\n" not in text
        assert json.loads(text) == {
            "target": "http://127.0.0.1:8080",
            "transport": "rest",
            "loop": "open",
            "rate": 2.0,
            "concurrency": None,
            "requests": 2,
            "input_tokens": 128.0,
            "output_tokens": 2,
            "shared_prefix": 0,
            "seed": 5,
            "succeeded": 1,
            "failed": 1,
            "failures": [
                {
                    "error_type": "overloaded",
                    "code": "429",
                    "count": 1,
                    "message": "Model is overloaded",
                }
            ],
            "duration_s": 0.3,
            "requests_per_s": 3.333,
            "output_tokens_per_s": 6.67,
            "generated_tokens": 2,
            "ended_early": 0,
            "first_token_ms": {"p50": 100.0, "p90": 100.0, "p99": 100.0},
            "inter_token_ms": {"p50": 200.0, "p90": 200.0, "p99": 200.0},
            "end_to_end_ms": {"p50": 300.0, "p90": 300.0, "p99": 300.0},
            "sent_late_ms": {"p50": 0.0, "p90": 0.0, "p99": 0.0},
            "mean_queue_ms": 12.5,
        }


class TestPrompts:
    @staticmethod
    async def two_a_word(text: str) -> list[int]:
        """A tokenizer that adds a token and splits words after their first letter."""
        spans = [match.span() for match in re.finditer(r"\S+", text)]
        stops = [stop for start, end in spans for stop in (start + 1, end) if stop - start or end]
        return [0, *dict.fromkeys(stops)]

    async def test_have_the_wanted_length_and_no_common_beginning(self) -> None:
        maker = PromptMaker(self.two_a_word, 40, salt=1)
        await maker.prepare(0)
        prompts = [await maker.make(index) for index in range(200)]
        assert {prompt.num_tokens for prompt in prompts} == {40}
        assert len({prompt.text.split()[0] for prompt in prompts}) == 200
        assert [len(await self.two_a_word(prompt.text)) for prompt in prompts] == [40] * 200

    async def test_share_as_many_tokens_as_asked_for(self) -> None:
        maker = PromptMaker(self.two_a_word, 40, salt=1)
        await maker.prepare(25)
        texts = [(await maker.make(index)).text for index in range(20)]
        common = len(next(iter(texts)).split())
        for one, other in itertools.pairwise(texts):
            pairs = zip(one.split(), other.split(), strict=False)
            common = min(
                common, len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
            )
        assert len(await self.two_a_word(" ".join(texts[0].split()[:common]))) == 25
        assert len({text.split()[common] for text in texts}) == 20

    async def test_are_new_with_another_salt(self) -> None:
        texts = []
        for salt in (1, 1, 2):
            maker = PromptMaker(self.two_a_word, 40, salt)
            await maker.prepare(0)
            texts.append((await maker.make(0)).text)
        assert texts[0] == texts[1] != texts[2]

    async def test_of_too_few_tokens_are_refused(self) -> None:
        maker = PromptMaker(self.two_a_word, 2, salt=1)
        await maker.prepare(0)
        with pytest.raises(TargetError, match="2 tokens are too few"):
            await maker.make(0)


class TestBench:
    async def test_warm_up_is_not_counted_and_finds_a_seed_that_does_not_end_early(self) -> None:
        clock = FakeClock()
        transport = FakeTransport(clock, early_seeds=(10, 11))
        asked = options(
            "--requests=5", "--warm-up=3", "--concurrency=2", "--output-tokens=4", "--seed=10"
        )
        report = await bench(transport, asked, clock)
        assert [task.seed for task in transport.tasks] == [10, 11, 12, *[12] * 5]
        assert (report.summary.succeeded, report.summary.ended_early) == (5, 0)
        assert (report.prompt_tokens, report.queue_s) == (128.0, 0.25)
        assert len({task.prompt.split()[0] for task in transport.tasks}) == 8

    async def test_failures_are_counted(self) -> None:
        clock = FakeClock()
        transport = FakeTransport(clock, [None, None, OVERLOADED, None, OVERLOADED])
        report = await bench(transport, options("--requests=4", "--warm-up=2", "--rate=9"), clock)
        assert (report.summary.succeeded, report.summary.failed) == (2, 2)

    async def test_an_overloaded_warm_up_does_not_stop_it(self) -> None:
        clock = FakeClock()
        transport = FakeTransport(clock, [OVERLOADED] * 2)
        report = await bench(transport, options("--requests=4", "--warm-up=2"), clock)
        assert report.summary.succeeded == 4

    async def test_requests_that_cannot_be_valid_stop_it(self) -> None:
        clock = FakeClock()
        transport = FakeTransport(clock, [Failure("validation", "422", "too\nlong")] * 2)
        with pytest.raises(TargetError, match=r"^cannot measure http\S+ validation 422: too long$"):
            await bench(transport, options("--requests=4", "--warm-up=2"), clock)


class TestOptions:
    def test_defaults(self) -> None:
        asked = options()
        assert (asked.rate, asked.concurrency, asked.requests, asked.warm_up) == (None, 8, 64, 8)
        assert options("--rate=2").concurrency is None
        assert asked.target == Target("http://127.0.0.1:8080", "rest", secure=False)

    def test_targets(self) -> None:
        assert parse_target("grpcs://h:1") == Target("grpcs://h:1", "grpc", secure=True)
        assert parse_target("grpc://[::1]:1").authority == "[::1]:1"

    @pytest.mark.parametrize(
        ("flag", "text"),
        [
            ("--target=localhost:8080", "must be like http://host:8080 or grpc://host:50051"),
            ("--target=grpc://localhost", "must be a host and a port"),
            ("--rate=0", "must be a number > 0. Given: 0"),
            ("--rate=nan", "must be a number > 0. Given: nan"),
            ("--requests=0", "must be a whole number >= 1. Given: 0"),
            ("--shared-prefix=128", "--shared-prefix must be < --input-tokens. Given: 128 and 128"),
            ("--port=8080", "unrecognized arguments: --port=8080"),
        ],
    )
    def test_wrong_ones_get_one_line_and_exit_code_2(
        self, flag: str, text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        try:
            code: Any = cli.main(["bench", flag])
        except SystemExit as exit_:
            code = exit_.code
        stderr = capsys.readouterr().err
        assert (code, stderr.count("\n")) == (2, 1)
        assert text in stderr

    def test_shared_prefix_leaves_room(self) -> None:
        with pytest.raises(SettingsError, match="must be < --input-tokens"):
            options("--shared-prefix=9", "--input-tokens=9")

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_server_that_is_not_there_is_one_line_and_exit_code_1(
        self, scheme: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = cli.main(["bench", f"--target={scheme}://127.0.0.1:1"])
        stderr = capsys.readouterr().err
        assert code == 1
        assert stderr.splitlines()[-1].startswith(
            f"tokenwire bench: cannot measure {scheme}://127.0.0.1:1: connection"
        )


def test_ctrl_c_ends_it_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(*_: object) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr("service.bench.command._run", interrupted)
    assert cli.main(["bench"]) == 130


def test_queue_time_is_the_mean_of_what_came_between() -> None:
    before = "# HELP x\ntgi_request_queue_duration_sum 1.0\ntgi_request_queue_duration_count 4.0\n"
    after = "tgi_request_queue_duration_sum 4.0\ntgi_request_queue_duration_count 10.0\n"
    assert mean_queue_s(before, after) == 0.5
    assert mean_queue_s("", after) == 0.4
    assert mean_queue_s(after, after) is None
    assert mean_queue_s("", "") is None


async def tokens_of(transport: RestTransport | GrpcTransport) -> int:
    try:
        return len([None async for _ in transport.stream(TASK)])
    finally:
        await transport.close()


def rest_transport(status: int, content: bytes) -> RestTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=content)

    return RestTransport(parse_target("http://fake"), httpx.MockTransport(answer))


class TestRestTransport:
    async def test_yields_once_for_each_event(self) -> None:
        text = "a\u2028b\x85c"  # ends lines for str.splitlines, not for SSE
        last = json.dumps({"token": {}, "generated_text": text}, ensure_ascii=False)
        body = f':\n\ndata:{{"generated_text":null}}\n\ndata: {last}\n\n'.encode()
        assert await tokens_of(rest_transport(200, body)) == 2

    @pytest.mark.parametrize(
        ("status", "body", "failure"),
        [
            (429, b'{"error":"Model is overloaded","error_type":"overloaded"}', OVERLOADED),
            (
                200,
                b'data:{"error":"x","error_type":"generation"}\n\n',
                Failure("generation", "200", "x"),
            ),
            (
                502,
                b"<html>",
                Failure("http", "502", "the answer to /generate_stream has status 502"),
            ),
            (200, b'data:{"generated_text":null}\n\n', INCOMPLETE),
            (200, b"", INCOMPLETE),
        ],
    )
    async def test_failures(self, status: int, body: bytes, failure: Failure) -> None:
        with pytest.raises(RequestFailed) as caught:
            await tokens_of(rest_transport(status, body))
        assert caught.value.failure == failure

    async def test_tokens_of_something_else(self) -> None:
        transport = rest_transport(200, b'{"tokens":[]}')
        with pytest.raises(RequestFailed, match="no list of tokens"):
            await transport.token_stops("x")
        await transport.close()


class FakeServicer:
    """A gRPC server with one token, then an end of its own kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    async def stream(self, raw: bytes, context: Any) -> AsyncIterator[bytes]:
        request = pb.GenerateRequest.parse(raw)
        assert request.parameters is not None
        assert (request.parameters.seed, request.parameters.max_new_tokens) == (7, 2)
        yield bytes(pb.GenerateStreamResponse(index=1, token=pb.Token(id=1, text="a")))
        if self.kind == "good":
            yield bytes(pb.GenerateStreamResponse(index=2, generated_text="ab"))
        if self.kind == "bad":
            detail = any_pb2.Any()
            detail.Pack(error_details_pb2.ErrorInfo(reason="generation"))
            status = status_pb2.Status(details=[detail]).SerializeToString()
            trailers = (("grpc-status-details-bin", status),)
            await context.abort(grpc.StatusCode.ABORTED, "x", trailers)

    async def tokenize(self, raw: bytes, context: Any) -> bytes:
        return bytes(pb.TokenizeResponse(tokens=[pb.SimpleToken(), pb.SimpleToken(stop=5)]))

    async def metrics(self, raw: bytes, context: Any) -> bytes:
        return bytes(HttpBody(data=b"series 1\n"))


async def serving(kind: str) -> tuple[aio.Server, GrpcTransport]:
    servicer = FakeServicer(kind)
    server = aio.server()
    methods = {
        "GenerateStream": grpc.unary_stream_rpc_method_handler(servicer.stream),
        "Tokenize": grpc.unary_unary_rpc_method_handler(servicer.tokenize),
        "Metrics": grpc.unary_unary_rpc_method_handler(servicer.metrics),
    }
    name = "tokenwire.v1.TextGenerationService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, GrpcTransport(parse_target(f"grpc://127.0.0.1:{port}"))


class TestGrpcTransport:
    async def test_yields_once_for_each_message(self) -> None:
        server, transport = await serving("good")
        assert await transport.token_stops("hello") == [0, 5]
        assert await transport.metrics() == "series 1\n"
        assert await tokens_of(transport) == 2
        await server.stop(None)

    @pytest.mark.parametrize(
        ("kind", "failure"),
        [("bad", Failure("generation", "ABORTED", "x")), ("short", INCOMPLETE)],
    )
    async def test_failures(self, kind: str, failure: Failure) -> None:
        server, transport = await serving(kind)
        with pytest.raises(RequestFailed) as caught:
            await tokens_of(transport)
        assert caught.value.failure == failure
        await server.stop(None)
