"""A server's exposition, read into families and samples."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.deploy.monitoring import Selector

_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_PARTS = re.compile("_(bucket|sum|count)$")


@dataclass(frozen=True)
class Sample:
    """A value, and its labels."""

    labels: Mapping[str, str]
    value: float


@dataclass
class Family:
    """A name with its type and samples, which may have names of their own."""

    kind: str
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    @property
    def labels(self) -> set[str]:
        """The labels of all samples, without the bounds of buckets."""
        return {
            name for samples in self.samples.values() for item in samples for name in item.labels
        } - {"le"}


def families(text: str) -> dict[str, Family]:
    """All families of an exposition in the text format."""
    found = {
        name: Family(kind) for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    }
    for line in text.splitlines():
        if not line.startswith("#"):
            match = _SAMPLE.fullmatch(line)
            assert match is not None, line
            name, labels, value = match.groups()
            family = found.get(name) or found[_PARTS.sub("", name)]
            sample = Sample(dict(_LABEL.findall(labels or "")), float(value))
            family.samples.setdefault(name, []).append(sample)
    return found


def matching(found: Mapping[str, Family], selector: Selector) -> list[Sample]:
    """The samples that a selector asks for."""
    family = found.get(selector.name) or found.get(_PARTS.sub("", selector.name))
    samples = [] if family is None else family.samples.get(selector.name, [])
    return [
        item
        for item in samples
        if all(re.fullmatch(value, item.labels.get(key, "")) for key, value in selector.labels)
    ]
