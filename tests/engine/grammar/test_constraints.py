"""The masks of a step, and the grammars of the requests in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.grammar.backend_llguidance import json_source, regex_source
from engine.grammar.constraints import Constraints
from engine.grammar.masks import TokenMasks
from engine.protocol.errors import GrammarError
from engine.protocol.request import Request, SamplingParams
from engine.sampling.logits import RowMasks, process
from engine.scheduling.sequence import Sequence
from tests.engine.grammar.grammar_cases import (
    INTEGER,
    REGEXES,
    record,
)
from tests.engine.grammar.grammars import (
    allowed,
    compile_source,
    compiler,
    encode,
    eos_of,
    make_request,
    tokenizer,
)

NEVER = float("-inf")


def make_sequence(**sampling: Any) -> Sequence:
    """A sequence with these sampling parameters."""
    params = SamplingParams(**sampling)
    return Sequence(
        Request(request_id="r", prompt_token_ids=(1,), max_new_tokens=9, sampling=params)
    )


class TestMasks:
    """Filling masks and applying them to scores."""

    def test_of_a_step_equal_those_of_single_rows(self) -> None:
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


class TestConstraints:
    """The requests' matchers."""

    @pytest.fixture
    def constraints(self) -> Constraints:
        """Constraints without requests."""
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
    def test_resume_after_the_tokens_generated_before_a_break(
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

    def test_report_a_grammar_that_allows_no_token(self, constraints: Constraints) -> None:
        request = make_request("r", regex_source(r"a[^\s\S]"))
        constraints.add(request)
        sequence = Sequence(request)
        constraints.check(Sequence(make_request("free", "")))
        self.masks_of(constraints, sequence)
        with pytest.raises(GrammarError):
            constraints.check(sequence)
