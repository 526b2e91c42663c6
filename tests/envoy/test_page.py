"""The page at `/`, in a real browser, behind a real Envoy and a fake service."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from service.page.document import document
from tests.browser import CHROMIUM, Page, browsing
from tests.envoy.fake_service import Context
from tests.envoy.gateway import Gateway

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
EVENTS = "text/event-stream"
ENTER = ("Enter", 13, "\r")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with browsing() as page:
        yield page


@pytest.fixture
def page(tab: Page, gateway: Gateway) -> Page:
    """The page, freshly opened, of a server whose model is called some/model."""
    gateway.service.reply("Info", b'{"model_id":"some/model","max_total_tokens":64}')
    tab.forget()
    tab.media()
    tab.open(f"http://{gateway.target}/")
    tab.value("sessionStorage.clear()")
    tab.wait("document.title.startsWith('some/model')")
    return tab


def part(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


USAGE = b'data: {"choices":[],"usage":{"completion_tokens":12}}\n\n'
DONE = b"data: [DONE]\n\n"


def answer_with(gateway: Gateway, *parts: bytes) -> None:
    gateway.service.reply("Chat", *parts, content_type=EVENTS)


def ask(page: Page, text: str = "hello") -> None:
    page.type(text)
    page.press(*ENTER)


def wait_for_the_end(page: Page) -> None:
    page.wait("!document.querySelector('[aria-busy]') && document.querySelector('#stop').hidden")


def last_body(gateway: Gateway) -> dict[str, Any]:
    (*_, call) = (call for call in gateway.service.calls if call.method == "Chat")
    body: dict[str, Any] = json.loads(call.request.http.data)
    return body


def answer(page: Page) -> str:
    text: str = page.value("document.querySelector('#log li:last-child .text').textContent")
    return text


@pytest.mark.parametrize("accept", [BROWSER, "text/html", "application/json, TEXT/HTML;q=0.1"])
def test_browsers_get_the_page(gateway: Gateway, accept: str) -> None:
    reply = gateway.client.get("/", headers={"accept": accept})
    assert reply.status_code == 200
    assert reply.text == document().body
    assert [reply.headers[name] for name, _ in document().headers] == [
        value for _, value in document().headers
    ]
    head = gateway.client.head("/", headers={"accept": accept})
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(reply.content))
    assert gateway.service.calls == []


@pytest.mark.parametrize(
    "accept", ["*/*", "application/json", "text/html;q=0", "text/html; q=0.00", "x-text/html", ""]
)
def test_others_get_health_as_before(gateway: Gateway, accept: str) -> None:
    reply = gateway.client.get("/", headers={"accept": accept})
    assert reply.content == b'{"method":"Health"}'
    assert "content-security-policy" not in reply.headers


def test_a_post_of_a_browser_is_a_generation(gateway: Gateway) -> None:
    reply = gateway.client.post("/", json={}, headers={"accept": BROWSER})
    assert reply.content == b'{"method":"CompatGenerate"}'


def test_other_methods_and_paths_are_as_before(gateway: Gateway) -> None:
    assert gateway.client.put("/", headers={"accept": BROWSER}).status_code == 405
    reply = gateway.client.get("/health", headers={"accept": BROWSER})
    assert reply.content == b'{"method":"Health"}'


def test_the_page_is_there_while_the_service_is_not(gateway: Gateway) -> None:
    gateway.service.fail("Health", grpc.StatusCode.UNAVAILABLE, "")
    assert gateway.client.get("/", headers={"accept": BROWSER}).text == document().body


def test_the_page_is_small_and_asks_nobody_else_for_anything() -> None:
    body = document().body
    assert len(body.encode()) < 20_000
    assert "http" not in body.replace("http://www.w3.org/2000/svg", "")  # an XML namespace
    assert "unsafe" not in dict(document().headers)["content-security-policy"]


@needs_chromium
def test_an_answer_is_shown_while_it_comes(page: Page, gateway: Gateway) -> None:
    gate = gateway.service.gate()

    async def stream(_request: Any, _context: Context) -> AsyncIterator[Any]:
        yield gateway.messages.reply("Chat", part("Good "), EVENTS)
        await gate.wait()
        for body in (part("day", "stop"), USAGE, DONE):
            yield gateway.messages.reply("Chat", body, EVENTS)

    gateway.service.behave("Chat", stream)
    ask(page)
    page.wait("document.querySelector('#log li:last-child .text').textContent === 'Good '")
    assert page.value("document.querySelector('#log li:last-child').ariaBusy") == "true"
    assert not page.value("document.querySelector('#stop').hidden")
    gate.open()
    wait_for_the_end(page)
    assert answer(page) == "Good day"
    assert page.value("document.querySelector('#rate').textContent").startswith("12 tokens · ")
    assert page.complaints() == []
    assert last_body(gateway)["stream"] is True


@needs_chromium
def test_a_conversation_goes_on_with_what_was_said(page: Page, gateway: Gateway) -> None:
    answer_with(gateway, part("one", "stop"), DONE)
    page.value("document.querySelector('#system').value = 'Be brief.'")
    ask(page, "first")
    wait_for_the_end(page)
    ask(page, "second")
    wait_for_the_end(page)
    said = [(item["role"], item["content"]) for item in last_body(gateway)["messages"]]
    assert said == [
        ("system", "Be brief."), ("user", "first"), ("assistant", "one"), ("user", "second")
    ]  # fmt: skip
    page.value("document.querySelector('#new').click()")
    ask(page, "third")
    wait_for_the_end(page)
    assert [item["content"] for item in last_body(gateway)["messages"]] == ["Be brief.", "third"]


@needs_chromium
@pytest.mark.parametrize(
    "text", ["<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "&lt;b&gt; </p>"]
)
def test_what_the_model_says_is_text(page: Page, gateway: Gateway, text: str) -> None:
    answer_with(gateway, part(text, "stop"), DONE)
    ask(page, text)
    wait_for_the_end(page)
    assert answer(page) == text
    assert page.value("document.querySelectorAll('#log img, #log script, #log b').length") == 0
    assert page.complaints() == []


@needs_chromium
def test_the_policy_refuses_html_and_foreign_addresses(page: Page, gateway: Gateway) -> None:
    html = "document.body.innerHTML = '<b>'"
    refused = f"(() => {{ try {{ {html}; }} catch (error) {{ return error.name; }} }})()"
    assert page.value(refused) == "TypeError"
    other = f"http://localhost:{gateway.target.rpartition(':')[2]}/info"
    fetched = f"fetch({json.dumps(other)}).then(() => 'fetched', (e) => e.name)"
    assert page.value(fetched) == "TypeError"
    assert any("connect-src" in text for text in page.complaints())


@needs_chromium
def test_stop_ends_the_answer_and_keeps_what_there_is(page: Page, gateway: Gateway) -> None:
    ended = gateway.service.gate()

    async def stream(_request: Any, context: Context) -> AsyncIterator[Any]:
        context.add_done_callback(lambda _: ended.open())
        yield gateway.messages.reply("Chat", part("Good "), EVENTS)
        await gateway.service.gate().wait()  # for ever

    gateway.service.behave("Chat", stream)
    ask(page)
    page.wait("document.querySelector('#log li:last-child .text').textContent === 'Good '")
    page.press("Escape", 27)
    wait_for_the_end(page)
    assert "Stopped." in page.text()
    answer_with(gateway, part("day", "stop"), DONE)
    ask(page, "and?")
    wait_for_the_end(page)
    assert last_body(gateway)["messages"][1] == {"role": "assistant", "content": "Good "}
    assert page.complaints() == []


@needs_chromium
def test_shift_and_enter_starts_a_line(page: Page, gateway: Gateway) -> None:
    answer_with(gateway, part("yes", "stop"), DONE)
    page.type("one")
    page.press(*ENTER, modifiers=8)
    page.type("two")
    page.press(*ENTER)
    wait_for_the_end(page)
    assert last_body(gateway)["messages"][0]["content"] == "one\ntwo"


ERRORS: list[tuple[grpc.StatusCode, dict[str, str], str]] = [
    (
        grpc.StatusCode.INVALID_ARGUMENT,
        {"x_http_status": "422", "x_error_body": '{"error":"too \\"long\\"","error_type":"x"}'},
        'refused the request: too "long"',
    ),
    (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        {"x_http_status": "429", "retry_after": "3", "x_error_body": '{"error":"full"}'},
        "Try again in 3 s",
    ),
    (grpc.StatusCode.UNAVAILABLE, {}, "not ready"),
    (grpc.StatusCode.INTERNAL, {}, "status 500"),
]


@needs_chromium
@pytest.mark.parametrize(("code", "trailing", "words"), ERRORS)
def test_errors_are_said_in_words(
    page: Page, gateway: Gateway, code: grpc.StatusCode, trailing: dict[str, str], words: str
) -> None:
    gateway.service.fail("Chat", code, "", **trailing)
    ask(page, "a question")
    wait_for_the_end(page)
    assert words in page.value("document.querySelector('[role=alert]:not([hidden])').textContent")
    # The question is not lost, and not a part of the conversation.
    assert page.value("document.querySelector('#prompt').value") == "a question"
    assert page.value("document.querySelectorAll('#log li').length") == 0


@needs_chromium
@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([part("Good "), b'data: {"error":"no luck","error_type":"x"}\n\n', DONE], "no luck"),
        ([part("Good ")], "before the answer was complete"),
    ],
)  # fmt: skip
def test_a_stream_that_fails_says_so_and_keeps_its_beginning(
    page: Page, gateway: Gateway, parts: list[bytes], words: str
) -> None:
    answer_with(gateway, *parts)
    ask(page)
    wait_for_the_end(page)
    assert words in page.value("document.querySelector('[role=alert]').textContent")
    assert answer(page) == "Good "


@needs_chromium
def test_a_key_is_asked_for_kept_for_the_tab_and_sent(tab: Page, gateway: Gateway) -> None:
    def refuses(context: Context) -> bool:
        return ("authorization", "Bearer tw-right") not in context.invocation_metadata()

    async def info(_request: Any, context: Context) -> Any:
        if refuses(context):
            body = '{"error":"no key","error_type":"unauthenticated"}'
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "",
                (("x-http-status", "401"), ("x-error-body", body)),
            )
        return gateway.messages.reply("Info", b'{"model_id":"some/model","max_total_tokens":64}')

    gateway.service.behave("Info", info)
    answer_with(gateway, part("yes", "stop"), DONE)
    tab.open(f"http://{gateway.target}/")
    tab.value("sessionStorage.clear()")
    tab.wait("document.activeElement.id === 'key'")
    assert "asks for an API key" in tab.text()
    tab.type("tw-wrong")
    tab.press(*ENTER)
    tab.wait("document.body.innerText.includes('does not accept this API key')")
    tab.type("tw-right")
    tab.press(*ENTER)
    tab.wait("document.activeElement.id === 'prompt'")
    ask(tab)
    wait_for_the_end(tab)
    assert gateway.service.calls[-1].metadata["authorization"] == "Bearer tw-right"
    assert tab.value("localStorage.length + document.cookie.length") == 0
    assert tab.value("sessionStorage.getItem('tokenwire-api-key')") == "tw-right"
    tab.value("sessionStorage.clear()")


# Every text's contrast with what is behind it, by WCAG 2: 4.5 is AA for small text.
CONTRASTS = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const back = (e) => {
    const c = rgb(getComputedStyle(e).backgroundColor);
    return c.length === 3 || c[3] === 1 ? c : back(e.parentElement);
  };
  return [...document.querySelectorAll('body *')]
    .filter((e) => e.checkVisibility() && e.innerText?.trim() || e.matches('input, textarea'))
    .map((e) => { const [a, b] = [light(rgb(getComputedStyle(e).color)), light(back(e))].sort();
      return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 60)]; });
})()"""


