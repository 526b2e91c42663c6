"""Grammars: what compiles, what follows what, what a mask lets through, what is refused."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.grammar import backend_llguidance as grammar_module
from engine.grammar.backend_llguidance import (
    GrammarCompiler,
    Matcher,
    TokenMasks,
    json_source,
    regex_source,
)
from engine.grammar.constraints import Constraints
from engine.protocol.errors import GrammarError
from engine.protocol.request import Request, SamplingParams
from engine.sampling.logits import RowMasks, process
from engine.scheduling.sequence import Sequence
from tests.engine.grammar.grammar_cases import (
    BOOLEAN,
    INSTANCES,
    INTEGER,
    REFUSED,
    REGEXES,
    SCHEMAS,
    Schema,
    record,
)
from tests.engine.grammar.grammars import (
    KINDS,
    allowed,
    compile_source,
    compiler,
    encode,
    eos_of,
    make_request,
    special_ids,
    spell,
    tokenizer,
)

NEVER = float("-inf")


def accepts(matcher: Matcher, text: str, kind: str = "demo") -> bool:
    """Whether a text, in the tokenizer's own tokens, is a whole one."""
    try:
        matcher.advance(encode(text, kind))
        return eos_of(kind) <= allowed(matcher, kind)
    except GrammarError:
        return False


def walk(matcher: Matcher, seed: int, kind: str = "demo", num_tokens: int = 60) -> list[int]:
    """Tokens that a blind choice gives, without an end."""
    rng = random.Random(seed)
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        token_id = rng.choice(sorted(allowed(matcher, kind)))
        if token_id in eos_of(kind):
            break
        matcher.advance([token_id])
        tokens.append(token_id)
    return tokens


