"""Files that come with the service: inside this package in a wheel, beside it in a checkout."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

NAME = __name__.rpartition(".")[0]  # `service`; in a wheel, below the name of the distribution
PACKAGE = Path(str(resources.files(NAME)))
DESCRIPTORS = PACKAGE / "pb" / "descriptors.binpb"  # what protoc made of `protos/`
OPENAPI = PACKAGE / "api" / "openapi"  # the contract and our additions


def envoy_template() -> Path:
    """The template of Envoy's configuration."""
    return _bundled("envoy.yaml.j2", "envoy/envoy.yaml.j2")


def affinity_script() -> Path:
    """The script by which Envoy knows how a request begins."""
    return _bundled("affinity.lua", "envoy/affinity.lua")


def demo_model() -> Path:
    """The directory of the bundled model."""
    return _bundled("models/demo", "models/demo")


def _bundled(in_wheel: str, in_checkout: str) -> Path:
    """A file or directory that `force-include` in pyproject.toml puts into the package."""
    installed = PACKAGE / in_wheel
    return installed if installed.exists() else PACKAGE.parent / in_checkout
