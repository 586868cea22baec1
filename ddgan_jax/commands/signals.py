"""Signals that end a command early: SIGTERM from a scheduler, Ctrl-C, and SIGUSR1 from SLURM's `--signal=USR1@60`."""

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
AGAIN = 1.0  # seconds; a launcher may send one signal both to a process and to its group


class Interrupt:
    """A context that handles SIGNALS: the first one raises Interrupted, or within `held` only sets `signal`.

    Signals that are ignored stay ignored, such as SIGINT in a command that a script starts in the background.

    Another one, at least a second later, ends the process immediately.
    """

    def __init__(self) -> None:
        """Starts without a signal."""
        self.signal = ""
        self._time = 0.0
        self._held = False

    def __enter__(self) -> "Interrupt":
        self._before, self._hook = {}, sys.unraisablehook
        sys.unraisablehook = self._unraisable
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._come) for number in handled}
        return self

    def __exit__(self, *error: object) -> None:
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context in which signals only set `signal`, which the body checks.

        Raises Interrupted if one has come before in code that ignores exceptions, such as a garbage collection.
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
            self.check()
        if number == signal.SIGINT:  # someone waits at a terminal; print() may be what was interrupted
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping; Ctrl-C again after a second ends the process at once, without saving\n")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A context that delays signals to the end of its body, and then raises Interrupted."""
        with self.held():
            yield
        self.check()

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.signal:
            raise Interrupted(f"{self.signal}: {NOTHING_LOST}")

    def _unraisable(self, what: Any) -> None:
        if not isinstance(what.exc_value, Interrupted):  # `held` will raise it
            self._hook(what)


def raise_on_signal(interrupt: Interrupt, chunks: Iterator[Any]) -> Iterator[Any]:
    """Yields chunks until a signal comes to any process, then raises Interrupted in all of them at the same chunk."""
    for chunk in chunks:
        if processes.any_process(bool(interrupt.signal)):
            raise Interrupted(interrupt.signal)
        yield chunk
