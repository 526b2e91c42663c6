"""Requests generated from the schemas of the document, valid and broken: never answered with a 5xx.

The examples are the same in every run.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.e2e.contract import DOCUMENT, DONE, SSE, Checker, events, meant_path, resolve
from tests.e2e.refusal import processes
from tests.e2e.stack import Stack

POSTS = [
    path
    for path, methods in DOCUMENT["paths"].items()
    if "post" in methods and "security" not in methods["post"]  # else it is refused unread
]
EXAMPLES = 18  # for each path

MAX_TOKENS = 3  # few: these tests are about reading requests, not about generating
MAX_OPTIONAL = 3  # optional properties per object: with more, requests are almost never valid

TEXTS = ["a", "Hello world", "", "¿Qué? 🙂", "\x00\u200b\ufeff", "user", "assistant", "auto", "tgi"]
HUGE = "long " * 20_000
DEEP: Any = json.loads("[" * 90 + "]" * 90)
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 1e-45, 1e39, 1e308, float("nan"), float("inf")),
    *(2**31, 2**32, 2**53 + 1, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**30),
    *("", "1", "null", "\ud800", "\x00", "🙂" * 50, HUGE, "{}", "../../etc/passwd", "{{ x }}"),
    *([], {}, [None], [[]], [1, "a", None], {"": None}, {"a": {"b": [1]}}, DEEP, ["a"] * 500),
]


@st.composite
def objects(draw: st.DrawFn, schema: dict[str, Any]) -> dict[str, Any]:
    """All required properties and some optional ones."""
    required = schema.get("required", [])
    properties = schema.get("properties", {})
    optional = [name for name in properties if name not in required]
    chosen = []
    if optional:
        names = st.sampled_from(optional)
        chosen = draw(st.lists(names, max_size=MAX_OPTIONAL, unique=True))
    return {name: draw(values(properties[name])) for name in [*required, *chosen]}


def _texts(example: str | None) -> st.SearchStrategy[str]:
    """Any text, but often the example of the document, since few texts are valid roles."""
    anything = st.sampled_from(TEXTS) | st.text(max_size=12)
    return anything if example is None else st.just(example) | st.just(example) | anything


_PLAIN: dict[str, Callable[[dict[str, Any]], st.SearchStrategy[Any]]] = {
    "boolean": lambda _: st.booleans(),
    "string": lambda schema: _texts(schema.get("example")),
    "integer": lambda schema: st.integers(schema.get("minimum", -1), 5),
    "number": lambda schema: st.floats(
        schema.get("exclusiveMinimum", -2), schema.get("maximum", 2), width=16
    ),
    "array": lambda schema: st.lists(values(schema["items"]), min_size=1, max_size=3),
    "object": objects,
}
_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that fit a schema of the document."""
    schema = resolve(schema)
    if schema.get("nullable"):
        return st.none() | values({**schema, "nullable": False})
    for union in ("oneOf", "allOf"):
        if union in schema:
            return st.one_of([values(item) for item in schema[union]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "type" not in schema:
        return _ANYTHING
    return st.deferred(lambda: _PLAIN[schema["type"]](schema))


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every entry within a value, at all levels."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _entries(value[key])


@st.composite
def bodies(draw: st.DrawFn, path: str) -> Any:
    """The body of a request, with up to two mutations."""
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]
    body = draw(values(content["application/json"]["schema"]))
    limit_length(body)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        body = draw(mutated(body))
    return body


def limit_length(body: dict[str, Any]) -> None:
    """Sets a small number of tokens, unless the body has one: then it is at most 5, or invalid."""
    if "inputs" in body:
        body.setdefault("parameters", {}).setdefault("max_new_tokens", MAX_TOKENS)
    else:
        body.setdefault("max_tokens", MAX_TOKENS)


@st.composite
def mutated(draw: st.DrawFn, body: Any) -> Any:
    """The same body with a value replaced or wrapped, or a key removed or added."""
    junk = draw(st.sampled_from(JUNK))
    body = copy.deepcopy(body)
    entries = list(_entries(body)) if isinstance(body, dict | list) else []
    if not entries:
        return junk
    container, key = draw(st.sampled_from(entries))
    match draw(st.sampled_from(["replace", "replace", "remove", "add", "wrap", "all"])):
        case "replace":
            container[key] = junk
        case "remove":
            del container[key]
        case "wrap":
            container[key] = [container[key]]
        case "all":
            return junk
        case "add" if isinstance(container, dict):
            container["\nunknown 🙂"] = junk
    return body


@pytest.fixture(scope="module")
def outcomes(stack: Stack) -> Iterator[Counter[int]]:
    """Counts statuses. After all examples, checks that the server is unharmed."""
    before = processes(stack)
    expected = stack.generate()
    counter: Counter[int] = Counter()
    yield counter
    stack.wait_until_idle()
    assert stack.is_healthy()
    assert stack.generate() == expected
    assert processes(stack) == before


@pytest.mark.parametrize("path", POSTS)
def test_generated_body_is_served_or_refused(
    stack: Stack, outcomes: Counter[int], path: str
) -> None:
    met: Counter[int] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(body=bodies(path))
    def check(body: Any) -> None:
        text = json.dumps(body)
        reply = stack.http.post(path, content=text, headers={"content-type": "application/json"})
        met[reply.status_code] += 1
        check_reply(path, body, reply)
        if not is_json(text):
            assert reply.status_code in (400, 422)  # 422: a wrong type came first
        else:
            assert reply.status_code != 400

    check()
    assert met.keys() >= {200, 422}  # both valid and invalid examples were generated
    outcomes.update(met)


def is_json(text: str) -> bool:
    """Whether a text of Python's `json` is JSON: NaN is not, nor is half a surrogate pair."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        value = json.loads(text, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError:
        return False
    return True


def check_reply(path: str, body: Any, reply: httpx.Response) -> None:
    """Checks status and schema; a stream may have failed with an event."""
    if reply.status_code == 404:  # there are no adapters
        assert reply.json()["error_type"] == "not_found", reply.text
        assert "adapter_id" in json.dumps(body)
        return
    assert reply.status_code in (200, 400, 422, 424)
    Checker().check("POST", meant_path(path, body), reply)
    if reply.headers["content-type"] == SSE:
        bodies = [json.loads(item) for item in events(reply) if item != DONE]
        failures = [item["error_type"] for item in bodies if "error" in item]
        assert set(failures) <= {"validation", "generation"}
