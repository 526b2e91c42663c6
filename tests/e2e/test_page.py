"""The page at `/` of a whole server, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.browser import CHROMIUM, Page, browsing
from tests.e2e.stack import PROMPT, Stack

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

# Notes every text that the answer has had.
WATCH = """
window.seen = [];
new MutationObserver(() => {
  const text = document.querySelector('#log .assistant .text')?.textContent;
  if (text && text !== seen.at(-1)) seen.push(text);
}).observe(document.querySelector('#log'), {subtree: true, childList: true, characterData: true});
"""


@pytest.fixture(scope="module")
def page(stack: Stack) -> Iterator[Page]:
    with browsing() as page:
        page.open(f"{stack.url}/")
        yield page


def test_an_answer_of_the_model_streams_into_the_page(page: Page, stack: Stack) -> None:
    model = stack.http.get("/info").json()["model_id"]
    page.wait(f"document.querySelector('#model').textContent === '{model}'")
    page.value(WATCH)
    page.value("document.querySelector('#temperature').value = 0")
    page.type(PROMPT)
    page.press("Enter", 13, "\r")
    page.wait("document.querySelector('#log .assistant') && !document.querySelector('[aria-busy]')")
    seen: list[str] = page.value("seen")
    assert len(seen) > 5
    assert all(later.startswith(text) for text, later in pairwise(seen))
    messages = [{"role": "user", "content": PROMPT}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 1000}
    whole = stack.http.post("/v1/chat/completions", json=body).json()
    assert seen[-1] == whole["choices"][0]["message"]["content"]
    tokens = whole["usage"]["completion_tokens"]
    assert page.value("document.querySelector('#rate').textContent").startswith(f"{tokens} tokens ")
    assert page.complaints() == []


def test_the_page_asks_this_server_alone(page: Page, stack: Stack) -> None:
    asked = [url for url in page.requests() if not url.startswith("data:")]
    assert f"{stack.url}/" in asked
    assert [url for url in asked if not url.startswith(f"{stack.url}/")] == []


def test_its_link_to_the_documentation_leads_there(page: Page) -> None:
    page.value("document.querySelector('nav a').click()")
    page.wait("document.querySelector('#swagger-ui .info .title')")
    assert page.value("location.pathname") == "/docs"
