"""A scripted engine, a tokenizer of words, and the values that most tests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import grpc
from grpc import aio
from tokenizers import Tokenizer

from engine.protocol.adapters import AdapterInfo, LoadAdapter
from engine.protocol.config import EngineInfo, RankMemory
from engine.protocol.errors import unknown_adapter
from engine.protocol.request import (
    EngineStats,
    FinishReason,
    Request,
    SamplingParams,
    SequenceOutput,
    StepOutput,
)
from engine.protocol.request import Token as RawToken
from service.access.keys import key_line, make_key, parse_keys
from service.api.authentication import Authenticator
from service.api.interceptor import CallInterceptor
from service.call_record import CallRecord
from service.generation.generation import Generation, PrefillToken, Timings, Token
from service.generation.limits import Limits
from service.generation.metrics import Metrics
from service.generation.parameters import GenerationRequest
from service.generation.server_info import ServerInfo
from service.grammar.checker import GrammarChecker
from service.openai.head import Head
from service.text.tokenizer import TextTokenizer
from service.workers.lanes import Lanes
from tests.paths import DEMO_MODEL as MODEL

TIMEOUT_S = 20.0  # of anything that must happen; nothing waits for it to pass

LIMITS = Limits(
    max_concurrent_requests=8,
    max_best_of=2,
    max_stop_sequences=4,
    max_top_n_tokens=5,
    max_input_tokens=90,
    max_total_tokens=200,
    max_client_batch_size=4,
    max_choices=3,
    max_request_values=32_768,
    max_messages=4096,
    max_message_parts=1024,
    max_tools=1024,
    max_stop_sequence_bytes=1024,
    max_tokenize_bytes=1_048_576,
    vocab_size=5000,
)

LANES = Lanes(max_bytes=16 << 20)

ADMIN_KEY = make_key()
_ADMIN_KEYS = parse_keys(key_line("root", ADMIN_KEY))
ADMINS = Authenticator(admin_keys=lambda: _ADMIN_KEYS)  # lets everyone in, there with this key

INFO = EngineInfo(
    model_id="fake",
    model_sha=None,
    dtype="torch.float32",
    device="cpu",
    vocab_size=32,
    max_total_tokens=200,
    max_batch_total_tokens=400,
    block_size=4,
    attention="none",
    ranks=(RankMemory(3000, 2000),),
)

SERVER = ServerInfo(
    engine=INFO,
    limits=LIMITS,
    model_id="some/model",
    compute_type="1-cpu",
    tool_call_format="auto",
    waiting_served_ratio=0.3,
    max_waiting_tokens=20,
    max_batch_size=None,
    validation_workers=2,
)

ANSWER_HEAD = Head(
    id="chatcmpl-1", created=12, model="some/model", system_fingerprint="2.1.2-dev0-native"
)


@cache
def demo_tokenizer() -> TextTokenizer:
    """The tokenizer of the bundled model, as the service loads it."""
    return TextTokenizer.load(str(MODEL))


@cache
def raw_tokenizer() -> Tokenizer:
    """The same tokenizer, without our classes around it."""
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def demo_ids(text: str) -> list[int]:
    """The ids of a text, without special tokens around it."""
    return list(raw_tokenizer().encode(text, add_special_tokens=False).ids)


# Refuses every grammar; tests/service/grammar tests one that does not.
NO_GRAMMARS = GrammarChecker("", 1, frozenset(), enabled=False)


class WordTokenizer:
    """Ids are indices of a list of words; those in angle brackets are special, `<eos>` ends."""

    text_after = None

    def __init__(self, *words: str) -> None:
        self.words = words
        self.special_ids = frozenset(i for i, word in enumerate(words) if word.startswith("<"))
        self.eos_token_ids = frozenset(i for i, word in enumerate(words) if word == "<eos>")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The words, concatenated."""
        return "".join(self.words[index] for index in token_ids)

    def token_text(self, token_id: int) -> str:
        """One word."""
        return self.words[token_id]


Script = Callable[[Request], AsyncGenerator[SequenceOutput]]


class FakeEngineClient:
    """Yields the outputs of a script for every request, and records the requests."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.num_open = 0
        self.num_aborted = 0  # closed before they ended
        self.is_healthy = True
        self.adapters: dict[str, AdapterInfo] = {}

    async def load_adapter(self, wanted: LoadAdapter) -> AdapterInfo:
        """Notes it as loaded."""
        self.adapters[wanted.name] = AdapterInfo(wanted.name, wanted.source, "0" * 64, 4)
        return self.adapters[wanted.name]

    async def unload_adapter(self, name: str, call: str = "") -> None:
        """Notes it as gone.

        Raises:
            AdapterError: there is none.
        """
        if self.adapters.pop(name, None) is None:
            raise unknown_adapter(name)

    def abort(self, call: CallRecord) -> None:
        """Leaves all calls alone: scripts end by themselves."""

    def new_request_id(self) -> str:
        """Consecutive numbers."""
        return str(len(self.requests))

    async def generate(
        self, request: Request, on_end: Callable[[], object] = lambda: None
    ) -> AsyncGenerator[SequenceOutput]:
        """The script's outputs."""
        self.requests.append(request)
        self.num_open += 1
        ended = False
        try:
            async for output in self.script(request):
                ended = output.finish_reason is not None or output.error is not None
                if ended:
                    on_end()
                yield output
        finally:
            self.num_open -= 1
            self.num_aborted += not ended


