"""Images in conversations, through Envoy and over gRPC, answered as by transformers' generate."""

from __future__ import annotations

import base64
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from tests.clients.conftest import CLIENT
from tests.e2e.reflection_client import ReflectionClient, details
from tests.e2e.stack import DEADLINE_S, Stack, running, wait_until

pytest.importorskip("PIL")

from tests.e2e.image_checkpoint import generated, make, picture, png
from tests.image_host import ImageHost, image_host, moved, ok

NUM_TOKENS = 16
MAX_PIXELS = 50_000
MAX_BYTES = 500_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def host() -> Iterator[ImageHost]:
    with image_host() as made:
        made.answers["/1.png"] = ok(png(picture(1)))
        made.answers["/moved.png"] = moved("/1.png")
        made.answers["/text.png"] = ok(b"a secret")
        made.answers["/large.png"] = ok(b"x" * (MAX_BYTES + 1))
        made.answers["/never.png"] = made.hang
        yield made


@pytest.fixture(scope="module")
def served(
    checkpoint: Path, host: ImageHost, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    log = tmp_path_factory.mktemp("served") / "log"
    limits = (
        "--max-images=3",
        f"--max-image-pixels={MAX_PIXELS}",
        f"--max-image-bytes={MAX_BYTES}",
        "--image-fetch-seconds=100",
        f"--allowed-media-domains={host.place},images.example",
    )
    with running(log, f"--model-id={checkpoint}", *limits) as stack:
        yield stack


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image(data: bytes) -> dict[str, Any]:
    return at(url(data))


def at(place: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": place}}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*parts]}


def body(*messages: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [*messages],
        "max_tokens": NUM_TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
    }


def markdown(data: bytes) -> str:
    return f"![]({url(data)})"


def plain(inputs: str) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": {"max_new_tokens": NUM_TOKENS}}


def for_template(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**item, "content": [{"type": "image"} if "image_url" in p else p for p in item["content"]]}
        for item in messages
    ]


CONVERSATIONS = {
    "one": [user(text("What is this?"), image(png(picture(1))))],
    "two": [
        user(image(png(picture(1))), image(png(picture(2, 60, 20))), text("Which is larger?")),
        {"role": "assistant", "content": [text("The first.")]},
        user(text("Why?")),
    ],
    "large": [user(image(png(picture(3, 220, 220))), text("A long conversation, by its bytes."))],
}
PICTURES = {
    "large": [picture(3, 220, 220)],
    "one": [picture(1)],
    "two": [picture(1), picture(2, 60, 20)],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_answer_is_that_of_generate(served: Stack, checkpoint: Path, name: str) -> None:
    messages = CONVERSATIONS[name]
    expected, num_prompt = generated(checkpoint, for_template(messages), PICTURES[name], NUM_TOKENS)
    reply = served.http.post("/v1/chat/completions", json=body(*messages)).json()
    assert reply["choices"][0]["message"]["content"] == expected
    assert reply["usage"]["prompt_tokens"] == num_prompt


def test_a_stream_has_the_same_text(served: Stack) -> None:
    wanted = body(*CONVERSATIONS["one"])
    whole = served.http.post("/v1/chat/completions", json=wanted).json()
    with served.http.stream(
        "POST", "/v1/chat/completions", json=wanted | {"stream": True}
    ) as stream:
        lines = [
            line[5:]
            for line in stream.iter_lines()
            if line.startswith("data:") and "[DONE]" not in line
        ]
    deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines]
    assert "".join(deltas) == whole["choices"][0]["message"]["content"]


def test_grpc_callers_have_the_same_answer(served: Stack, checkpoint: Path) -> None:
    expected, num_prompt = generated(
        checkpoint, for_template(CONVERSATIONS["two"]), PICTURES["two"], NUM_TOKENS
    )
    for channel in (served.direct, served.through_envoy):
        reply = ReflectionClient(channel).call("ChatUnary", body(*CONVERSATIONS["two"]))
        assert reply.choices[0].message.content == expected
        assert reply.usage.prompt_tokens == num_prompt


def test_a_text_alone_is_answered(served: Stack, checkpoint: Path) -> None:
    message = {"role": "user", "content": "Hello"}
    expected, _ = generated(checkpoint, [user(text("Hello"))], [], NUM_TOKENS)
    reply = served.http.post("/v1/chat/completions", json=body(message)).json()
    assert reply["choices"][0]["message"]["content"] == expected


def test_a_mark_in_a_text_is_text(served: Stack) -> None:
    """It would be one more image else."""
    message = user(text("An <image> is"), image(png(picture(1))))
    assert served.http.post("/v1/chat/completions", json=body(message)).status_code == 200


URL = "messages[0].content[0].image_url.url"


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (image(b"hello"), f"`{URL}` is not an image"),
        (image(png(picture(1))[:100]), f"`{URL}` is an image that cannot be decoded"),
        (image(png(picture(1, 400, 300))), f"`{URL}` must have at most {MAX_PIXELS} pixels"),
        (image(b"x" * (MAX_BYTES + 1)), f"`{URL}` must have at most {MAX_BYTES} bytes"),
        (at("http://127.0.0.1/x.png"), f"`{URL}` has a host or a port from which"),
        (at("https://me:secret@images.example/x"), f"`{URL}` has the name of a user"),
        (at("file:///etc/passwd"), f"`{URL}` is neither a data: URL nor an http: or https: URL"),
        (at("data:image/png;base64,a*b"), f"`{URL}` has data that is not base64"),
        ({"type": "image_url", "image_url": {}}, "missing field `url`"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused(
    served: Stack, part: dict[str, Any], said: str
) -> None:
    answer = served.http.post("/v1/chat/completions", json=body(user(part)))
    assert answer.status_code == 422
    assert said in answer.json()["error"]
    assert served.http.post("/generate", json={"inputs": "still there"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/text.png", f"`{URL}` is not an image"),
        ("/large.png", f"`{URL}` must have at most {MAX_BYTES} bytes"),
    ],
)
def test_a_fetched_file_that_is_no_image_is_refused(
    served: Stack, host: ImageHost, path: str, said: str
) -> None:
    wanted = body(user(at(host.url(path))))
    answer = served.http.post("/v1/chat/completions", json=wanted)
    assert answer.status_code == 422
    assert said in answer.json()["error"]
    assert "secret" not in answer.text
    with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT") as caught:
        ReflectionClient(served.direct).call("ChatUnary", wanted)
    assert said in str(caught.value)


def test_an_image_at_a_url_is_fetched(served: Stack, host: ImageHost) -> None:
    here = body(user(text("What is this?"), image(png(picture(1)))))
    expected = served.http.post("/v1/chat/completions", json=here).json()
    for path in ("/1.png", "/moved.png"):
        there = body(user(text("What is this?"), at(host.url(path))))
        reply = served.http.post("/v1/chat/completions", json=there).json()
        assert reply["choices"] == expected["choices"]
        assert reply["usage"] == expected["usage"]
        grpc_reply = ReflectionClient(served.direct).call("ChatUnary", there)
        text_there = grpc_reply.choices[0].message.content
        assert text_there == expected["choices"][0]["message"]["content"]


def test_an_image_in_markdown_is_fetched(served: Stack, host: ImageHost) -> None:
    inputs = "user: A: ![]({})assistant: "
    here, there = inputs.format(url(png(picture(1)))), inputs.format(host.url("/1.png"))
    expected = served.http.post("/generate", json=plain(here)).json()
    assert served.http.post("/generate", json=plain(there)).json() == expected


def test_markdown_in_what_users_say_is_an_image(served: Stack, host: ImageHost) -> None:
    """As in TGI; in other roles it is text, and where special tokens are text, too."""
    parts = [text("See "), image(png(picture(1))), text(" and tell")]
    expected = served.http.post("/v1/chat/completions", json=body(user(*parts))).json()
    for place in (url(png(picture(1))), host.url("/1.png")):
        said = f"See ![]({place}) and tell"
        for content in (said, [text(said)]):
            wanted = body({"role": "user", "content": content})
            reply = served.http.post("/v1/chat/completions", json=wanted).json()
            assert reply["choices"] == expected["choices"]
            assert reply["usage"] == expected["usage"]
    shown = f"![]({host.url('/1.png')})"
    for role, more in (
        ("assistant", {}),
        ("system", {}),
        ("user", {"escape_special_tokens": True}),
    ):
        wanted = {"messages": [{"role": role, "content": shown}], **more}
        prompt = served.http.post("/chat_tokenize", json=wanted).json()["templated_text"]
        assert prompt == f"{role}: {shown}assistant: "


def test_typed_callers_send_files_as_they_are(served: Stack) -> None:
    parts = [text("What is this?"), image(png(picture(1)))]
    expected = served.http.post("/v1/chat/completions", json=body(user(*parts))).json()
    for more in ({}, {"mime_type": "image/png"}):
        file = {"data": base64.b64encode(png(picture(1))).decode(), **more}
        turn = {"role": "user", "parts": [{"text": "What is this?"}, {"image": file}]}
        for channel in (served.direct, served.through_envoy):
            reply = ReflectionClient(channel).call("ChatUnary", body(turn))
            assert reply.choices[0].message.content == expected["choices"][0]["message"]["content"]
            assert reply.usage.prompt_tokens == expected["usage"]["prompt_tokens"]


def test_a_typed_prompt_shows_images_by_number(served: Stack) -> None:
    first, second = markdown(png(picture(1))), markdown(png(picture(2)))
    expected = served.http.post("/generate", json=plain(f"A {second} B {first} C {second}")).json()
    files = [{"data": base64.b64encode(png(picture(seed))).decode()} for seed in (1, 2)]
    wanted = plain(f"A ![](image:1) B ![](image:0) C {second}") | {"images": files}
    grpc_client = ReflectionClient(served.direct)
    replies = [grpc_client.call("Generate", wanted)]
    for method in ("GenerateStream", "CompatGenerate", "Invocations"):
        replies.append(grpc_client.collect(method, wanted)[-1])
    assert all(expected["generated_text"] in str(reply) for reply in replies)


def test_completions_have_images_in_markdown(served: Stack, host: ImageHost) -> None:
    prompts = [f"A {markdown(png(picture(1)))}", f"B ![]({host.url('/1.png')})"]
    wanted = {"prompt": prompts, "max_tokens": NUM_TOKENS, "temperature": 0.0}
    for fields in (wanted, wanted | {"echo": True}):
        reply = served.http.post("/v1/completions", json=fields).json()
        for prompt, choice in zip(prompts, reply["choices"], strict=True):
            alone = served.http.post("/generate", json=plain(prompt)).json()["generated_text"]
            assert choice["text"] == (prompt if "echo" in fields else "") + alone
    typed = ReflectionClient(served.direct).call("CompletionsUnary", wanted)
    assert [choice.text for choice in typed.choices] == [
        choice["text"].removeprefix(prompt)
        for prompt, choice in zip(prompts, reply["choices"], strict=True)
    ]
    refused = served.http.post("/v1/completions", json={"prompt": markdown(b"hello")})
    assert refused.status_code == 422
    assert "is not an image" in refused.json()["error"]


def test_the_example_of_the_client_runs(
    served: Stack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "picture.png").write_bytes(png(picture(1)))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall("```python\n(.*?)```", (CLIENT / "README.md").read_text(), re.S)
    (example,) = (block for block in blocks if "picture.png" in block)
    example = f"from tokenwire_client import Client\n{example}"
    exec(example.replace("127.0.0.1:50051", served.grpc_address), {})
    printed = capsys.readouterr().out
    shown = plain(f"This {markdown(png(picture(1)))} is") | {"parameters": {}}
    expected = served.http.post("/generate", json=shown).json()["generated_text"]
    assert printed.endswith(f"{expected}\n")


PNG = {"data": base64.b64encode(png(picture(1))).decode()}


@pytest.mark.parametrize(
    ("part", "field", "said"),
    [
        ({"image": {"data": ""}}, "image.data", "is not an image in one of"),
        ({"image": {}}, "image.data", "missing field"),
        ({}, "text", "missing field"),
        ({"image": {"url": "x", "mime_type": "image/png"}}, "image.mime_type", "is for `data`"),
        ({"image": {**PNG, "mime_type": "image/x"}}, "image.mime_type", "must be one of image/png"),
        ({"image": {**PNG, "mime_type": "image/gif"}}, "image.data", "is not in the format that"),
        ({"image": {"url": "ftp://x/y"}}, "image.url", "is neither a data: URL"),
    ],
)
def test_a_typed_image_that_cannot_be_used_is_refused(
    served: Stack, part: dict[str, Any], field: str, said: str
) -> None:
    turn = {"role": "user", "parts": [part]}
    with pytest.raises(grpc.RpcError) as caught:
        ReflectionClient(served.direct).call("ChatUnary", body(turn))
    assert_refused(caught.value, f"messages[0].parts[0].{field}", said)


@pytest.mark.parametrize(
    ("wanted", "field", "said"),
    [
        (plain("x") | {"images": [PNG]}, "images[0].data", "is not shown in `inputs`"),
        (plain("![](image:1)") | {"images": [PNG]}, "inputs", "that is not there"),
        ({"input_ids": {"ids": [5]}, "images": [PNG]}, "images", "not among `input_ids`"),
    ],
)
def test_a_typed_prompt_that_does_not_show_its_images_is_refused(
    served: Stack, wanted: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ReflectionClient(served.direct).call("Generate", wanted)
    assert_refused(caught.value, field, said)


def assert_refused(error: grpc.RpcError, field: str, said: str) -> None:
    assert (error.code(), details(error)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        ("validation", field),
    )
    assert said in str(error.details())


def test_responses_take_images(served: Stack, host: ImageHost) -> None:
    parts = [text("What is this?"), image(png(picture(1)))]
    chat = served.http.post("/v1/chat/completions", json=body(user(*parts))).json()
    expected = chat["choices"][0]["message"]["content"]
    for place in (url(png(picture(1))), host.url("/1.png")):
        shown = {"type": "input_image", "image_url": place, "detail": "high"}
        item = user({"type": "input_text", "text": "What is this?"}, shown)
        wanted = {"input": [item], "max_output_tokens": NUM_TOKENS, "temperature": 0.0}
        reply = served.http.post("/v1/responses", json=wanted).json()
        assert reply["output"][0]["content"][0]["text"] == expected
        assert reply["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
        assert expected in str(ReflectionClient(served.direct).collect("Responses", wanted))
        sdk = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused")
        with sdk, sdk.responses.create(model="tgi", stream=True, **wanted) as events:
            deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == expected


@pytest.mark.parametrize(
    ("part", "field", "said"),
    [
        ({"image_url": "data:x"}, "image_url", "must have the form data:image/png;base64"),
        ({"image_url": "http://x.example/"}, "image_url", "has a host or a port from which"),
        ({"file_id": "file_1"}, "file_id", "nothing is stored"),
        ({"image_url": {"url": "data:x"}}, "image_url", "expected a string"),
        ({"image_url": url(b""), "detail": "tiny"}, "detail", "must be one of `auto`"),
        ({}, "image_url", "missing field"),
    ],
)
def test_an_image_of_responses_that_cannot_be_used_is_refused(
    served: Stack, part: dict[str, Any], field: str, said: str
) -> None:
    item = user({"type": "input_text", "text": "x"}, {"type": "input_image", **part})
    answer = served.http.post(
        "/v1/responses", json={"input": [item]}, headers={"x-error-format": "openai"}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (422, f"input[0].content[1].{field}")
    assert said in error["message"]


def test_listed_tokens_are_those_that_usage_counts(served: Stack, host: ImageHost) -> None:
    conversations = [
        *CONVERSATIONS.values(),
        [user(text("An <image> is"), image(png(picture(1))))],
        [{"role": "user", "content": f"A ![]({host.url('/1.png')})"}],
    ]
    for messages in conversations:
        chat = served.http.post("/v1/chat/completions", json=body(*messages)).json()
        listed = served.http.post("/chat_tokenize", json=body(*messages)).json()
        assert len(listed["tokenize_response"]) == chat["usage"]["prompt_tokens"]
        spelled = listed["templated_text"].encode()
        for token in listed["tokenize_response"]:
            assert spelled[token["start"] : token["stop"]].decode() == token["text"]
    grpc_reply = ReflectionClient(served.direct).call("ChatTokenize", body(*messages))
    assert grpc_reply.templated_text == listed["templated_text"]
    assert len(grpc_reply.tokenize_response) == len(listed["tokenize_response"])


def test_the_tokens_of_a_text_have_those_of_its_images(served: Stack) -> None:
    inputs = f"A {markdown(png(picture(1)))} B"
    wanted = plain(inputs)
    wanted["parameters"] |= {"details": True, "decoder_input_details": True}
    prefill = served.http.post("/generate", json=wanted).json()["details"]["prefill"]
    listed = served.http.post("/tokenize", json={"inputs": inputs}).json()
    assert [token["id"] for token in listed] == [token["id"] for token in prefill]
    typed = ReflectionClient(served.direct).call("Tokenize", {"inputs": inputs})
    assert [token.id for token in typed.tokens] == [token["id"] for token in listed]
    refused = served.http.post("/tokenize", json={"inputs": f"<image>{markdown(png(picture(1)))}"})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "template_error")


def test_the_limits_on_images_are_told(served: Stack) -> None:
    info = ReflectionClient(served.direct).call("Info")
    limits = (info.max_images, info.max_image_bytes, info.max_image_pixels, info.fetches_images)
    assert limits == (3, MAX_BYTES, MAX_PIXELS, True)


def test_a_fetch_holds_no_permit_and_ends_with_its_caller(served: Stack, host: ImageHost) -> None:
    wanted = body(user(at(host.url("/never.png"))))
    data = json.dumps(wanted).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
    name, port = served.address.rsplit(":", 1)
    host.is_asked.clear()
    host.is_left.clear()
    with socket.create_connection((name, int(port))) as caller:
        caller.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + data)
        assert host.is_asked.wait(DEADLINE_S)
        wait_until(lambda: served.metric("tokenwire_requests_active") == 0, "no permit held")
        assert served.http.post("/generate", json={"inputs": "x"}).status_code == 200
        assert not host.is_left.is_set()
    assert host.is_left.wait(DEADLINE_S)


def test_too_many_images_are_refused(served: Stack) -> None:
    message = user(*[image(png(picture(1)))] * 4)
    answer = served.http.post("/v1/chat/completions", json=body(message))
    assert answer.status_code == 422
    assert "`messages` supports up to 3 images. Given: 4" in answer.json()["error"]


def test_a_plain_prompt_has_images_in_markdown(served: Stack, checkpoint: Path) -> None:
    """As TGI's callers send them; the template of this model writes the same text."""
    messages = [user(text("A: "), image(png(picture(1))), text(" B: "), image(png(picture(2))))]
    expected, num_prompt = generated(
        checkpoint, for_template(messages), [picture(1), picture(2)], NUM_TOKENS
    )
    images = markdown(png(picture(1))), markdown(png(picture(2)))
    inputs = f"user: A: {images[0]} B: {images[1]}assistant: "
    wanted = plain(inputs)
    wanted["parameters"] |= {"details": True, "decoder_input_details": True}
    reply = served.http.post("/generate", json=wanted).json()
    assert reply["generated_text"] == expected
    assert len(reply["details"]["prefill"]) == num_prompt
    with served.http.stream("POST", "/generate_stream", json=plain(inputs)) as stream:
        lines = [line[5:] for line in stream.iter_lines() if line.startswith("data:")]
    assert json.loads(lines[-1])["generated_text"] == expected
    whole = served.http.post("/", json=plain(inputs)).json()
    assert whole[0]["generated_text"] == inputs + expected
    grpc = ReflectionClient(served.direct).call("Generate", plain(inputs))
    assert grpc.generated_text == expected


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (markdown(b"hello"), "`inputs` is not an image"),
        ("![](http://127.0.0.1/x.png)", "`inputs` has a host or a port from which"),
        (markdown(png(picture(1))) * 4, "`inputs` supports up to 3 images. Given: 4"),
        (f"<image>{markdown(png(picture(1)))}", "2 marks for 1 images"),
    ],
)
def test_an_image_in_markdown_that_cannot_be_used_is_refused(
    served: Stack, inputs: str, said: str
) -> None:
    answer = served.http.post("/generate", json=plain(inputs))
    assert answer.status_code == 422
    assert said in answer.json()["error"]
    stream = served.http.post("/generate_stream", json=plain(inputs))
    assert said in json.loads(stream.text.removeprefix("data:"))["error"]
