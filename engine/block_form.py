"""What a block of the KV cache holds where some layers see only a window of a text.

All blocks have as many bytes, and any can hold either of two things::

    of layers that see everything     many tokens, all such layers     whole_size tokens
    of layers with a window           few tokens, all such layers      block_size tokens

So both kinds of layers take from one pool, and what one leaves the other can use, whatever the
lengths of texts. A block with many tokens of few layers and one with few tokens of many layers are
equally large if `ratio` is right; where it cannot be, some places in a block stay empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NUM_PADDING = 1  # blocks of a cache that no text gets: kernels may read it in place of freed ones


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockForm:
    """The two kinds of blocks of a cache.

    Attributes:
        window: positions that a token sees at most in layers with a window, its own included.
        block_size: tokens of a block of layers with a window.
        ratio: how many times more tokens a block of the other layers has; 0 if there are none.
        window_places: layers for which a block of layers with a window has room.
        whole_places: the same of the other layers.
    """

    window: int
    block_size: int
    ratio: int
    window_places: int = 1
    whole_places: int = 1

    @property
    def whole_size(self) -> int:
        """Tokens of a block of layers that see everything; 0 if there are none."""
        return self.ratio * self.block_size

    def windowed(self, windows: Mapping[int, int]) -> frozenset[int]:
        """The layers with a window, of those that have one, by their index.

        One that is larger than any text is none, and larger than `window`.
        """
        return frozenset(layer for layer, size in windows.items() if size <= self.window)

    def num_whole(self, num_tokens: int) -> int:
        """Blocks that a text takes in layers that see everything."""
        return -(-num_tokens // self.whole_size) if self.ratio else 0

    def num_windowed(self, num_tokens: int, lookahead: int = 1) -> int:
        """The most blocks that a text takes in layers with a window.

        Args:
            num_tokens: of the text.
            lookahead: tokens that a step may compute, whose windows all have to be there.
        """
        span = self.window - 1 + lookahead
        return min(-(-num_tokens // self.block_size), -(-(span - 1) // self.block_size) + 1)

    def first_needed(self, num_computed: int) -> int:
        """The index of the first block with a window that tokens after these still see."""
        return max(0, num_computed - self.window + 1) // self.block_size

    def num_blocks(self, num_tokens: int, lookahead: int = 1) -> int:
        """The most blocks that a text takes."""
        return self.num_whole(num_tokens) + self.num_windowed(num_tokens, lookahead)


def choose_form(
    *, num_whole: int, num_windowed: int, window: int, block_size: int, max_total_tokens: int
) -> BlockForm | None:
    """The form in which the longest text takes the least memory.

    Args:
        num_whole: layers that see everything.
        num_windowed: layers that see a window.
        window: the largest window.
        block_size: tokens of a block of layers with a window.
        max_total_tokens: of the longest text.

    Returns:
        None if no form takes less than blocks with the same tokens of all layers.
    """
    if not num_whole:
        forms = [BlockForm(window=window, block_size=block_size, ratio=0, whole_places=0)]
    else:
        forms = [
            _of_ratio(ratio, num_whole, num_windowed, window, block_size)
            for ratio in range(1, -(-num_windowed // num_whole) + 1)
        ]

    def cost(form: BlockForm) -> int:
        """Layers' blocks of `block_size` tokens."""
        places = form.window_places if num_whole else num_windowed
        return form.num_blocks(max_total_tokens) * places

    usual = -(-max_total_tokens // block_size) * (num_whole + num_windowed)
    best = min(forms, key=cost, default=None)
    return best if best is not None and cost(best) < usual else None


def _of_ratio(
    ratio: int, num_whole: int, num_windowed: int, window: int, block_size: int
) -> BlockForm:
    """A form whose blocks have room for all layers of either kind."""
    whole_places = max(num_whole, -(-num_windowed // ratio))
    return BlockForm(
        window=window,
        block_size=block_size,
        ratio=ratio,
        window_places=whole_places * ratio,
        whole_places=whole_places,
    )
