"""Puts the page together, and says which content a browser may let it have."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

# Where a caller takes HTML, as browsers say; `q=0` means that it does not. RE2 has no negation, so
# the weights that are allowed are spelt out.
ACCEPTS_HTML = r"(?i)(.*[,\s])?text/html\s*(;\s*q=(1(\.0*)?|0?\.\d*[1-9]\d*)\s*)?(,.*)?"


@dataclass(frozen=True, slots=True)
class Document:
    """The page as it is sent.

    Attributes:
        body: HTML.
        headers: of the response, by name.
    """

    body: str
    headers: tuple[tuple[str, str], ...]


@cache
def document() -> Document:
    """The page, with style and script inside, and the headers that allow these two alone."""
    folder = resources.files(__package__)
    html, style, script = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("index.html", "chat.css", "chat.js")
    )
    body = html.replace("{{ style }}", style).replace("{{ script }}", script)
    return Document(body, _headers(style, script))


def _headers(style: str, script: str) -> tuple[tuple[str, str], ...]:
    # `require-trusted-types-for` makes text that is set as HTML an error.
    policy = (
        "default-src 'none'",
        f"script-src {_source(script)}",
        f"style-src {_source(style)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return (
        ("content-type", "text/html; charset=utf-8"),
        ("content-security-policy", "; ".join(policy)),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cache-control", "no-cache"),
        ("vary", "accept"),
    )


def _source(text: str) -> str:
    """The hash by which a policy allows one inline text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