@needs_chromium
def test_light_and_dark_can_be_read(page: Page, gateway: Gateway) -> None:
    answer_with(gateway, part("Good day", "length"), DONE)
    ask(page)
    wait_for_the_end(page)
    page.value("document.querySelector('details').open = true")
    for shown in ("error", "key-form"):
        page.value(f"document.getElementById('{shown}').hidden = false")
    page.value("document.getElementById('error').textContent = 'An error.'")
    backs = []
    for scheme in ("light", "dark"):
        page.media(prefers_color_scheme=scheme)
        found = page.value(CONTRASTS)
        assert len(found) > 20
        assert [entry for entry in found if entry[0] < 4.5] == []
        backs.append(page.value("getComputedStyle(document.body).backgroundColor"))
    assert len(set(backs)) == 2


@needs_chromium
def test_nothing_moves_for_who_does_not_want_it(page: Page, gateway: Gateway) -> None:
    gate = gateway.service.gate()

    async def stream(_request: Any, _context: Context) -> AsyncIterator[Any]:
        yield gateway.messages.reply("Chat", part("Good "), EVENTS)
        await gate.wait()
        yield gateway.messages.reply("Chat", part("day", "stop"), EVENTS)

    gateway.service.behave("Chat", stream)
    ask(page)
    page.wait("document.querySelector('#log li:last-child .text').textContent === 'Good '")
    count = "document.getAnimations().length"
    assert page.value(count) == 1
    page.media(prefers_reduced_motion="reduce")
    assert page.value(count) == 0
    gate.open()
    wait_for_the_end(page)


@needs_chromium
def test_every_field_has_a_label_and_every_control_a_name(page: Page) -> None:
    page.value("document.querySelector('details').open = true")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = [
        node
        for node in nodes
        if node.get("role", {}).get("value") in ("textbox", "spinbutton", "button", "link")
    ]
    assert len(controls) == 7
    assert [node for node in controls if not node["name"]["value"]] == []
    roles = {node.get("role", {}).get("value") for node in nodes}
    assert {"banner", "main", "contentinfo", "log", "heading", "navigation"} <= roles
    assert page.value("document.documentElement.lang") == "en"


@needs_chromium
def test_a_narrow_window_needs_no_sideways_scrolling(page: Page) -> None:
    page.picture(320, 640)
    assert page.value("document.documentElement.scrollWidth") <= 320
    page.call("Emulation.clearDeviceMetricsOverride")
