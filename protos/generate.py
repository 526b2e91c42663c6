"""Compiles the protos into `service/pb`; to be run after every change of a proto.

That is message classes, and the descriptor set that Envoy, server reflection and `rpc.py` read.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
OUTPUT = PROTOS.parent / "service" / "pb"


def generate(output: Path) -> None:
    """Writes the generated package to `output`, replacing what stands there.

    Raises:
        subprocess.CalledProcessError: a proto does not compile.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    # The plugin and the formatter it calls live beside the interpreter, which need not be on PATH.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    packages = sysconfig.get_path("purelib")  # has google/api/*.proto
    with tempfile.TemporaryDirectory() as scratch:  # the formatter would read our ruff settings
        subprocess.run(
            [
                sys.executable,
                "-m",
                "grpc_tools.protoc",
                f"-I{PROTOS}",
                f"-I{packages}",
                "--include_imports",
                f"--descriptor_set_out={output / 'descriptors.binpb'}",
                f"--python_betterproto2_out={output}",
                "--python_betterproto2_opt=client_generation=none",
                *sorted(str(file) for file in PROTOS.rglob("*.proto")),
            ],
            check=True,
            cwd=scratch,
            env={**os.environ, "PATH": path},
        )


if __name__ == "__main__":
    generate(OUTPUT)
