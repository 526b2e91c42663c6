"""Images for a Qwen VL model: of any size, each with as many tokens as its size needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.image_checkpoint import picture, png
from tests.e2e.qwen_checkpoint import generated, make
from tests.e2e.stack import Stack
from tests.e2e.test_images import (
    NUM_TOKENS,
    at,
    body,
    for_template,
    image,
    markdown,
    plain,
    text,
    user,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make(folder)
    return folder


def test_answers_are_those_of_generate(served: Stack, checkpoint: Path) -> None:
    pictures = [picture(1, 60, 90), picture(2, 112, 56), picture(3, 300, 300)]
    first, *others = [image(png(one)) for one in pictures]
    messages = [
        user(first, text("What is this?")),
        {"role": "assistant", "content": [text("A picture.")]},
        user(text("And these:"), *others),
    ]
    expected, num_prompt = generated(checkpoint, for_template(messages), pictures, NUM_TOKENS)
    listed = served.http.post("/chat_tokenize", json=body(*messages)).json()
    assert len(listed["tokenize_response"]) == num_prompt
    for _ in range(2):  # the second time from the cache
        reply = served.http.post("/v1/chat/completions", json=body(*messages)).json()
        assert reply["choices"][0]["message"]["content"] == expected
        assert reply["usage"]["prompt_tokens"] == num_prompt


def test_markdown_is_what_the_template_writes(served: Stack, checkpoint: Path) -> None:
    image_file = png(picture(1, 60, 90))
    messages = [user(image(image_file), text("What is this?"))]
    expected, _ = generated(checkpoint, for_template(messages), [picture(1, 60, 90)], NUM_TOKENS)
    reply = served.http.post(
        "/generate", json=plain(f"user: {markdown(image_file)}What is this?assistant: ")
    )
    assert reply.json()["generated_text"] == expected


def test_nothing_is_fetched_without_a_list_of_hosts(served: Stack) -> None:
    place = "https://images.example/x.png"
    chat = served.http.post("/v1/chat/completions", json=body(user(at(place))))
    text_alone = served.http.post("/generate", json=plain(f"![]({place})"))
    for answer in (chat, text_alone):
        assert answer.status_code == 422
        assert "must be a data: URL; this server fetches no images" in answer.json()["error"]
