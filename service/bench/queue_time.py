"""How long requests waited in the server's queue, by the server's own metrics.

The headers of a stream go out before its first token and do not know it.
"""

from __future__ import annotations

_SERIES = "tgi_request_queue_duration"


def mean_queue_s(before: str, after: str) -> float | None:
    """Returns the mean over the requests between two looks at the metrics, whoever sent them.

    None if the server does not say, or if none ended in between.
    """
    count = _value(after, "count") - _value(before, "count")
    return (_value(after, "sum") - _value(before, "sum")) / count if count > 0 else None


def _value(exposition: str, kind: str) -> float:
    for line in exposition.splitlines():
        name, _, value = line.partition(" ")
        if name == f"{_SERIES}_{kind}":
            return float(value)
    return 0.0  # not seen yet
