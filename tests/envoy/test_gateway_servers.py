"""Several servers behind one Envoy: one that dies or freezes costs its streams and nothing else."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from service.launch.edge import Edge
from service.launch.endpoints import write_endpoints
from service.launch.servers import Address, Affinity, Servers
from tests.callers import Callers
from tests.envoy.fake_server import FakeServer
from tests.envoy.fake_service import DEADLINE, FakeService, Messages
from tests.envoy.gateway import Gateway, StartGateway, poll
from tests.envoy.lone_gateway import lone_gateway
from tests.envoy.name_server import NameServer

NUM_SERVERS = 3


@pytest.fixture(scope="module")
def servers() -> Iterator[list[FakeServer]]:
    """Three servers in processes of their own."""
    started = [FakeServer(f"server-{number}") for number in range(NUM_SERVERS)]
    for server in started:
        server.wait_for_port()
    yield started
    for server in started:
        server.kill()


def asking(client: httpx.Client) -> Callers:
    """Callers of a gateway, each call in a session of its own."""

    def ask(number: int) -> str:
        head = {"x-session-id": str(number)}
        reply = client.post("/generate", json={"inputs": "x"}, headers=head)
        assert reply.status_code == 200, reply.text
        return reply.text

    return Callers(ask)


class Stream:
    """A stream that is read as it comes."""

    def __init__(self, gateway: Gateway, channel: grpc.Channel, session: str) -> None:
        self.server = ""
        self.num_read = 0
        self.error: grpc.RpcError | None = None
        self._call = gateway.stub(channel, "GenerateStream")(
            gateway.messages.new("GenerateRequest", inputs="x"),
            metadata=(("x-session-id", session),),
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        poll(lambda: self.server, "the stream begins")

    def close(self) -> None:
        """Leaves."""
        self._call.cancel()
        self._thread.join(DEADLINE)

    def wait_for_more(self) -> None:
        """Returns once it has gone on."""
        before = self.num_read
        poll(lambda: self.num_read > before, "the stream goes on")

    def _read(self) -> None:
        try:
            for piece in self._call:
                self.server = piece.http.data.decode()
                self.num_read += 1
        except grpc.RpcError as error:
            self.error = error


@contextlib.contextmanager
def streams_of(gateway: Gateway, servers: list[FakeServer]) -> Iterator[dict[str, Stream]]:
    """A stream from each of the servers, by its name."""
    streams: dict[str, Stream] = {}
    with contextlib.ExitStack() as stack:
        channel = stack.enter_context(gateway.channel())
        for session in itertools.count():
            stream = Stream(gateway, channel, str(session))
            stack.callback(stream.close)
            streams[stream.server] = stream
            if len(streams) == len(servers):
                break
        yield streams


@contextlib.contextmanager
def front(
    start: StartGateway, servers: list[FakeServer], affinity: tuple[Affinity, ...]
) -> Iterator[Gateway]:
    addresses = tuple(Address("127.0.0.1", server.port) for server in servers)
    edge = Edge(server_ping_s=0.2, server_answer_s=2, ejection_s=0.2)
    with start(servers=Servers(addresses=addresses, affinity=affinity), edge=edge) as gateway:
        wait_for_healthy(gateway, len(servers))
        yield gateway


def wait_for_healthy(gateway: Gateway, count: int) -> None:
    poll(lambda: gateway.stat("membership_healthy") == count, f"{count} servers are healthy")


@pytest.mark.parametrize(
    ("way", "affinity"),
    [("kill", ()), ("freeze", ("session",))],
    ids=["killed-by-least-request", "frozen-by-affinity"],
)
def test_no_answer_is_lost_with_a_server_and_only_its_streams_end(
    start_gateway: StartGateway,
    servers: list[FakeServer],
    way: str,
    affinity: tuple[Affinity, ...],
) -> None:
    with front(start_gateway, servers, affinity) as gateway:
        for lost in servers:
            others = [server for server in servers if server is not lost]
            with streams_of(gateway, servers) as streams, asking(gateway.client) as callers:
                callers.wait_for_more(server.name for server in servers)
                getattr(lost, way)()
                ended = poll(lambda it=streams[lost.name]: it.error, "its stream ends")
                assert ended.code() is grpc.StatusCode.INTERNAL  # the stream was reset
                callers.wait_for_more(server.name for server in others)
                if way == "kill":
                    lost.start()
                    lost.wait_for_port()
                else:
                    lost.thaw()
                callers.wait_for_more(server.name for server in servers)  # it gets requests again
                for server in others:
                    streams[server.name].wait_for_more()
            assert not callers.errors


def test_the_file_of_addresses_is_followed(gateway_messages: Messages, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        first, second = (FakeService(gateway_messages) for _ in range(2))
        for number, service in enumerate((first, second)):
            stack.callback(service.stop)
            service.reset()
            service.reply("Generate", str(number).encode())
        path = tmp_path / "servers"
        path.write_text(f"# the first one\n127.0.0.1:{first.port}\n")
        settings = {"TOKENWIRE_SERVICE_ENDPOINTS_FILE": str(path)}
        gateway = stack.enter_context(lone_gateway(first.port, tmp_path, **settings))

        def server() -> str:
            return gateway.client.post("/generate", json={"inputs": "x"}).text

        assert {server() for _ in range(20)} == {"0"}
        path.write_text(f"127.0.0.1:{first.port}\n127.0.0.1:{second.port}  # another one\n")
        poll(lambda: server() == "1", "the second server is asked")
        path.write_text("nonsense\n")
        poll(lambda: "not an address host:port: 'nonsense'" in gateway.log.read_text(), "a word")
        assert {server() for _ in range(20)} == {"0", "1"}
        new = path.with_suffix(".new")
        new.write_text(f"127.0.0.1:{second.port}\n")
        new.replace(path)
        poll(lambda: {server() for _ in range(20)} == {"1"}, "the first one is asked no longer")


def test_a_server_that_is_named_no_longer_ends_its_streams_in_peace(
    start_gateway: StartGateway, servers: list[FakeServer], tmp_path: Path
) -> None:
    one, other, _ = servers
    addresses = {it.name: Address("127.0.0.1", it.port) for it in (one, other)}
    config = Servers(addresses=tuple(addresses.values()), endpoints_file=tmp_path / "unused")
    with start_gateway(servers=config) as gateway:
        wait_for_healthy(gateway, 2)
        with streams_of(gateway, [one, other]) as streams, asking(gateway.client) as callers:
            write_endpoints((addresses[one.name],), gateway.directory / "servers.json")
            wait_for_healthy(gateway, 1)
            callers.wait_for_more([one.name])
            streams[other.name].wait_for_more()
        assert not callers.errors


def test_a_name_stands_for_all_its_addresses_and_is_asked_for_again(
    start_gateway: StartGateway, gateway_messages: Messages
) -> None:
    """Of a DNS server of our own."""
    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    with contextlib.ExitStack() as stack:
        port = 0
        for host in hosts:
            service = FakeService(gateway_messages, port, host)
            stack.callback(service.stop)
            service.reset()
            service.reply("Generate", host.encode())
            port = service.port
        names = stack.enter_context(NameServer(*hosts[:2]))
        config = Servers(
            addresses=(Address("servers.example", port),),
            resolvers=(Address("127.0.0.1", names.port),),
        )
        gateway = stack.enter_context(start_gateway(servers=config, edge=Edge(resolving_s=0.1)))

        def answering() -> set[str]:
            replies = [gateway.client.post("/generate", json={"inputs": "x"}) for _ in range(20)]
            assert {reply.status_code for reply in replies} == {200}
            return {reply.text for reply in replies}

        wait_for_healthy(gateway, 2)
        assert answering() == set(hosts[:2])
        names.addresses = hosts[1:]
        poll(lambda: answering() == set(hosts[1:]), "one address for another")
        names.addresses = None
        poll(lambda: names.num_failed > 3, "the name server fails")
        assert answering() == set(hosts[1:])


def test_a_name_and_an_address_stand_side_by_side(
    start_gateway: StartGateway, servers: list[FakeServer]
) -> None:
    one, other, _ = servers
    addresses = Address("localhost", one.port), Address("127.0.0.1", other.port)
    with (
        start_gateway(servers=Servers(addresses=addresses)) as gateway,
        asking(gateway.client) as callers,
    ):
        callers.wait_for_more([one.name, other.name])
    assert not callers.errors
