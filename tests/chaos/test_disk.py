"""A disk without room, read-only, with I/O errors, or slow, during each kind of write.

One sentence and exit code 1; what was written before is intact; and when the disk is well again, the same command goes
on to the numbers of a run that met nothing. `sick_disk.c`, between Python and libc, makes the disk sick.
"""

import errno
import pathlib
import random
import shutil
import subprocess

import numpy as np
import pytest
from commands import PARTS, POINTS
from forks import Forks, at_step
from test_killed import OFTEN, assert_same, of_pictures, outcome, photos  # noqa: F401

from ddgan_jax.storage import checkpoint

SICK = {"no room": errno.ENOSPC, "read-only": errno.EROFS, "I/O error": errno.EIO, "slow": 0}
KINDS = {  # of writes while training, and a part of their paths
    "checkpoint": "/checkpoints/4",
    "metrics": "/metrics.jsonl",
    "picture": "/samples/",
    "curves": "/.curves.png",
    "best": "/.best.json",
    "settings": "/.config.json",
    "results": "/.results.json",
    "data copy": "/image_folder/",
    "cached features": "/evaluation/",
    "compiled programs": "/programs/",
    "the rest of the workdir": "/run/",
}
OF_PICTURES = ("picture", "data copy", "cached features")  # the others are as well tried with points, which are quick
# For servers: every program cached, and reads that fail are retried for a moment only
QUICKLY = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "DDGAN_RETRY_SECONDS": "2",
}
CACHES = ("cached features", "compiled programs")  # without which a run is only slower
QUICK = "from ddgan_jax.metrics import classifier; classifier.STEPS = 50\n"  # it is trained in every case


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """(runs main.py on the disk, the file that makes it sick)."""
    folder = tmp_path_factory.mktemp("disk")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library, control = folder / "sick_disk.so", folder / "control"
    source = pathlib.Path(__file__).with_name("sick_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    control.write_text("")
    server = Forks(LD_PRELOAD=str(library), SICK_CONTROL=str(control), **QUICKLY)
    yield server, control
    server.close()


@pytest.fixture(scope="module")
def unbroken(disk, photos, cache, tmp_path_factory):  # noqa: F811
    """Of runs on points and on pictures: the arguments, and what is left on a well disk."""
    runs = {}
    for name, own in (("points", [POINTS]), ("pictures", of_pictures(photos))):
        folder, arguments = tmp_path_factory.mktemp(name), [*own, *OFTEN, cache]
        places = [f"--config.data.dir={folder / 'data'}", f"--workdir={folder / 'run'}"]
        ended = disk[0].run(*arguments, *places, before=QUICK, seconds=300)
        assert ended.code == 0, ended
        runs[name] = arguments, outcome(folder / "run")
    return runs


def cases() -> list[tuple[str, str, bool]]:
    """(kind of write, sickness, from the start?)."""
    both = ("metrics", "picture", "the rest of the workdir")
    found = [(kind, name, first) for kind in KINDS for name in SICK for first in {True, kind not in both}]
    return sorted(found)


@pytest.mark.lives(1, PARTS)
def test_while_training(life, disk, unbroken, full, count, tmp_path):
    server, control = disk
    chosen = cases()[life::PARTS] if full else random.Random(1).sample(cases(), 3)
    wrong, codes = [], {}
    for i, (kind, sickness, first) in enumerate(chosen):
        folder = tmp_path / str(i)
        flags, right = unbroken["pictures" if kind in OF_PICTURES else "points"]
        arguments = [
            *flags,
            f"--config.data.dir={folder / 'data'}",
            f"--workdir={folder / 'run'}",
            f"--compilation_cache={folder / 'programs'}" if kind == "compiled programs" else "",
        ]
        text = f"{SICK[sickness]} {KINDS[kind]}"
        later = at_step(3, f"open({str(control)!r}, 'w').write({text!r})")
        control.write_text(text if first else "")
        try:
            before = QUICK + ("" if first else later)
            ended = server.run(*filter(None, arguments), before=before, seconds=300)
            control.write_text("")
            codes[ended.code] = codes.get(ended.code, 0) + 1
            assert "Traceback" not in ended.errors, ended.errors[-1500:]
            goes_on = sickness == "slow" or kind in CACHES
            allowed = (0,) if goes_on else (1, 2) if kind in ("settings", "data copy") or first else (1,)
            assert ended.code in allowed, ended
            assert kind != "cached features" or sickness == "slow" or "will be computed again" in ended.output, ended
            assert goes_on or len(ended.told) == 1, ended.errors
            for step in checkpoint.finished(folder / "run" / "checkpoints"):
                checkpoint.read(checkpoint.find(folder / "run" / "checkpoints" / str(step)))
            again = server.run(*filter(None, arguments), before=QUICK, seconds=300)
            assert again.code == 0, again
            assert_same(folder / "run", right)
        except Exception as error:
            wrong.append(f"{kind}, {sickness}, {'from the start' if first else 'at step 3'}: {str(error)[:1500]}")
        control.write_text("")
    assert not wrong, f"{len(wrong)} of {len(chosen)}\n" + "\n\n".join(wrong)
    count(cases=len(chosen), **{f"exit_code_{code}": number for code, number in codes.items()})


@pytest.mark.parametrize("sickness", [name for name in SICK if name != "slow"])
@pytest.mark.parametrize(
    "mode, name, other",
    [
        ("sample", "x.npz", "--sample_seed=1"),
        ("sample", "x.png", "--sample_seed=1"),
        ("export", "x.safetensors", "--checkpoint=digits"),  # the last of two counts
    ],
)
def test_while_writing_a_result(mode, name, other, sickness, disk, count, tmp_path):
    """The file that was there is still there, whole."""
    server, control = disk
    arguments = [f"--mode={mode}", "--checkpoint=gaussians", f"--out={tmp_path / name}"]
    assert server.run(*arguments).code == 0
    before = (tmp_path / name).read_bytes()
    control.write_text(f"{SICK[sickness]} {tmp_path}")
    ended = server.run(*arguments, other)
    control.write_text("")
    assert ended.code == 1 and len(ended.told) == 1, ended
    assert (tmp_path / name).read_bytes() == before
    assert server.run(*arguments, other).code == 0
    if name.endswith(".npz"):
        assert len(np.load(tmp_path / name)["images"]) == 64
    count(cases=1)
