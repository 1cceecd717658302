"""Log lines: text for people, or one JSON object each for what collects them. Those about a job say so in fields."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from finetune_api import KIND
from finetune_operator.config import LogFormat, LogLevel

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CHATTY = ("aiohttp.access", "kopf.objects", "kopf.activities")
"""A line for each event and probe would drown what matters."""

# Each look at a job is in a task of its own, and so is its context.
_fields: ContextVar[dict[str, Any]] = ContextVar("log_fields")


def configure(form: LogFormat, level: LogLevel) -> None:
    """All loggers of the process, those of libraries too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "DEBUG" else logging.WARNING)


@contextlib.contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Fields of all lines that are written until the end of the block."""
    token = _fields.set({**_fields.get({}), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


def add(**fields: Any) -> None:
    """More fields, until the end of the same block."""
    _fields.set({**_fields.get({}), **fields})


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
            **_fields.get({}),
        }
        # kopf's own loggers name the object that a handler was called for.
        if reference := getattr(record, "k8s_ref", None):
            key = "job" if reference["kind"] == KIND else reference["kind"].lower()
            line |= {"namespace": reference["namespace"], key: reference["name"], "uid": reference["uid"]}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
