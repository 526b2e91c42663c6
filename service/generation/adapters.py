"""Which adapter a request means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.protocol.adapters import AdapterInfo, same_name

from ..errors import unknown_adapter
from .parameters import Parameters

# What clients write where TGI wants no name.
PLACEHOLDERS = ("", "tgi")


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters that are served beside a model, which may change.

    Attributes:
        served: those that there are now, by their names.
        model_id: the model's own name.
        unknown_is_base: whether any other name means the model, as in TGI, instead of an error.
        may_change: whether adapters may come while the server runs.
    """

    served: Callable[[], Mapping[str, AdapterInfo]] = dict
    model_id: str = ""
    unknown_is_base: bool = False
    may_change: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """By which requests choose them."""
        return tuple(self.served())

    def find(self, name: str | None, *, is_model: bool) -> str:
        """The digest of the adapter that a request asks for; empty for the model alone.

        Args:
            name: what the request says.
            is_model: whether it says that as the name of a model: its own means the model, and
                where there never are adapters any, since clients must write something.

        Raises:
            ServiceError: there is no such adapter.
        """
        if not name:
            return ""
        served = self.served()
        if name in served:
            return served[name].digest
        if is_model and (not (served or self.may_change) or self.is_base(name)):
            return ""
        if self.unknown_is_base:
            return ""
        raise unknown_adapter(name)

    def chosen(self, parameters: Parameters) -> str:
        """The same for a request's parameters.

        Raises:
            ServiceError: there is no such adapter.
        """
        return self.find(parameters.adapter_id, is_model=parameters.names_model)

    def is_base(self, name: str) -> bool:
        """Whether it is a name of the model itself."""
        return name in PLACEHOLDERS or same_name(name, self.model_id)
