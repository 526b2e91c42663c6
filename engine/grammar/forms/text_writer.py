"""Strings of a form as a terminal, for texts and for names."""

from __future__ import annotations

from ..schema.keywords import Schema, items
from ..schema.strings import with_known_strings
from . import expressions
from .claims import size
from .formats import PLAIN_FORMATS
from .limits import unsayable
from .texts import TextForm


def text_expression(form: TextForm) -> str:
    """The JSON strings of a form without formats, as an expression in Lark."""
    if form.formats:
        raise unsayable('"format" of a name')
    if form.values is not None:
        kept = [expressions.quoted_text(text) for text in form.values if form.has(text)]
        return f"/{_in_lark('|'.join(kept) or expressions.NOTHING)}/"
    length = expressions.quoted_length(form.min_length, form.max_length)
    parts = [f"/{_in_lark(length)}/"]
    parts += [f"/{_in_lark(expressions.quoted(pattern))}/" for pattern in form.patterns]
    parts += [f"~/{_in_lark(expressions.quoted(pattern))}/" for pattern in form.other_than]
    if form.excluded:
        excluded = "|".join(map(expressions.quoted_text, form.excluded))
        parts.append(f"~/{_in_lark(excluded)}/")
    return " & ".join(parts)


def plain_expression(schema: Schema) -> str:
    """Strings that fit a schema, without quotation marks, as an expression in Lark.

    Raises:
        GrammarError: its pattern cannot be said, or a length is none.
    """
    least, most = size(schema, "minLength", 0), size(schema, "maxLength")
    parts = [f"/(?s:.){{{least},{'' if most is None else most}}}/"]
    read = with_known_strings(schema, "#", strict_formats=False)
    if "format" in read:
        parts.append(f"/{_in_lark(PLAIN_FORMATS[read['format']])}/")
    patterns = [part["pattern"] for part in (read, *items(read.get("allOf"))) if "pattern" in part]
    parts += [f"/{_in_lark(expressions.whole(pattern))}/" for pattern in patterns]
    return " & ".join(parts)


def _in_lark(expression: str) -> str:
    """An expression as it stands between slashes."""
    return expression.replace("/", r"\/")
