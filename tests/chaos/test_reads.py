"""Reads that fail: every kind of file that is read, every fault, and every command that reads it.

The result is the one without the fault, or there is a one-line error that names the cause, and no file has changed.
`sick_disk.c` makes reads of a local disk fail, `bucket_server.py` those of a bucket. What is read through a memory map
fails to be opened only.
"""

import hashlib
import pathlib
import random
import re
import shutil
import time
import zipfile
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from buckets import Bucket, bucket  # noqa: F401
from commands import PARTS, POINTS, python
from forks import SIGTERM, Ended, Forks, at_step
from published import arrays, inception_state
from test_damage import numbers
from test_data import PHOTOS
from test_disk import QUICK, QUICKLY, disk  # noqa: F401
from test_killed import OFTEN, outcome, photos  # noqa: F401

# --- What is read --------------------------------------------------------------------------------------------------

STOP = at_step(5, SIGTERM)  # at step 6 of 8, with checkpoints of 4, the best so far, and 6
OF_POINTS = [POINTS, *OFTEN, "--config.checkpoint.keep=2", "--config.checkpoint.keep_period=4"]
POINTS_RUN = [*OF_POINTS, "--workdir={here}/points"]
OF_PICTURES = [  # networks that compile quickly
    "--config=configs/image_folder.py:smoke",
    "--config.objective=gaussian",
    "--config.generator.ch_mult=(1,)",
    "--config.eval.features=classifier",
    "--config.data.max_bad_share=0.5",  # so that an image that is left out is noticed by its absence alone
]
PICTURES = [*OF_PICTURES, "--config.data.name=image_folder", "--config.data.dir={local}/data"]
FOLDER = [*PICTURES, "--config.data.path={here}/photos"]
PICTURES_RUN = [*FOLDER, *OFTEN, "--workdir={here}/pictures"]
MODEL = "--checkpoint={local}/pictures.safetensors"
JUDGE = ["--mode=evaluate", "--samples={here}/samples.npz"]
PREPARE = [*OF_PICTURES, "--config.data.name=image_folder", "--config.data.dir={out}/data"]
ARRAY_RECORD = [*OF_PICTURES, "--config.data.name=photos", "--config.data.dir={here}/tfds"]
WEIGHTS = [
    *PICTURES,
    "--config.data.path={local}/photos",
    "--config.eval.features=inception",
    "--config.eval.inception_weights={here}/inception.npz",
    "--config.eval.download=False",
]

