"""`logprobs`, `echo` and token ids of `/v1/completions`, against transformers, over both faces."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.reference import ids_of, scores
from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import DEADLINE_S, PROMPT, Stack
from tests.e2e.typed_messages import failure, float32, rest, rest_events
from tests.service.fakes import raw_tokenizer

PATH = "/v1/completions"
TEXT = "The sea is blue, and so is the sky. ¿Qué? 🙂"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 4}
BOS = "<|bos|>"  # which the tokenizer puts before texts
KEYS = ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
TOLERANCE = 2e-3


@pytest.mark.parametrize(
    ("fields", "status"), [({"best_of": 1}, 200), ({"n": 2, "best_of": 2}, 200)]
)
def test_as_many_texts_may_be_made_as_returned(
    stack: Stack, fields: dict[str, int], status: int
) -> None:
    body = {"prompt": "a", "max_tokens": 1, "temperature": 9.0, **fields}
    assert stack.http.post("/v1/completions", json=body).status_code == status


@pytest.mark.parametrize("fields", [{"best_of": 2}, {"n": 3, "best_of": 2}, {"best_of": 0}])
def test_more_texts_than_are_returned_are_not_made_in_silence(
    stack: Stack, fields: dict[str, int]
) -> None:
    reply = stack.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **fields})
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    assert "`best_of` must be `n` on this path" in reply.json()["error"]


def expected_logprobs(token_ids: list[int]) -> list[float]:
    """The log-probability of every token but the first."""
    rows = scores(token_ids)[:-1]
    return [float(row[token_id]) for row, token_id in zip(rows, token_ids[1:], strict=True)]


def choice(stack: Stack, **changes: Any) -> dict[str, Any]:
    """The one choice of an answer."""
    (found,) = rest(stack, PATH, {"prompt": TEXT, **GREEDY, **changes})["choices"]
    return dict(found)


def check_columns(logprobs: dict[str, Any], count: int) -> None:
    assert list(logprobs) == KEYS
    assert [len(column) for column in logprobs.values()] == [count] * 4


@pytest.mark.parametrize("top_n", [0, 1, 5])
def test_tokens_of_a_continuation_have_logprobs(stack: Stack, top_n: int) -> None:
    found = choice(stack, logprobs=top_n)
    logprobs = found["logprobs"]
    check_columns(logprobs, 4)
    assert "".join(logprobs["tokens"]) == found["text"] == choice(stack)["text"]
    assert logprobs["text_offset"] == offsets(logprobs["tokens"])
    for token, logprob, tops in zip(*list(logprobs.values())[:3], strict=True):
        assert tops[token] == logprob == max(tops.values())  # greedy
        assert len(tops) == max(top_n, 1)
    rows = scores(ids_of(TEXT) + generated_ids(stack))
    last = len(ids_of(TEXT)) - 1
    expected = [float(rows[last + place].max()) for place in range(4)]
    assert logprobs["token_logprobs"] == pytest.approx(expected, abs=TOLERANCE)


def generated_ids(stack: Stack) -> list[int]:
    reply = stack.generate(TEXT, max_new_tokens=4)
    return [token["id"] for token in reply["details"]["tokens"]]


def offsets(tokens: list[str], start: int = 0) -> list[int]:
    return [start + sum(map(len, tokens[:index])) for index in range(len(tokens))]


def test_drawn_token_stands_beside_the_likeliest(stack: Stack) -> None:
    logprobs = choice(stack, logprobs=2, temperature=5.0, seed=3, max_tokens=12)["logprobs"]
    sizes = set()
    for token, logprob, tops in zip(*list(logprobs.values())[:3], strict=True):
        assert tops[token] == logprob
        sizes.add(len(tops))
    assert sizes <= {2, 3}
    assert 3 in sizes


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("prompt", [TEXT, "text as ids"])
def test_echo_puts_the_prompt_and_its_logprobs_first(
    stack: Stack, prompt: str, max_tokens: int
) -> None:
    token_ids = ids_of(TEXT)
    is_text = prompt == TEXT
    given = TEXT if is_text else token_ids
    echoed = TEXT if is_text else BOS + TEXT
    wanted = {"prompt": given, "echo": True, "logprobs": 3, "max_tokens": max_tokens}
    body = rest(stack, PATH, {**GREEDY, **wanted})
    (found,) = body["choices"]
    assert found["text"].startswith(echoed)
    assert (found["text"] == echoed) == (max_tokens == 0)
    assert found["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == max_tokens
    logprobs = found["logprobs"]
    check_columns(logprobs, len(token_ids) + max_tokens)
    first, *others = logprobs["token_logprobs"][: len(token_ids)]
    assert (first, logprobs["top_logprobs"][0]) == (None, None)
    assert others == pytest.approx(expected_logprobs(token_ids), abs=TOLERANCE)
    rows = scores(token_ids)
    for place, (tops, own) in enumerate(zip(logprobs["top_logprobs"][1:], others, strict=False)):
        assert 3 <= len(tops) <= 4 or len(set(tops)) < 4
        assert own in tops.values()
        assert max(tops.values()) == pytest.approx(float(rows[place].max()), abs=TOLERANCE)
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        if "�" not in token and (token != BOS or not is_text):
            assert found["text"].startswith(token, offset)


def test_sums_are_those_that_an_evaluation_harness_computes(stack: Stack) -> None:
    """What lm-eval's `local-completions` sends for a task with several endings."""
    context = "The capital of France is"
    endings = [" Paris.", " blue.", " a city in the north."]
    prompts = [ids_of(context + ending) for ending in endings]
    start = len(ids_of(context))
    body = {
        "prompt": prompts,
        "model": "any",
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
        "temperature": 0,
    }
    found = rest(stack, PATH, body)["choices"]
    assert [item["index"] for item in found] == [0, 1, 2]
    for item, token_ids in zip(found, prompts, strict=True):
        own = item["logprobs"]["token_logprobs"][start:-1]
        tops = item["logprobs"]["top_logprobs"][start:-1]
        expected = expected_logprobs(token_ids)[start - 1 :]
        assert len(own) == len(expected)
        assert sum(own) == pytest.approx(sum(expected), abs=TOLERANCE * len(own))
        greedy = all(value == max(top.values()) for value, top in zip(own, tops, strict=True))
        likeliest = scores(token_ids)[start - 1 : -1].argmax(-1).tolist()
        assert greedy == (likeliest == token_ids[start:])


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]], [[5, 6], [7]]])
def test_token_ids_are_echoed_as_their_text(stack: Stack, prompt: Any) -> None:
    lists = prompt if isinstance(prompt[0], list) else [prompt]
    body = {"prompt": prompt, **GREEDY, "echo": True, "max_tokens": 0}
    texts = [item["text"] for item in rest(stack, PATH, body)["choices"]]
    assert texts == [raw_tokenizer().decode(ids, skip_special_tokens=False) for ids in lists]


