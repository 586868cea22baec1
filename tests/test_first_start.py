"""A paper's preset on a new computer: one command downloads, trains and evaluates, and each fault is one line."""

import json
import os
import shutil

import published
import pytest
from commands import all_succeed, ends, start_group
from servers import serving

from ddgan_jax.metrics import inception, vgg

SMALL = (
    *("--config=configs/cifar10.py", "--config.generator.nf=8", "--config.generator.ch_mult=(1,2)"),
    *("--config.generator.num_res_blocks=1", "--config.discriminator.ngf=8", "--config.train.batch_size=8"),
    *("--config.train.num_steps=2", "--config.eval.every=2", "--config.eval.online_samples=12"),
    *("--config.eval.num_samples=16", "--config.eval.reference_samples=20", "--config.eval.batch_size=4"),
)


@pytest.fixture(scope="module")
def files():
    return published.files()


@pytest.fixture(scope="module")
def server(files):
    with serving(files) as server:
        yield server


@pytest.fixture
def start(server, files, tmp_path, monkeypatch):
    """Starts main.py in processes with an empty home, and the mirror."""
    server.files, server.faults, server.requests = dict(files), [], []
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    env = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "DDGAN_MIRROR": server.url}
    env |= {"SUMS": published.sums(files), "JAX_COMPILATION_CACHE_DIR": f"{os.environ['XDG_CACHE_HOME']}/programs"}
    run = f"--workdir={tmp_path}/run"

    def start(*arguments, count=1, script=published.SCRIPT):
        return start_group(count, *SMALL, run, *arguments, script=script, env=env)

    return start


def requested(server):
    """{file: number of requests}"""
    paths = [path[1:] for path, _ in server.requests]
    return {path: paths.count(path) for path in paths}


AS_MANY_AS_THE_PAPER = """
from ddgan_jax.commands import evaluate
evaluate.PAPER_SAMPLES = 16
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_one_command(count, start, server, tmp_path):
    (output, *_) = all_succeed(start(count=count, script=published.SCRIPT + AS_MANY_AS_THE_PAPER))
    assert requested(server) == {published.ARCHIVE: 1, inception.FILE: 1, vgg.FILE: 1}
    for text in ("preparing dataset cifar10 in", "evaluating step 2 with 16 samples", "next:", "(paper: 3.75)"):
        assert text in output, output
    found = json.loads((tmp_path / "run" / "evaluation" / "2" / "results.json").read_text())
    assert found["num_samples"] == 16 and found["networks"] == ["Inception 2015-12-05", "VGG16"]
    assert found["fid"] > 0 and 0 <= found["recall"] <= 1 and found["real_images"] == 20
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/fid_12"] == last["eval/fid"] > 0 and last["step"] == 2
    (output, *_) = all_succeed(start(count=count))
    assert "nothing is left to train" in output and "the evaluation of step 2 is in" in output
    assert sum(requested(server).values()) == 3


@pytest.mark.slow
def test_prepare_alone_then_without_a_network(start, server, tmp_path):
    """Cut downloads are resumed by the same command."""
    server.faults = [1000]
    (output,) = all_succeed(start("--mode=prepare"))
    assert "the data is ready: 100 examples of 32x32x3" in output and "feature networks are ready" in output
    assert requested(server) == {published.ARCHIVE: 2, inception.FILE: 1, vgg.FILE: 1}
    server.faults = ["503"] * 99
    (output,) = all_succeed(start("--mode=prepare"))
    assert "preparing" not in output and not (tmp_path / "run").exists()


WITHOUT_TENSORFLOW = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "tensorflow" else find(name, *rest)
"""
FULL_DISK = """
import shutil, types
shutil.disk_usage = lambda path: types.SimpleNamespace(free=1000)
"""


@pytest.mark.parametrize(
    "fault, script, code, message",
    [
        ("", WITHOUT_TENSORFLOW, 2, "preparing it needs TensorFlow: run `pip install -r requirements.txt`"),
        ("", FULL_DISK, 1, "preparing dataset cifar10 takes up to 2 MiB, and"),
        (f"/{published.ARCHIVE}", "", 1, "the server answers 404 Not Found: run the same command again, or put the"),
        (
            f"/{inception.FILE}",
            "",
            1,
            "the server answers 404 Not Found: run the same command with --mode=prepare on a",
        ),
        ("sums", "", 1, "is not the published file: its SHA-256 is"),
    ],
)
def test_faults(fault, script, code, message, start, server, tmp_path):
    server.files.pop(fault, None)
    if fault == "sums":
        server.files[f"/{published.ARCHIVE}"] = b"another archive"
    ((found, output),) = ends(start(script=published.SCRIPT + script))
    assert found == code and message in output and "Traceback" not in output, output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_is_there_and_damaged(start, server, tmp_path):
    """`--mode=prepare` finds it, where it can still be downloaded again, and says what to remove."""
    all_succeed(start("--mode=prepare"))
    data = tmp_path / "tensorflow_datasets"
    assert sorted(path.name for path in (data / "downloads").iterdir()) == ["published"]

    def refused() -> str:
        ((code, output),) = ends(start("--mode=prepare"))
        assert code in (1, 2) and "Traceback" not in output, output
        return output

    weights = tmp_path / "cache" / "ddgan_jax" / "downloads" / vgg.FILE
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    assert f"{weights} is damaged" in refused()
    weights.write_bytes(content)
    (shard,) = data.glob("cifar10/*/*train.array_record*")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert f"or remove the folder of the dataset in {data} and prepare it anew" in refused()
    info = shard.with_name("dataset_info.json")
    info.unlink()
    assert f"{shard.parent} is no complete dataset: remove it, and run the same command again" in refused()
    shutil.rmtree(data / "cifar10")
    archive = data / "downloads" / "published" / "cifar10" / published.ARCHIVE
    archive.write_bytes(archive.read_bytes()[:1000])
    assert f"{archive} is damaged" in refused()
    archive.unlink()
    (output,) = all_succeed(start("--mode=prepare"))
    assert "the data is ready: 100 examples" in output


def test_downloads_can_be_switched_off(start, server):
    ((code, output),) = ends(start("--config.data.download=False"))
    assert code == 2 and "dataset cifar10 is not in" in output and "tfds build cifar10" in output
    ((code, output),) = ends(start("--config.eval.download=False"))
    assert code == 2 and "leave --config.eval.download at True" in output
    assert requested(server) == {published.ARCHIVE: 1}
