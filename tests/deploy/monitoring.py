"""The dashboard and the rules in `deploy/`, and the series that their expressions ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from tests.paths import REPOSITORY

PROMETHEUS = REPOSITORY / "deploy" / "prometheus"
DASHBOARD = REPOSITORY / "deploy" / "grafana" / "tokenwire.json"

_SERIES = re.compile(r"(?<![\w:])((?:tgi|tokenwire|grpc|process)_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)(=~|=)"([^"]*)"')


@dataclass(frozen=True)
class Selector:
    """A series that an expression asks for; `labels` has patterns of their values."""

    name: str
    labels: tuple[tuple[str, str], ...] = ()


def selectors(expression: str) -> set[Selector]:
    """All series of an expression, without the labels that Prometheus adds."""
    return {
        Selector(name, tuple(_patterns(matchers))) for name, matchers in _SERIES.findall(expression)
    }


def _patterns(matchers: str) -> Iterator[tuple[str, str]]:
    for label, operator, value in _MATCHER.findall(matchers):
        if label not in ("job", "instance"):
            yield label, value if operator == "=~" else re.escape(value)


def rules() -> list[dict[str, Any]]:
    """All recording and alerting rules."""
    groups = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    result: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return result


def panels() -> list[dict[str, Any]]:
    """Its panels, without the rows between them."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """Those of all rules and panels."""
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [*(rule["expr"] for rule in rules()), *shown]