class TestSchemas:
    """What a schema allows, told by instances of it."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", INSTANCES)
    def test_take_their_instances_and_no_others(self, name: str, kind: str) -> None:
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
    def test_know_one_spelling_of_white_space(self, text: str) -> None:
        matcher = compile_source(json_source({"type": "array", "items": INTEGER}))
        assert accepts(matcher.copy(), "[1, 2]")
        assert not accepts(matcher, text)

    @pytest.mark.parametrize("text", ['"\t"', '"\n"', '"\x01"', "'a'", '"a', '"\\x"', '"\\ud83d"'])
    def test_let_no_broken_string_through(self, text: str) -> None:
        assert not accepts(compile_source(json_source({"type": "string"})), text)

    @pytest.mark.parametrize(
        "text", ["01", "+1", ".5", "1.", "1e", "NaN", "Infinity", "0x1", "--1"]
    )
    def test_let_no_broken_number_through(self, text: str) -> None:
        assert not accepts(compile_source(json_source({"type": "number"})), text)

    @pytest.mark.parametrize(
        "text",
        ['{"a": 1, "\\u0061": true}', '{"q\\"": 1, "q\\u0022": true}', '{"a": 1, "a": 2}'],
    )
    def test_let_no_property_come_again_in_another_spelling(self, text: str) -> None:
        schema = {"type": "object", "properties": {"a": INTEGER, 'q"': INTEGER}}
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
    def test_lose_no_control_character(self, schema: Schema, text: str) -> None:
        matcher = compile_source(json_source(schema))
        assert json.loads(spell(walk(matcher, 0))) == text

    @pytest.mark.parametrize("or_text", [False, True])
    @pytest.mark.parametrize("name", REFUSED)
    def test_name_a_keyword_that_cannot_be_enforced(self, name: str, or_text: bool) -> None:
        schema, word = REFUSED[name]
        with pytest.raises(GrammarError) as caught:
            compile_source(json_source(schema, or_text=or_text))
        assert word in str(caught.value)

    @pytest.mark.parametrize("or_text", [False, True])
    @pytest.mark.parametrize("name", ["not", "uniqueItems", "overlapping oneOf"])
    def test_refuse_it_deep_inside_too(self, name: str, or_text: bool) -> None:
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
    def test_ignore_it_if_told_to(self, name: str) -> None:
        schema, _ = REFUSED[name]
        source = json_source(record({"a": schema}), best_effort=True)
        if name != "minProperties":  # which is not among the keywords that can be ignored
            assert walk(compile_source(source), 1)

    @pytest.mark.parametrize("or_text", [False, True])
    @pytest.mark.parametrize(
        "options", [{"lenient": True}, {"lenient": True, "coerce_one_of": True}, {}]
    )
    @pytest.mark.parametrize("name", ["not", "overlapping oneOf", "unknown format"])
    def test_cannot_switch_their_enforcement_off(
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

    def test_cannot_change_the_spelling_either(self) -> None:
        options = {"whitespace_flexible": True, "json_allowed_escapes": 'nrbtf\\"u'}
        schema = {"type": "array", "items": INTEGER, "x-guidance": options}
        for or_text in (False, True):
            matcher = compile_source(json_source(schema, or_text=or_text))
            assert accepts(matcher.copy(), "[1, 2]")
            assert accepts(matcher, "[1,2]") is or_text  # as free text
        schema = record({"x-guidance": INTEGER})
        assert accepts(compile_source(json_source(schema)), '{"x-guidance": 1}')

    def test_of_a_least_size_are_taken_where_it_holds_anyway(self) -> None:
        schema = record({"a": BOOLEAN, "b": BOOLEAN}, minProperties=2)
        assert accepts(compile_source(json_source(schema)), '{"a": true, "b": true}')
        named = record({"minProperties": {"const": {"minProperties": 5}}})
        text = '{"minProperties": {"minProperties": 5}}'
        assert accepts(compile_source(json_source(named)), text)
        for schema in (
            {"type": "object", "additionalProperties": INTEGER, "minProperties": 2},
            {"anyOf": [{"type": "object", "minProperties": 3, "required": ["a", "b"]}]},
            record({"properties": {"type": "object", "minProperties": 2}}),
        ):
            with pytest.raises(GrammarError, match="minProperties"):
                json_source(schema)

    def test_without_any_instance_come_to_an_error_and_not_to_an_end(self) -> None:
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
    def test_that_are_none_are_refused(self, pattern: str) -> None:
        with pytest.raises(GrammarError):
            compile_source(regex_source(pattern))

    def test_that_nothing_matches_come_to_an_error_and_not_to_an_end(self) -> None:
        with pytest.raises(GrammarError):
            allowed(compile_source(regex_source(r"a[^\s\S]")))

    def test_that_are_too_much_work_come_to_an_error_and_not_to_an_end(self) -> None:
        matcher = compile_source(regex_source("([a-z]{1,100}){1,100}"))
        with pytest.raises(GrammarError):
            for _ in range(2000):
                token_ids = sorted(allowed(matcher))
                matcher.advance([token_ids[len(token_ids) // 2]])


class TestCallOrText:
    """Text that begins with a brace is a call."""

    @pytest.fixture
    def matcher(self) -> Matcher:
        """A call of a function with a number."""
        return compile_source(json_source(record({"n": INTEGER}), or_text=True))

    @pytest.mark.parametrize("text", ['{"n": 1}', '{"n": -20}'])
    def test_takes_calls(self, matcher: Matcher, text: str) -> None:
        assert accepts(matcher, text)

    @pytest.mark.parametrize(
        "text",
        ["{", "{}", '{"n": 1', '{"n": "x"}', '{"n": 1} ', '{"n": 1}!', " {", '\n\t{"n": 1}', "{{x"],
    )
    def test_takes_nothing_else_behind_a_brace(self, matcher: Matcher, text: str) -> None:
        assert not accepts(matcher, text)

    @pytest.mark.parametrize(
        "text", ["Hi", 'n {"n": "x"}', " \n two\nlines {", "[1", "é日😀", "<|end|>", "}", '"{"']
    )
    def test_takes_any_other_text(self, matcher: Matcher, text: str) -> None:
        assert accepts(matcher, text)

    def test_allows_every_token_in_free_text_but_the_special_ones(self, matcher: Matcher) -> None:
        matcher.advance(encode("Hi"))
        assert allowed(matcher).isdisjoint(special_ids("demo") - eos_of("demo"))
        texts = {encode(text)[0] for text in ("{", "}", '"', " a", "\n", "<")}
        assert texts | eos_of("demo") <= allowed(matcher)


class TestMatcher:
    """Walking through a grammar."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", SCHEMAS)
    def test_forces_only_what_its_masks_leave_no_choice_about(self, name: str, kind: str) -> None:
        source = json_source(SCHEMAS[name])
        for seed in range(2):
            tokens = walk(compile_source(source, kind), seed, kind, 40)
            matcher = compile_source(source, kind)
            for token_id in tokens:
                probe = matcher.copy()
                for forced in matcher.forced():
                    assert allowed(probe, kind) == {forced}
                    probe.advance([forced])
                matcher.advance([token_id])

    def test_forces_the_tokenizers_own_spelling(self) -> None:
        text = '{"city": "Zürich 😀"}'
        matcher = compile_source(json_source({"const": {"city": "Zürich 😀"}}))
        assert matcher.forced() == encode(text)
        matcher.advance(matcher.forced())
        assert matcher.is_over
        assert matcher.forced() == []
        assert allowed(matcher) == eos_of("demo")

    @pytest.mark.parametrize("pattern", REGEXES[:12])
    def test_may_end_exactly_where_the_text_is_whole(self, pattern: str) -> None:
        for seed in range(3):
            matcher = compile_source(regex_source(pattern))
            tokens = walk(compile_source(regex_source(pattern)), seed)
            for index in range(len(tokens) + 1):
                spelt = spell(tokens[:index])
                may_end = eos_of("demo") <= allowed(matcher)
                text = spelt.decode(errors="replace")
                whole = text.encode() == spelt and regex.fullmatch(pattern, text)
                assert may_end == bool(whole), text
                assert matcher.is_over <= may_end
                matcher.advance(tokens[index : index + 1])

    @pytest.mark.parametrize("kind", KINDS)
    def test_takes_the_names_of_special_tokens_for_text(self, kind: str) -> None:
        for name in ("<|end|>", "<|user|>", "<|bos|>", "</s>", "<s>x", "<unk>"):
            for source, text in (
                (regex_source(name.replace("|", r"\|")), name),
                (json_source({"const": f"a{name}b"}), f'"a{name}b"'),
                (json_source({"enum": [name, "b"], "minLength": 2}), f'"{name}"'),
            ):
                tokens = walk(compile_source(source, kind), 0, kind)
                assert spell(tokens, kind) == text.encode()
                matcher = compile_source(source, kind)
                assert special_ids(kind).isdisjoint(matcher.forced())

    def test_that_was_led_astray_stays_an_error(self) -> None:
        matcher = compile_source(regex_source("abc"))
        with pytest.raises(GrammarError):
            matcher.advance(encode("x"))
        for again in (matcher.check, matcher.copy, lambda: matcher.advance(encode("a"))):
            with pytest.raises(GrammarError):
                again()
        with pytest.raises(GrammarError):
            allowed(matcher)

    def test_takes_no_token_that_there_is_not(self) -> None:
        with pytest.raises(GrammarError):
            compile_source(regex_source(".*")).advance([1 << 20])

    def test_copies_go_their_own_ways(self) -> None:
        matcher = compile_source(regex_source("ab|ac"))
        matcher.advance(encode("a"))
        left, right = matcher.copy(), matcher.copy()
        left.advance(encode("b"))
        right.advance(encode("c"))
        assert left.is_over
        assert right.is_over
        assert not matcher.is_over


