"""What tells the service processes of one server apart, in OpenTelemetry's words."""

from __future__ import annotations

import uuid

from ..launch.place import Place

_INSTANCE_ID = "service.instance.id"
_WORKER = "tokenwire.worker"  # its number, which stays when another process takes its place

_OWN_ID = str(uuid.uuid4())  # the same in traces and metrics


def own_attributes(place: Place | None) -> dict[str, str]:
    """Attributes of this process: none where it is the only one, whose id is for others to choose.

    A process that takes another's place counts from 0, so it has an id of its own.
    """
    return {} if place is None else {_INSTANCE_ID: _OWN_ID, _WORKER: str(place.number)}
