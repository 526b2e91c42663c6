"""Prompts have the wanted number of tokens and differ from their first word on."""

from __future__ import annotations

import itertools
import re

import pytest

from service.bench.prompts import PromptMaker
from service.client.target import TargetError


class TestPrompts:
    @staticmethod
    async def two_a_word(text: str) -> list[int]:
        """A tokenizer that adds a token and splits words after their first letter."""
        spans = [match.span() for match in re.finditer(r"\S+", text)]
        stops = [stop for start, end in spans for stop in (start + 1, end) if stop - start or end]
        return [0, *dict.fromkeys(stops)]

    async def test_have_the_wanted_length_and_no_common_beginning(self) -> None:
        maker = PromptMaker(self.two_a_word, 40, salt=1)
        await maker.prepare(0)
        prompts = [await maker.make(index) for index in range(200)]
        assert {prompt.num_tokens for prompt in prompts} == {40}
        assert len({prompt.text.split()[0] for prompt in prompts}) == 200
        assert [len(await self.two_a_word(prompt.text)) for prompt in prompts] == [40] * 200

    async def test_share_as_many_tokens_as_asked_for(self) -> None:
        maker = PromptMaker(self.two_a_word, 40, salt=1)
        await maker.prepare(25)
        texts = [(await maker.make(index)).text for index in range(20)]
        common = len(next(iter(texts)).split())
        for one, other in itertools.pairwise(texts):
            pairs = zip(one.split(), other.split(), strict=False)
            common = min(
                common, len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
            )
        assert len(await self.two_a_word(" ".join(texts[0].split()[:common]))) == 25
        assert len({text.split()[common] for text in texts}) == 20

    async def test_are_new_with_another_salt(self) -> None:
        texts = []
        for salt in (1, 1, 2):
            maker = PromptMaker(self.two_a_word, 40, salt)
            await maker.prepare(0)
            texts.append((await maker.make(0)).text)
        assert texts[0] == texts[1] != texts[2]

    async def test_of_too_few_tokens_are_refused(self) -> None:
        maker = PromptMaker(self.two_a_word, 2, salt=1)
        await maker.prepare(0)
        with pytest.raises(TargetError, match="2 tokens are too few"):
            await maker.make(0)
