"""The JSON Schema Test Suite against the grammars: what is accepted, and whether that is right.

    python -m benchmarks.json_schema_suite [--suite DIR] > docs/json-schema.md

Without a folder it takes the suite out of the source package of `jsonschema`, which pip downloads.
A case is a schema with instances. If the schema is accepted, each valid instance must be reachable,
in some order of its properties and some spelling of its numbers, and no invalid one. A valid
instance that reading rules out (other properties of a closed object, numbers beyond 10^18) counts
as narrowed: it does not fit the schema that is enforced.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer

from engine.grammar import backend_outlines
from engine.grammar.backend_llguidance import JSON_OPTIONS, json_source, regex_source
from engine.grammar.forms import lark_source
from engine.grammar.schema import UnsaidError, read_schema
from engine.grammar.schema.references import with_local_references
from engine.grammar.schema.strings import FORMATS
from engine.protocol.errors import GrammarError

PACKAGE = "jsonschema==4.26.0"
FOLDER = "json/tests/draft2020-12"
_REMOTE = "http://localhost:1234/"  # where the suite has further documents
_DEADLINE_S = 20  # of a case
_MAX_TEXTS = 2000  # orders and spellings that are tried of one instance


@dataclass(slots=True)
class Score:
    """What became of the cases of a keyword, and of the instances of those accepted."""

    cases: int = 0
    accepted: int = 0
    right: int = 0
    reachable: int = 0
    narrowed: int = 0
    kept_out: int = 0
    faults: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def add(self, other: Score) -> None:
        """Adds the counts of another."""
        for name in ("cases", "accepted", "right", "reachable", "narrowed", "kept_out"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults += other.faults
        self.reasons += other.reasons


def download(folder: Path) -> Path:
    """The suite's folder, out of a package that is downloaded to `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    name = PACKAGE.partition("==")[0]
    subprocess.run([*command, "--no-binary", name, "--dest", folder, PACKAGE], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as package:
        package.extractall(folder, filter="data")
    (suite,) = folder.glob(f"*/{FOLDER}")
    return suite


def judge(cases: list[dict[str, Any]], library: str = "llguidance") -> Score:
    """The score of the cases of one file, by the grammars of a library."""
    score = Score()
    for case in cases:
        score.add(_judge_in_time(case, library))
    return score


def _judge_in_time(case: dict[str, Any], library: str) -> Score:
    """The score of a case, in a process that ends with its time, as in the service."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=lambda: there.send(_judge_case(case, library)))
    process.start()
    late = Score(cases=1, reasons=[f"{case['description']}: takes more than {_DEADLINE_S} s"])
    score: Score = here.recv() if here.poll(_DEADLINE_S) else late
    process.kill()
    process.join()
    return score


def bundled(schema: dict[str, Any], documents: dict[str, Any]) -> dict[str, Any]:
    """A schema with the documents that it may refer to in its `$defs`, as 2020-12 has it.

    Args:
        schema: the schema.
        documents: the documents by their addresses.
    """
    if _REMOTE not in json.dumps(schema):
        return schema
    definitions: dict[str, Any] = {}
    for address, document in documents.items():
        if document.get("$id", address) == address:
            definitions[address] = {**document, "$id": address}
        else:  # it is known by another identity too
            other = {"$id": address, "$ref": document["$id"], "$defs": {"other": document}}
            definitions[address] = other
    return {**schema, "$defs": {**definitions, **schema.get("$defs", {})}}


def _documents(suite: Path) -> dict[str, Any]:
    """The documents that come with the suite, by their addresses."""
    folder = suite.parents[1] / "remotes"
    paths = [*folder.glob("*.json"), *folder.glob(f"{suite.name}/**/*.json")]
    paths += folder.glob("nested/*.json")
    return {
        f"{_REMOTE}{path.relative_to(folder).as_posix()}": json.loads(path.read_text())
        for path in sorted(paths)
    }


def _judge_case(case: dict[str, Any], library: str) -> Score:
    schema = {"allOf": [case["schema"]]} if isinstance(case["schema"], bool) else case["schema"]
    score = Score(cases=1)
    try:
        matcher = _compiled(schema, library)
    except GrammarError as error:
        score.reasons.append(f"{case['description']}: {error}")
        if any(test["valid"] for test in case["tests"]) or "nsatisfiable" not in str(error):
            return score
        matcher = None  # nothing fits it, and that is right
        score.reasons.clear()
    score.accepted = 1
    for test in case["tests"]:
        is_found = matcher is not None and is_reachable(matcher, test["data"])
        if is_found != test["valid"]:
            if test["valid"] and _is_narrowed(schema, test["data"], library):
                score.narrowed += 1
                continue
            score.faults.append(f"{case['description']}: {test['description']}")
        elif is_found:
            score.reachable += 1
        else:
            score.kept_out += 1
    score.right = not score.faults
    return score


def _is_narrowed(schema: dict[str, Any], instance: Any, library: str) -> bool:
    """Whether reading rules out an instance: a format is enforced too, where it is known."""
    if library == "outlines":  # it has the properties in the schema's order alone, too
        return not Draft202012Validator(read_schema(schema)).is_valid(instance)
    if schema.get("format") in FORMATS and isinstance(instance, str):
        return True
    try:
        return not Draft202012Validator(read_schema(schema)).is_valid(instance)
    except UnsaidError:  # is it because objects are closed?
        start, rules = lark_source(with_local_references(schema), JSON_OPTIONS, are_closed=False)
        matcher = matcher_of(LLMatcher.grammar_from_lark(f"start: {start}\n{rules}"))
        return is_reachable(matcher, instance)


def _compiled(schema: dict[str, Any], library: str) -> LLMatcher:
    if library == "llguidance":
        return matcher_of(json_source(schema))
    pattern = backend_outlines.pattern_of(backend_outlines.json_source(schema))
    return matcher_of(regex_source(pattern))


def matcher_of(source: str) -> LLMatcher:
    """The matcher of a source, over a vocabulary of bytes.

    Raises:
        GrammarError: the library refuses it.
    """
    matcher = LLMatcher(_tokenizer(), source, log_level=0)
    if matcher.is_error():
        raise GrammarError(matcher.get_error())
    return matcher


def is_reachable(matcher: LLMatcher, instance: Any) -> bool:
    """Whether an instance can be written, in some order of properties and some spelling."""
    texts = itertools.islice(_texts(instance), _MAX_TEXTS)
    return any(_accepts(matcher, text) for text in texts)


def _accepts(matcher: LLMatcher, text: str) -> bool:
    tokens = _tokenizer().tokenize_str(text)
    copy = matcher.deep_copy()
    return copy.validate_tokens(tokens) == len(tokens) and (
        not tokens or (copy.consume_tokens(tokens) and copy.is_accepting())
    )


def _texts(value: Any) -> Iterator[str]:
    """The spellings of a value: orders of properties, and a few of each number."""
    if isinstance(value, dict):
        for order in itertools.permutations(value):
            spelt = [[f"{_string(name)}: {text}" for text in _some(value[name])] for name in order]
            for members in itertools.product(*spelt):
                yield "{" + ", ".join(members) + "}"
    elif isinstance(value, list):
        for members in itertools.product(*map(_some, value)):
            yield "[" + ", ".join(members) + "]"
    elif type(value) in (int, float):
        yield from _numerals(value)
    else:
        yield _string(value)


def _some(value: Any) -> list[str]:
    return list(itertools.islice(_texts(value), 24))


def _numerals(number: float) -> Iterator[str]:
    yield json.dumps(number)
    for text in (f"{number:.{digits}f}" for digits in range(3)):
        if float(text) == number:
            yield text


def _string(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@cache
def _tokenizer() -> LLTokenizer:
    return LLTokenizer("byte")


def scores(suite: Path, library: str = "llguidance") -> dict[str, Score]:
    """The score of each keyword."""
    documents = _documents(suite)
    results = {}
    for path in sorted(suite.glob("*.json")):
        cases = json.loads(path.read_text(encoding="utf-8"))
        for case in cases:
            if isinstance(case["schema"], dict):
                case["schema"] = bundled(case["schema"], documents)
        results[path.stem] = judge(cases, library)
    return results


_HEAD = """# JSON Schema: what is enforced

The required cases of the JSON Schema Test Suite for draft 2020-12 (as in the source package of
`{package}`), by `benchmarks/json_schema_suite.py`. A case is one schema with instances. It is
*accepted* if it compiles, and *right* if each of its valid instances can be written and none of the
invalid ones. *Narrowed* are valid instances that are ruled out on purpose: further properties of
objects that list theirs, strings against a format that is known, numbers beyond 10^18
([why](decisions/2026-11-29-what-a-schema-means.md)). What is not accepted is refused with its
keyword and place. Other documents are not fetched: those that a case refers to stand in its `$defs`
with their `$id`, as 2020-12 has it for schemas that are bundled.

"""
_COLUMNS = """\
| keyword | cases | accepted | right | valid, reachable | valid, narrowed | invalid, kept out |
|---|---|---|---|---|---|---|
"""
_OUTLINES = """
## outlines-core

The same for the second library, whose keywords are few: it is asked for what llguidance lacks
([why](decisions/2026-11-29-a-second-grammar-library.md)). Judged are the regular expressions that
it makes of schemas, as llguidance matches them.

"""


def table(results: dict[str, Score]) -> str:
    """The results in Markdown."""
    total = Score()
    for score in results.values():
        total.add(score)
    rows = [*results.items(), ("**all**", total)]
    lines = [
        f"| {name} | {s.cases} | {s.accepted} | {s.right} "
        f"| {s.reachable} | {s.narrowed} | {s.kept_out} |"
        for name, s in rows
    ]
    return _COLUMNS + "\n".join(lines) + "\n"


def main() -> None:
    """Prints the page; what is wrong or refused goes to standard error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", type=Path, help="the suite's folder of a draft")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        suite = options.suite or download(Path(folder))
        results = scores(suite)
        others = scores(suite, "outlines")
    head = _HEAD.format(package=PACKAGE.replace("==", " "))
    print(head + table(results) + _OUTLINES + table(others), end="")
    for library, some in (("llguidance", results), ("outlines", others)):
        for name, score in some.items():
            for kind, texts in (("wrong", score.faults), ("refused", score.reasons)):
                for text in texts:
                    reason = " ".join(text.split())[:300]
                    print(f"{library}: {kind} {name}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
