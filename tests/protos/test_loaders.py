"""Loaders of other languages read the protos as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from protos.check import export_googleapis
from service.bundled import DESCRIPTORS
from tests.paths import REPOSITORY
from tests.protos.node_modules import needs_node, run_node

METHODS = {
    "Generate",
    "GenerateStream",
    "CompatGenerate",
    "Chat",
    "Completions",
    "Responses",
    "Invocations",
    "Tokenize",
    "ChatTokenize",
    "Info",
    "GetLoad",
    "GetModel",
    "ListModels",
    "Health",
    "Metrics",
    "OpenApi",
    "Docs",
}
SHOW = """
const service = loaded["tokenwire.v1.TextGenerationService"];
const bytes = service.Generate.requestSerialize({inputs: "hello", parameters: {seed: "7"}});
const back = service.Generate.requestDeserialize(bytes);
console.log(JSON.stringify({
  methods: Object.keys(service), streams: service.Chat.responseStream,
  inputs: back.inputs, seed: String(back.parameters.seed),
}));
"""
FROM_FOLDERS = """
const loader = require("@grpc/proto-loader");
const loaded = loader.loadSync("tokenwire/v1/text_generation.proto", {
  includeDirs: ["protos", "build/googleapis"], longs: String,
});
"""
FROM_DESCRIPTORS = """
const loader = require("@grpc/proto-loader");
const descriptors = require("fs").readFileSync(process.argv[1]);
const loaded = loader.loadFileDescriptorSetFromBuffer(descriptors, {longs: String});
"""


def assert_service(shown: str) -> None:
    seen = json.loads(shown)
    assert set(seen["methods"]) >= METHODS
    assert (seen["streams"], seen["inputs"], seen["seed"]) == (True, "hello", "7")


@needs_node("@grpc/proto-loader")
def test_proto_loader_reads_the_folders(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "protos" / "tokenwire", tmp_path / "protos" / "tokenwire")
    export_googleapis(tmp_path / "build" / "googleapis")
    assert_service(run_node(FROM_FOLDERS + SHOW, cwd=tmp_path))


@needs_node("@grpc/proto-loader")
def test_proto_loader_reads_the_descriptors_with_nothing_else(tmp_path: Path) -> None:
    assert_service(run_node(FROM_DESCRIPTORS + SHOW, str(DESCRIPTORS), cwd=tmp_path))
