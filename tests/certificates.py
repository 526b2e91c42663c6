"""Certificates for a test, made by openssl while it runs; none is in the repository."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_NEW_KEY = ["-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in two files."""

    certificate: Path
    key: Path

    def replace_by(self, other: Pair) -> None:
        """Puts the other's files in place of these, each at once, as operators do."""
        for mine, theirs in ((self.certificate, other.certificate), (self.key, other.key)):
            copy = mine.with_suffix(".new")
            shutil.copyfile(theirs, copy)
            copy.replace(mine)


class Authority:
    """Signs certificates, which all lie in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.certificate, self._key = directory / "ca.pem", directory / "ca.key"
        _openssl(
            ["req", "-x509", *_NEW_KEY, "-days", "2", "-subj", "/CN=a test's authority"],
            {"-keyout": self._key, "-out": self.certificate},
        )

    def issue(self, name: str, *names: str, subject: str | None = None) -> Pair:
        """A certificate whose files are called `name`.

        Args:
            name: of its files, and its CN.
            names: its alternative names, like DNS:localhost or URI:spiffe://a/b.
            subject: instead of the CN, like /O=a/CN=b.
        """
        directory = self._directory / name
        directory.mkdir(exist_ok=True)
        pair = Pair(directory / "certificate.pem", directory / "key.pem")
        request = directory / "request.pem"
        extension = ["-addext", f"subjectAltName={','.join(names)}"] if names else []
        _openssl(
            ["req", *_NEW_KEY, "-subj", subject or f"/CN={name}", *extension],
            {"-keyout": pair.key, "-out": request},
        )
        _openssl(
            ["x509", "-req", "-days", "2", "-copy_extensions", "copy"],
            {"-in": request, "-CA": self.certificate, "-CAkey": self._key}
            | {"-out": pair.certificate},
        )
        return pair


def _openssl(arguments: list[str], files: dict[str, Path]) -> None:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("needs openssl to make a certificate")
    paths = [part for option, path in files.items() for part in (option, str(path))]
    subprocess.run([program, *arguments, *paths], check=True, capture_output=True)
