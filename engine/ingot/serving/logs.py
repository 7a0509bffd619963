"""Log lines of the endpoint: one a request, as text or as JSON, with fields and never a part of a request."""

import json
import logging
import sys
import time
from typing import Any, Literal, TextIO

Format = Literal["text", "json"]
LOGGER = logging.getLogger("ingot.serve")


class _Stderr(logging.StreamHandler[TextIO]):
    """Standard error as it is when a line is written."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        self.stream = sys.stderr
        super().emit(record)


class _Lines(logging.Formatter):
    def __init__(self, form: Format) -> None:
        super().__init__()
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        if self.form == "json":
            about = {"time": stamp, "level": record.levelname.lower(), "message": record.getMessage()}
            return json.dumps(about | fields, ensure_ascii=False)
        words = [stamp, record.levelname.lower(), record.getMessage()]
        return " ".join([*words, *(f"{name}={value}" for name, value in fields.items() if value not in ("", None))])


def write_logs(form: Format) -> logging.Handler:
    """Lines of this endpoint to standard error; the handler, for who takes it away again."""
    handler = _Stderr()
    handler.setFormatter(_Lines(form))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    return handler
