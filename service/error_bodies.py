"""The bodies of errors over REST: TGI's, and OpenAI's for those who read that.

TGI's clients read a text at the key `error`, OpenAI's an object. On OpenAI's paths the caller's
headers decide; the rule is here once, for the service, and for the errors that Envoy makes itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

ErrorFormat = Literal["tgi", "openai"]

FORMAT_HEADER = "x-error-format"
OPENAI_PATHS = "/v1/"  # how they begin
# All of OpenAI's SDKs send headers that begin like this; Envoy looks for these two only.
_SDK_PREFIX = "x-stainless-"
SDK_HEADERS = ("x-stainless-lang", "x-stainless-package-version")

# The `code` of errors that clients know by OpenAI's name. The others have their `error_type`.
_CODES = {"unauthenticated": "invalid_api_key", "overloaded": "rate_limit_exceeded"}
_FAILED = 424  # of the server, although it is below 500


def error_format(path: str | None, headers: Mapping[str, object]) -> ErrorFormat:
    """The form of the errors of a REST call.

    Args:
        path: that was asked for.
        headers: the caller's, with names in lower case.
    """
    if path is None or not path.startswith(OPENAI_PATHS):
        return "tgi"
    if (wanted := headers.get(FORMAT_HEADER)) is not None:
        return "openai" if wanted == "openai" else "tgi"
    return "openai" if _is_sdk(headers) else "tgi"


def tgi_body(message: str, error_type: str) -> dict[str, Any]:
    """TGI's form."""
    return {"error": message, "error_type": error_type}


def openai_body(
    message: str, error_type: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's form.

    Args:
        message: the text.
        error_type: that of TGI's form.
        status: of the reply.
        param: the path of the field at fault.
        code: OpenAI's name of the error, if it has one that neither type nor status tells.
    """
    return {
        "error": {
            "message": message,
            "type": _type(status),
            "param": param,
            "code": code or _CODES.get(error_type, error_type),
        }
    }


def _is_sdk(names: Iterable[str]) -> bool:
    return any(name.startswith(_SDK_PREFIX) for name in names)


def _type(status: int) -> str:
    """OpenAI's type of an error: whose fault it is."""
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 or status == _FAILED else "invalid_request_error"