# {what is done: (arguments, the workdir that it trains in)}; {here} is where the files are that may be unreadable,
# {local} where the others are, {out} where the results go
COMMANDS: dict[str, tuple[list[str], str]] = {
    "resume": (POINTS_RUN, "{here}/points"),
    "begin anew": ([*OF_POINTS, "--workdir={out}/run"], "{out}/run"),
    "begin": ([*OF_POINTS, "--config.train.init_from={here}/points", "--workdir={out}/run"], "{out}/run"),
    "sample": ([*POINTS_RUN, "--mode=sample", "--num_samples=100", "--out={out}/x.npz"], ""),
    "sample the best": ([POINTS, "--mode=sample", "--checkpoint={here}/points/best", "--out={out}/x.npz"], ""),
    "evaluate": ([*POINTS_RUN, "--mode=evaluate", "--num_samples=200", "--out={out}"], ""),
    "export": ([*POINTS_RUN, "--mode=export", "--out={out}/x.safetensors"], ""),
    "interpolate": ([*POINTS_RUN, "--mode=interpolate", "--out={out}/x.npz"], ""),
    "sample a file": (["--mode=sample", "--checkpoint={here}/model.safetensors", "--out={out}/x.npz"], ""),
    "evaluate a file": ([POINTS, "--mode=evaluate", "--checkpoint={here}/model.safetensors", "--out={out}"], ""),
    "begin from a file": (
        [*OF_POINTS, "--config.train.init_from={here}/model.safetensors", "--workdir={out}/run"],
        "{out}/run",
    ),
    "sample a .pth": ([*FOLDER, "--mode=sample", "--checkpoint={here}/pictures.pth", "--out={out}/x.npz"], ""),
    "edit": (["--mode=edit", MODEL, "--image={here}/image.png", "--out={out}/x.npz"], ""),
    "vary": (["--mode=vary", MODEL, "--image={here}/image.png", "--out={out}/x.npz"], ""),
    "inpaint": (
        ["--mode=inpaint", MODEL, "--image={here}/image.png", "--mask={here}/mask.png", "--out={out}/x.npz"],
        "",
    ),
    "judge": ([*PICTURES, "--config.data.path={local}/photos", *JUDGE, "--out={out}"], ""),
    "judge a folder": (
        [*PICTURES, "--config.data.path={local}/photos", "--mode=evaluate", "--samples={here}/samples", "--out={out}"],
        "",
    ),
    "resume pictures": (PICTURES_RUN, "{here}/pictures"),
    "evaluate pictures": ([*PICTURES_RUN, "--mode=evaluate", "--num_samples=24", "--out={out}"], ""),
    "prepare": ([*PREPARE, "--config.data.path={here}/photos", *JUDGE, "--out={out}"], ""),
    "prepare and train": ([*PREPARE, *OFTEN, "--config.data.path={here}/photos", "--workdir={out}/run"], "{out}/run"),
    "prepare a zip": ([*PREPARE, "--config.data.path={here}/photos.zip", *JUDGE, "--out={out}"], ""),
    "prepare an LMDB": ([*PREPARE, "--config.data.path={here}/lmdb", *JUDGE, "--out={out}"], ""),
    "judge by records": ([*ARRAY_RECORD, *JUDGE, "--out={out}"], ""),
    "train on records": ([*ARRAY_RECORD, *OFTEN, "--config.eval.every=0", "--workdir={out}/run"], "{out}/run"),
    "judge by Inception": ([*WEIGHTS, *JUDGE, "--out={out}"], ""),
}
OF_A_RUN = ("resume", "begin", "sample", "evaluate", "export", "interpolate")
OF_DATA = ("resume pictures", "evaluate pictures", "judge")
SLOW = ("judge by Inception", "prepare and train", "train on records")  # with --full only


class Kind(NamedTuple):
    """Files whose paths have `part` in them, and the commands that read them."""

    part: str
    commands: tuple[str, ...]
    given: bool = False  # the user named this very file: where it is not there or not allowed, that is a user error
    only: tuple[str, ...] = ()  # of the faults; all of them
    in_a_bucket: bool = True  # as well


KINDS = {
    "all checkpoints": Kind("/points/checkpoints/", OF_A_RUN),
    "the newest checkpoint": Kind("/points/checkpoints/6/", OF_A_RUN),
    "arrays": Kind("/points/checkpoints/6/ema/d/", OF_A_RUN),
    "arrays of the state": Kind("/points/checkpoints/6/state/", ("resume", "begin")),
    "manifest": Kind("/points/checkpoints/6/ema/manifest.ocdbt", OF_A_RUN),
    "tree of arrays": Kind("/points/checkpoints/6/ema/_METADATA", OF_A_RUN),
    "checkpoint's JSON": Kind("/points/checkpoints/6/config/metadata", OF_A_RUN),
    "list of checkpoints": Kind("/points/checkpoints", OF_A_RUN, only=("EIO on list", "503 on list")),
    "best.json": Kind("/points/best.json", ("resume", "sample the best"), given=True),  # as RUN/best
    "config.json": Kind("/points/config.json", ("resume",)),
    "metrics.jsonl": Kind("/points/metrics.jsonl", ("resume", "evaluate")),
    ".safetensors": Kind("/model.safetensors", ("sample a file", "evaluate a file", "begin from a file"), given=True),
    ".pth": Kind("/pictures.pth", ("sample a .pth",), given=True),
    "--image": Kind("/image.png", ("edit", "inpaint", "vary"), given=True),
    "--mask": Kind("/mask.png", ("inpaint",), given=True),
    "--samples": Kind("/samples.npz", ("judge",), given=True),
    "a folder of samples": Kind("/samples/000003.png", ("judge a folder",), given=True),
    "list of samples": Kind("/samples", ("judge a folder",), only=("EIO on list", "503 on list"), given=True),
    "images": Kind("/photos/b/5.png", ("prepare", "prepare and train"), given=True),
    "list of images": Kind("/photos/b", ("prepare", "resume pictures"), only=("EIO on list", "503 on list")),
    "zip": Kind("/photos.zip", ("prepare a zip",), given=True),
    "LMDB": Kind("/lmdb/data.mdb", ("prepare an LMDB",), given=True, in_a_bucket=False),
    "array_record": Kind(".array_record", ("judge by records", "train on records")),
    "dataset's JSON": Kind("/tfds/photos/1.0.0/", ("judge by records",), only=("EIO on open", "503", "drop", "403")),
    "weights": Kind("/inception.npz", ("judge by Inception",), given=True),
    "copy's JSON": Kind("/data/image_folder/", OF_DATA, in_a_bucket=False),
    "copy's images": Kind("/images.0.bin", OF_DATA, in_a_bucket=False),
    "classifier": Kind("/data/evaluation/classifier", OF_DATA, in_a_bucket=False),
    "features": Kind("/data/evaluation/features", OF_DATA, in_a_bucket=False),
}

