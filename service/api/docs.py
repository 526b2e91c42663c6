"""The interactive documentation: Swagger UI, from a package, for our own OpenAPI document.

That document is the contract, unchanged, with our additions merged in (JSON Merge Patch, RFC 7396).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import orjson
import swagger_ui_bundle

from ..bundled import OPENAPI
from ..errors import ErrorKind, ServiceError
from ..routes import DOCS_ASSETS

JSON_TYPE = "application/json"

_TYPES = {".css": "text/css", ".js": "text/javascript", ".png": "image/png"}
_PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Tokenwire</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
<link rel="icon" type="image/png" href="/docs/favicon-32x32.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui"});</script>
</body>
</html>
"""


@cache
def open_api(model_id: str = "tokenwire/demo") -> bytes:
    """The OpenAPI document, whose examples are requests that this server answers.

    Args:
        model_id: the name of the model that is served, for the example of a path that has it.
    """
    contract, additions = (
        orjson.loads((OPENAPI / name).read_bytes()) for name in ("contract.json", "additions.json")
    )
    document = merge_patch(contract, additions)
    (name,) = document["paths"]["/v1/models/{id}"]["get"]["parameters"]
    name["schema"]["example"] = model_id
    return orjson.dumps(document)


@cache
def file(asset: str) -> tuple[str, bytes]:
    """Returns content type and bytes of the page (`asset` is empty) or of a file that it loads.

    Raises:
        ServiceError: there is no such file.
    """
    if not asset:
        return "text/html; charset=utf-8", _PAGE
    if asset not in DOCS_ASSETS:
        raise ServiceError(ErrorKind.NOT_FOUND, "Not Found", field="asset")
    path = Path(swagger_ui_bundle.swagger_ui_path) / asset
    return _TYPES[path.suffix], path.read_bytes()


def merge_patch(target: Any, patch: Any) -> Any:
    """Applies a patch: objects are merged, null removes, everything else replaces (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result
