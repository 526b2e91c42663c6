"""A batch reaches another rank as it was sent, whatever its size."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from multiprocessing import Pipe

import pytest
import torch

from engine.batch.model_input import (
    AdapterRows,
    AttentionInput,
    ImageRows,
    ModelInput,
    SequenceState,
    Span,
    StateRows,
    WindowInput,
)
from engine.ranks.plan_channel import Order, PlanReceiver, PlanSender


def _batch(
    num_tokens: int,
    num_seqs: int,
    num_rows: int,
    max_blocks: int,
    window_blocks: int = 0,
    num_adapted: int = 0,
    num_previous: int = 0,
) -> ModelInput:
    """Random numbers of the largest values that there can be."""

    def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(-1, torch.iinfo(dtype).max, shape, dtype=dtype)

    return ModelInput(
        input_ids=random(num_tokens, dtype=torch.int64),
        positions=random(num_tokens, dtype=torch.int64),
        attention=AttentionInput(
            slot_mapping=random(num_tokens, dtype=torch.int64),
            block_tables=random(num_seqs, max_blocks, dtype=torch.int32),
            query_start_loc=random(num_seqs + 1, dtype=torch.int32),
            context_lens=random(num_seqs, dtype=torch.int32),
            window=WindowInput(
                4096,
                random(num_tokens, dtype=torch.int64),
                random(num_seqs, window_blocks, dtype=torch.int32),
            )
            if window_blocks
            else None,
        ),
        logits_rows=random(num_rows, dtype=torch.int64),
        sampled={},
        prompt_rows=[],
        adapters=AdapterRows(
            random(num_adapted, dtype=torch.int64) if num_adapted < num_tokens else None,
            random(num_adapted, dtype=torch.int64),
        )
        if num_adapted
        else None,
        previous=random(num_previous, dtype=torch.int64) if num_previous else None,
    )


def _assert_same(actual: ModelInput | Order | None, expected: ModelInput) -> None:
    assert isinstance(actual, ModelInput)
    for name in ("input_ids", "positions", "logits_rows"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))
    ours, theirs = actual.attention, expected.attention
    names = {field.name for field in fields(AttentionInput)} - {"window"}
    pairs = [(getattr(ours, name), getattr(theirs, name)) for name in names]
    assert (ours.window is None) == (theirs.window is None)
    if ours.window is not None and theirs.window is not None:
        assert ours.window.window == theirs.window.window
        pairs += zip(ours.window[1:], theirs.window[1:], strict=True)
    assert (actual.previous is None) == (expected.previous is None)
    if actual.previous is not None and expected.previous is not None:
        assert actual.previous.shape == expected.previous.shape  # their numbers come otherwise
    assert (actual.adapters is None) == (expected.adapters is None)
    if actual.adapters is not None and expected.adapters is not None:
        assert (actual.adapters.rows is None) == (expected.adapters.rows is None)
        pairs.append((actual.adapters.owners, expected.adapters.owners))
        if actual.adapters.rows is not None and expected.adapters.rows is not None:
            pairs.append((actual.adapters.rows, expected.adapters.rows))
    for mine, other in pairs:
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


def test_batches_of_any_size_arrive_at_all_ranks() -> None:
    ours, theirs = zip(*(Pipe() for _ in range(2)), strict=True)
    sender = PlanSender([(os.getpid(), connection) for connection in ours])
    receivers = [PlanReceiver(connection) for connection in theirs]
    # The fifth needs more memory than there was for the first.
    for sizes in (
        (1, 1, 1, 1),
        (7, 3, 0, 5),
        (7, 3, 2, 5, 9),
        (8, 8, 8, 1),
        (7, 3, 2, 5, 0, 7),
        (7, 3, 2, 5, 9, 4, 6),
        (2048, 256, 2048, 2048, 4096),
        (1, 1, 1, 1),
    ):
        batch = _batch(*sizes)
        sender.send(batch)
        for receiver in receivers:
            _assert_same(receiver.receive(60.0), batch)


@pytest.mark.parametrize(
    "images",
    [
        ImageRows(torch.arange(5), torch.randn(5, 7), spans=(Span(1, 2, 3, 9),)),
        ImageRows(
            torch.arange(3),
            torch.randn(3, 5, dtype=torch.bfloat16),
            (torch.randn(3, 5).half(), torch.randn(3, 5).half()),
            torch.arange(21).view(7, 3).T,
        ),
        ImageRows(torch.arange(0), torch.empty(0), positions=torch.arange(21).view(3, 7)),
    ],
    ids=["tokens that see each other", "other formats", "positions alone"],
)
def test_images_arrive_as_they_are(images: ImageRows[torch.Tensor]) -> None:
    ours, theirs = Pipe()
    sender, receiver = PlanSender([(os.getpid(), ours)]), PlanReceiver(theirs)
    # An odd number of integers of four bytes before them.
    batch = replace(_batch(7, 2, 2, 5, 0, 7), images=images)
    sender.send(batch)
    received = receiver.receive(60.0)
    _assert_same(received, batch)
    assert isinstance(received, ModelInput)
    assert received.images is not None
    assert received.images.spans == images.spans
    pairs = [(received.images.rows, images.rows), (received.images.embeddings, images.embeddings)]
    pairs += zip(received.images.deepstack, images.deepstack, strict=True)
    if images.positions is not None:
        assert received.images.positions is not None
        pairs.append((received.images.positions, images.positions))
    assert received.images.mapped(lambda it: it.dtype) == images.mapped(lambda it: it.dtype)
    assert all(torch.equal(mine, other) for mine, other in pairs)


@pytest.mark.parametrize(
    "states",
    [
        StateRows.decode(torch.tensor([3, 1])),
        StateRows(
            [0, 4, 7],
            [SequenceState(2, True), SequenceState(5, False, 6, ((2, 8), (3, 9)), (1, 0))],
            torch.device("cpu"),
        ),
    ],
    ids=["slots of a decode step", "sequences"],
)
def test_states_arrive_as_they_are(states: StateRows) -> None:
    ours, theirs = Pipe()
    sender, receiver = PlanSender([(os.getpid(), ours)]), PlanReceiver(theirs)
    batch = _batch(7, 2, 2, 5, 9, 4)
    starts = torch.tensor([0, 4, 7], dtype=torch.int32)
    batch = replace(
        batch, attention=replace(batch.attention, query_start_loc=starts), states=states
    )
    sender.send(batch)
    received = receiver.receive(60.0)
    _assert_same(received, batch)
    assert isinstance(received, ModelInput)
    assert received.states is not None
    assert received.states[:3] == states[:3]
    mine, other = received.states.decoding, states.decoding
    assert (mine is None) == (other is None)
    if mine is not None and other is not None:
        assert torch.equal(mine, other)


def test_a_batch_stays_as_it_is_when_the_next_is_sent() -> None:
    ours, theirs = Pipe()
    sender, receiver = PlanSender([(os.getpid(), ours)]), PlanReceiver(theirs)
    first = _batch(4, 2, 2, 3)
    sender.send(first)
    received = receiver.receive(60.0)
    sender.send(_batch(4, 2, 2, 3))
    _assert_same(received, first)


def test_a_batch_is_not_overwritten_before_it_is_copied() -> None:
    ours, theirs = Pipe()
    sender, receiver = PlanSender([(os.getpid(), ours)]), PlanReceiver(theirs)
    first, second = _batch(4, 2, 2, 3), _batch(4, 2, 2, 3)
    sender.send(first)
    with ThreadPoolExecutor() as threads:
        sent = threads.submit(sender.send, second)
        _assert_same(receiver.receive(60.0), first)
        sent.result(timeout=60)
    _assert_same(receiver.receive(60.0), second)


def test_an_order_arrives_between_two_batches_and_is_answered() -> None:
    ours, theirs = Pipe()
    sender, receiver = PlanSender([(os.getpid(), ours)]), PlanReceiver(theirs)
    first, second = _batch(4, 2, 2, 3), _batch(3, 3, 3, 1)
    sender.send(first)
    sender.order("put", 3, None)
    _assert_same(receiver.receive(60.0), first)
    assert receiver.receive(60.0) == Order("put", (3, None))
    receiver.answer("done")
    assert sender.answers() == ["done"]
    sender.send(second)
    _assert_same(receiver.receive(60.0), second)


def test_without_a_batch_there_is_none_and_the_senders_end_is_one() -> None:
    ours, theirs = Pipe()
    receiver = PlanReceiver(theirs)
    assert receiver.receive(0.0) is None
    ours.close()
    with pytest.raises(EOFError):
        receiver.receive(60.0)
