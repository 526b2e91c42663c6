"""What a platform does with calls: names them, ends them, weighs them, watches them."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from tests.e2e.reflection_client import ReflectionClient, details
from tests.e2e.stack import DEADLINE_S, ENDLESS, PROMPT, Stack, running, wait_until

LONG = {"inputs": PROMPT, "parameters": ENDLESS}
CONVERSATION = [{"role": "user", "content": PROMPT}]


@pytest.fixture(params=["direct", "envoy"])
def api(request: pytest.FixtureRequest, stack: Stack) -> ReflectionClient:
    """A client of the service's port, and one of the gateway's."""
    return ReflectionClient(stack.direct if request.param == "direct" else stack.through_envoy)


class TestNames:
    @pytest.mark.parametrize(
        ("method", "fields"),
        [
            ("Generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 1}}),
            ("ChatUnary", {"messages": CONVERSATION, "max_tokens": 1}),
            ("CompletionsUnary", {"prompt": [PROMPT], "max_tokens": 1}),
        ],
    )
    def test_a_call_has_the_name_that_its_request_gives(
        self, api: ReflectionClient, method: str, fields: dict[str, Any]
    ) -> None:
        metadata = {"x-request-id": "of-the-mesh"}
        assert api.call(method, fields, metadata=metadata).request_id == "of-the-mesh"
        named = {**fields, "request_id": "mine"}
        assert api.call(method, named, metadata=metadata).request_id == "mine"
        assert len(api.call(method, fields).request_id) >= 32

    def test_the_name_is_in_the_metadata_of_success_and_failure(
        self, api: ReflectionClient
    ) -> None:
        stream = api.call(
            "GenerateStream",
            {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}, "request_id": "mine"},
        )
        *_, last = stream
        assert last.request_id == "mine"
        for metadata in (stream.initial_metadata(), stream.trailing_metadata()):
            assert dict(metadata)["x-request-id"] == "mine"
        with pytest.raises(grpc.RpcError) as failed:
            api.call("Generate", {"inputs": "", "request_id": "mine"})
        assert dict(failed.value.trailing_metadata())["x-request-id"] == "mine"

    @pytest.mark.parametrize("name", ["", "two words", "x" * 129, "ü"])
    def test_a_name_that_cannot_stand_in_a_header_is_refused(
        self, api: ReflectionClient, name: str
    ) -> None:
        with pytest.raises(grpc.RpcError) as failed:
            api.call("Generate", {"inputs": PROMPT, "request_id": name})
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details(failed.value) == ("validation", "request_id")


class TestAbort:
    def test_a_stream_is_ended_by_its_name(self, stack: Stack, api: ReflectionClient) -> None:
        stream = api.call("GenerateStream", {**LONG, "request_id": "a-stream"})
        next(stream)
        assert api.call("Abort", {"request_id": "a-stream"}).aborted == 1
        with pytest.raises(grpc.RpcError) as ended:
            list(stream)
        assert ended.value.code() is grpc.StatusCode.CANCELLED
        assert ended.value.details() == "the call was ended by Abort"
        assert details(ended.value) == ("cancelled", None)
        stack.wait_until_idle()

    def test_a_unary_call_is_ended_with_all_its_candidates(
        self, stack: Stack, api: ReflectionClient
    ) -> None:
        # Without a seed, which best_of refuses, only this keeps the candidates from ending soon.
        parameters = {k: v for k, v in ENDLESS.items() if k != "seed"}
        parameters |= {"best_of": 2, "ignore_eos": True}
        path = f"/{api.describe().full_name}/Generate"
        request = api.request(
            "Generate", {"inputs": PROMPT, "parameters": parameters, "request_id": "unary"}
        )
        call = api.channel.unary_unary(path, lambda message: message.SerializeToString()).future(
            request
        )
        stack.wait_until_running(2)
        assert api.call("Abort", {"request_id": "unary"}).aborted == 1
        assert call.code() is grpc.StatusCode.CANCELLED
        stack.wait_until_idle()

    def test_all_prompts_of_a_call_are_ended(self, stack: Stack, api: ReflectionClient) -> None:
        fields = {"prompt": [PROMPT, "Hello"], "stream": True, "request_id": "several"}
        fields |= {"temperature": 1e6, "seed": 2, "max_tokens": 1900}
        stream = api.call("Completions", fields)
        next(stream)
        assert api.call("Abort", {"request_id": "several"}).aborted == 2
        with pytest.raises(grpc.RpcError) as ended:
            list(stream)
        assert ended.value.code() is grpc.StatusCode.CANCELLED
        stack.wait_until_idle()

    def test_a_rest_stream_gets_the_event(self, stack: Stack, api: ReflectionClient) -> None:
        headers = {"x-request-id": "of-rest"}
        with stack.http.stream("POST", "/generate_stream", json=LONG, headers=headers) as reply:
            lines = reply.iter_lines()
            next(lines)
            assert api.call("Abort", {"request_id": "of-rest"}).aborted == 1
            *_, last = (line for line in lines if line)
        assert last == 'data: {"error":"the call was ended by Abort","error_type":"cancelled"}'

    def test_a_rest_call_gets_the_status(self, stack: Stack, api: ReflectionClient) -> None:
        def call() -> httpx.Response:
            return stack.http.post("/generate", json=LONG, headers={"x-request-id": "whole"})

        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(call)
            wait_until(
                lambda: api.call("Abort", {"request_id": "whole"}).aborted == 1, "that it runs"
            )
            assert reply.result().status_code == 499
        assert reply.result().json()["error_type"] == "cancelled"

    def test_a_name_that_no_call_has_is_no_error(self, api: ReflectionClient) -> None:
        assert api.call("Abort", {"request_id": "nobody"}).aborted == 0

    def test_an_abort_needs_a_name(self, api: ReflectionClient) -> None:
        with pytest.raises(grpc.RpcError) as failed:
            api.call("Abort", {})
        assert details(failed.value) == ("validation", "request_id")

    def test_an_abort_does_not_take_the_name_of_its_victim(self, api: ReflectionClient) -> None:
        api.call("Abort", {"request_id": "x y z"})


class TestUnaryTwins:
    def test_they_answer_as_the_others_do(self, api: ReflectionClient) -> None:
        chat = {"messages": CONVERSATION, "max_tokens": 6, "temperature": 0.0}
        completions = {"prompt": [PROMPT], "max_tokens": 6, "temperature": 0.0}
        for method, fields in (("Chat", chat), ("Completions", completions)):
            [streamed] = api.collect(method, fields)
            unary = api.call(f"{method}Unary", fields)
            assert unary.choices == streamed.completion.choices
            assert unary.model == streamed.completion.model
            assert unary.usage.total_tokens == streamed.completion.usage.total_tokens

    @pytest.mark.parametrize(
        ("method", "fields"),
        [("ChatUnary", {"messages": CONVERSATION}), ("CompletionsUnary", {"prompt": [PROMPT]})],
    )
    def test_they_refuse_streams(
        self, api: ReflectionClient, method: str, fields: dict[str, Any]
    ) -> None:
        with pytest.raises(grpc.RpcError) as failed:
            api.call(method, {**fields, "stream": True})
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details(failed.value) == ("validation", "stream")

    def test_their_errors_name_their_own_fields(self, api: ReflectionClient) -> None:
        with pytest.raises(grpc.RpcError) as failed:
            api.call("CompletionsUnary", {"prompt_ids": [{"ids": []}]})
        assert details(failed.value) == ("validation", "prompt_ids")
        with pytest.raises(grpc.RpcError) as failed:
            api.call("ChatUnary", {"messages": CONVERSATION, "top_logprobs": 99, "logprobs": True})
        assert details(failed.value) == ("validation", "top_logprobs")


class TestWeights:
    """`logit_bias` and `priority`, with one meaning on every path."""

    PATHS = pytest.mark.parametrize(
        "path", ["/generate", "/v1/chat/completions", "/v1/completions"]
    )

    def tokens(self, stack: Stack, path: str, **fields: Any) -> str:
        bodies = {
            "/generate": {"inputs": PROMPT, "parameters": {"max_new_tokens": 3, **fields}},
            "/v1/chat/completions": {
                "messages": CONVERSATION,
                "max_tokens": 3,
                "temperature": 0.0,
                **fields,
            },
            "/v1/completions": {"prompt": PROMPT, "max_tokens": 3, "temperature": 0.0, **fields},
        }
        reply = stack.http.post(path, json=bodies[path])
        assert reply.status_code == 200, reply.text
        body = reply.json()
        if path == "/generate":
            return str(body["generated_text"])
        [choice] = body["choices"]
        return str(choice["message"]["content"] if "chat" in path else choice["text"])

    @PATHS
    def test_a_bias_forces_and_bans_tokens(self, stack: Stack, path: str) -> None:
        tokens = stack.http.post("/tokenize", json={"inputs": "zz"}).json()
        token_id, text = tokens[-1]["id"], tokens[-1]["text"]
        assert self.tokens(stack, path, logit_bias={str(token_id): 100}).strip() == 3 * text
        free = self.tokens(stack, path)
        _, *tokens = stack.http.post("/tokenize", json={"inputs": free}).json()
        for token in tokens:  # but for the one that begins every text
            banned = self.tokens(stack, path, logit_bias={str(token["id"]): -100.0})
            ids = [t["id"] for t in stack.http.post("/tokenize", json={"inputs": banned}).json()]
            assert token["id"] not in ids

    @PATHS
    def test_the_likeliest_token_may_be_favoured_without_change(
        self, stack: Stack, path: str
    ) -> None:
        assert self.tokens(stack, path, logit_bias={}) == self.tokens(stack, path)
        assert self.tokens(stack, path, logit_bias=None) == self.tokens(stack, path)
        assert self.tokens(stack, path, priority=-100) == self.tokens(stack, path)

    def test_the_list_of_the_contract_has_no_effect(self, stack: Stack) -> None:
        path = "/v1/chat/completions"
        assert self.tokens(stack, path, logit_bias=[1.0, -3.5]) == self.tokens(stack, path)

    @PATHS
    @pytest.mark.parametrize(
        ("fields", "text", "field"),
        [
            ({"logit_bias": {"1": 100.5}}, "`logit_bias` must be >= -100.0", "logit_bias"),
            ({"logit_bias": {"4294967295": 1}}, "token ids in `logit_bias`", "logit_bias"),
            (
                {"logit_bias": {str(number): 1 for number in range(1025)}},
                "`logit_bias` supports up to 1024 tokens. Given: 1025",
                "logit_bias",
            ),
            ({"priority": 101}, "`priority` must be >= -100 and <= 100. Given: 101", "priority"),
            ({"priority": -2147483648}, "Given: -2147483648", "priority"),
        ],
    )
    def test_weights_outside_their_limits_are_refused(
        self, stack: Stack, path: str, fields: dict[str, Any], text: str, field: str
    ) -> None:
        rpc, body = {
            "/generate": ("Generate", {"inputs": PROMPT, "parameters": fields}),
            "/v1/completions": ("CompletionsUnary", {"prompt": [PROMPT], **fields}),
            "/v1/chat/completions": ("ChatUnary", {"messages": CONVERSATION, **fields}),
        }[path]
        reply = stack.http.post(path, json=body)
        assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
        assert text in reply.json()["error"]
        with pytest.raises(grpc.RpcError) as refused:
            ReflectionClient(stack.direct).call(rpc, body)
        prefix = "parameters." if path == "/generate" else ""
        assert details(refused.value) == ("validation", prefix + field)

    @pytest.mark.parametrize(
        ("bias", "text"),
        [
            ({"x": 1}, "logit_bias: expected an integer as a name, got a string"),
            ({"-1": 1}, "logit_bias: expected an integer as a name >= 0"),
            ({"1": "x"}, "logit_bias[...]: expected a number, got a string"),
            (7, "logit_bias: expected an object, got an integer"),
        ],
    )
    def test_a_bias_of_another_shape_is_refused(self, stack: Stack, bias: Any, text: str) -> None:
        body = {"prompt": PROMPT, "logit_bias": bias}
        reply = stack.http.post("/v1/completions", json=body)
        assert reply.status_code == 422
        assert text in reply.json()["error"]


class TestWatchLoad:
    def test_the_load_is_told_again_and_again(self, stack: Stack, api: ReflectionClient) -> None:
        stack.wait_until_idle()
        watch = api.call("WatchLoad", {"interval_seconds": 0.1})
        assert next(watch).running == 0
        stream = api.call("GenerateStream", LONG)
        wait_until(lambda: next(watch).running == 1, "a load with the stream")
        stream.cancel()
        wait_until(lambda: next(watch).running == 0, "a load without it")
        watch.cancel()

    @pytest.mark.parametrize("interval", [0.0, 0.09, -1.0, 3601.0, "Infinity", "NaN"])
    def test_an_interval_outside_its_limits_is_refused(
        self, api: ReflectionClient, interval: float | str
    ) -> None:
        with pytest.raises(grpc.RpcError) as failed:
            list(api.call("WatchLoad", {"interval_seconds": interval}))
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details(failed.value) == ("validation", "interval_seconds")

    def test_watching_does_not_hold_a_server_that_ends(self, tmp_path: Path) -> None:
        with running(tmp_path / "log", "--drain-seconds=600") as server:
            watches = [
                ReflectionClient(channel).call("WatchLoad", {"interval_seconds": 3600.0})
                for channel in (server.direct, server.through_envoy)
            ]
            for watch in watches:
                next(watch)
            server.process.send_signal(signal.SIGTERM)
            for watch in watches:
                with pytest.raises(grpc.RpcError) as ended:
                    next(watch)
                assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
            server.process.wait(DEADLINE_S)  # of a grace of 600


def test_adapters_are_listed(api: ReflectionClient) -> None:
    assert list(api.call("Info").adapter_ids) == []
