"""How long requests waited in the server's queue, from the server's own metrics.

The headers of a stream are sent before its first token and cannot contain it.
"""

from __future__ import annotations

_SERIES = "tgi_request_queue_duration"


def mean_queue_s(before: str, after: str) -> float | None:
    """Returns the mean in seconds over all requests between two readings of the metrics.

    None if the server has no such series, or if no request ended in between.
    """
    count = _value(after, "count") - _value(before, "count")
    return (_value(after, "sum") - _value(before, "sum")) / count if count > 0 else None


def _value(exposition: str, kind: str) -> float:
    for line in exposition.splitlines():
        name, _, value = line.partition(" ")
        if name == f"{_SERIES}_{kind}":
            return float(value)
    return 0.0  # the series does not exist yet
