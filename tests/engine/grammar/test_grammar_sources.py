"""What JSON Schemas and regular expressions allow as grammars, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.grammar.backend_llguidance import json_source, regex_source
from engine.grammar.matcher import Matcher
from engine.protocol.errors import GrammarError
from tests.engine.grammar.grammar_cases import (
    BOOLEAN,
    INTEGER,
    NULL,
    Schema,
    record,
)
from tests.engine.grammar.grammars import (
    KINDS,
    accepts,
    allowed,
    compile_source,
    encode,
    eos_of,
    special_ids,
    spell,
    walk,
)
from tests.engine.grammar.schema_instances import INSTANCES, REFUSED


class TestSchemas:
    """What a schema allows."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", INSTANCES)
    def test_allow_their_instances_and_no_others(self, name: str, kind: str) -> None:
        schema, good, bad = INSTANCES[name]
        matcher = compile_source(json_source(schema), kind)
        for instance in good:
            text = json.dumps(instance, ensure_ascii=False)
            assert accepts(matcher.copy(), text, kind), text
        for instance in bad:
            for ascii_only in (True, False):
                text = json.dumps(instance, ensure_ascii=ascii_only)
                assert not accepts(matcher.copy(), text, kind), text

    @pytest.mark.parametrize("text", ["", "[", "[1", "[1,2]", "[1 , 2]", "[ 1]", "[1]\n", " [1]"])
    def test_allow_one_spelling_of_white_space(self, text: str) -> None:
        matcher = compile_source(json_source({"type": "array", "items": INTEGER}))
        assert accepts(matcher.copy(), "[1, 2]")
        assert not accepts(matcher, text)

    @pytest.mark.parametrize("text", ['"\t"', '"\n"', '"\x01"', "'a'", '"a', '"\\x"', '"\\ud83d"'])
    def test_allow_no_invalid_string(self, text: str) -> None:
        assert not accepts(compile_source(json_source({"type": "string"})), text)

    @pytest.mark.parametrize(
        "text", ["01", "+1", ".5", "1.", "1e", "NaN", "Infinity", "0x1", "--1"]
    )
    def test_allow_no_invalid_number(self, text: str) -> None:
        assert not accepts(compile_source(json_source({"type": "number"})), text)

    @pytest.mark.parametrize(
        "text",
        ['{"a": 1, "\\u0061": true}', '{"q\\"": 1, "q\\u0022": true}', '{"a": 1, "a": 2}'],
    )
    def test_allow_no_property_twice_in_different_spellings(self, text: str) -> None:
        schema = {"properties": {"a": INTEGER, 'q"': INTEGER}, "additionalProperties": True}
        matcher = compile_source(json_source(schema))
        assert accepts(matcher.copy(), '{"a": 1, "b": true}')
        assert not accepts(matcher, text)

    @pytest.mark.parametrize(
        ("schema", "text"),
        [
            ({"const": "a\x01\n\x7fb"}, "a\x01\n\x7fb"),
            ({"enum": ["\x0b"]}, "\x0b"),
            ({"type": "string", "pattern": r"^a\vb$"}, "a\x0bb"),
            ({"type": "string", "pattern": r"^a\x{1}b$"}, "a\x01b"),
            ({"type": "string", "pattern": r"^a\u001Fb$"}, "a\x1fb"),
            ({"const": '\b\f\n\r\t"\\/é日😀\u2028'}, '\b\f\n\r\t"\\/é日😀\u2028'),
        ],
    )
    def test_keep_control_characters(self, schema: Schema, text: str) -> None:
        matcher = compile_source(json_source(schema))
        assert json.loads(spell(walk(matcher, 0))) == text

    @pytest.mark.parametrize("or_text", [False, True])
    @pytest.mark.parametrize("name", REFUSED)
    def test_refuse_a_keyword_that_cannot_be_enforced_by_name(
        self, name: str, or_text: bool
    ) -> None:
        schema, word = REFUSED[name]
        with pytest.raises(GrammarError) as caught:
            compile_source(json_source(schema, or_text=or_text))
        assert word in str(caught.value)

    @pytest.mark.parametrize("or_text", [False, True])
    @pytest.mark.parametrize("name", ["not", "uniqueItems", "overlapping oneOf"])
    def test_refuse_such_keywords_in_nested_schemas(self, name: str, or_text: bool) -> None:
        schema, word = REFUSED[name]
        for inside in (
            record({"a": schema}),
            {"type": "array", "items": schema},
            {"anyOf": [BOOLEAN, record({}, {"a": schema})]},
            {"$ref": "#/$defs/a", "$defs": {"a": record({"b": schema})}},
        ):
            with pytest.raises(GrammarError) as caught:
                compile_source(json_source(inside, or_text=or_text))
            assert word in str(caught.value)

    @pytest.mark.parametrize("name", ["not", "uniqueItems", "overlapping oneOf", "minProperties"])
    def test_ignore_such_keywords_with_best_effort(self, name: str) -> None:
        schema, _ = REFUSED[name]
        source = json_source(record({"a": schema}), best_effort=True)
        if name != "minProperties":  # llguidance has no option to ignore this one
            assert walk(compile_source(source), 1)

    @pytest.mark.parametrize("or_text", [False, True])
    @pytest.mark.parametrize(
        "options", [{"lenient": True}, {"lenient": True, "coerce_one_of": True}, {}]
    )
    @pytest.mark.parametrize("name", ["not", "overlapping oneOf", "uniqueItems"])
    def test_cannot_switch_off_enforcement_by_options_of_the_library(
        self, name: str, options: dict[str, Any], or_text: bool
    ) -> None:
        schema, _ = REFUSED[name]
        for inside in (
            {**schema, "x-guidance": options},
            record({"a": {**schema, "x-guidance": options}}),
            record({"a": schema}) | {"x-guidance": options},
            {"$ref": "#/$defs/a", "$defs": {"a": {**schema, "x-guidance": options}}},
        ):
            with pytest.raises(GrammarError):
                compile_source(json_source(inside, or_text=or_text))

    def test_cannot_change_white_space_by_options_of_the_library(self) -> None:
        options = {"whitespace_flexible": True, "json_allowed_escapes": 'nrbtf\\"u'}
        schema = {"type": "array", "items": INTEGER, "x-guidance": options}
        for or_text in (False, True):
            matcher = compile_source(json_source(schema, or_text=or_text))
            assert accepts(matcher.copy(), "[1, 2]")
            assert accepts(matcher, "[1,2]") is or_text  # as free text
        schema = record({"x-guidance": INTEGER})
        assert accepts(compile_source(json_source(schema)), '{"x-guidance": 1}')

    def test_allow_min_properties_only_if_as_many_are_required(self) -> None:
        schema = record({"a": BOOLEAN, "b": BOOLEAN}, minProperties=2)
        assert accepts(compile_source(json_source(schema)), '{"a": true, "b": true}')
        named = record({"minProperties": {"const": {"minProperties": 5}}})
        text = '{"minProperties": {"minProperties": 5}}'
        assert accepts(compile_source(json_source(named)), text)
        for schema in (
            {"type": "object", "additionalProperties": INTEGER, "minProperties": 2},
            {"anyOf": [{"type": "object", "minProperties": 4, "required": ["a", "b"]}]},
            record({"properties": {"type": "object", "minProperties": 2}}),
        ):
            with pytest.raises(GrammarError, match="minProperties"):
                json_source(schema)

    @pytest.mark.parametrize("name", ["colour", "regex", "int32"])
    def test_refuse_a_format_that_nobody_knows_if_they_have_to(self, name: str) -> None:
        schema = record({"a": {"type": ["string", "null"], "format": name}})
        assert accepts(compile_source(json_source(schema)), '{"a": "red"}')
        with pytest.raises(GrammarError, match=f'"format" {name} .*, at #/properties/a'):
            json_source(schema, strict_formats=True)
        number = record({"a": {"type": "integer", "format": name}})
        assert accepts(compile_source(json_source(number, strict_formats=True)), '{"a": 1}')

    def test_name_the_place_of_what_they_refuse(self) -> None:
        inside = record({"a/b": {"anyOf": [NULL, {"$ref": "#/$defs/x"}]}})
        schema = inside | {"$defs": {"x": {"type": "array", "items": [{"uniqueItems": True}]}}}
        with pytest.raises(GrammarError, match=r'"uniqueItems" .*, at #/\$defs/x/prefixItems/0'):
            json_source(schema)

    def test_without_any_instance_raise_an_error(self) -> None:
        schema = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
        with pytest.raises(GrammarError):
            allowed(compile_source(json_source(schema)))


