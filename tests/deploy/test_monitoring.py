"""Alert rules and dashboard are sound; that a server has their series is tested in tests/e2e."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess

import pytest
import yaml

from tests.deploy.monitoring import PROMETHEUS, Selector, dashboard, panels, rules, selectors
from tests.paths import REPOSITORY

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")


@needs_promtool
@pytest.mark.parametrize(
    "command", [["check", "rules", "rules.yml"], ["test", "rules", "rules.test.yml"]]
)
def test_promtool_accepts_the_rules(command: list[str]) -> None:
    done = subprocess.run(
        ["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_each_rule_is_tried_out() -> None:
    (tests,) = yaml.safe_load((PROMETHEUS / "rules.test.yml").read_text())["tests"]
    tried = {item["alertname"] for item in tests["alert_rule_test"] if item["exp_alerts"]}
    tried |= {item["expr"] for item in tests["promql_expr_test"] if item["exp_samples"]}
    assert {rule.get("alert") or rule["record"] for rule in rules()} == tried


def test_each_alert_says_what_is_wrong_and_how_bad_it_is() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("warning", "critical"), rule
            assert "{{ $labels.instance }}" in rule["annotations"]["summary"], rule
            assert rule["annotations"]["summary"].endswith(".")


def test_panels_have_a_place_of_their_own() -> None:
    items = dashboard()["panels"]
    assert len({panel["id"] for panel in items}) == len(items)
    places = [
        {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        for place in (panel["gridPos"] for panel in items)
    ]
    assert all(x < 24 for place in places for x, _ in place)
    assert not any(one & other for one, other in itertools.combinations(places, 2))


def test_panels_say_what_they_show_of_the_chosen_servers() -> None:
    variables = {item["name"] for item in dashboard()["templating"]["list"]}
    for panel in panels():
        assert panel["description"], panel["title"]
        for target in panel["targets"]:
            expression = target["expr"]
            used = set(re.findall(r"\$(\w+)", expression)) - {"__rate_interval"}
            assert used == {"job", "instance"} <= variables
            assert expression.count("instance=~") == len(re.findall(r"[a-z]\{", expression))


def test_series_are_found_in_expressions() -> None:
    expression = 'sum by (le) (rate(tgi_a_bucket{job=~"$job", err=~"x|y"}[5m])) / process_b == 0'
    expected = {Selector("tgi_a_bucket", (("err", "x|y"),)), Selector("process_b")}
    assert selectors(expression) == expected


def test_the_readme_lists_every_panel() -> None:
    rows: dict[str, list[str]] = {}
    for panel in dashboard()["panels"]:
        if panel["type"] == "row":
            rows[panel["title"]] = []
        else:
            rows[next(reversed(rows))].append(panel["title"])
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    for row, titles in rows.items():
        assert f"| {row} | {', '.join(titles)} |" in lines
