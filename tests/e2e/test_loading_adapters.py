"""Adapters that come and go while the server runs, over both faces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from service.access.keys import key_line, make_key
from tests.e2e.contract import DOCUMENT
from tests.e2e.reflection_client import ReflectionClient, details
from tests.e2e.stack import PROMPT, Stack, running, wait_until
from tests.engine.adapters.made import make_adapter
from tests.paths import DEMO_MODEL

_SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 1, "target_modules": "all-linear"}
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
MODEL = "tokenwire/demo"
FIRST = "at-start"


@dataclass(frozen=True)
class Loading:
    """A server that may load the adapters `0`, `1` and `2` of a directory, three at a time."""

    stack: Stack
    directory: Path
    admin: dict[str, str]
    caller: dict[str, str]

    def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        return self.stack.http.post(path, json=body, headers=headers or self.admin)

    def load(self, name: str, path: str, **fields: Any) -> httpx.Response:
        return self.post(LOAD, {"lora_name": name, "lora_path": path, **fields})

    def unload(self, name: str) -> httpx.Response:
        return self.post(UNLOAD, {"lora_name": name})

    def text(self, adapter: str | None, **parameters: Any) -> str:
        body = {"inputs": PROMPT, "parameters": {**GREEDY, "adapter_id": adapter, **parameters}}
        reply = self.post("/generate", body, **self.caller)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["generated_text"])

    def status(self, adapter: str) -> int:
        body = {"inputs": PROMPT, "parameters": {**GREEDY, "adapter_id": adapter}}
        return self.post("/generate", body, **self.caller).status_code

    def models(self) -> list[str]:
        reply = self.stack.http.get("/v1/models", headers=self.caller)
        return [entry["id"] for entry in reply.json()["data"]]


@pytest.fixture(scope="module")
def loading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loading]:
    path = tmp_path_factory.mktemp("loading")
    directory = path / "adapters"
    for seed in range(3):
        make_adapter(DEMO_MODEL, directory / str(seed), seed, **_SETTINGS)
    (directory / "pirate").symlink_to("0")  # inside of it
    make_adapter(DEMO_MODEL, path / "elsewhere", 7, **_SETTINGS)
    keys = {name: make_key() for name in ("admin", "caller")}
    for name, key in keys.items():
        (path / name).write_text(key_line(name, key) + "\n")
    flags = (
        f"--lora-adapters={FIRST}={path / 'elsewhere'}",
        f"--lora-adapter-directory={directory}",
        f"--admin-key-file={path / 'admin'}",
        f"--api-key-file={path / 'caller'}",
        "--api-key-exempt=health",
        "--api-key-exempt=reflection",
        "--max-loras=2",
        "--max-cpu-loras=3",
    )
    headers = {name: {"authorization": f"Bearer {key}"} for name, key in keys.items()}
    with running(path / "log", *flags) as stack:
        yield Loading(stack, directory, headers["admin"], headers["caller"])


@pytest.fixture(autouse=True)
def _unloaded(loading: Loading) -> Iterator[None]:
    yield
    for name in loading.models():
        if name not in (MODEL, FIRST):
            assert loading.unload(name).status_code == 200


@pytest.fixture(params=["direct", "through_envoy"])
def typed(loading: Loading, request: pytest.FixtureRequest) -> ReflectionClient:
    return ReflectionClient(getattr(loading.stack, request.param))


def test_an_adapter_is_loaded_used_and_unloaded(loading: Loading) -> None:
    assert loading.status("pirate") == 404
    reply = loading.load("pirate", "0")
    assert reply.status_code == 200, reply.text
    assert reply.text == "Success: LoRA adapter 'pirate' added successfully."
    assert loading.models() == [MODEL, FIRST, "pirate"]
    info = loading.stack.http.get("/info", headers=loading.caller).json()
    assert info["adapter_ids"] == [FIRST, "pirate"]
    texts = {loading.text(name) for name in (None, FIRST, "pirate")}
    assert len(texts) == 3
    reply = loading.unload("pirate")
    assert (reply.status_code, reply.text) == (
        200,
        "Success: LoRA adapter 'pirate' removed successfully.",
    )
    assert loading.status("pirate") == 404
    assert loading.models() == [MODEL, FIRST]


def test_the_examples_of_the_document_are_answered(loading: Loading) -> None:
    for path in (LOAD, UNLOAD):
        content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert loading.post(path, content["example"]).status_code == 200


def test_the_typed_calls_do_the_same(loading: Loading, typed: ReflectionClient) -> None:
    body = {"lora_name": "pirate", "lora_path": str(loading.directory / "0")}
    loaded = typed.call("LoadAdapter", body, metadata=loading.admin).adapter
    assert (loaded.name, loaded.path, loaded.rank) == ("pirate", body["lora_path"], 4)
    listed = typed.call("ListAdapters", metadata=loading.admin)
    assert [one.name for one in listed.adapters] == [FIRST, "pirate"]
    assert listed.adapters[1] == loaded
    assert listed.max_adapters == 3
    typed.call("UnloadAdapter", {"lora_name": "pirate"}, metadata=loading.admin)
    with pytest.raises(grpc.RpcError) as refused:
        typed.call("UnloadAdapter", {"lora_name": "pirate"}, metadata=loading.admin)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert details(refused.value) == ("not_found", "lora_name")


def test_other_weights_of_the_same_name_find_no_cache_of_the_first(loading: Loading) -> None:
    loading.load("first", "0")
    loading.load("second", "1")
    wanted = [loading.text(name) for name in ("first", "second")]
    assert wanted[0] != wanted[1]
    loading.unload("first")
    loading.unload("second")
    for path, text in [("0", wanted[0]), ("1", wanted[1]), ("0", wanted[0])]:
        assert loading.load("turns", path, load_inplace=True).status_code == 200
        assert loading.text("turns") == text


def test_a_running_text_ends_with_the_weights_that_it_began_with(loading: Loading) -> None:
    loading.load("pirate", "0")
    whole = loading.text("pirate", max_new_tokens=300)
    body = {
        "inputs": PROMPT,
        "parameters": {**GREEDY, "adapter_id": "pirate", "max_new_tokens": 300},
    }
    for change in (
        lambda: loading.load("pirate", "1", load_inplace=True),
        lambda: loading.unload("pirate"),
    ):
        loading.load("pirate", "0", load_inplace=True)
        with loading.stack.http.stream(
            "POST", "/generate_stream", json=body, headers=loading.caller
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert change().status_code == 200
            (*_, last) = (line for line in lines if line)
        assert json.loads(last.removeprefix("data:"))["generated_text"] == whole
    assert loading.status("pirate") == 404


def test_no_more_than_the_host_s_are_loaded_and_all_are_used(loading: Loading) -> None:
    """Two are on the device at a time."""
    assert loading.load("a", "0").status_code == 200
    assert loading.load("b", "1").status_code == 200
    reply = loading.load("c", "2")
    assert (reply.status_code, reply.json()["error_type"]) == (400, "too_many_adapters")
    assert reply.json()["error"] == "3 adapters are loaded, the most there can be: unload one"
    texts = [loading.text(name) for name in (None, FIRST, "a", "b")]
    assert len(set(texts)) == 4
    assert [loading.text(name) for name in (None, FIRST, "a", "b")] == texts
    assert loading.load("b", "2", load_inplace=True).status_code == 200
    assert loading.text("b") not in texts


def test_a_name_that_is_loaded(loading: Loading, typed: ReflectionClient) -> None:
    loading.load("pirate", "0")
    reply = loading.load("pirate", "1")
    assert (reply.status_code, reply.json()["error_type"]) == (400, "adapter_loaded")
    assert reply.json()["error"] == "The adapter `pirate` has already been loaded"
    with pytest.raises(grpc.RpcError) as refused:
        body = {"lora_name": FIRST, "lora_path": "1"}
        typed.call("LoadAdapter", body, metadata=loading.admin)
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS


def test_only_admins_may(loading: Loading, typed: ReflectionClient) -> None:
    body = {"lora_name": "pirate", "lora_path": "0"}
    for headers, status in [
        (loading.caller, 403),
        ({"authorization": "Bearer tw-wrong"}, 401),
        ({"x-none": "1"}, 401),
    ]:
        for path in (LOAD, UNLOAD):
            assert loading.post(path, body, **headers).status_code == status
    for method in ("LoadAdapter", "UnloadAdapter", "ListAdapters"):
        with pytest.raises(grpc.RpcError) as refused:
            typed.call(method, metadata=loading.caller)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert loading.models() == [MODEL, FIRST]
    assert loading.post("/generate", {"inputs": "x"}, **loading.admin).status_code == 200


def test_without_admin_keys_or_a_directory_nobody_may(stack: Stack) -> None:
    body = {"lora_name": "pirate", "lora_path": "0"}
    reply = stack.http.post(LOAD, json=body)
    assert (reply.status_code, reply.json()["error_type"]) == (403, "forbidden")
    assert "--admin-key-file" in reply.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({"lora_name": "x"}, 422, "missing field `lora_path`"),
        ({"lora_path": "0"}, 422, "missing field `lora_name`"),
        ({"lora_name": 1, "lora_path": "0"}, 422, "lora_name"),
        ({"lora_name": "", "lora_path": "0"}, 422, "`lora_name` must have 1 to 256 characters"),
        ({"lora_name": "x" * 257, "lora_path": "0"}, 422, "Given: 257"),
        ({"lora_name": "a\nb", "lora_path": "0"}, 422, "no control characters"),
        ({"lora_name": "tgi", "lora_path": "0"}, 422, "must not be a name of the model itself"),
        ({"lora_name": MODEL, "lora_path": "0"}, 422, "must not be a name of the model itself"),
        ({"lora_name": "x", "lora_path": ""}, 422, "`lora_path` must have 1 to 4096 bytes"),
        ({"lora_name": "x", "lora_path": "0/" * 4000}, 422, "Given: 8000"),
        ({"lora_name": "x", "lora_path": "none"}, 404, "adapter x: there is no directory none"),
        ({"lora_name": "x", "lora_path": "a\0b"}, 404, "adapter x: embedded null byte"),
        ({"lora_name": "x", "lora_path": "../elsewhere"}, 403, "not below"),
        ({"lora_name": "x", "lora_path": "/etc"}, 403, "not below"),
        ({"lora_name": "x", "lora_path": "/etc/none"}, 403, "not below"),
        ({"lora_name": "x", "lora_path": "link"}, 403, "not below"),
        ({"lora_name": "x", "lora_path": "half"}, 400, "a file of it is a link to somewhere else"),
        ({"lora_name": "x", "lora_path": "empty"}, 400, "has no adapter_config.json"),
        ({"lora_name": "x", "lora_path": "endless"}, 400, "takes too long to match"),
        ({"lora_name": "x", "lora_path": "deep"}, 400, "adapter_config.json is not JSON"),
        ({"lora_name": "x", "lora_path": "cut"}, 400, "adapter_model.safetensors is broken"),
        ({"lora_name": "x", "lora_path": "other"}, 400, "and the model's is"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_loaded(
    loading: Loading, broken: None, body: dict[str, Any], status: int, error: str
) -> None:
    reply = loading.post(LOAD, body)
    assert (reply.status_code, error in reply.json()["error"]) == (status, True), reply.text
    assert "\n" not in reply.json()["error"]
    assert loading.models() == [MODEL, FIRST]


@pytest.fixture(scope="module")
def broken(loading: Loading) -> None:
    """Directories that are no adapters of this model, each in another way."""
    directory = loading.directory
    config = json.loads((directory / "0" / "adapter_config.json").read_text())
    (directory / "empty").mkdir()
    (directory / "link").symlink_to(directory.parent / "elsewhere")
    for name in ("half", "endless", "deep", "cut", "other"):
        shutil.copytree(directory / "0", directory / name)
    weights = directory / "half" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(directory.parent / "elsewhere" / weights.name)
    pattern = {r"(?:(.+?)|\3){40}\d": 4}
    (directory / "endless" / "adapter_config.json").write_text(
        json.dumps({**config, "rank_pattern": pattern})
    )
    (directory / "deep" / "adapter_config.json").write_text("[" * 500_000)
    whole = (directory / "0" / "adapter_model.safetensors").read_bytes()
    (directory / "cut" / "adapter_model.safetensors").write_bytes(whole[:-10])
    _make_for_another_model(directory / "other")


def _make_for_another_model(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    save_file(
        {**tensors, name: tensors[name][:, :-1].contiguous()}, path / "adapter_model.safetensors"
    )


def test_others_do_not_notice_what_is_refused(loading: Loading, broken: None) -> None:
    body = {"inputs": PROMPT, "parameters": {**GREEDY, "max_new_tokens": 400}}
    with loading.stack.http.stream(
        "POST", "/generate_stream", json=body, headers=loading.caller
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        for path in ("endless", "cut", "other", "none"):
            assert loading.load("x", path).status_code in (400, 404)
        (*_, last) = (line for line in lines if line)
    assert json.loads(last.removeprefix("data:"))["generated_text"] == loading.text(
        None, max_new_tokens=400
    )


def test_all_come_back_after_the_engine_died(loading: Loading) -> None:
    """With the weights that they had, and texts go on; one that was unloaded stays away."""
    loading.load("pirate", "0")
    loading.load("poet", "1")
    assert loading.unload(FIRST).status_code == 200
    parameters = {**GREEDY, "adapter_id": "poet", "max_new_tokens": 400}
    unbroken = [loading.text("pirate"), loading.text("poet", max_new_tokens=400)]
    body = {"inputs": PROMPT, "parameters": parameters}
    with loading.stack.http.stream(
        "POST", "/generate_stream", json=body, headers=loading.caller
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        with loading.stack.without_engine():
            assert loading.load("late", "2").status_code == 503
            assert loading.unload("pirate").status_code == 503
        (*_, last) = (line for line in lines if line)
    assert json.loads(last.removeprefix("data:"))["generated_text"] == unbroken[1]
    wait_until(loading.stack.is_healthy, "a healthy server")
    assert loading.models() == [MODEL, "pirate", "poet"]
    assert loading.status(FIRST) == 404
    assert loading.text("pirate") == unbroken[0]


def test_they_are_there_after_the_service_died(loading: Loading) -> None:
    loading.load("pirate", "0")
    text = loading.text("pirate")
    loading.stack.child("service").kill()
    wait_until(loading.stack.is_healthy, "a healthy server")
    assert "pirate" in loading.models()
    assert loading.text("pirate") == text


@pytest.mark.parametrize("body", [{}, {"lora_name": 1}, {"lora_name": ""}])
def test_what_is_not_named_cannot_be_unloaded(loading: Loading, body: dict[str, Any]) -> None:
    reply = loading.post(UNLOAD, body)
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    assert "lora_name" in reply.json()["error"]


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
def test_an_order_that_is_no_json_is_a_400(loading: Loading, path: str) -> None:
    headers = loading.admin | {"content-type": "application/json"}
    reply = loading.stack.http.post(path, content=b'{"lora_name"', headers=headers)
    assert (reply.status_code, reply.json()["error_type"]) == (400, "validation")


def test_only_an_admin_may_unload(loading: Loading) -> None:
    for headers, status in ((loading.caller, 403), ({"x-none": "1"}, 401)):
        assert loading.post(UNLOAD, {"lora_name": FIRST}, **headers).status_code == status