class TestCompiler:
    """Compiling, and what is kept of it."""

    @pytest.fixture
    def small(self) -> GrammarCompiler:
        """A compiler of its own, for a small tokenizer."""
        return GrammarCompiler(tokenizer("bpe").to_str(), tokenizer("bpe").get_vocab_size())

    @pytest.mark.parametrize("source", ["", "x", "{}", "[1]", '{"grammars": []}'])
    def test_refuses_what_is_no_source(self, small: GrammarCompiler, source: str) -> None:
        with pytest.raises(GrammarError):
            small.compile(source, eos_of("bpe"))

    @pytest.mark.parametrize("text", ["", "{}", "no tokenizer", '{"model": {"type": "BPE"}}'])
    def test_tells_of_a_tokenizer_that_it_cannot_use(self, text: str) -> None:
        unusable = GrammarCompiler(text, 10)
        for _ in range(2):
            with pytest.raises(GrammarError, match="tokenizer"):
                unusable.compile(regex_source("a"), frozenset({0}))
        assert unusable.is_ready(regex_source("a"), frozenset({0}))

    @pytest.mark.parametrize("eos", [frozenset(), frozenset({1 << 20})])
    def test_tells_of_ends_that_it_cannot_use(
        self, small: GrammarCompiler, eos: frozenset[int]
    ) -> None:
        with pytest.raises(GrammarError):
            small.compile(regex_source("a"), eos)

    def test_tells_of_a_model_that_is_smaller_than_the_tokenizer(self) -> None:
        with pytest.raises(GrammarError):
            GrammarCompiler(tokenizer("bpe").to_str(), 10).compile(regex_source("a"), eos_of("bpe"))

    @pytest.mark.parametrize("extra", [0, 1, 31, 77])
    def test_allows_no_token_that_only_the_model_has(self, extra: int) -> None:
        vocab_size = tokenizer("bpe").get_vocab_size()
        wide = GrammarCompiler(tokenizer("bpe").to_str(), vocab_size + extra)
        matcher = wide.compile(regex_source("(?s).*"), eos_of("bpe"))
        (words,) = TokenMasks(vocab_size + extra).start([matcher]).result()
        assert len(words) == -(-(vocab_size + extra) // 32)
        bits = [32 * at + bit for at in range(len(words)) for bit in range(32)]
        assert all(not int(words[b // 32]) >> b % 32 & 1 for b in bits if b >= vocab_size)

    def test_knows_several_ends(self, small: GrammarCompiler) -> None:
        ends = eos_of("bpe") | {tokenizer("bpe").token_to_id("<s>")}
        matcher = small.compile(regex_source("a?"), ends)
        assert allowed(matcher, "bpe") & special_ids("bpe") == ends
        one = small.compile(regex_source("a?"), eos_of("bpe"))
        assert allowed(one, "bpe") & special_ids("bpe") == eos_of("bpe")

    def test_gives_a_fresh_matcher_each_time(self, small: GrammarCompiler) -> None:
        source, eos = regex_source("ab"), eos_of("bpe")
        assert not small.is_ready(source, eos)
        small.compile(source, eos).advance(encode("ab", "bpe"))
        assert small.is_ready(source, eos)
        assert not small.is_ready(source, eos | {1})
        assert accepts(small.compile(source, eos), "ab", "bpe")

    def test_remembers_what_is_wrong(self, small: GrammarCompiler) -> None:
        for _ in range(2):
            with pytest.raises(GrammarError, match="unclosed"):
                small.compile(regex_source("("), eos_of("bpe"))
        assert small.is_ready(regex_source("("), eos_of("bpe"))

    def test_keeps_the_last_used_within_so_many_bytes(
        self, small: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sources = [regex_source(f"{letter}{'z' * 100}") for letter in "abcdef"]
        monkeypatch.setattr(grammar_module, "_MAX_CACHED_BYTES", 3 * len(sources[0]))
        for source in [*sources[:3], sources[0], sources[3]]:
            small.compile(source, eos_of("bpe"))
        ready = [source for source in sources if small.is_ready(source, eos_of("bpe"))]
        assert ready == [sources[0], sources[2], sources[3]]
        big = regex_source("y" * 1000)
        small.compile(big, eos_of("bpe"))
        assert [s for s in [*sources, big] if small.is_ready(s, eos_of("bpe"))] == [big]
        small.compile(sources[0], eos_of("bpe"))
        assert [s for s in [*sources, big] if small.is_ready(s, eos_of("bpe"))] == [sources[0]]

    def test_prepares_in_the_background(self, small: GrammarCompiler) -> None:
        for source in (regex_source("ab"), regex_source("("), "x"):
            done = threading.Event()
            small.prepare(source, eos_of("bpe"), done.set)
            assert done.wait(30)
            assert small.is_ready(source, eos_of("bpe"))

    def test_serves_many_threads(self, small: GrammarCompiler) -> None:
        masks = TokenMasks(tokenizer("bpe").get_vocab_size())
        names = list(SCHEMAS)[:20]

        def work(index: int) -> tuple[str, bytes]:
            name = names[index % len(names)]
            matcher = small.compile(json_source(SCHEMAS[name]), eos_of("bpe"))
            tokens: list[int] = []
            while not matcher.is_over and len(tokens) < 15:
                (words,) = masks.start([matcher]).result()
                matcher.check()
                at = int(words.nonzero()[0][-1])
                token_id = 32 * at + (int(words[at]) & 0xFFFFFFFF).bit_length() - 1
                if token_id in eos_of("bpe"):
                    break
                matcher.advance([token_id])
                tokens.append(token_id)
            return name, spell(tokens, "bpe")

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(work, range(160)))
        assert len(set(results)) == len(names), "the same in each thread"


class TestMasks:
    """From matchers to scores."""

    def test_of_a_step_are_those_of_each_row(self) -> None:
        matchers = [compile_source(regex_source(pattern)) for pattern in REGEXES[:20]]
        together = TokenMasks(tokenizer("demo").get_vocab_size()).start(matchers).result()
        for matcher, row in zip(matchers, together, strict=True):
            alone = TokenMasks(tokenizer("demo").get_vocab_size(), 1).start([matcher]).result()
            assert (row == alone[0]).all()

    @given(st.data())
    @settings(max_examples=60)
    def test_set_scores_as_a_slow_reference_does(self, data: st.DataObject) -> None:
        num_rows, vocab_size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 80))
        rows = sorted(data.draw(st.sets(st.integers(0, num_rows - 1), min_size=1)))
        num_bytes = -(-vocab_size // 32) * 4
        packed = [data.draw(st.binary(min_size=num_bytes, max_size=num_bytes)) for _ in rows]
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
        scores = torch.randn(num_rows, vocab_size, generator=generator)
        expected = scores.clone()
        for row, mask in zip(rows, packed, strict=True):
            for token_id in range(vocab_size):
                if not mask[token_id // 8] >> token_id % 8 & 1:
                    expected[row, token_id] = NEVER
        masks = RowMasks(rows, torch.tensor([list(mask) for mask in packed], dtype=torch.uint8))
        result = process(scores, [make_sequence() for _ in range(num_rows)], masks)
        assert result.view(torch.int32).equal(expected.view(torch.int32)), "bit for bit"

    def test_come_after_penalties_and_before_filters(self) -> None:
        masks = RowMasks([0], torch.tensor([[0b0110, 0, 0, 0]], dtype=torch.uint8))
        scores = torch.tensor([[9.0, 1.0, 2.0, 8.0], [9.0, 1.0, 2.0, 8.0]])
        result = process(scores, [make_sequence(top_k=1), make_sequence(top_k=1)], masks)
        assert result.tolist() == [[NEVER, NEVER, 2.0, NEVER], [9.0, NEVER, NEVER, NEVER]]


def make_sequence(**sampling: Any) -> Sequence:
    """A sequence with these sampling parameters."""
    params = SamplingParams(**sampling)
    return Sequence(
        Request(request_id="r", prompt_token_ids=(1,), max_new_tokens=9, sampling=params)
    )


class TestConstraints:
    """The requests' matchers."""

    @pytest.fixture
    def constraints(self) -> Constraints:
        """Constraints with nobody in them."""
        return Constraints(compiler("demo"), TokenMasks(tokenizer("demo").get_vocab_size()))

    @staticmethod
    def masks_of(constraints: Constraints, *sequences: Sequence) -> RowMasks | None:
        """The masks of a step."""
        pending = constraints.start(list(sequences))
        return None if pending is None else pending.wait(torch.device("cpu"))

    def test_mask_only_rows_with_a_grammar(self, constraints: Constraints) -> None:
        bound = make_request("bound", regex_source("ab"))
        free = Sequence(make_request("free", ""))
        assert self.masks_of(constraints, free) is None
        constraints.add(bound)
        assert self.masks_of(constraints, free) is None
        masks = self.masks_of(constraints, free, Sequence(bound), free)
        assert masks is not None
        assert masks.rows == [1]
        constraints.drop("bound")
        constraints.drop("bound")
        assert self.masks_of(constraints, free) is None

    def test_force_what_follows_and_the_end(self, constraints: Constraints) -> None:
        tokens = encode('{"a": true}')
        request = make_request("r", json_source(record({"a": {"const": True}})))
        constraints.add(request)
        forced = constraints.advance(Sequence(request), tokens[0])
        assert forced == [*tokens[1:], *eos_of("demo")]
        assert constraints.advance(Sequence(make_request("free", "")), 5) == []

    def test_do_not_force_an_end_that_has_an_alternative(self, constraints: Constraints) -> None:
        request = make_request("r", regex_source(r"1(\.5)?"))
        constraints.add(request)
        assert constraints.advance(Sequence(request), encode("1")[0]) == []
        masks = self.masks_of(constraints, Sequence(request))
        assert masks is not None

    @pytest.mark.parametrize("length", range(9))
    def test_resume_behind_the_tokens_before_a_break(
        self, constraints: Constraints, length: int
    ) -> None:
        text = '{"age": 7, "name": "é😀"}'
        schema = record({"age": INTEGER, "name": {"type": "string", "maxLength": 2}})
        tokens = encode(text)
        resumed = tuple(tokens[:length])
        request = make_request("r", json_source(schema), resumed_token_ids=resumed)
        constraints.add(request)
        matcher = compile_source(request.grammar)
        matcher.advance(resumed)
        masks = self.masks_of(constraints, Sequence(request))
        assert masks is not None
        bits = np.unpackbits(masks.packed[0].numpy(), bitorder="little")
        assert set(np.flatnonzero(bits).tolist()) == allowed(matcher)

    def test_refuse_tokens_that_the_grammar_forbids(self, constraints: Constraints) -> None:
        request = make_request("r", regex_source("ab"), resumed_token_ids=tuple(encode("x")))
        with pytest.raises(GrammarError):
            constraints.add(request)
        assert self.masks_of(constraints, Sequence(make_request("free", ""))) is None

    def test_tell_of_a_dead_end(self, constraints: Constraints) -> None:
        request = make_request("r", regex_source(r"a[^\s\S]"))
        constraints.add(request)
        sequence = Sequence(request)
        constraints.check(Sequence(make_request("free", "")))
        self.masks_of(constraints, sequence)
        with pytest.raises(GrammarError):
            constraints.check(sequence)
