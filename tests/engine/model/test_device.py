"""The device of a model: a GPU that torch cannot use is an error, and never a silent CPU."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.model import device
from engine.model.device import choose_device
from engine.protocol.errors import ModelLoadError

CPU = torch.device("cpu")
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020).\nPlease update."


class Machine:
    """A machine without a GPU that torch can use, and what else is found on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root = root
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(device, "_DEVICE_FILES", root)
        monkeypatch.setattr(device, "_DRIVER_FILE", root / "version")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("PATH", str(root))

    def has_file(self, name: str, text: str = "") -> None:
        (self.root / name).write_text(text)

    def has_smi(self, output: str, code: int = 0) -> None:
        """`nvidia-smi -L` ends with this."""
        self.has_file("nvidia-smi", f"#!/bin/sh\necho '{output}'\nexit {code}\n")
        (self.root / "nvidia-smi").chmod(0o755)

    def has_torch_for(self, cuda: str | None, error: str | None = None) -> None:
        """This torch is built for a version of CUDA, which starts with an error."""

        def init() -> None:
            if error is not None:
                raise RuntimeError(error)

        self._monkeypatch.setattr(torch.version, "cuda", cuda)
        self._monkeypatch.setattr(torch.cuda, "init", init)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def refusal(wanted: str | None = None) -> str:
    with pytest.raises(ModelLoadError) as caught:
        choose_device(wanted)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("--device cpu runs the model on the CPU")
    return message


def test_a_gpu_that_torch_can_use_is_used(machine: Machine, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(None) == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["nvidiactl", "nvidia-uvm", "nvidia-caps", "sda1"])
def test_without_a_gpu_it_is_the_cpu(machine: Machine, name: str) -> None:
    machine.has_file(name)
    machine.has_torch_for(None)
    assert choose_device(None) == CPU


@pytest.mark.parametrize("name", ["nvidia0", "nvidia7", "nvidia12"])
def test_torch_without_cuda_beside_a_gpu_is_named(machine: Machine, name: str) -> None:
    machine.has_file(name)
    machine.has_torch_for(None)
    assert "it is built without CUDA" in refusal()
    assert choose_device("cpu") == CPU


def test_a_driver_that_is_too_old_is_named_with_its_version(machine: Machine) -> None:
    machine.has_file("nvidia0")
    machine.has_file("version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue\n")
    machine.has_torch_for("13.0", TOO_OLD)
    message = refusal()
    assert "built for CUDA 13.0" in message
    assert "driver 535.54.03" in message
    assert "too old (found version 12020)" in message


def test_a_gpu_without_its_driver_is_named(machine: Machine) -> None:
    machine.has_file("nvidia0")
    machine.has_torch_for("12.8", "Found no NVIDIA driver on your system")
    assert "no NVIDIA driver is loaded" in refusal()


def test_a_gpu_that_only_nvidia_smi_lists_counts(machine: Machine) -> None:
    machine.has_smi("GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)")
    machine.has_torch_for(None)
    assert "it is built without CUDA" in refusal()


@pytest.mark.parametrize(("output", "code"), [("No devices were found", 0), ("GPU lost", 9)])
def test_nvidia_smi_without_a_gpu_does_not_count(machine: Machine, output: str, code: int) -> None:
    machine.has_smi(output, code)
    assert choose_device(None) == CPU


def test_nvidia_smi_that_hangs_does_not_count(machine: Machine, monkeypatch: Any) -> None:
    def hang(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 20.0)

    machine.has_smi("GPU 0")
    monkeypatch.setattr(subprocess, "run", hang)
    assert choose_device(None) == CPU


@pytest.mark.parametrize("value", ["", "-1", " "])
def test_gpus_that_the_environment_hides_are_not_missed(
    machine: Machine, monkeypatch: Any, value: str
) -> None:
    machine.has_file("nvidia0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert choose_device(None) == CPU


def test_a_gpu_that_is_asked_for_must_be_there(machine: Machine) -> None:
    machine.has_torch_for("13.0")
    assert "finds no GPU" in refusal("cuda")
    machine.has_torch_for(None)
    assert "it is built without CUDA" in refusal("cuda")
