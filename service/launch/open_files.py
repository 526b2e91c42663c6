"""The number of files that a process may have open, which connections count towards."""

from __future__ import annotations

import resource

_OTHERS = 256  # files of a process besides its callers' connections


def raise_limit(num_connections: int) -> str | None:
    """Raises this process's limit, which children inherit, as far as it needs and the user may.

    Args:
        num_connections: connections of callers that there may be at a time.

    Returns:
        A line of warning if that is not enough.
    """
    needed = num_connections + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    allowed = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == needed:
        return None
    return (
        f"only {allowed} files may be open (ulimit -n); {num_connections} connections need {needed}"
    )