def script(*outputs: SequenceOutput | Exception | asyncio.Event) -> Script:
    """The same outputs for every request; exceptions are raised, events are waited for."""

    async def engine_script(_: Request) -> AsyncGenerator[SequenceOutput]:
        for output in outputs:
            if isinstance(output, Exception):
                raise output
            if isinstance(output, asyncio.Event):
                await output.wait()
            else:
                yield output

    return engine_script


def step(
    token_id: int | None = None,
    *,
    logprob: float = -0.5,
    top: Iterable[tuple[int, float]] = (),
    finish: FinishReason | None = None,
    prompt_logprobs: tuple[float | None, ...] = (),
    error: str | None = None,
) -> SequenceOutput:
    """The output of one step."""
    return SequenceOutput(
        request_id="any",
        token=None if token_id is None else RawToken(token_id, logprob, tuple(top)),
        finish_reason=finish,
        prompt_logprobs=prompt_logprobs,
        error=error,
        first_scheduled=True,
    )


def speaking(text: str) -> Script:
    """Continues every prompt with a text and the end-of-text token, as an engine would."""
    ids = demo_ids(text)

    async def engine_script(request: Request) -> AsyncGenerator[SequenceOutput]:
        eos = sorted(request.eos_token_ids)[0]
        if request.prompt_logprobs:
            logprobs = [None, *(-0.1 * i for i in range(1, len(request.prompt_token_ids)))]
            yield step(prompt_logprobs=tuple(logprobs))
        for number, token_id in enumerate([*ids, eos], start=1):
            finish = FinishReason.EOS_TOKEN if token_id == eos else None
            if number >= request.max_new_tokens:
                finish = FinishReason.LENGTH
            top = [(token_id, -0.25), (eos, -1.7)][: request.sampling.top_n_tokens]
            yield step(token_id, logprob=-0.03414917, top=top, finish=finish)
            if finish is not None:
                return

    return engine_script


def generation_request(**changes: Any) -> GenerationRequest:
    """A valid request: greedy, three tokens of prompt."""
    values: dict[str, Any] = {
        "inputs": "Once upon",
        "prompt_token_ids": (0, 1, 2),
        "sampling": SamplingParams(seed=7),
        "max_new_tokens": 20,
        "stop": (),
        "return_full_text": False,
        "details": False,
        "decoder_input_details": False,
        "best_of": 1,
    }
    return GenerationRequest(**(values | changes))


def generation(**changes: Any) -> Generation:
    """A finished text of two tokens."""
    values: dict[str, Any] = {
        "request": generation_request(),
        "text": " a time",
        "finish_reason": "length",
        "tokens": [Token(5, " a", -0.5, False), Token(6, " time", 0.0, False)],
        "top_tokens": [],
        "prefill": [],
        "seed": None,
        "timings": Timings(10.0, 10.25, 10.5, 11.5),
    }
    return Generation(**(values | changes))


PREFILL = [PrefillToken(0, "Once", None), PrefillToken(1, " upon", -1.5)]
TOP_TOKENS = [[Token(5, " a", -0.5, False), Token(2, "<eos>", None, True)], []]


def engine_step(**stats: int) -> StepOutput:
    """A step that computed something."""
    return StepOutput(
        stats=EngineStats(**stats),
        num_scheduled_tokens=3,
        num_prefill_tokens=2,
        forward_s=0.25,
        duration_s=0.5,
    )


class FakeContext:
    """A gRPC call with the caller's metadata; it records the headers that are sent."""

    def __init__(self, metadata: Iterable[tuple[str, str]] = ()) -> None:
        self.metadata = tuple(metadata)
        self.headers: list[dict[str, str]] = []

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """What the caller sent."""
        return self.metadata

    async def write(self, message: bytes) -> None:
        """Takes a message of a stream."""

    async def send_initial_metadata(self, headers: Iterable[tuple[str, str]]) -> None:
        """Records the headers."""
        self.headers.append(dict(headers))


def sample(exposition: bytes, name: str) -> float:
    """The value of one series; 0 if it has not appeared."""
    for line in exposition.decode().splitlines():
        if line.startswith(name + " "):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def simple_tokenizer(ids: Sequence[int]) -> SimpleNamespace:
    """A tokenizer that finds the same tokens in every text."""

    async def encode(_: str, *, truncate: int | None = None, max_tokens: int) -> tuple[int, ...]:
        return tuple(ids if truncate is None else ids[-truncate:])

    return SimpleNamespace(encode=encode, too_long=lambda *_: False)


@asynccontextmanager
async def listening(
    handlers: grpc.GenericRpcHandler,
    metrics: Metrics | None = None,
    *,
    credentials: grpc.ServerCredentials | None = None,
    **options: Any,
) -> AsyncGenerator[int]:
    """A server on a free port with our interceptor and its options; gives the port."""
    options = {"from_gateway": False, **options}
    server = aio.server(interceptors=[CallInterceptor(metrics or Metrics(LIMITS), **options)])
    server.add_generic_rpc_handlers((handlers,))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


@asynccontextmanager
async def serving(
    handlers: grpc.GenericRpcHandler, metrics: Metrics | None = None, **options: Any
) -> AsyncGenerator[aio.Channel]:
    """A server as from `listening`, and a channel to it."""
    async with (
        listening(handlers, metrics, **options) as port,
        aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield channel


async def eventually(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110  gRPC and threads set no event
            await asyncio.sleep(0.001)


def trailers(error: aio.AioRpcError) -> dict[str, Any]:
    """The trailing metadata of a failed call."""
    return dict(error.trailing_metadata() or ())