def test_choices_of_a_prompt_share_its_logprobs(stack: Stack) -> None:
    body = {"prompt": TEXT, "echo": True, "logprobs": 1, "n": 3, "seed": 5, "temperature": 9.0}
    found = rest(stack, PATH, {**body, "max_tokens": 2})["choices"]
    count = len(ids_of(TEXT))
    columns = [item["logprobs"]["token_logprobs"] for item in found]
    assert [len(column) for column in columns] == [count + 2] * 3
    assert columns[0][:count] == columns[1][:count] == columns[2][:count]
    assert len({item["text"] for item in found}) == 3


def test_stream_has_the_logprobs_of_the_whole_answer(stack: Stack) -> None:
    body = {"prompt": TEXT, **GREEDY, "logprobs": 2}
    whole = choice(stack, logprobs=2)["logprobs"]
    parts = [
        event["choices"][0]["logprobs"]
        for event in rest_events(stack, PATH, {**body, "stream": True})
    ]
    for key in KEYS:
        assert [value for part in parts for value in part[key]] == whole[key]


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_stream_echoes_the_prompt_in_its_first_part(stack: Stack, max_tokens: int) -> None:
    body = {"prompt": [TEXT, "One, two,"], **GREEDY, "echo": True, "max_tokens": max_tokens}
    whole = [item["text"] for item in rest(stack, PATH, body)["choices"]]
    found = ["", ""]
    for event in rest_events(stack, PATH, {**body, "stream": True}):
        found[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert [text[: len(part)] for text, part in zip(found, whole, strict=True)] == whole
    assert found[0].startswith(TEXT)


def test_grpc_callers_get_the_same(api: ReflectionClient, stack: Stack) -> None:
    wanted = {"prompt": [TEXT], **GREEDY, "echo": True}
    expected = choice(stack, echo=True, logprobs=2)["logprobs"]
    fields = {**wanted, "logprobs": True, "top_logprobs": 2}
    (reply,) = api.collect("Completions", fields)
    (answer,) = reply.completion.choices
    content = answer.logprobs.content
    assert [item.token for item in content] == expected["tokens"]
    assert [item.text_offset for item in content] == expected["text_offset"]
    logprobs = [item.logprob if item.HasField("logprob") else None for item in content]
    assert logprobs == [float32(value) for value in expected["token_logprobs"]]
    tops = [{top.token: top.logprob for top in item.top_logprobs} or None for item in content]
    assert tops == [
        part and {text: float32(value) for text, value in part.items()}
        for part in expected["top_logprobs"]
    ]
    (plain,) = api.collect("Completions", wanted)
    assert not plain.completion.choices[0].HasField("logprobs")
    (invoked,) = api.collect("Invocations", fields)
    assert invoked.completions.completion.choices[0] == answer


@pytest.mark.parametrize(
    ("changes", "text", "field"),
    [
        ({"logprobs": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6", "logprobs"),
        ({"max_tokens": 0}, "`max_new_tokens` must be strictly positive", "max_tokens"),
        (
            {"echo": True, "logprobs": 1, "stream": True},
            "`echo` with `logprobs` is not supported when streaming tokens",
            "echo",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    stack: Stack, api: ReflectionClient, changes: dict[str, Any], text: str, field: str
) -> None:
    text = f"Input validation error: {text}"
    headers = {"x-error-format": "openai"}
    reply = stack.http.post(PATH, json={"prompt": TEXT, **changes}, headers=headers)
    error = reply.json()["error"]
    assert (reply.status_code, error["message"], error["param"]) == (422, text, field)
    typed = {"prompt": [TEXT], **changes}
    if "logprobs" in typed:
        typed |= {"logprobs": True, "top_logprobs": typed["logprobs"]}
    assert failure(api, "Completions", typed).details() == text


def test_openai_s_client_reads_them(stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="-", timeout=DEADLINE_S) as client:
        output = client.completions.create(
            model="m", prompt=PROMPT, logprobs=2, echo=True, max_tokens=2, temperature=0.0
        )
    (found,) = output.choices
    assert found.logprobs is not None
    assert found.logprobs.tokens is not None
    assert found.logprobs.token_logprobs is not None
    assert found.text.startswith(PROMPT)
    assert len(found.logprobs.tokens) == len(found.logprobs.token_logprobs) > 2
