"""Which adapter a request means."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..errors import unknown_adapter

# What clients write where TGI wants no name.
PLACEHOLDERS = ("", "tgi")


def same_name(name: str, served: str) -> bool:
    """Whether a caller's name is that of something served.

    A directory's leading slash may be missing: in a path it stands next to another one, and the
    gateway merges the two.
    """
    return bool(name) and name.removeprefix("/") == served.removeprefix("/")


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters that are served beside a model.

    Attributes:
        names: by which requests choose them.
        model_id: the model's own name.
        unknown_is_base: whether any other name means the model, as in TGI, instead of an error.
    """

    names: Collection[str] = ()
    model_id: str = ""
    unknown_is_base: bool = False

    def find(self, name: str | None, *, is_model: bool) -> str:
        """The name of the adapter that a request asks for; empty for the model alone.

        Args:
            name: what the request says.
            is_model: whether it says that as the name of a model: its own means the model, and
                without adapters any, since clients must write something.

        Raises:
            ServiceError: there is no such adapter.
        """
        if not name:
            return ""
        if name in self.names:
            return name
        if is_model and (not self.names or self._is_base(name)):
            return ""
        if self.unknown_is_base:
            return ""
        raise unknown_adapter(name)

    def _is_base(self, name: str) -> bool:
        return name in PLACEHOLDERS or same_name(name, self.model_id)
