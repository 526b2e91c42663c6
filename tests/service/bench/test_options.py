"""The options of `tokenwire bench`, and the answers to wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service import cli
from service.client.credentials import Credentials
from service.client.target import Target, parse_target
from service.launch.options import SettingsError
from tests.service.bench.fakes import options


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
            ("--tls-cert=c", "--tls-cert and --tls-key must be given together"),
            ("--port=8080", "unknown flag --port"),
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

    def test_credentials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("API_KEY", raising=False)
        assert options().credentials == Credentials()
        monkeypatch.setenv("API_KEY", "variable")
        assert options().credentials.headers == (("authorization", "Bearer variable"),)
        asked = options("--api-key=flag", "--tls-ca=ca", "--tls-cert=c", "--tls-key=k").credentials
        assert asked == Credentials("flag", Path("ca"), Path("c"), Path("k"))
        assert "flag" not in repr(asked)

    def test_shared_prefix_leaves_room(self) -> None:
        with pytest.raises(SettingsError, match="must be < --input-tokens"):
            options("--shared-prefix=9", "--input-tokens=9")

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_unreachable_server_is_one_line_and_exit_code_1(
        self, scheme: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = cli.main(["bench", f"--target={scheme}://127.0.0.1:1"])
        stderr = capsys.readouterr().err
        assert code == 1
        assert stderr.splitlines()[-1].startswith(
            f"tokenwire bench: cannot measure {scheme}://127.0.0.1:1: connection"
        )
