"""Models whose images see themselves as a whole: each is computed in one step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol.errors import CapacityError
from engine.protocol.images import Image
from engine.protocol.request import Request
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence

STEP_TOKENS, NUM_SEQS, LOGPROB_ROWS = 20, 4, 9
ROOM = STEP_TOKENS - NUM_SEQS + 1


def make_scheduler(*, keeps_images: bool = True, max_chunk_tokens: int = 5) -> Scheduler:
    return Scheduler(
        BlockManager(256, 2),
        max_step_tokens=STEP_TOKENS,
        max_num_seqs=NUM_SEQS,
        max_chunk_tokens=max_chunk_tokens,
        max_logprob_rows=LOGPROB_ROWS,
        keeps_images=keeps_images,
    )


def sequence(
    *parts: tuple[int, int], caller: str = "", first_id: int = 0, prompt_logprobs: bool = False
) -> Sequence:
    """With these parts, each a number of tokens of text and of an image."""
    images, at = [], 0
    for text, length in parts:
        at += text
        images.append(Image(b"%d %d" % (first_id, at), ((at, length),), ()))
        at += length
    return Sequence(
        Request(
            request_id="r",
            prompt_token_ids=(*range(first_id, first_id + at + 1),),
            max_new_tokens=3,
            images=(*images,),
            caller=caller,
            prompt_logprobs=prompt_logprobs,
        )
    )


def run(scheduler: Scheduler, sequences: list[Sequence]) -> list[tuple[Sequence, int]]:
    """Runs them to their end; how far each sequence is after each of its steps."""
    found = []
    for one in sequences:
        scheduler.add(one)
    while scheduler.has_work:
        batch = scheduler.schedule()
        assert batch.num_tokens, "nothing is computed, and there is work"
        assert batch.total_tokens <= STEP_TOKENS
        scheduler.advance(batch)
        found += [(one, one.num_computed_tokens) for one in batch.num_tokens]
        for one in batch.num_tokens:
            if one.num_pending_tokens == 0 and one.append(7) is not None:
                scheduler.finish(one)
    return found


lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(1, ROOM)), min_size=1, max_size=3)


@given(st.lists(lengths, min_size=1, max_size=5), st.integers(1, STEP_TOKENS))
def test_no_step_ends_within_an_image(prompts: list[list[tuple[int, int]]], chunk: int) -> None:
    sequences = [
        sequence(*parts, caller=str(index % 2), first_id=1000 * index)
        for index, parts in enumerate(prompts)
    ]
    spans = {
        one: [span for image in one.request.images for span in image.spans] for one in sequences
    }
    for one, end in run(make_scheduler(max_chunk_tokens=chunk), sequences):
        assert not any(start < end < start + length for start, length in spans[one])


def test_a_step_ends_before_an_image_and_the_next_one_has_all_of_it() -> None:
    decoding = Sequence(Request(request_id="d", prompt_token_ids=(9,), max_new_tokens=40))
    scheduler = make_scheduler()
    scheduler.add(decoding)
    batch = scheduler.schedule()
    scheduler.advance(batch)
    decoding.append(1)
    with_image = sequence((3, 12))
    scheduler.add(with_image)
    ends = []
    for _ in range(3):
        scheduler.advance(scheduler.schedule())
        decoding.append(1)
        ends.append(with_image.num_computed_tokens)
    assert ends == [3, 15, 16]


def test_a_prompt_whose_image_does_not_fit_beside_others_waits_and_holds_nothing() -> None:
    scheduler = make_scheduler(max_chunk_tokens=STEP_TOKENS)
    first, second = sequence((0, 4)), sequence((0, ROOM), first_id=100)
    scheduler.add(first)
    scheduler.add(second)
    batch = scheduler.schedule()
    assert batch.num_tokens == {first: 5}
    assert not second.block_table
    scheduler.advance(batch)
    first.append(7)
    assert scheduler.schedule().num_tokens == {first: 1, second: ROOM + 1}


def test_an_image_with_more_tokens_than_a_step_has_room_for_is_refused() -> None:
    scheduler = make_scheduler()
    with pytest.raises(CapacityError, match=f"image of {ROOM + 1} tokens.* room for {ROOM}"):
        scheduler.add(sequence((3, ROOM + 1)))
    with pytest.raises(CapacityError, match=f"room for {LOGPROB_ROWS}"):
        scheduler.add(sequence((3, LOGPROB_ROWS + 1), prompt_logprobs=True))
    make_scheduler(keeps_images=False).add(sequence((3, ROOM + 1)))
    assert run(scheduler, [sequence((3, LOGPROB_ROWS), prompt_logprobs=True)])
