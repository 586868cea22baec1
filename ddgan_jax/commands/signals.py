"""Signals that end a job early: SIGTERM of a scheduler, Ctrl-C, and SIGUSR1 as SLURM's `--signal=USR1@60` sends it."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from ddgan_jax.devices import processes
from ddgan_jax.errors import NOTHING_LOST, Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AGAIN = 1.0  # s; launchers send a signal to the process and to its group, which is one signal twice


class Interrupt:
    """Listens for SIGNALS inside a `with`. The first raises Interrupted at once, or within `held` is only noted.

    Another one, a second later or more, ends the process at once.
    """

    def __init__(self) -> None:
        """Nothing has come yet."""
        self.signal = ""
        self._time = 0.0
        self._held = False

    def __enter__(self) -> "Interrupt":
        self._before, self._hook = {}, sys.unraisablehook
        sys.unraisablehook = self._unraisable
        if threading.current_thread() is threading.main_thread():  # no other thread may listen
            self._before = {number: signal.signal(number, self._come) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals only set `signal` in the body of the `with`, which checks it.

        Raises Interrupted if one has come before, in code that ignores exceptions, such as a garbage collection.
        """
        self.check()
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def _come(self, number: int, frame: Any) -> None:
        if self.signal:
            if time.monotonic() - self._time > AGAIN:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.signal, self._time = signal.Signals(number).name, time.monotonic()
        if not self._held:
            raise Interrupted(self._text())

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """The body of the `with` is finished when a signal comes; then Interrupted is raised."""
        with self.held():
            yield
        self.check()

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.signal:
            raise Interrupted(self._text())

    def _text(self) -> str:
        return f"{self.signal}: {NOTHING_LOST}"

    def _unraisable(self, what: Any) -> None:
        if not isinstance(what.exc_value, Interrupted):  # `held` will raise it
            self._hook(what)


def until(interrupt: Interrupt, chunks: Iterator[Any]) -> Iterator[Any]:
    """The chunks, until a signal has come to any process: then Interrupted, in all of them at the same chunk."""
    for chunk in chunks:
        if processes.any_process(bool(interrupt.signal)):
            raise Interrupted(interrupt.signal)
        yield chunk
