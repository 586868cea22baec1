"""What is tested on which day: environments for the notebook, versions of JAX for commands, and the longest parts.

`python tests/environments.py` prints the notebook's environments of today, for `pytest -k`,
`python tests/environments.py jax` the version of JAX, and `python tests/environments.py parts` the parts of `.ci/run`.
"""

import datetime
import functools
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple


class Environment(NamedTuple):
    """A version of Python, and what is installed before all else."""

    python: str
    preinstalled: tuple[str, ...]


ENVIRONMENTS = {
    "colab": Environment("3.12", ("jax==0.7.2", "flax==0.11.2", "numpy==2.0.2", "scikit-learn", "ipykernel")),
    "newest": Environment("3.13", ("ipykernel",)),
    "present": Environment(f"{sys.version_info[0]}.{sys.version_info[1]}", ("ipykernel",)),
}
# The oldest JAX that is allowed (Colab's), one in the middle, and the newest.
JAX = {
    "oldest": Environment("3.12", ("jax==0.7.2", "flax==0.11.2")),
    "middle": Environment("3.11", ("jax==0.9.0",)),
    "latest": Environment("3.13", ()),
}


# Without optimization, these halve the time of compiling. The second emits a program's code in one part: several parts
# take more of the CPU in all, which only pays where cores are idle.
QUICKER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


@functools.cache
def known_flags(flags: str, python: str) -> str:
    """XLA_FLAGS for an interpreter: `flags`, without those of QUICKER if its XLA does not know one of them.

    XLA ends a process for a flag that it does not know, and newer versions have dropped the first.
    """
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    knows = not subprocess.run([python, "-c", "import jax; jax.devices()"], env=env, capture_output=True).returncode
    return flags if knows else flags.replace(QUICKER, "").strip()


@functools.cache
def interpreter(version: str) -> str | None:
    """A Python of this version that can make environments: this one, one on PATH, or one of pyenv's; or None."""
    roots = [os.environ.get("PYENV_ROOT"), pathlib.Path.home() / ".pyenv"]
    if shutil.which("pyenv"):
        roots.append(subprocess.run(["pyenv", "root"], capture_output=True, text=True).stdout.strip())
    of_pyenv = [
        path for root in roots if root for path in sorted(pathlib.Path(root).glob(f"versions/{version}.*/bin/python"))
    ]
    check = f"import ensurepip, sys, venv; assert '%d.%d' % sys.version_info[:2] == '{version}'"
    for candidate in (sys.executable, shutil.which(f"python{version}"), *of_pyenv):
        # pyenv puts a python3.12 on PATH even where it only says that another version is chosen.
        if candidate and not subprocess.run([candidate, "-c", check], capture_output=True).returncode:
            return str(candidate)
    return None


def here() -> list[str]:
    """The environments that this machine can make; the present interpreter's only if there is no other."""
    found = [name for name in ("colab", "newest") if interpreter(ENVIRONMENTS[name].python)]
    return found or ["present"]


def of_day(day: datetime.date, found: list[str], everything: bool = False) -> list[str]:
    """Those of `found` that are tested on a day: Colab's on even days of the year, else the newest; on Sundays all."""
    if everything or day.isoweekday() == 7:
        return found
    wanted = "newest" if day.timetuple().tm_yday % 2 else "colab"
    return [wanted] if wanted in found else found[:1]


def jax_of_day(day: datetime.date, everything: bool = False) -> list[str]:
    """The versions of JAX that are tested on a day: one after the other, or all."""
    return list(JAX) if everything else [list(JAX)[day.timetuple().tm_yday % len(JAX)]]


def parts_of_day(day: datetime.date, everything: bool = False) -> list[str]:
    """The longest parts of `.ci/run`: some on each of four days, one after the other also across New Year, or all."""
    days = [["resumed runs"], ["chaos"], ["documented commands", "deployment"], ["joined processes"]]
    return list(itertools.chain(*days)) if everything else days[day.toordinal() % len(days)]


if __name__ == "__main__":
    today, everything = datetime.date.today(), os.environ.get("CI_ALL") == "1"
    if "jax" in sys.argv:
        chosen = jax_of_day(today, everything)
    elif "parts" in sys.argv:
        chosen = parts_of_day(today, everything)
    else:
        chosen = of_day(today, here(), everything)
    print(" or ".join(chosen))
