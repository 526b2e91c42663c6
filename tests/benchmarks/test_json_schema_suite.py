"""How the JSON Schema Test Suite is judged, on cases like those in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.json_schema_suite import judge, scores, table


def case(schema: Any, valid: list[Any], invalid: list[Any]) -> dict[str, Any]:
    """A case in the suite's form."""
    instances = [(value, True) for value in valid] + [(value, False) for value in invalid]
    tests = [{"description": str(v), "data": v, "valid": is_valid} for v, is_valid in instances]
    return {"description": "a case", "schema": schema, "tests": tests}


RIGHT = [
    case({"type": "integer", "maximum": 3}, [3, 3.0, -5], [4, 3.5, "3", None]),
    case({"required": ["b", "a"]}, [{"a": 1, "b": 2}, 7], [{"a": 1}]),
    case({"type": "number", "multipleOf": 0.5}, [1, 1.5, -2.0], [0.3]),
    case({"type": "array", "items": [{"const": "é"}]}, [["é", 1], []], [["e"]]),
    case({"enum": [{"a": [1, None]}, 5]}, [{"a": [1, None]}, 5.0], [{"a": [1]}, {}]),
    case(True, ["a", {}], []),
    case(False, [], ["a", {}]),
]


@pytest.mark.parametrize("right", RIGHT)
def test_a_case_that_is_enforced_is_right(right: dict[str, Any]) -> None:
    score = judge([right])
    assert (score.cases, score.accepted, score.right, score.narrowed) == (1, 1, 1, 0)
    assert score.reachable + score.kept_out == len(right["tests"])


def test_what_is_ruled_out_on_purpose_is_narrowed() -> None:
    score = judge([case({"properties": {"a": {}}}, [{"a": 1}, {"b": 1}], [])])
    assert (score.right, score.reachable, score.narrowed) == (1, 1, 1)


def test_a_case_that_is_not_enforced_is_wrong() -> None:
    wrong = judge([case({"type": "string"}, [1], []), case({"type": "null"}, [], [None])])
    assert (wrong.accepted, wrong.right, len(wrong.faults)) == (2, 1, 1)


def test_a_refused_case_is_neither(tmp_path: Path) -> None:
    refused = case({"uniqueItems": True}, [[1]], [[1, 1]])
    (tmp_path / "uniqueItems.json").write_text(json.dumps([refused, RIGHT[0]]))
    results = scores(tmp_path)
    assert "| uniqueItems | 2 | 1 | 1 |" in table(results)
    assert '"uniqueItems" cannot be enforced' in results["uniqueItems"].reasons[0]
