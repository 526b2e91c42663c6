"""Which part of a layer's weight a rank has."""

from __future__ import annotations

from typing import NamedTuple


class Cut(NamedTuple):
    """A rank's part of the weight [out, in] of a linear layer.

    `dim` is 0 where the layer was divided by outputs, and 1 by inputs. `first` and `size` say
    which of the `total` outputs or inputs are the rank's.
    """

    dim: int
    first: int
    size: int
    total: int
