"""Wrappers of standard output and standard error, which discard what is written once the stream is closed."""

import contextlib
import os
from collections.abc import Callable
from typing import Any


class PatientStream:
    """A stream that drops its output when it cannot be written any more, which must not end a training.

    Ctrl-C in `python main.py | tee log` ends tee too, a terminal disappears with its connection, and a disk fills up.
    """

    def __init__(self, stream: Any):
        """Wraps an open text stream."""
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text, or drops it."""
        return self._try(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        """Writes what is buffered, or drops it."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError:
            with contextlib.suppress(OSError):  # a stream without a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
