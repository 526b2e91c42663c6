"""Which of several servers gets a request: the one of its session, its caller or its beginning."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from service.launch.servers import BEGINNING_HEADER, Address, Affinity, Servers
from service.routes import SERVICE
from tests.envoy.fake_service import FakeService, Gate, Messages
from tests.envoy.gateway import Gateway, StartGateway, poll

NUM_SERVERS = 3
EVERYTHING: tuple[Affinity, ...] = ("session", "caller", "beginning")
MANY = range(60)  # by chance they would not all be on fewer servers than there are
LONG = "It is a truth universally acknowledged. " * 40


class Front:
    """A gateway in front of several fake servers, each of which answers with its number."""

    def __init__(self, gateway: Gateway, servers: list[FakeService]) -> None:
        self.gateway = gateway
        self.servers = servers
        self.reset()

    def reset(self) -> None:
        """Lets all servers answer again, and forgets the calls they had."""
        for number, server in enumerate(self.servers):
            server.reset()
            for method in ("Generate", "ChatUnary", "Chat", "Tokenize"):
                server.reply(method, str(number).encode())

    def post(self, body: Any, path: str = "/generate", **headers: str) -> int:
        """The number of the server that a REST request went to."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        reply = self.gateway.client.post(path, json=body, headers=names)
        assert reply.status_code == 200, reply.text
        return int(reply.text)

    def beginning(self) -> str:
        """What the last call that any server got was hashed by; empty for nothing."""
        (call,) = (call for server in self.servers for call in server.calls)
        self.reset()
        return call.metadata.get(BEGINNING_HEADER, "")


@contextlib.contextmanager
def front(start: StartGateway, messages: Messages, **fields: Any) -> Iterator[Front]:
    """A gateway and its servers, all healthy."""
    with contextlib.ExitStack() as stack:
        servers = [FakeService(messages) for _ in range(NUM_SERVERS)]
        for server in servers:
            stack.callback(server.stop)
        addresses = tuple(Address("127.0.0.1", server.port) for server in servers)
        started = start(servers=Servers(addresses=addresses, **fields))
        gateway = stack.enter_context(started)
        poll(lambda: gateway.stat("membership_healthy") == NUM_SERVERS, "all servers are healthy")
        yield Front(gateway, servers)


@pytest.fixture(scope="module")
def running_front(start_gateway: StartGateway, gateway_messages: Messages) -> Iterator[Front]:
    with front(start_gateway, gateway_messages, affinity=EVERYTHING) as running:
        yield running


@pytest.fixture
def by_affinity(running_front: Front) -> Front:
    running_front.reset()
    return running_front


def body(text: str) -> dict[str, Any]:
    return {"inputs": text}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_requests_of_a_session_go_to_one_server_whoever_asks_for_what(by_affinity: Front) -> None:
    used = set()
    for number in MANY:
        session = f"session-{number}"
        first = by_affinity.post(body("a"), x_session_id=session)
        other = by_affinity.post(body("b"), x_session_id=session, authorization="Bearer k")
        chat = {"messages": [turn("user", "c")]}
        assert (
            first == other == by_affinity.post(chat, "/v1/chat/completions", x_session_id=session)
        )
        used.add(first)
    assert used == set(range(NUM_SERVERS))


@pytest.mark.parametrize("header", ["authorization", "x_api_key"])
def test_without_a_session_requests_of_a_key_go_to_one_server(
    by_affinity: Front, header: str
) -> None:
    servers = {number: by_affinity.post(body("a"), **{header: f"k{number}"}) for number in MANY}
    assert set(servers.values()) == set(range(NUM_SERVERS))
    for number, server in servers.items():
        assert by_affinity.post(body("b"), **{header: f"k{number}"}) == server
    assert not any(
        BEGINNING_HEADER in call.metadata for it in by_affinity.servers for call in it.calls
    )


def test_without_either_requests_that_begin_alike_go_to_one_server(by_affinity: Front) -> None:
    used = set()
    for number in MANY:
        start = f"{number} {LONG}"
        first = by_affinity.post(body(start + "What does he want?"))
        assert by_affinity.post(body(start + "And she?")) == first
        used.add(first)
    assert used == set(range(NUM_SERVERS))


