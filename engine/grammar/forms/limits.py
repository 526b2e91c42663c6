"""How much work a schema may make, and the errors of those that make more."""

from __future__ import annotations

from ...protocol.errors import GrammarError

MAX_FORMS = 256  # of one value; as many as there are combinations of its choices
MAX_RULES = 3000  # of the grammar
MAX_STATES = 600  # of one array or object: what is counted of it, and which values it has already
MAX_STEPS = 40_000  # combinations of forms that are looked at for a whole schema


def too_many(what: str, limit: int) -> GrammarError:
    """The error of a schema that needs more of something than there may be."""
    return GrammarError(f"it needs more than {limit} {what}")


def unsayable(what: str) -> GrammarError:
    """The error of a keyword that cannot be enforced where it stands."""
    return GrammarError(f"{what} cannot be said exactly")
