"""Log lines, for people or as JSON; and how everything else that a process writes becomes JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from datetime import UTC, datetime
from io import TextIOBase
from typing import Any, TextIO

from .call_record import CallFilter

FIELDS = "fields"  # the attribute of a log record with further fields of its JSON
_CALL_FIELDS = ("request_id", "caller", "trace_id")
_TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
# Read when libraries that show bars are imported; tqdm's is off where its value is not empty.
_BARS = "TQDM_DISABLE"
_NO_BARS = {_BARS: "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
_QUIET_GRPC = {"GRPC_VERBOSITY": "NONE"}  # what its C code has to say of connections


def set_up_logging(level: str, *, json_output: bool, worker: int | None = None) -> None:
    """Sets up the log of this process, on stderr.

    Decides on progress bars, too, unless the environment has: they are for a terminal. Processes
    that this one starts take the decision over, since they write into a pipe either way.

    Args:
        level: the least that is logged.
        json_output: whether it, and whatever else this process writes, is JSON.
        worker: the number of this service process, which all lines name; None if there is one.
    """
    _decide_on_bars(wanted=sys.stderr.isatty() and not json_output)
    handler = logging.StreamHandler()
    handler.addFilter(CallFilter())
    handler.setFormatter(JsonFormatter(worker) if json_output else text_formatter(worker))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _decide_on_bars(*, wanted: bool) -> None:
    if _BARS not in os.environ:
        os.environ |= {_BARS: ""} if wanted else _NO_BARS


def write_json_only() -> None:
    """Makes JSON lines of all that Python code of this process writes from now on.

    That are warnings, tracebacks, and what libraries print. It does not reach what C code writes,
    which is why gRPC's is told to be silent; and `serve` makes JSON lines of all that its children
    write, since it relays that.
    """
    os.environ |= _NO_BARS | _QUIET_GRPC
    sys.stdout = JsonLines(sys.stdout, "stdout")
    sys.stderr = JsonLines(sys.stderr, "stderr")


def text_formatter(worker: int | None = None) -> TextFormatter:
    """Lines for people; those of one of several service processes name it."""
    name = "%(name)s" if worker is None else f"%(name)s #{worker}"
    return TextFormatter(_TEXT_FORMAT.replace("%(name)s", name))


class TextFormatter(logging.Formatter):
    """A line, which ends in the request's id and its caller if it is about one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        text = super().formatMessage(record)
        request_id, caller = getattr(record, "request_id", ""), getattr(record, "caller", "")
        return f"{text} [{' '.join(filter(None, (request_id, caller)))}]" if request_id else text


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the keys that TGI's router writes under --json-output.

    Args:
        worker: the number of this service process; None if there is one.
    """

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._more = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        found = {name: value for name in _CALL_FIELDS if (value := getattr(record, name, ""))}
        more: dict[str, Any] = {**self._more, **found}
        more |= getattr(record, FIELDS, {})
        if record.exc_info:
            more["exception"] = self.formatException(record.exc_info)
        level = record.levelname.replace("WARNING", "WARN")
        return json_line(level, record.getMessage(), record.name, record.created, **more)


def json_line(level: str, message: str, target: str, at: float, **more: Any) -> str:
    """A log line, without its end; `at` in seconds since 1970."""
    timestamp = datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds")
    line = {
        "timestamp": timestamp.replace("+00:00", "Z"),
        "level": level,
        "message": message,
        "target": target,
    }
    return json.dumps(line | more, ensure_ascii=False)


def message_of(line: str) -> str:
    """The message of a line, if it is JSON; or else the line."""
    found = _parsed(line)
    return str(found["message"]) if found is not None and "message" in found else line


def _parsed(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class JsonLines(TextIOBase):
    """A text stream whose lines all are JSON objects: others become the message of one.

    Args:
        stream: where lines are written.
        target: which is named in those that are made here.
    """

    def __init__(self, stream: TextIO, target: str) -> None:
        self._stream = stream
        self._target = target
        self._rest = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """Writes the lines that are complete."""
        with self._lock:
            *lines, self._rest = (self._rest + text.replace("\r", "\n")).split("\n")
            if lines:
                self._stream.write("".join(map(self._line, lines)))
        return len(text)

    def flush(self) -> None:
        """Writes what is there, but for a line that has not ended."""
        self._stream.flush()

    def close(self) -> None:
        """Writes the last line, ended or not."""
        self.write("\n")
        self.flush()

    def fileno(self) -> int:
        """That of the stream behind."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """No: nobody reads JSON from a terminal."""
        return False

    def _line(self, line: str) -> str:
        line = line.strip()
        if not line or _parsed(line) is not None:
            return f"{line}\n" if line else ""
        now = datetime.now(UTC).timestamp()
        return json_line("INFO", line, self._target, now) + "\n"
