"""Other languages' plug-ins generate stubs of the protos as they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from protos.generate import protoc
from tests.protos.node_modules import MODULES, needs_node, run_node

CHECK_PYTHON = """
from tokenwire.v1 import chat_pb2, text_generation_pb2_grpc
assert chat_pb2.ResponseFormat.TYPE_TEXT == 5
assert text_generation_pb2_grpc.TextGenerationServiceStub
"""
USE_TYPESCRIPT = """
import { create } from "@bufbuild/protobuf";
import { GenerateRequestSchema } from "./tokenwire/v1/generate_pb";
import { ResponseFormat_Type } from "./tokenwire/v1/chat_pb";
import { TextGenerationService } from "./tokenwire/v1/text_generation_pb";
export const request = create(GenerateRequestSchema, { inputs: "hello", parameters: { seed: 7n } });
export const type: ResponseFormat_Type = ResponseFormat_Type.JSON_SCHEMA;
export const name: string = TextGenerationService.method.generate.name;
"""
IMPORTED = ("google/api/annotations.proto", "google/api/http.proto", "google/api/httpbody.proto")
TYPESCRIPT_OPTIONS = (
    "--noEmit --strict --skipLibCheck --target es2022 --module es2022 --moduleResolution bundler"
)


def test_python_stubs_are_generated_and_can_be_imported(tmp_path: Path) -> None:
    protoc(f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", f"--pyi_out={tmp_path}")
    subprocess.run(
        [sys.executable, "-W", "error", "-c", CHECK_PYTHON],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        check=True,
    )


@needs_node("@bufbuild/protoc-gen-es", "@bufbuild/protobuf", "typescript")
def test_typescript_stubs_are_generated_and_type_check(tmp_path: Path) -> None:
    plugin = f"--plugin=protoc-gen-es={MODULES / '.bin' / 'protoc-gen-es'}"
    protoc(plugin, "--es_opt=target=ts", f"--es_out={tmp_path}", *IMPORTED)
    (tmp_path / "use.ts").write_text(USE_TYPESCRIPT)
    (tmp_path / "node_modules").symlink_to(MODULES)
    compiler = MODULES / "typescript" / "bin" / "tsc"
    run_node(
        "require(process.argv[1])",
        str(compiler),
        *TYPESCRIPT_OPTIONS.split(),
        "use.ts",
        cwd=tmp_path,
    )


@pytest.mark.skipif(
    not (shutil.which("protoc-gen-go") and shutil.which("protoc-gen-go-grpc")),
    reason="needs protoc-gen-go and protoc-gen-go-grpc",
)
def test_go_stubs_are_generated_in_one_package(tmp_path: Path) -> None:
    protoc(f"--go_out={tmp_path}", f"--go-grpc_out={tmp_path}")
    files = sorted(tmp_path.rglob("*.go"))
    assert {file.parent for file in files} == {tmp_path / "tokenwire" / "v1"}
    assert "text_generation_grpc.pb.go" in {file.name for file in files}
    assert {package(file) for file in files} == {"tokenwirev1"}


def package(file: Path) -> str:
    lines = file.read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("package "))
    return line.split()[1]
