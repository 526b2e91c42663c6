"""Models that write images in their own way: answers through the server are those of generate."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("PIL")

from tests.e2e.family_checkpoints import RECIPES, generated, make
from tests.e2e.image_checkpoint import picture, png
from tests.e2e.stack import Stack
from tests.e2e.test_images import NUM_TOKENS, body, for_template, image, text, user
from tests.on_demand import ALL_MODELS

TRIED = RECIPES if ALL_MODELS else ("gemma3",)
PICTURES = [picture(1, 60, 90), picture(2, 150, 64)]


@pytest.fixture(scope="module", params=TRIED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make(folder, name)
    return folder


def test_answers_are_those_of_generate(served: Stack, checkpoint: Path, name: str) -> None:
    """With an image at a text's beginning, one at its end."""
    first, second = (image(png(one)) for one in PICTURES)
    conversations = {
        1: [user(first, text("\nWhat is this?"))],
        2: [
            user(text("One:"), first),
            {"role": "assistant", "content": [text("A picture.")]},
            user(second, text("And this?")),
        ],
    }
    for count, messages in conversations.items():
        expected = generated(checkpoint, name, for_template(messages), PICTURES[:count], NUM_TOKENS)
        for _ in range(2):  # the second time from the cache
            reply = served.http.post("/v1/chat/completions", json=body(*messages)).json()
            answer = reply["choices"][0]["message"]["content"]
            assert (answer, reply["usage"]["prompt_tokens"]) == expected


def test_a_mark_in_a_text_is_text(served: Stack, name: str) -> None:
    mark = RECIPES[name].mark or RECIPES[name].placeholder
    messages = [user(text(f"{mark} is a mark."), image(png(PICTURES[0])))]
    reply = served.http.post("/v1/chat/completions", json=body(*messages))
    assert reply.status_code == 200
