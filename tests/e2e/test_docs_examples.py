"""What Swagger UI sends as it stands, without a change by the reader, is answered with 200."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import orjson
import pytest

from service.api import docs
from service.routes import REST_ROUTES
from tests.browser import CHROMIUM, Page, browsing
from tests.e2e.stack import Stack, running
from tests.paths import REPOSITORY

DOCUMENT: dict[str, Any] = orjson.loads(docs.open_api())
OPERATIONS = [(method, path) for path, item in DOCUMENT["paths"].items() for method in item]
# Need an admin key, which the server of these tests has not; test_loading_adapters.py sends theirs.
ADMIN = [("post", "/v1/load_lora_adapter"), ("post", "/v1/unload_lora_adapter")]
OPEN = [operation for operation in OPERATIONS if operation not in ADMIN]

# Does what a reader does: opens an operation, tries it out, executes it; then the status shown.
EXECUTE = """(async () => {
  const block = document.getElementById('operations-' + %s);
  const press = async (selector) => {
    for (;;) {
      const found = block.querySelector(selector);
      if (found) { found.click(); return; }
      await new Promise(requestAnimationFrame);
    }
  };
  await press('.opblock-summary-control');
  await press('.try-out__btn');
  await press('.execute');
  for (;;) {
    const status = block.querySelector('.live-responses-table .response .response-col_status');
    if (status) return status.firstChild.textContent;
    await new Promise(requestAnimationFrame);
  }
})()"""


def operation(method: str, path: str) -> dict[str, Any]:
    found: dict[str, Any] = DOCUMENT["paths"][path][method]
    return found


def example(found: dict[str, Any]) -> Any:
    """The body that stands as the example of an operation; None for one without a body."""
    if "requestBody" not in found:
        return None
    return found["requestBody"]["content"]["application/json"]["example"]


def send(client: httpx.Client, document: dict[str, Any], method: str, path: str) -> httpx.Response:
    found = document["paths"][path][method]
    for parameter in found.get("parameters", ()):
        value = quote(parameter["schema"]["example"], safe="")
        path = path.replace(f"{{{parameter['name']}}}", value)
    body = example(found)
    return client.request(method, path, json=body) if body else client.request(method, path)


def test_every_operation_with_a_body_has_an_example() -> None:
    with_body = [(method, path) for method, path in OPERATIONS if method == "post"]
    assert len(with_body) == sum("POST" in methods for methods in REST_ROUTES.values())
    assert all(example(operation(method, path)) for method, path in with_body)


@pytest.mark.parametrize(("method", "path"), ADMIN)
def test_the_example_for_admins_is_refused_to_others(stack: Stack, method: str, path: str) -> None:
    assert operation(method, path)["security"] == [{"api_key": []}]
    assert send(stack.http, DOCUMENT, method, path).status_code == 403


@pytest.mark.parametrize(("method", "path"), OPEN)
def test_the_example_is_answered(stack: Stack, method: str, path: str) -> None:
    served = stack.http.get("/openapi.json").json()
    reply = send(stack.http, served, method, path)
    assert reply.status_code == 200, reply.text
    assert "error" not in reply.text[:20]


def test_the_example_names_the_model_that_is_served(tmp_path: Path) -> None:
    model = tmp_path / "other"
    model.symlink_to(REPOSITORY / "models" / "demo")
    document = orjson.loads(docs.open_api(str(model)))
    (name,) = document["paths"]["/v1/models/{id}"]["get"]["parameters"]
    assert name["schema"]["example"] == str(model)
    with running(tmp_path / "log", f"--model-id={model}") as other:
        served = other.http.get("/openapi.json").json()
        assert served == document
        assert send(other.http, served, "get", "/v1/models/{id}").status_code == 200


@pytest.fixture(scope="module")
def page(stack: Stack) -> Iterator[Page]:
    with browsing() as page:
        page.open(f"{stack.url}/docs")
        page.wait("document.querySelector('.opblock')")
        yield page


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
@pytest.mark.parametrize(("method", "path"), OPEN[::4])
def test_try_it_out_gets_200(page: Page, method: str, path: str) -> None:
    """Of a few operations: what the page sends is their example, of which all are sent above."""
    found = operation(method, path)
    name = f"{found['tags'][0].replace(' ', '_')}-{found['operationId']}"
    assert page.value(EXECUTE % json.dumps(name)) == "200"
