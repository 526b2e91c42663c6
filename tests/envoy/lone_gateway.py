"""`tokenwire envoy` as a process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from service.launch.sources import without_settings
from tests.envoy.fake_service import DEADLINE
from tests.envoy.gateway import poll
from tests.paths import REPOSITORY


class LoneGateway:
    """The command as a process; `port` is that of a service, if settings name no servers."""

    def __init__(self, port: int, log: Path, **settings: str) -> None:
        self.log = log
        environment = without_settings(os.environ) | settings
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "envoy", "--port=0"],
                cwd=REPOSITORY,
                env={**environment, "TOKENWIRE_GATEWAY_PORT": str(port)},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.port = poll(self._port, "Envoy listens")
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=DEADLINE, trust_env=False
        )
        poll(lambda: self.client.get("/health").status_code == 200, "the service is found")

    def envoy(self) -> psutil.Process:
        """Envoy's process."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def is_closed(self) -> bool:
        """Whether nothing listens on the public port."""
        try:
            httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=DEADLINE, trust_env=False)
        except httpx.ConnectError:
            return True
        except httpx.TransportError:  # it was closed just after it had accepted the connection
            pass
        return False

    def end(self) -> None:
        """Ends whatever is left."""
        self.client.close()
        self.process.kill()
        self.process.wait(DEADLINE)

    def _port(self) -> int | None:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):
            found = self.envoy().net_connections("tcp")
            return next((c.laddr.port for c in found if c.status == psutil.CONN_LISTEN), None)
        return None


@contextlib.contextmanager
def lone_gateway(port: int, directory: Path, **settings: str) -> Iterator[LoneGateway]:
    """The command for the length of a block; settings are variables."""
    gateway = LoneGateway(port, directory / "log", **settings)
    try:
        yield gateway
    finally:
        gateway.end()
