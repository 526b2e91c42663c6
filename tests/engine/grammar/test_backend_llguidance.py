"""Matchers and their compiler: advancing, forced tokens, caching, errors."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import regex
from tokenizers import AddedToken, Tokenizer

from engine.grammar import backend_llguidance as grammar_module
from engine.grammar import compiler as compiler_module
from engine.grammar.backend_llguidance import json_source, regex_source
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.masks import TokenMasks
from engine.protocol.errors import GrammarError
from tests.engine.grammar.grammar_cases import (
    REGEXES,
    SCHEMAS,
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
    tokenizer,
    walk,
)


class TestMatcher:
    """Matchers of llguidance."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", SCHEMAS)
    def test_forces_only_tokens_that_its_masks_force(self, name: str, kind: str) -> None:
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

    def test_forces_tokens_as_the_tokenizer_spells_them(self) -> None:
        text = '{"city": "Zürich 😀"}'
        matcher = compile_source(json_source({"const": {"city": "Zürich 😀"}}))
        assert matcher.forced() == encode(text)
        matcher.advance(matcher.forced())
        assert matcher.is_over
        assert matcher.forced() == []
        assert allowed(matcher) == eos_of("demo")

    @pytest.mark.parametrize("pattern", REGEXES[:12])
    def test_allows_the_end_exactly_where_the_text_matches(self, pattern: str) -> None:
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
    def test_spells_names_of_special_tokens_as_text(self, kind: str) -> None:
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

    def test_keeps_raising_after_a_forbidden_token(self) -> None:
        matcher = compile_source(regex_source("abc"))
        with pytest.raises(GrammarError):
            matcher.advance(encode("x"))
        for again in (matcher.check, matcher.copy, lambda: matcher.advance(encode("a"))):
            with pytest.raises(GrammarError):
                again()
        with pytest.raises(GrammarError):
            allowed(matcher)

    def test_refuses_a_token_outside_the_vocabulary(self) -> None:
        with pytest.raises(GrammarError):
            compile_source(regex_source(".*")).advance([1 << 20])

    def test_copies_are_independent(self) -> None:
        matcher = compile_source(regex_source("ab|ac"))
        matcher.advance(encode("a"))
        left, right = matcher.copy(), matcher.copy()
        left.advance(encode("b"))
        right.advance(encode("c"))
        assert left.is_over
        assert right.is_over
        assert not matcher.is_over


class TestCompiler:
    """Compiling sources and caching the results."""

    @pytest.fixture
    def small(self) -> GrammarCompiler:
        """A new compiler, for a small tokenizer."""
        return GrammarCompiler(tokenizer("bpe").to_str(), tokenizer("bpe").get_vocab_size())

    @pytest.mark.parametrize("source", ["", "x", "{}", "[1]", '{"grammars": []}'])
    def test_refuses_an_invalid_source(self, small: GrammarCompiler, source: str) -> None:
        with pytest.raises(GrammarError):
            small.compile(source, eos_of("bpe"))

    @pytest.mark.parametrize("text", ["", "{}", "no tokenizer", '{"model": {"type": "BPE"}}'])
    def test_refuses_a_tokenizer_that_the_library_does_not_support(self, text: str) -> None:
        unusable = GrammarCompiler(text, 10)
        for _ in range(2):
            with pytest.raises(GrammarError, match="tokenizer"):
                unusable.compile(regex_source("a"), frozenset({0}))
        assert unusable.is_ready(regex_source("a"), frozenset({0}))

    @pytest.mark.parametrize("eos", [frozenset(), frozenset({1 << 20})])
    def test_refuses_invalid_end_tokens(self, small: GrammarCompiler, eos: frozenset[int]) -> None:
        with pytest.raises(GrammarError):
            small.compile(regex_source("a"), eos)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("lacking", [1, 40])
    def test_allows_only_tokens_that_the_model_has(self, kind: str, lacking: int) -> None:
        vocab_size = tokenizer(kind).get_vocab_size() - lacking
        narrow = GrammarCompiler(tokenizer(kind).to_str(), vocab_size)
        matcher = narrow.compile(regex_source("(?s).*"), eos_of(kind))
        (words,) = TokenMasks(vocab_size).start([matcher]).result()
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        free = set(np.flatnonzero(bits).tolist())
        assert max(free) < vocab_size
        shared = {token for token in encode("the t", kind) if token < vocab_size}
        assert free >= shared | eos_of(kind)
        text = 'the t"rth: éth 日本 tr'
        forced = narrow.compile(json_source({"const": text}), eos_of(kind)).forced()
        assert max(forced) < vocab_size
        assert spell(forced, kind) == json.dumps(text, ensure_ascii=False).encode()

    def test_an_added_token_that_the_model_lacks_costs_no_grammar(self) -> None:
        """As with Gemma 3, whose tokenizer has one for images."""
        wider = Tokenizer.from_str(tokenizer("bpe").to_str())
        vocab_size = wider.get_vocab_size()
        wider.add_special_tokens([AddedToken("<image>", special=True)])
        wider.add_tokens([AddedToken("wide")])
        narrow = GrammarCompiler(wider.to_str(), vocab_size)
        forced = narrow.compile(regex_source("a wide <image>"), eos_of("bpe")).forced()
        assert spell(forced, "bpe") == b"a wide <image>"
        assert max(forced) < vocab_size

    def test_builds_a_tokenizer_that_it_cannot_use_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        builds: list[int] = []
        fit = grammar_module.fitted

        def counted(text: str, vocab_size: int) -> str:
            builds.append(vocab_size)
            return fit(text, vocab_size)

        monkeypatch.setattr(grammar_module, "fitted", counted)
        unusable = GrammarCompiler('{"model": {"type": "none"}}', 10)
        for pattern in ("a", "b", "c"):
            with pytest.raises(GrammarError, match="tokenizer"):
                unusable.compile(regex_source(pattern), frozenset({0}))
        with pytest.raises(GrammarError, match="tokenizer"):
            unusable.warm(frozenset({0}))
        assert builds == [10]

    @pytest.mark.parametrize("extra", [0, 1, 31, 77])
    def test_allows_no_token_that_only_the_model_has(self, extra: int) -> None:
        vocab_size = tokenizer("bpe").get_vocab_size()
        wide = GrammarCompiler(tokenizer("bpe").to_str(), vocab_size + extra)
        matcher = wide.compile(regex_source("(?s).*"), eos_of("bpe"))
        (words,) = TokenMasks(vocab_size + extra).start([matcher]).result()
        assert len(words) == -(-(vocab_size + extra) // 32)
        bits = [32 * at + bit for at in range(len(words)) for bit in range(32)]
        assert all(not int(words[b // 32]) >> b % 32 & 1 for b in bits if b >= vocab_size)

    def test_allows_several_end_tokens(self, small: GrammarCompiler) -> None:
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

    def test_caches_errors(self, small: GrammarCompiler) -> None:
        for _ in range(2):
            with pytest.raises(GrammarError, match="unclosed"):
                small.compile(regex_source("("), eos_of("bpe"))
        assert small.is_ready(regex_source("("), eos_of("bpe"))

    def test_keeps_the_most_recently_used_within_a_number_of_bytes(
        self, small: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sources = [regex_source(f"{letter}{'z' * 100}") for letter in "abcdef"]
        size = 3 * len(sources[0]) * compiler_module._BYTES_PER_CHARACTER
        monkeypatch.setattr(compiler_module, "_MAX_CACHED_BYTES", size)
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

    def test_can_be_used_by_many_threads(self, small: GrammarCompiler) -> None:
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
        assert len(set(results)) == len(names), "the same result in each thread"
