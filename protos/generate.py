"""Compiles the protos for the service and for the client; to be run after every change of a proto.

The service gets message classes, and the descriptor set that Envoy, server reflection and `rpc.py`
read: `service/pb`. The client gets protoc's own classes, which need nothing but protobuf.
What comes out depends on the protos and the locked packages alone: the plug-in's formatter looks
for settings from its working directory upwards, so it gets its own there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

PROTOS = Path(__file__).resolve().parent
OUTPUT = PROTOS.parent / "service" / "pb"
CLIENT_OUTPUT = PROTOS.parent / "clients" / "python" / "src" / "tokenwire_client" / "pb"

# They annotate methods with REST paths, which Envoy reads in the descriptor set. No message of ours
# has a field of their types, and the classes for them would be 2,600 lines.
_ONLY_ANNOTATIONS = (
    "google/api/annotations.proto",
    "google/api/http.proto",
    "google/protobuf/descriptor.proto",
)
_FORMATTER_SETTINGS = "line-length = 100\n"
_CLIENT_INIT = '"""What protoc makes of the protos; see `protos/generate.py`."""\n'
# How protoc's classes import each other: by the proto's path, which is no package of the client.
_ABSOLUTE_IMPORT = re.compile(r"^from tokenwire\.v1 import ", re.MULTILINE)


def generate(output: Path) -> None:
    """Writes the generated package to `output`, replacing what stands there.

    Raises:
        subprocess.CalledProcessError: a proto does not compile.
        ValueError: the plug-in refuses a proto.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    compile_protos(output / "descriptors.binpb")
    with tempfile.TemporaryDirectory() as scratch:
        documented = Path(scratch) / "documented.binpb"
        compile_protos(documented, "--include_source_info")
        files = FileDescriptorSet.FromString(documented.read_bytes()).file
        for name, content in _message_classes(list(files), Path(scratch)):
            path = output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")


def generate_client(output: Path) -> None:
    """Writes protoc's classes to the package `output`, replacing what stands there.

    Raises:
        subprocess.CalledProcessError: a proto does not compile.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / "__init__.py").write_text(_CLIENT_INIT)
    with tempfile.TemporaryDirectory() as scratch:
        protoc(f"--python_out={scratch}", f"--pyi_out={scratch}")
        for file in (Path(scratch) / "tokenwire" / "v1").iterdir():
            text = _ABSOLUTE_IMPORT.sub("from . import ", file.read_text(encoding="utf-8"))
            (output / file.name).write_text(text, encoding="utf-8")


def compile_protos(descriptors: Path, *options: str) -> None:
    """Writes the descriptor set of all protos and of what they import.

    Args:
        descriptors: the file to write.
        options: further ones of protoc.

    Raises:
        subprocess.CalledProcessError: a proto does not compile.
    """
    protoc("--include_imports", f"--descriptor_set_out={descriptors}", *options)


def protoc(*options: str) -> None:
    """Runs protoc on all protos.

    Raises:
        subprocess.CalledProcessError: a proto does not compile.
    """
    packages = sysconfig.get_path("purelib")  # has google/api/*.proto
    protos = sorted(str(file) for file in PROTOS.rglob("*.proto"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{PROTOS}",
            f"-I{packages}",
            *options,
            *protos,
        ],
        check=True,
    )


def _message_classes(files: list[FileDescriptorProto], scratch: Path) -> Iterator[tuple[str, str]]:
    """Names and contents of the files that betterproto2's plug-in makes of compiled protos."""
    kept = [file for file in files if file.name not in _ONLY_ANNOTATIONS]
    request = CodeGeneratorRequest(
        file_to_generate=[file.name for file in kept],
        parameter="client_generation=none",
        proto_file=kept,
    )
    (scratch / "ruff.toml").write_text(_FORMATTER_SETTINGS)
    # The plug-in and the formatter it calls live beside the interpreter, which need not be on PATH.
    scripts = sysconfig.get_path("scripts")
    plugin = subprocess.run(
        [str(Path(scripts) / "protoc-gen-python_betterproto2")],
        input=request.SerializeToString(),
        stdout=subprocess.PIPE,
        check=True,
        cwd=scratch,
        env={**os.environ, "PATH": os.pathsep.join([scripts, os.environ["PATH"]])},
    )
    response = CodeGeneratorResponse.FromString(plugin.stdout)
    if response.error:
        raise ValueError(response.error)
    for file in response.file:
        yield file.name, file.content


if __name__ == "__main__":
    generate(OUTPUT)
    generate_client(CLIENT_OUTPUT)
