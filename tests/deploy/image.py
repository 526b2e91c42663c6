"""The image's files, put together by hand as the Dockerfile says, where no Docker engine is."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import Distribution
from pathlib import Path

from tests.deploy.dockerfile import Stage, stages
from tests.locks import pins
from tests.paths import REPOSITORY

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


class Image:
    """A directory that stands for the image's root.

    What would be downloaded is linked from this environment instead, in the versions of the lock;
    everything else is what the Dockerfile copies and runs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stages = stages(REPOSITORY / "Dockerfile")
        self.home = root / "home" / "tokenwire"
        self.prefix = root / "opt" / "tokenwire"
        (wheel,) = self._build_wheel()
        self._link_packages(self.stages["packages"])
        self._install(wheel)

    @property
    def server(self) -> Stage:
        """The last stage."""
        return self.stages["server"]

    def environment(self) -> dict[str, str]:
        """The variables of a container."""
        inherited = {"PATH": str(self._only_these("env", "sh", "sed", "id"))}
        variables = self.server.variables()
        assert variables["PATH"] == "/opt/tokenwire/bin:$PATH"
        rooted = {
            name: f"{self.root}{value}" if value.startswith("/") else ""
            for name, value in variables.items()
        }
        return {**inherited, **rooted, "PATH": f"{self.prefix}/bin:{inherited['PATH']}"}

    def _build_wheel(self) -> list[Path]:
        """Runs the stage `wheel` with nothing but what it copies."""
        stage = self.stages["wheel"]
        source = self.root / "source"
        source.mkdir(parents=True)
        for names, place in stage.copies():
            for name in names:
                path = REPOSITORY / name
                if path.is_dir():
                    shutil.copytree(
                        path, source / place, ignore=shutil.ignore_patterns("__pycache__")
                    )
                else:
                    shutil.copy(path, source / place)
        (command,) = stage.texts("RUN")
        assert command == "pip wheel --no-cache-dir --no-deps --wheel-dir /wheel ."
        wheels = self.root / "wheel"
        options = ["--no-build-isolation", "--no-deps", "--wheel-dir", str(wheels)]
        subprocess.run([*PIP, "wheel", *options, "."], cwd=source, check=True)
        return list(wheels.iterdir())

    def _link_packages(self, stage: Stage) -> None:
        """Makes the environment of the stage `packages`."""
        assert "python -m venv /opt/tokenwire" in stage.texts("RUN")
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(self.prefix)], check=True
        )
        names = [name.replace("${DEVICE}", "cpu") for names, _ in stage.copies() for name in names]
        (lock,) = (name for name in names if name.endswith(".lock"))
        locked = pins(REPOSITORY / lock)
        distributions = [importlib.metadata.distribution(name) for name in locked]
        for distribution in distributions:
            wanted = locked[distribution.name.lower().replace("_", "-")]
            assert distribution.version == wanted, f"{distribution.name} {distribution.version}"
        _link(distributions, self.site_packages)

    @property
    def site_packages(self) -> Path:
        """Where the packages are."""
        (path,) = self.prefix.glob("lib/python*/site-packages")
        return path

    def _install(self, wheel: Path) -> None:
        python = str(self.prefix / "bin" / "python")
        subprocess.run([*PIP, "--python", python, "install", "--no-deps", str(wheel)], check=True)
        module = "tokenwire.engine.kernels.prebuild"
        assert f"python -m {module}" in " ".join(self.stages["packages"].texts("RUN"))
        command = [python, "-P", "-m", module]
        subprocess.run(command, check=True, capture_output=True, env={"PATH": os.defpath})

    def _only_these(self, *programs: str) -> Path:
        """A directory with a few programs: above all, no compiler."""
        directory = self.root / "bin"
        directory.mkdir(exist_ok=True)
        for program in programs:
            found = shutil.which(program)
            if found and not (directory / program).exists():
                (directory / program).symlink_to(found)
        return directory


def _link(distributions: list[Distribution], to: Path) -> None:
    """Links what distributions have installed: whole folders where they share none."""
    owners: dict[str, set[str]] = defaultdict(set)
    for other in importlib.metadata.distributions():
        name = other.name  # is read from a file
        for top in {path.partition("/")[0] for path in _recorded(other)}:
            owners[top].add(name)
    for distribution in distributions:
        paths = _recorded(distribution)
        alone = {top for path in paths if len(owners[top := path.partition("/")[0]]) == 1}
        shared = {path for path in paths if path.partition("/")[0] not in alone}
        for path in alone | shared:
            (to / path).parent.mkdir(parents=True, exist_ok=True)
            (to / path).symlink_to(Path(str(distribution.locate_file(path))))


def _recorded(distribution: Distribution) -> list[str]:
    """What a distribution has installed, below `site-packages`."""
    lines = (distribution.read_text("RECORD") or "").splitlines()
    paths = (line.partition(",")[0] for line in lines)
    return [path for path in paths if not path.startswith(("..", "/", "__pycache__"))]
