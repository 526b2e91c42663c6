"""The whole service, called over gRPC and over REST: both callers receive the same."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest

from service.pb.tokenwire import v1 as pb
from tests.service.api.harness import (
    PROMPT,
    TEXT,
    Service,
    assert_same_status,
    chat_request,
    generate_request,
)
from tests.service.codec.agreement import assert_agree
from tests.service.fakes import demo_ids, demo_tokenizer

GREEDY = {
    "plain": {},
    "details": {"details": True},
    "everything": {"details": True, "decoder_input_details": True, "top_n_tokens": 2, "seed": 5},
    "echo": {"return_full_text": True, "details": True},
    "short": {"max_new_tokens": 2, "details": True},
    "stop": {"stop": ["fox."], "details": True},
    "truncated": {"truncate": 3, "details": True, "decoder_input_details": True},
    "sampled": {"temperature": 0.5, "seed": 2**64 - 1, "details": True},
}


def tokens_of(message: Any) -> list[int]:
    return [token.id for token in message.details.tokens]


@pytest.mark.parametrize("parameters", GREEDY.values(), ids=GREEDY.keys())
async def test_generate_replies_are_the_same_for_both(
    service: Service, parameters: dict[str, Any]
) -> None:
    native, rest = await service.ask_both("Generate", generate_request(parameters))
    assert_agree(native.replies[0], rest.json)


async def test_generate_gives_the_text(service: Service) -> None:
    native, rest = await service.ask_both("Generate", generate_request({"details": True}))
    assert rest.json["generated_text"] == TEXT
    (reply,) = native.replies
    assert tokens_of(reply)[:-1] == demo_ids(TEXT)
    assert reply.details.tokens[-1].special
    assert reply.details.finish_reason is pb.FinishReason.EOS_TOKEN
    assert rest.json["details"]["finish_reason"] == "eos_token"
    assert rest.json["details"]["seed"] is None


async def test_absent_parameters_mean_sampling(service: Service) -> None:
    await service.ask_both("Generate", generate_request())
    await service.ask_both("Generate", generate_request({}))
    assert [item.sampling.do_sample for item in service.client.requests] == [
        True,
        True,
        False,
        False,
    ]


async def test_a_watermark_is_requested_from_the_engine(service: Service) -> None:
    await service.ask_both("Generate", generate_request({"watermark": True}))
    await service.ask_both("Generate", generate_request({}))
    asked = [item.sampling.watermark for item in service.client.requests]
    assert asked == [True, True, False, False]


async def test_best_of_replies_are_the_same_for_both(service: Service) -> None:
    request = generate_request({"best_of": 2, "do_sample": True, "details": True})
    for answer in await service.ask_both("Generate", request):
        body = answer.replies[0] if answer.replies[0].http is None else answer.json
        sequences = (
            body["details"]["best_of_sequences"]
            if isinstance(body, dict)
            else body.details.best_of_sequences
        )
        assert len(sequences) == 1


TIMES = ("total-time", "validation-time", "queue-time", "inference-time")


async def test_a_reply_has_the_headers_of_tgi(service: Service) -> None:
    for answer in await service.ask_both("Generate", generate_request({"max_new_tokens": 2})):
        headers = answer.headers
        assert headers["x-compute-type"] == "1-cpu"
        assert headers["x-compute-characters"] == str(len(PROMPT))
        assert headers["x-generated-tokens"] == "2"
        assert headers["x-prompt-tokens"] == str(len(await demo_tokenizer().encode(PROMPT)))
        assert headers["x-time-per-token"].isdigit()
        assert float(headers["x-compute-time"]) >= 0
        assert all(float(headers[f"x-{name}"]) >= 0 for name in TIMES)


@pytest.mark.parametrize("parameters", [{}, {"details": True, "top_n_tokens": 2}], ids=str)
async def test_stream_messages_are_the_same_for_both(
    service: Service, parameters: dict[str, Any]
) -> None:
    native, rest = await service.ask_both("GenerateStream", generate_request(parameters))
    assert len(native.replies) == len(rest.events) == len(demo_ids(TEXT)) + 1
    for reply, event in zip(native.replies, rest.events, strict=True):
        assert_agree(reply, event)
    texts = [event["token"]["text"] for event in rest.events if not event["token"]["special"]]
    assert "".join(texts) == rest.events[-1]["generated_text"] == TEXT
    assert [event["index"] for event in rest.events] == list(range(1, len(rest.events) + 1))


async def test_a_stream_has_the_headers_of_tgi(service: Service) -> None:
    for answer in await service.ask_both("GenerateStream", generate_request({})):
        assert answer.headers["x-compute-type"] == "1-cpu"
        assert answer.headers["x-compute-characters"] == str(len(PROMPT))
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["cache-control"] == "no-cache"
        assert "x-total-time" not in answer.headers


async def test_the_root_path_answers_with_a_list_and_the_prompt(service: Service) -> None:
    native, rest = await service.ask_both("CompatGenerate", pb.CompatGenerateRequest(inputs=PROMPT))
    assert rest.json == [{"generated_text": PROMPT + TEXT}]
    assert native.replies[0].response.generated_text == PROMPT + TEXT


async def test_the_root_path_omits_the_prompt_if_requested(service: Service) -> None:
    parameters = pb.GenerateParameters(return_full_text=False)
    request = pb.CompatGenerateRequest(inputs=PROMPT, parameters=parameters)
    _, rest = await service.ask_both("CompatGenerate", request)
    assert rest.json == [{"generated_text": TEXT}]


async def test_the_root_path_streams(service: Service) -> None:
    request = pb.CompatGenerateRequest(inputs=PROMPT, stream=True)
    native, rest = await service.ask_both("CompatGenerate", request)
    for reply, event in zip(native.replies, rest.events, strict=True):
        assert_agree(reply.event, event)
    assert rest.events[-1]["generated_text"] == PROMPT + TEXT


@pytest.mark.parametrize(
    "changes", [{}, {"logprobs": True, "top_logprobs": 2, "max_tokens": 3}], ids=str
)
async def test_chat_replies_are_the_same_for_both(
    service: Service, changes: dict[str, Any]
) -> None:
    native, rest = await service.ask_both("Chat", chat_request(**changes))
    (reply,) = native.replies
    reply.completion.created, reply.completion.id = rest.json["created"], rest.json["id"]
    assert_agree(reply.completion, rest.json)
    assert rest.headers["x-compute-type"] == "1-cpu"
    if not changes:
        assert rest.json["choices"][0]["message"]["content"] == TEXT
        assert rest.json["usage"]["completion_tokens"] == len(demo_ids(TEXT)) + 1


async def test_chat_chunks_are_the_same_for_both(service: Service) -> None:
    request = chat_request(stream=True, logprobs=True, top_logprobs=1)
    native, rest = await service.ask_both("Chat", request)
    *events, end = rest.events
    assert end == "[DONE]"
    for reply, event in zip(native.replies, events, strict=True):
        reply.chunk.created, reply.chunk.id = event["created"], event["id"]
        assert_agree(reply.chunk, event)
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == TEXT
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + ["stop"]


async def test_completions_are_the_same_for_both(service: Service) -> None:
    request = pb.CompletionsRequest(prompt=["one", "one two"], max_tokens=3, temperature=0.0)
    native, rest = await service.ask_both("Completions", request)
    (reply,) = native.replies
    reply.completion.created, reply.completion.id = rest.json["created"], rest.json["id"]
    assert_agree(reply.completion, rest.json)
    assert [choice["index"] for choice in rest.json["choices"]] == [0, 1]
    assert rest.json["usage"]["completion_tokens"] == 6
    assert rest.headers["x-generated-tokens"] == "6"
    assert "x-compute-time" not in rest.headers


async def test_completion_chunks_are_the_same_for_both(service: Service) -> None:
    request = pb.CompletionsRequest(prompt=["one", "one two"], max_tokens=3, stream=True)
    native, rest = await service.ask_both("Completions", request)
    *events, end = rest.events
    assert end == "[DONE]"
    reasons = []
    for reply, event in zip(native.replies, events, strict=True):
        reply.completion.created, reply.completion.id = event["created"], event["id"]
        (choice,) = reply.completion.choices
        reasons.append((choice.finish_reason, choice.reason))
        assert_agree(reply.completion, event)
    assert [event["choices"][0]["index"] for event in events] == [0, 1, 0, 1, 0, 1]
    goes_on, ended = ("", pb.FinishReason.UNSPECIFIED), ("length", pb.FinishReason.LENGTH)
    assert reasons == [goes_on] * 4 + [ended] * 2


async def test_tokens_are_the_same_for_both(service: Service) -> None:
    text = "Grüße 😀"
    native, rest = await service.ask_both("TokenizeStream", pb.TokenizeRequest(inputs=text))
    assert_agree(native.replies[0].tokens, rest.json)
    for token in rest.json:
        assert text.encode()[token["start"] : token["stop"]].decode() == token["text"]
    assert [token["id"] for token in rest.json if token["text"]] == demo_ids(text)
    for answer in (native, rest):
        assert answer.headers["x-accel-buffering"] == "yes"


async def test_an_empty_text_may_be_tokenised(service: Service) -> None:
    native, rest = await service.ask_both("TokenizeStream", pb.TokenizeRequest(inputs=""))
    assert all(token["text"] == "" for token in rest.json)
    assert len(native.replies[0].tokens) == len(rest.json)


async def test_info_is_the_same_for_both(service: Service) -> None:
    native, rest = await service.ask_both("Info", pb.InfoRequest())
    assert_agree(native.replies[0], rest.json)


async def test_health_is_the_same_for_both(service: Service) -> None:
    _, rest = await service.ask_both("Health", pb.HealthRequest())
    assert (rest.body, rest.error) == (b"", None)
    service.client.is_healthy = False
    native, rest = await service.ask_both("Health", pb.HealthRequest())
    assert_same_status(native, rest, grpc.StatusCode.UNAVAILABLE, 503, "healthcheck", "unhealthy")


async def test_a_scrape_waits_for_no_other_work_in_threads(service: Service) -> None:
    release = threading.Event()
    loop = asyncio.get_running_loop()
    busy = [loop.run_in_executor(None, release.wait) for _ in range(64)]  # more than it has
    try:
        answer = await service.ask("Metrics", pb.MetricsRequest(), rest=True)
        assert b"tgi_request_count" in answer.replies[0].data
    finally:
        release.set()
        await asyncio.gather(*busy)


async def test_metrics_are_the_same_for_both(service: Service) -> None:
    await service.ask_both("Generate", generate_request({}))
    for answer in await service.ask_both("Metrics", pb.MetricsRequest()):
        assert answer.replies[0].content_type.startswith("text/plain; version=0.0.4")
        assert b"\ntgi_request_success 2.0\n" in answer.replies[0].data
