"""Lints the protos with buf, builds them, and looks for changes that break callers of a release.

It needs no network: google's protos come from the Python package googleapis-common-protos, into
`build/googleapis`, after which buf's own commands work in the checkout as well.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

ROOT = Path(__file__).resolve().parent.parent
# The descriptor set of the last release: its service/pb/descriptors.binpb.
RELEASED = ROOT / "protos" / "released.binpb"

_IMPORTED = ("annotations.proto", "http.proto", "httpbody.proto")


def check(root: Path = ROOT, released: Path = RELEASED) -> str:
    """What is wrong with the protos of a checkout, in buf's words; empty if nothing is.

    Args:
        root: has `buf.yaml` and `protos`; google's protos are written to its `build`.
        released: the descriptor set whose callers must be able to go on.
    """
    export_googleapis(root / "build" / "googleapis")
    lint = _buf(root, "lint")
    with tempfile.TemporaryDirectory() as scratch:
        now, before = Path(scratch) / "now.binpb", Path(scratch) / "before.binpb"
        if failure := _buf(root, "build", f"--output={now}"):
            return failure
        before.write_bytes(_with_accepted_changes(released.read_bytes()))
        # Compared as files: against one, a workspace of two modules passes whatever it has.
        config = f"--config={root / 'buf.yaml'}"
        return lint + _buf(root, "breaking", str(now), f"--against={before}", config)


def export_googleapis(folder: Path) -> None:
    """Writes the protos of google that ours import to a folder, as one to look for imports in."""
    source = Path(sysconfig.get_path("purelib")) / "google" / "api"
    target = folder / "google" / "api"
    target.mkdir(parents=True, exist_ok=True)
    for name in _IMPORTED:
        shutil.copyfile(source / name, target / name)


def _with_accepted_changes(released: bytes) -> bytes:
    """A release with the changes that buf would refuse and that we made all the same.

    Of 0.1.0: the enum ResponseFormatType is now nested, which changes the names of its values in
    JSON and nothing in bytes; and `logit_bias`, a list that nothing read, is now a map at another
    number. Once a later release has replaced 0.1.0 here, this does nothing.
    """
    files = FileDescriptorSet.FromString(released)
    for file in files.file:
        for message in file.message_type:
            _drop_unread(message)
        for enum in file.enum_type:
            if enum.name == "ResponseFormatType":
                _nest(file)
                break
    return files.SerializeToString()


def _drop_unread(message: DescriptorProto) -> None:
    for field in message.field:
        if field.name == "logit_bias" and field.type == FieldDescriptorProto.TYPE_FLOAT:
            message.field.remove(field)
            break


def _nest(file: FileDescriptorProto) -> None:
    (enum,) = (item for item in file.enum_type if item.name == "ResponseFormatType")
    (message,) = (item for item in file.message_type if item.name == "ResponseFormat")
    nested = message.enum_type.add()
    nested.CopyFrom(enum)
    nested.name = "Type"
    for value in nested.value:
        value.name = f"TYPE_{value.name.upper()}"
    for field in message.field:
        if field.type_name == f".{file.package}.{enum.name}":
            field.type_name = f".{file.package}.ResponseFormat.Type"
    file.enum_type.remove(enum)


def _buf(root: Path, *arguments: str) -> str:
    """What buf finds wrong."""
    program = Path(sysconfig.get_path("scripts")) / "buf"
    ended = subprocess.run(
        [str(program), *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    return ended.stdout + ended.stderr if ended.returncode else ""


if __name__ == "__main__":
    sys.exit(check() or None)
