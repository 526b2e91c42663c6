"""Puts both packages below one name into the wheel: `tokenwire.service` and `tokenwire.engine`.

In a checkout they are `service` and `engine`, names that an environment may have for other things.
`docs/decisions/2026-11-29-one-name-in-the-wheel.md` says why they are moved here.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAME = "tokenwire"
PACKAGES = ("engine", "service")
_FROM = re.compile(rf"^(\s*from )(?=({'|'.join(PACKAGES)})[. ])", re.MULTILINE)
_IMPORT = re.compile(rf"^\s*import ({'|'.join(PACKAGES)})\b", re.MULTILINE)


class OneName(BuildHookInterface[Any]):
    """Copies the packages with their imports of each other under the new name.

    `tokenwire` itself gets no `__init__.py`: it is also the name of the protos' package, so that
    code generated of them (`tokenwire.v1`) can be installed beside this.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a build; an editable install keeps the folders as they are.

        Raises:
            ValueError: a file imports a package in a form that cannot be moved.
        """
        if version == "editable":
            return
        included = build_data["force_include"]
        for path, place in self.config["files"].items():
            included[str(Path(self.root) / path)] = place
        self._copies = tempfile.TemporaryDirectory(prefix="tokenwire-build-")
        for package in PACKAGES:
            for source in sorted((Path(self.root) / package).rglob("*")):
                if source.is_file() and "__pycache__" not in source.parts:
                    path = source.relative_to(self.root)
                    included[self._moved(source, path)] = f"{NAME}/{path}"
        scripts = self.metadata.core.scripts
        scripts.update({command: f"{NAME}.{target}" for command, target in scripts.items()})

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called by hatchling after a build."""
        if version != "editable":
            self._copies.cleanup()

    def _moved(self, source: Path, path: Path) -> str:
        """The file to put into the wheel for a file of the checkout."""
        if source.suffix != ".py":
            return str(source)
        copy = Path(self._copies.name) / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(moved(source.read_text(encoding="utf-8"), path), encoding="utf-8")
        return str(copy)


def moved(text: str, path: Path) -> str:
    """Python code whose imports of our packages are below the name of the wheel.

    Raises:
        ValueError: there is an `import engine`: the name it binds would not be the same.
    """
    if (found := _IMPORT.search(text)) is not None:
        line = text.count("\n", 0, found.end()) + 1
        raise ValueError(f"{path}:{line}: write `from {found[1]} import …`")
    return _FROM.sub(rf"\1{NAME}.", text)