def test_both_transports_go_to_the_server_of_a_session(by_affinity: Front) -> None:
    gateway = by_affinity.gateway
    with gateway.channel() as channel:
        generate = gateway.stub(channel, "Generate")
        for number in MANY:
            session = f"session-{number}"
            request = gateway.messages.new("GenerateRequest", inputs="x")
            reply = generate(request, metadata=(("x-session-id", session),))
            assert int(reply.http.data) == by_affinity.post(body("y"), x_session_id=session)


SYSTEM = turn("system", 'You are terse. Say [1], {2} or "3".')
HELLO, ANSWER, MORE = turn("user", "Hello"), turn("assistant", "Hi."), turn("user", "More")
BACKWARDS = {"content": "Hi.", "role": "assistant"}

Requests = tuple[str, Any, Any]
ALIKE: list[Requests] = [
    ("/generate", body(LONG + "a"), body(LONG + "b")),
    ("/generate", body("a"), {"parameters": {"max_new_tokens": 3}, "inputs": "a"}),
    ("/v1/completions", {"model": "m", "prompt": LONG}, {"prompt": LONG + "b", "model": "m"}),
    ("/v1/completions", {"prompt": [LONG, "a"]}, {"prompt": [LONG, "b"]}),
    (
        "/v1/chat/completions",
        {"messages": [SYSTEM, HELLO], "max_tokens": 5},
        {"max_tokens": 7, "messages": [SYSTEM, HELLO, ANSWER, MORE]},
    ),
    (
        "/v1/chat/completions",
        {"messages": [HELLO]},
        {"messages": [HELLO, BACKWARDS, MORE], "stream": True},
    ),
    (
        "/v1/chat/completions",
        {"messages": [turn("user", LONG + "a")]},
        {"messages": [turn("user", LONG + "b")]},
    ),
    (
        "/v1/responses",
        {"input": [{"type": "message", **HELLO}], "instructions": "Be terse."},
        {
            "instructions": "Be terse.",
            "input": [{"type": "message", **turn}for turn in (HELLO, ANSWER, MORE)],
        },
    ),
]  # fmt: skip
UNLIKE: list[Requests] = [
    ("/generate", body("a"), body("b")),
    ("/generate", body("a" + LONG), body("b" + LONG)),
    ("/v1/completions", {"prompt": "a", "model": "m"}, {"prompt": "b", "model": "m"}),
    ("/v1/chat/completions", {"messages": [SYSTEM, HELLO]}, {"messages": [SYSTEM, MORE]}),
    (
        "/v1/responses",
        {"input": "Hello", "instructions": "Be terse."},
        {"input": "Hello", "instructions": "Be polite."},
    ),
]


def rest_beginnings(front: Front, requests: Requests) -> list[str]:
    """What two REST requests are hashed by."""
    path, *bodies = requests
    found = []
    for content in bodies:
        assert front.gateway.client.post(path, json=content).status_code == 200
        found.append(front.beginning())
    return found


@pytest.mark.parametrize("requests", ALIKE)
def test_these_requests_begin_alike(by_affinity: Front, requests: Requests) -> None:
    one, other = rest_beginnings(by_affinity, requests)
    assert one == other != ""


@pytest.mark.parametrize("requests", UNLIKE)
def test_these_requests_do_not(by_affinity: Front, requests: Requests) -> None:
    one, other = rest_beginnings(by_affinity, requests)
    assert "" != one != other != ""


def grpc_beginning(front: Front, rpc: str, message: str, fields: dict[str, Any]) -> str:
    """What a gRPC request is hashed by."""
    gateway = front.gateway
    with gateway.channel() as channel:
        call = gateway.stub(channel, rpc)(gateway.messages.new(message, **fields))
        if gateway.messages.service.methods_by_name[rpc].server_streaming:
            list(call)
    return front.beginning()