# --- How it fails ---------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What is ordered of the disk or the bucket, and what an error message then names; "": the run succeeds."""

    order: str
    cause: str = ""


LOCAL = {
    "EIO on open": Fault("open 5 0", "Input/output error"),
    "EACCES on open": Fault("open 13 0", "Permission denied"),
    "ENOMEM on open": Fault("open 12 0", "Cannot allocate memory"),
    "ETIMEDOUT on open": Fault("open 110 0", "Connection timed out"),
    "EIO in the middle": Fault("middle 5 0", "Input/output error"),
    "EIO on stat": Fault("stat 5 0", "Input/output error"),
    "EIO on list": Fault("list 5 0", "Input/output error"),
    "short reads": Fault("short 0 0"),
    "EIO on open, twice": Fault("open 5 2"),
    "EIO in the middle, twice": Fault("middle 5 2"),
}
IN_A_BUCKET = {
    "403": Fault("read 403 0", "403|Forbidden|[Pp]ermission|[Dd]enied"),
    "404": Fault("read 404 0", "404|[Nn]ot ?[Ff]ound|No such file|does not exist|there is no|damaged"),
    "429": Fault("read 429 0", "429|Too Many Requests"),
    "503": Fault("read 503 0", "503|Service Unavailable"),
    "drop": Fault("read drop 0", "onnection|[Pp]ayload|[Tt]ransfer|[Rr]eset|body"),
    "503 on list": Fault("list 503 0", "503|Service Unavailable"),
    "503, twice": Fault("read 503 2"),
    "drop, twice": Fault("read drop 2"),
}
# liblmdb does not complete a short read, and reports an invalid header.
NOT_COMPLETED = {("LMDB", "short reads"): Fault("short 0 0", "MDB_INVALID")}
USER_ERRORS = ("EACCES on open", "403", "404")  # of a file that the user named


# --- Where ----------------------------------------------------------------------------------------------------------


class Place:
    """A copy of all files, on a disk or in a bucket, that can be made sick, and main.py there."""

    def __init__(self, server: Forks, here: str, world: "World", cache: str):
        self.server, self.here, self.world, self.cache = server, here, world, cache
        self._right: dict[str, dict] = {}

    def restore(self) -> None:
        """Put everything as it was."""
        raise NotImplementedError

    def snapshot(self) -> dict[str, str]:
        """{name: checksum} of all files."""
        raise NotImplementedError

    def be(self, order: str, part: str = "") -> None:
        """Fail as ordered from now on, and forget what failed before; "" is well."""
        raise NotImplementedError

    def failures(self) -> int:
        """How many reads failed since then."""
        raise NotImplementedError

    def folder(self, path: str, out: pathlib.Path) -> pathlib.Path:
        """A folder of files as a local one."""
        raise NotImplementedError

    def filled(self, text: str, out: pathlib.Path) -> str:
        return text.format(here=self.here, local=self.world.place, out=out)

    def run(self, command: str, out: pathlib.Path, before: str = "", seconds: float = 120) -> Ended:
        arguments = [self.filled(argument, out) for argument in COMMANDS[command][0]]
        ended = self.server.run(*arguments, self.cache, before=QUICK + before, seconds=seconds)
        # But for notes, and TensorStore's search for credentials, of which an emulator needs none
        errors = [line for line in ended.errors.splitlines() if not re.search("^note: |google_auth_provider", line)]
        return ended._replace(errors="\n".join(errors))

    def found(self, command: str, out: pathlib.Path) -> dict[str, object]:
        """What a command made."""
        found: dict[str, object] = {}
        if workdir := COMMANDS[command][1]:
            found |= outcome(self.folder(self.filled(workdir, out), out))
        for file in sorted(out.glob("*")):
            if file.name == "results.json":
                found |= {name: repr(value) for name, value in numbers(out).items()}  # NaN is not equal to NaN
            elif file.suffix in (".npz", ".safetensors"):
                found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        assert found
        return found

    def right(self, command: str, out: pathlib.Path) -> dict[str, object]:
        """What it makes without a fault."""
        if command not in self._right:
            self.restore()
            ended = self.run(command, out, seconds=300)
            assert ended.code == 0, (command, ended)
            self._right[command] = self.found(command, out)
            shutil.rmtree(out)
        return self._right[command]