class TestRegularExpressions:
    """What a regular expression allows."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("pattern", "good", "bad"),
        [
            (r"1(\.5)?", ["1", "1.5"], ["", "1.", "1.55", "2"]),
            (r"a|bc|", ["", "a", "bc"], ["b", "abc"]),
            (r"(?i)ok", ["ok", "OK", "oK"], ["o", "okk"]),
            (r"[😀-😏é]{1,2}日", ["😀日", "éé日"], ["日", "😀", "😀é😀日"]),
            (r"\d{2,3}", ["12", "123", "٣٤"], ["1", "1234", "a1"]),
            (r"a/b|/\n// x", ["a/b", "/\n// x"], ["a", "/", "b"]),
            ("a\nstart: /b/", ["a\nstart: /b/"], ["b", "a"]),
            (r"^ab$", ["ab"], ["ab\n", "^ab$"]),
            (r"\.\\\"", ['.\\"'], ["x", "\\"]),
            (r" the  the", [" the  the"], ["the  the", " the the"]),
        ],
    )
    def test_match_whole_texts(
        self, pattern: str, good: list[str], bad: list[str], kind: str
    ) -> None:
        matcher = compile_source(regex_source(pattern), kind)
        assert [text for text in good if not accepts(matcher.copy(), text, kind)] == []
        assert [text for text in bad if accepts(matcher.copy(), text, kind)] == []

    @pytest.mark.parametrize(
        "pattern", ["(", "a{", "[b", "*", r"(?=a)b", r"(a)\1", r"\bfoo", "(?P<n", "a{3,1}"]
    )
    def test_that_are_invalid_are_refused(self, pattern: str) -> None:
        with pytest.raises(GrammarError):
            compile_source(regex_source(pattern))

    def test_that_match_nothing_raise_an_error(self) -> None:
        with pytest.raises(GrammarError):
            allowed(compile_source(regex_source(r"a[^\s\S]")))

    def test_that_are_too_complex_raise_an_error(self) -> None:
        matcher = compile_source(regex_source("([a-z]{1,100}){1,100}"))
        with pytest.raises(GrammarError):
            for _ in range(2000):
                token_ids = sorted(allowed(matcher))
                matcher.advance([token_ids[len(token_ids) // 2]])


class TestCallOrText:
    """Grammars with `or_text`: text that begins with a brace is a call."""

    @pytest.fixture
    def matcher(self) -> Matcher:
        """A call of a function with a number, or text."""
        return compile_source(json_source(record({"n": INTEGER}), or_text=True))

    @pytest.mark.parametrize("text", ['{"n": 1}', '{"n": -20}'])
    def test_allows_calls(self, matcher: Matcher, text: str) -> None:
        assert accepts(matcher, text)

    @pytest.mark.parametrize(
        "text",
        ["{", "{}", '{"n": 1', '{"n": "x"}', '{"n": 1} ', '{"n": 1}!', " {", '\n\t{"n": 1}', "{{x"],
    )
    def test_allows_nothing_but_a_call_after_a_brace(self, matcher: Matcher, text: str) -> None:
        assert not accepts(matcher, text)

    @pytest.mark.parametrize(
        "text", ["Hi", 'n {"n": "x"}', " \n two\nlines {", "[1", "é日😀", "<|end|>", "}", '"{"']
    )
    def test_allows_text_that_does_not_begin_with_a_brace(
        self, matcher: Matcher, text: str
    ) -> None:
        assert accepts(matcher, text)

    def test_allows_all_but_special_tokens_in_free_text(self, matcher: Matcher) -> None:
        matcher.advance(encode("Hi"))
        assert allowed(matcher).isdisjoint(special_ids("demo") - eos_of("demo"))
        texts = {encode(text)[0] for text in ("{", "}", '"', " a", "\n", "<")}
        assert texts | eos_of("demo") <= allowed(matcher)
