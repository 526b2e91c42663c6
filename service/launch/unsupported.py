"""TGI's options that have no effect here, each with the reason and with what to use instead.

A flag is refused. A variable, often left over in a container's environment, causes a warning,
unless other programs use the name too. Values that ask for what happens anyway are accepted.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Unsupported:
    """An option of TGI's that has no effect here.

    Attributes:
        reason: why, and what to use instead.
        harmless: values that ask for what happens anyway.
        warns: whether its variable causes a warning: only TGI uses it, no other program.
    """

    reason: str
    harmless: frozenset[str] = frozenset()
    warns: bool = True


_NO_ROPE = "positions are scaled as the model's config.json says; change them there"
_NO_ADDRESS = Unsupported("shards are on one machine and meet by themselves", warns=False)
_NO_TUNNEL = Unsupported("there is no tunnel built in; run ngrok beside the server")
_NEVER_SENT = Unsupported("nothing is ever sent to anyone", frozenset({"true", "1"}))

UNSUPPORTED: dict[str, Unsupported] = {
    "shard_uds_path": Unsupported("the engine's socket is set with --engine-socket"),
    "master_addr": _NO_ADDRESS,
    "master_port": _NO_ADDRESS,
    "disable_custom_kernels": Unsupported("use --native-kernels=false"),
    "rope_scaling": Unsupported(_NO_ROPE),
    "rope_factor": Unsupported(_NO_ROPE),
    "huggingface_hub_cache": Unsupported(
        "set the variable HF_HUB_CACHE, which the hub's own library reads", warns=False
    ),
    "weights_cache_override": Unsupported("give the directory as --model-id"),
    "ngrok": _NO_TUNNEL,
    "ngrok_authtoken": _NO_TUNNEL,
    "ngrok_edge": _NO_TUNNEL,
    "env": Unsupported("the settings in force are in /info", warns=False),
    "disable_usage_stats": _NEVER_SENT,
    "disable_crash_reports": _NEVER_SENT,
    # From later versions of TGI.
    "api_key": Unsupported(
        "other users of the machine could read it; use --api-key-file, which `tokenwire key` fills"
    ),
    "payload_limit": Unsupported("use --max-request-bytes"),
    "usage_stats": Unsupported("nothing is ever sent to anyone", frozenset({"off"})),
}


def unsupported_variables(environment: Mapping[str, str]) -> list[str]:
    """Returns a warning for each of TGI's variables that is set and has no effect."""
    return [
        f"{name.upper()} has no effect: {entry.reason}"
        for name, entry in UNSUPPORTED.items()
        if entry.warns
        and (raw := environment.get(name.upper(), "").strip())
        and raw.lower() not in entry.harmless
    ]


class Refuse(argparse.Action):
    """Refuses an unsupported flag of TGI's, unless it asks for what happens anyway."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """See argparse.Action."""
        entry = UNSUPPORTED[self.dest]
        if str(values).lower() not in entry.harmless:
            parser.error(f"{option_string} is not supported: {entry.reason}")