def checksums(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class OnADisk(Place):
    def __init__(self, server: Forks, control: pathlib.Path, world: "World", cache: str):
        super().__init__(server, str(world.place), world, cache)
        self._control, self._fired = control, control.with_name(f"{control.name}.fired")

    def restore(self):
        self.world.restore()

    def snapshot(self):
        return checksums(self.world.place)

    def be(self, order, part=""):
        self._fired.unlink(missing_ok=True)
        self._control.write_text(order and f"{order} {part}")

    def failures(self):
        return len(self._fired.read_text().splitlines()) if self._fired.exists() else 0

    def folder(self, path, out):
        return pathlib.Path(path)


class InABucket(Place):
    def __init__(self, server: Forks, bucket: Bucket, world: "World", cache: str):  # noqa: F811
        super().__init__(server, f"{bucket.url}/here", world, cache)
        self.bucket, self._contents = bucket, {}
        for file in world.whole.rglob("*"):
            name = str(file.relative_to(world.whole))
            if file.is_file() and not name.startswith(("points/", "pictures/", "data/", "lmdb/")):
                bucket.put(f"here/{name}", file.read_bytes())
        ended = server.run(*[self.filled(flag, world.place) for flag in POINTS_RUN], cache, before=STOP, seconds=300)
        assert ended.code == 75, ended
        self._whole = self.snapshot()
        self._contents = {name: bucket.get(name) for name in self._whole}

    def restore(self):
        now = self.snapshot()
        for name in now.keys() - self._whole.keys():
            self.bucket.delete(name)
        for name in (name for name, checksum in self._whole.items() if now.get(name) != checksum):
            self.bucket.put(name, self._contents[name])

    def snapshot(self):
        return self.bucket.contents("here/")

    def be(self, order, part=""):
        self.bucket.be(*order.split(), *filter(None, [part]))

    def failures(self):
        return len(self.bucket.fired.read_text().splitlines()) if self.bucket.fired.exists() else 0

    def folder(self, path, out):
        if not path.startswith("gs://"):
            return pathlib.Path(path)
        target, prefix = out / "fetched", path.removeprefix(f"{self.bucket.url}/")
        for name in self.bucket.contents(f"{prefix}/"):
            file = target / name.removeprefix(f"{prefix}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.bucket.get(name))
        return target


class World(NamedTuple):
    """All files, as they are used (`place`) and as they were made (`whole`)."""

    place: pathlib.Path
    whole: pathlib.Path

    def restore(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.whole, self.place)  # with their times, from which the copy of a folder knows its files


def add_files(place: pathlib.Path, full: bool) -> None:
    """Inputs that no command writes, beside a folder of photos."""
    import lmdb
    from PIL import Image

    rng = np.random.default_rng(1)
    images = sorted((place / "photos").rglob("*.png"))
    with zipfile.ZipFile(place / "photos.zip", "w") as file:
        for image in images:
            file.write(image, image.relative_to(place / "photos"))
    with lmdb.open(str(place / "lmdb"), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for image in images:
            transaction.put(str(image.relative_to(place / "photos")).encode(), image.read_bytes())
    (place / "lmdb" / "lock.mdb").unlink()
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(place / "image.png")
    Image.fromarray(np.tri(16, dtype=np.uint8) * 255).save(place / "mask.png")
    samples = rng.integers(0, 256, (24, 8, 8, 3), np.uint8)
    np.savez(place / "samples.npz", images=samples)
    (place / "samples").mkdir()
    for i, sample in enumerate(samples):
        Image.fromarray(sample).save(place / "samples" / f"{i:06d}.png")
    child = python(PHOTOS, place / "tfds", "array_record")
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    if full:
        np.savez(place / "inception.npz", **arrays(inception_state()))


@pytest.fixture(scope="module")
def world(disk, photos, cache, full_run, tmp_path_factory):  # noqa: F811
    """Everything that is read: runs that were interrupted at step 6 of 8, models, data and its caches."""
    folder = tmp_path_factory.mktemp("reads")
    made = World(folder / "place", folder / "whole")
    made.place.mkdir()
    shutil.copytree(photos, made.place / "photos")
    add_files(made.place, full_run)
    here = OnADisk(*disk, made, cache)

    def run(*flags: str, code: int = 0, before: str = "") -> None:
        arguments = [here.filled(flag, folder) for flag in flags]
        ended = disk[0].run(*arguments, cache, before=QUICK + before, seconds=600)
        assert ended.code == code, ended

    run(*POINTS_RUN, code=75, before=STOP)
    run(*PICTURES_RUN, code=75, before=STOP)
    run(*POINTS_RUN, "--mode=export", "--out={here}/model.safetensors")
    run(*PICTURES_RUN, "--mode=export", "--out={here}/pictures.safetensors")
    run(*PICTURES_RUN, "--mode=export", "--out={here}/pictures.pth")
    for command in ["judge", "judge by records"] + ["judge by Inception"] * full_run:  # which fill the caches
        run(*COMMANDS[command][0])
    shutil.copytree(made.place, made.whole)
    return made


@pytest.fixture(scope="module")
def full_run(request) -> bool:
    return request.config.getoption("--full")


@pytest.fixture(scope="module")
def on_a_disk(disk, world, cache):  # noqa: F811
    yield OnADisk(*disk, world, cache)


@pytest.fixture(scope="module")
def in_a_bucket(bucket, world, cache, tmp_path_factory):  # noqa: F811
    world.restore()
    home = tmp_path_factory.mktemp("home")
    server = Forks(**bucket.env, **QUICKLY, XDG_CACHE_HOME=str(home))
    yield InABucket(server, bucket, world, cache)
    server.close()


# --- The matrix -----------------------------------------------------------------------------------------------------


def cases(faults: dict[str, Fault], remote: bool) -> list[tuple[str, str, str]]:
    """(kind, fault, command): each that there is."""
    found = []
    for name, kind in KINDS.items():
        for fault in faults:
            if fault in kind.only or (not kind.only and "list" not in fault):
                found += [(name, fault, command) for command in kind.commands]
    local = ("resume pictures", "evaluate pictures")
    found = [case for case in found if not remote or (KINDS[case[0]].in_a_bucket and case[2] not in local)]
    # The reader of array_record has a client of its own, which retries for 15 minutes.
    found = [case for case in found if case[0] != "array_record" or case[1] not in ("429", "503", "drop")]
    random.Random(0).shuffle(found)  # so that each part has some of each
    return found


def few(cases: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Some of them, with every kind, every fault and every command among them, and no slow ones."""
    chosen, seen = [], Counter()
    for case in (case for case in cases if case[2] not in SLOW):
        if any(not seen[part] for part in enumerate(case)):
            chosen.append(case)
            seen.update(enumerate(case))
    return chosen


def check(place: Place, kind: Kind, name: str, fault: Fault, command: str, out: pathlib.Path) -> str:
    """Let a command read what cannot be read; returns how it ended."""
    right, trains = place.right(command, out), COMMANDS[command][1]
    place.restore()
    before = place.snapshot()
    place.be(fault.order, kind.part)
    ended = place.run(command, out)
    failures = place.failures()
    place.be("")
    assert "Traceback" not in ended.errors, ended.errors[-1500:]
    assert ended.code != -9, f"not ended after {ended.seconds:.0f} s"
    if ended.code == 0:
        ours, reported = place.found(command, out), "damaged" in ended.output or "note: " in ended.output
        if name == "404" and reported:
            return "reported what is missing"
        different = {key for key in ours.keys() | right.keys() if ours.get(key) != right.get(key)}
        assert not different, f"other results: {sorted(map(str, different))[:5]}\n{ended.output[-1000:]}"
        changed = {file for file, checksum in before.items() if place.snapshot().get(file) != checksum}
        assert trains or not changed, f"changed {sorted(changed)}"
        return "right" if failures else "no such read"
    assert failures, f"nothing was read, and yet: {ended}"
    assert fault.cause, f"a fault that passes ended the run: {ended}"
    allowed = (1, 2) if kind.given and name in USER_ERRORS else (1,)
    assert ended.code in allowed, f"exit code {ended.code}: {ended.sentence}"
    assert len(ended.told) == 1 and re.match("(stopped|error): ", ended.told[0]), ended.errors[-1500:]
    assert re.search(fault.cause, ended.told[0]), f"the cause is not named: {ended.told[0]}"
    after = place.snapshot()
    changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    assert not changed, f"changed {sorted(changed)[:5]}"
    if (out / "data").exists() or (out / "run").exists():  # what was begun there is not believed
        again = place.run(command, out)
        assert again.code == 0 and place.found(command, out) == right, f"afterwards: {again}"
    return "one line"


def check_all(place: Place, faults: dict[str, Fault], cases: list[tuple[str, str, str]], count, tmp_path) -> None:
    wrong, seen = [], Counter()
    for i, (kind, fault, command) in enumerate(cases):
        start, out = time.time(), tmp_path / str(i)
        out.mkdir()
        try:
            ended = check(place, KINDS[kind], fault, NOT_COMPLETED.get((kind, fault), faults[fault]), command, out)
            seen[ended] += 1
        except Exception as error:
            ended = f"{type(error).__name__} {' '.join(str(error).split())[:600]}"
            wrong.append(f"{kind}, {fault}, {command}: {ended}")
        finally:
            place.be("")
            shutil.rmtree(out, ignore_errors=True)
        print(f"{time.time() - start:.1f} s: {kind}, {fault}, {command}: {ended}", flush=True)
    assert not wrong, f"{len(wrong)} of {len(cases)}\n" + "\n\n".join(wrong)
    count(cases=len(cases), **{name.replace(" ", "_"): number for name, number in seen.items()})


@pytest.mark.lives(1, PARTS)
def test_reads_of_a_disk(life, on_a_disk, full, count, tmp_path):
    every = cases(LOCAL, remote=False)
    check_all(on_a_disk, LOCAL, every[life::PARTS] if full else few(every), count, tmp_path)


@pytest.mark.lives(1, PARTS)
def test_reads_of_a_bucket(life, in_a_bucket, full, count, tmp_path):
    every = cases(IN_A_BUCKET, remote=True)
    check_all(in_a_bucket, IN_A_BUCKET, every[life::PARTS] if full else few(every), count, tmp_path)


# --- What must be shown ---------------------------------------------------------------------------------------------


def check_outage(place: Place, kind: Kind, order: str, seconds: float, out: pathlib.Path) -> int:
    """A run that cannot read its checkpoints ends, changes nothing, and continues as if nothing had been.

    The outage is over after `seconds`, and at the earliest when the first run has ended. Returns how many runs ended.
    """
    place.restore()
    place.run("begin anew", out, seconds=300)
    unbroken, runs = place.found("begin anew", out), 0
    before = place.snapshot()
    place.be(order, kind.part)
    over = time.time() + seconds
    while not runs or time.time() < over:
        ended, runs = place.run("resume", out, seconds=600), runs + 1
        assert ended.code == 1 and len(ended.told) == 1, ended
    place.be("")
    assert place.snapshot() == before
    ended = place.run("resume", out, seconds=300)
    assert ended.code == 0 and "resuming from step 6" in ended.output, ended
    assert place.found("resume", out) == unbroken
    return runs


def test_all_checkpoints_are_unreadable(on_a_disk, count, tmp_path):
    count(ended=check_outage(on_a_disk, KINDS["all checkpoints"], "open 5 0", 0, tmp_path))


def test_a_bucket_is_down(in_a_bucket, bucket, full, count, tmp_path):  # noqa: F811
    """With --full for two minutes, with the package's own patience."""
    server = in_a_bucket.server
    if full:
        quickly = {name: value for name, value in QUICKLY.items() if name != "DDGAN_RETRY_SECONDS"}
        in_a_bucket.server = Forks(**bucket.env, **quickly)
    count(ended=check_outage(in_a_bucket, KINDS["all checkpoints"], "down", 120 if full else 0, tmp_path))
    if full:
        in_a_bucket.server.close()
    in_a_bucket.server = server
