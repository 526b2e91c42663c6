"""Doubles that print like the float32 that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import orjson


def shortest_float32(value: float | None) -> float | None:
    """The double that prints as the shortest decimal of the same float32, as in TGI's JSON.

    None for None and for numbers that JSON lacks: NaN and the infinities.
    """
    if value is None:
        return None
    # numpy's own text has the same digits and takes half as long again.
    text = orjson.dumps(np.float32(value), option=orjson.OPT_SERIALIZE_NUMPY)
    short: float | None = orjson.loads(text)
    return short


def shortest_float32s(values: Sequence[float | None]) -> list[float | None]:
    """The same of many at once."""
    text = orjson.dumps(np.array(values, np.float32), option=orjson.OPT_SERIALIZE_NUMPY)
    short: list[float | None] = orjson.loads(text)
    return short
