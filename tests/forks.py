"""main.py again and again, from a process that has imported all of it: what a case takes is its own work.

server = Forks()
ended = server.run("--mode=sample", "--workdir=x", seconds=60)
assert ended.code == 0, ended.output
"""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent

MOST_MEMORY = 8 * 2**30  # bytes that a case may allocate


class Ended(NamedTuple):
    """How a run ended: code -9 is one that took too long; `mib` is its peak of memory."""

    code: int
    output: str
    errors: str
    compiled: int  # programs that took half a second or more
    mib: float
    seconds: float

    @property
    def sentence(self) -> str:
        """The last line of the errors."""
        return (self.errors.strip().splitlines() or [""])[-1]

    @property
    def told(self) -> list[str]:
        """The lines of the errors, but for Orbax's advice to save less often, which a busy machine brings out."""
        return [line for line in self.errors.strip().splitlines() if "Waiting for previous save" not in line]


def at_step(step: int, do: str) -> str:
    """Lines for `before` of Forks.run: a line of Python that runs just before the step after `step` is taken."""
    return f"""
import os, signal
from ddgan_jax.devices import parallel
take = parallel.Stop.step
def with_it(self, run, state, *rest):
    if int(state.step) == {step}:
        {do}
    return take(self, run, state, *rest)
parallel.Stop.step = with_it
"""


SIGTERM = "os.kill(os.getpid(), signal.SIGTERM)"


class Forks:
    """A server of its own, which ends with this object."""

    def __init__(self, **env: str):
        command = [sys.executable, "-W", "ignore", __file__]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *argv: object, before: str = "", seconds: float = 120) -> Ended:
        """Run main.py with these arguments; `before` are lines of Python that run first in its process."""
        request = {"argv": [str(argument) for argument in argv], "before": before, "seconds": seconds}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def forks():
    """A server for the tests of one module, which finds no datasets of tfds."""
    started = Forks(TFDS_DATA_DIR="/nonexistent")
    yield started
    started.close()


def work(request: dict, out: str, err: str, compiled: str) -> None:
    """What a child does: never returns."""
    os.setsid()
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code: object = 70
    try:
        import jax

        import main

        def note(event: str, seconds: float, **about: object) -> None:
            if event.endswith("backend_compile_duration") and seconds > 0.5:
                with open(compiled, "a") as file:
                    file.write(".")

        resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
        jax.monitoring.register_event_duration_secs_listener(note)
        sys.argv = ["main.py", *request["argv"]]
        exec(request["before"], {})
        code = main.main()
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 71)


def serve() -> None:
    """Answer every line of the standard input."""
    import main  # noqa: F401  (these are for the children)
    from ddgan_jax.commands import evaluate, generate, train  # noqa: F401
    from ddgan_jax.model import loading  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            files = [os.path.join(folder, name) for name in ("out", "err", "compiled")]
            start, child, late = time.time(), os.fork(), False
            if not child:
                work(request, *files)
            while True:
                ended, status, usage = os.wait4(child, os.WNOHANG)
                if ended:
                    break
                if time.time() - start > request["seconds"] and not late:
                    late = True
                    os.killpg(child, signal.SIGKILL)
                time.sleep(0.005)
            output, errors, compiled = (
                open(name, errors="replace").read() if os.path.exists(name) else "" for name in files
            )
        code = os.waitstatus_to_exitcode(status)
        answer = Ended(code, output, errors, len(compiled), usage.ru_maxrss / 1024, time.time() - start)
        print(json.dumps(answer._asdict()), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve()
