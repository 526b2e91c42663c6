"""Strings of a format, without quotation marks: some texts that are of it, perhaps not all."""

from __future__ import annotations

_DATE = (
    r"[0-9]{4}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    r"|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?"
_TIME = rf"{_CLOCK}(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,3}}"

# By the names of `engine/grammar/schema/strings.py`; each is an expression in the library's words.
PLAIN_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"(?:{_DATE})T{_TIME}",
    "duration": (
        r"P(?:[0-9]{1,9}W|[0-9]{1,9}D(?:T[0-9]{1,9}[HMS])?"
        r"|T[0-9]{1,9}(?:H(?:[0-9]{1,9}M(?:[0-9]{1,9}S)?)?|M(?:[0-9]{1,9}S)?|S))"
    ),
    "uuid": r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": r"[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{1,4}){7}",
    "hostname": _HOST,
    "email": rf"[A-Za-z0-9_+-]{{1,30}}(?:\.[A-Za-z0-9_+-]{{1,30}}){{0,1}}@{_HOST}",
    "uri": rf"[a-z][a-z0-9+.-]{{0,15}}://{_HOST}(?::[0-9]{{1,5}})?(?:/[A-Za-z0-9._~/?&=+:@,-]*)?",
}