def chat(front: Front, *turns: dict[str, Any]) -> dict[str, Any]:
    value = front.gateway.messages.new
    return {
        "messages": [
            {
                "role": it["role"],
                "content": value("google.protobuf.Value", string_value=it["content"]),
            }
            for it in turns
        ]
    }


def test_messages_begin_alike_as_bodies_do(by_affinity: Front) -> None:
    def of(rpc: str, **fields: Any) -> str:
        kind = by_affinity.gateway.messages.service.methods_by_name[rpc].input_type.name
        return grpc_beginning(by_affinity, rpc, kind, fields)

    def of_chat(*turns: dict[str, Any], **fields: Any) -> str:
        return of("ChatUnary", **chat(by_affinity, *turns), **fields)

    assert of("Generate", inputs=LONG + "a") == of("GenerateStream", inputs=LONG + "bcd" * 99) != ""
    assert of("Generate", inputs="a") != of("Generate", inputs="b")
    prompts = of("CompletionsUnary", prompt=[LONG, "a"]), of("Completions", prompt=[LONG + "b"])
    assert prompts[0] == prompts[1] != ""
    first = of_chat(SYSTEM, HELLO, model="m", max_tokens=5)
    assert first == of_chat(SYSTEM, HELLO, ANSWER, MORE) != ""
    assert first != of_chat(SYSTEM, MORE)
    long = [of_chat(SYSTEM, turn("user", LONG + end)) for end in ("a", "b" * 999)]
    assert long[0] == long[1] != ""


