"""Blocks of two kinds are equally large, have room for all layers, and save memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.block_form import BlockForm, choose_form


def layer_tokens(form: BlockForm, num_windowed: int, num_tokens: int, lookahead: int = 1) -> int:
    """What a text takes, as tokens of one layer."""
    places = form.window_places if form.ratio else num_windowed
    return form.num_blocks(num_tokens, lookahead) * places * form.block_size


@pytest.mark.parametrize(
    ("num_whole", "num_windowed", "window", "saved"),
    [(5, 29, 1024, 5.7), (8, 40, 1024, 5.2), (10, 52, 1024, 5.2), (12, 12, 128, 2.0)],
    ids=["Gemma 3 4B", "Gemma 3 12B", "Gemma 3 27B", "gpt-oss 20B"],
)
def test_published_models_take_a_fraction_for_long_texts(
    num_whole: int, num_windowed: int, window: int, saved: float
) -> None:
    length = 32_768
    form = choose_form(
        num_whole=num_whole,
        num_windowed=num_windowed,
        window=window,
        block_size=16,
        max_total_tokens=length,
    )
    assert form is not None
    usual = (num_whole + num_windowed) * length
    assert usual / layer_tokens(form, num_windowed, length) == pytest.approx(saved, abs=0.1)


@given(
    num_whole=st.integers(0, 20),
    num_windowed=st.integers(1, 60),
    window=st.integers(1, 500),
    block_size=st.sampled_from([1, 4, 16]),
    length=st.integers(2, 4000),
)
def test_blocks_of_either_kind_have_room_for_their_layers_and_are_equally_large(
    num_whole: int, num_windowed: int, window: int, block_size: int, length: int
) -> None:
    form = choose_form(
        num_whole=num_whole,
        num_windowed=num_windowed,
        window=window,
        block_size=block_size,
        max_total_tokens=length,
    )
    usual = -(-length // block_size) * block_size * (num_whole + num_windowed)
    if form is None:
        return
    assert layer_tokens(form, num_windowed, length) < usual
    assert bool(form.ratio) == bool(num_whole)
    if num_whole:
        assert form.whole_places >= num_whole
        assert form.window_places >= num_windowed
        assert form.whole_places * form.whole_size == form.window_places * form.block_size


@given(
    window=st.integers(1, 40),
    block_size=st.integers(1, 9),
    lookahead=st.integers(1, 30),
    length=st.integers(1, 200),
    data=st.data(),
)
def test_a_text_never_needs_more_blocks_with_a_window_than_is_counted(
    window: int, block_size: int, lookahead: int, length: int, data: st.DataObject
) -> None:
    form = BlockForm(window=window, block_size=block_size, ratio=1)
    computed = data.draw(st.integers(0, length - 1))
    end = min(length, computed + lookahead)
    first = form.first_needed(computed)
    assert first * block_size <= max(0, computed - window + 1) < (first + 1) * block_size
    assert -(-end // block_size) - first <= form.num_windowed(length, lookahead)


@given(num_whole=st.integers(1, 20), num_windowed=st.integers(1, 60), excess=st.integers(0, 99))
def test_a_window_as_long_as_texts_saves_nothing(
    num_whole: int, num_windowed: int, excess: int
) -> None:
    form = choose_form(
        num_whole=num_whole,
        num_windowed=num_windowed,
        window=128 + excess,
        block_size=16,
        max_total_tokens=128,
    )
    assert form is None
