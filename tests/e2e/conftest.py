"""One server for all tests of this folder; a failure shows the end of its log."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.e2e.native_models import THINKING, model_with
from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import Stack, running

_LOG_CHARS = 6000

# Makes failed assertions in these modules show their values, as in test files.
_MODULES = [
    "contract",
    "grammars",
    "refusal",
    "rest_replies",
    "shapes",
    "tool_calls",
    "typed_messages",
]
pytest.register_assert_rewrite(*(f"tests.e2e.{name}" for name in _MODULES))

_live: list[Stack] = []


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The server that all tests share; each test must leave it idle and healthy."""
    with running(tmp_path_factory.mktemp("stack") / "log") as stack:
        _live.append(stack)
        yield stack
        _live.remove(stack)


@pytest.fixture(scope="session", params=["direct", "through_envoy"])
def api(stack: Stack, request: pytest.FixtureRequest) -> ReflectionClient:
    """The gRPC API, on the service's own port and on Envoy's."""
    return ReflectionClient(getattr(stack, request.param))


@pytest.fixture(scope="session")
def direct_api(stack: Stack) -> ReflectionClient:
    """The gRPC API on the service's own port."""
    return ReflectionClient(stack.direct)


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server of the model that a module's own fixture `checkpoint` makes."""
    log = tmp_path_factory.mktemp("served") / "log"
    with running(log, f"--model-id={checkpoint}") as stack:
        yield stack


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server whose template opens the reasoning."""
    directory = tmp_path_factory.mktemp("thinking")
    model = model_with(directory / "model", THINKING, with_tags=True)
    with running(directory / "log", f"--model-id={model}") as server:
        yield server


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the end of the server's log to a failure."""
    report = yield
    if report.failed:
        stacks = [*_live, *(v for v in getattr(item, "funcargs", {}).values() if v not in _live)]
        for stack in stacks:
            if isinstance(stack, Stack):
                report.sections.append((f"log of {stack.url}", stack.log()[-_LOG_CHARS:]))
    return report


@pytest.fixture(params=["rest", "grpc", "grpc through Envoy"])
def target(stack: Stack, request: pytest.FixtureRequest) -> str:
    """Where the commands that are clients find the server, in each way that there is."""
    return {
        "rest": stack.url,
        "grpc": f"grpc://{stack.grpc_address}",
        "grpc through Envoy": f"grpc://{stack.address}",
    }[request.param]