def test_tables_of_fields_are_those_of_the_protos(by_affinity: Front) -> None:
    """Each field alone makes a beginning, of every RPC that generates."""
    messages = by_affinity.gateway.messages
    value = messages.new("google.protobuf.Value", string_value="x")
    texts: dict[str, Any] = {"inputs": "x", "prompt": ["x"], "instructions": "x", "input": value}
    texts |= chat(by_affinity, HELLO)
    for rpc in messages.service.methods:
        for field in rpc.input_type.fields:
            if field.name in texts and "okenize" not in rpc.name:
                fields = {field.name: texts[field.name]}
                assert grpc_beginning(by_affinity, rpc.name, rpc.input_type.name, fields), rpc.name


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"inputs"', b'{"inputs":', b'{"inputs":"\\', b'"inputs":[[[[', b"\xff" * 2000],
)
def test_a_body_that_is_none_is_for_the_server_to_refuse(
    by_affinity: Front, content: bytes
) -> None:
    head = {"content-type": "application/json"}
    reply = by_affinity.gateway.client.post("/generate", content=content, headers=head)
    assert reply.status_code == 200
    by_affinity.beginning()  # it has reached a server


@pytest.mark.parametrize("message", [b"", b"\x0a", b"\x0a\xff\xff\xff\xff\x0f", b"\x80" * 30])
def test_a_message_that_is_none_is_for_the_server_to_refuse(
    by_affinity: Front, message: bytes
) -> None:
    with by_affinity.gateway.channel() as channel:
        call = channel.unary_unary(f"/{SERVICE}/Generate")
        with contextlib.suppress(grpc.RpcError):
            call(message, timeout=60)
            return
    # The server's own parser has refused it.
    reply = by_affinity.post(body("x"))
    assert reply in range(NUM_SERVERS)


def test_long_requests_pass(by_affinity: Front) -> None:
    text = "x" * 1_500_000
    assert by_affinity.post(body(text)) in range(NUM_SERVERS)
    by_affinity.reset()
    gateway = by_affinity.gateway
    with gateway.channel() as channel:
        reply = gateway.stub(channel, "Generate")(
            gateway.messages.new("GenerateRequest", inputs=text)
        )
        assert int(reply.http.data) in range(NUM_SERVERS)
    assert by_affinity.beginning()
    too_long = gateway.client.post("/generate", json=body("x" * 2_100_000))
    assert too_long.status_code == 413


def test_callers_do_not_say_how_a_request_begins(by_affinity: Front) -> None:
    by_affinity.post(body("a"))
    one = by_affinity.beginning()
    by_affinity.post(body("a"), **{BEGINNING_HEADER.replace("-", "_"): "other"})
    assert by_affinity.beginning() == one


def hold(server: FakeService, number: int) -> Gate:
    """Makes a server answer when a gate is open."""
    gate = server.gate()
    reply = server.messages.reply("Generate", str(number).encode())

    async def wait(_request: Any, _context: Any) -> Any:
        await gate.wait()
        return reply

    server.behave("Generate", wait)
    return gate


def test_a_session_with_many_requests_is_helped_by_other_servers(by_affinity: Front) -> None:
    count, arrived = 12, by_affinity.servers
    gates = [hold(server, number) for number, server in enumerate(by_affinity.servers)]
    with ThreadPoolExecutor(count) as pool:
        calls = []
        for number in range(1, count + 1):
            calls.append(pool.submit(by_affinity.post, body("x"), x_session_id="busy"))
            poll(lambda n=number: sum(len(it.calls) for it in arrived) == n, "the call has arrived")
        for gate in gates:
            gate.open()
        loads = Counter(call.result() for call in calls)
    # Envoy's bound for the last call, 1.5 times the average, and one above it.
    assert max(loads.values()) <= -(-(count + 1) * 3 // (2 * NUM_SERVERS)) + 1
    assert len(loads) > 1


def test_a_server_at_its_limits_is_helped_and_all_at_their_limits_say_so(
    by_affinity: Front,
) -> None:
    own = by_affinity.post(body("x"), x_session_id="s")
    full: dict[str, str] = {
        "x_http_status": "429",
        "x_error_body": json.dumps({"error": "Model is overloaded", "error_type": "overloaded"}),
        "retry_after": "1",
    }
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    by_affinity.servers[own].fail("Generate", code, "full", **full)
    assert by_affinity.post(body("x"), x_session_id="s") != own
    for server in by_affinity.servers:
        server.fail("Generate", code, "full", **full)
    reply = by_affinity.gateway.client.post(
        "/generate", json=body("x"), headers={"x-session-id": "s"}
    )
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
    assert reply.json()["error_type"] == "overloaded"


def test_a_server_that_ends_is_helped(by_affinity: Front) -> None:
    own = by_affinity.post(body("x"), x_session_id="s")
    by_affinity.servers[own].fail("Generate", grpc.StatusCode.UNAVAILABLE, "ending")
    assert by_affinity.post(body("x"), x_session_id="s") != own


def test_errors_of_callers_are_not_asked_again(by_affinity: Front) -> None:
    for server in by_affinity.servers:
        server.fail("Generate", grpc.StatusCode.INVALID_ARGUMENT, "no", x_http_status="422")
    reply = by_affinity.gateway.client.post("/generate", json=body("x"))
    assert reply.status_code == 422
    assert sum(len(server.calls) for server in by_affinity.servers) == 1


def test_without_affinity_the_server_with_the_fewest_requests_gets_the_next(
    start_gateway: StartGateway, gateway_messages: Messages
) -> None:
    with front(start_gateway, gateway_messages) as running:
        gates = [hold(server, number) for number, server in enumerate(running.servers)]
        head = {"x_session_id": "s"}
        with ThreadPoolExecutor(30) as pool:
            calls = []
            for number in range(1, 31):
                calls.append(pool.submit(running.post, body("x"), **head))
                poll(
                    lambda n=number: sum(len(it.calls) for it in running.servers) == n,
                    "the call has arrived",
                )
            for gate in gates:
                gate.open()
            loads = Counter(call.result() for call in calls)
        # Of two by chance the one with fewer: never all, and never far from each other.
        assert max(loads.values()) - min(loads.values()) <= 10
        assert BEGINNING_HEADER not in running.servers[0].calls[0].metadata


def test_by_the_beginning_alone_keys_do_not_matter(
    start_gateway: StartGateway, gateway_messages: Messages
) -> None:
    with front(start_gateway, gateway_messages, affinity=("beginning",)) as running:
        servers = {running.post(body("x"), authorization=f"k{number}") for number in MANY}
        assert len(servers) == 1
