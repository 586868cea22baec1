"""The command line: configurations, flags, which run a command uses, and what it prints."""

import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from commands import POINTS, ROOT, SMOKE, succeed

from ddgan_jax.commands import cli
from ddgan_jax.commands.progress import next_commands
from ddgan_jax.config import presets
from ddgan_jax.config.settings import as_dict, read
from ddgan_jax.data.sources import Data


@pytest.fixture(scope="module")
def points_run(tmp_path_factory):
    """The workdir of a short run on points, with a best checkpoint."""
    workdir = tmp_path_factory.mktemp("runs") / "points"
    succeed(POINTS, f"--workdir={workdir}", "--config.train.num_steps=4", "--config.eval.every=4")
    return workdir


@pytest.mark.slow
def test_samples_are_compared_with_the_data_of_the_run(refused, points_run, tmp_path):
    """Not with the default digits, with which these would be compared in silence."""
    np.savez(tmp_path / "x.npz", np.zeros((70, 2), np.float32))
    for named in ([f"--workdir={points_run}"], ["--checkpoint=gaussians"], [f"--checkpoint={points_run}/best"]):
        succeed("--mode=evaluate", f"--samples={tmp_path / 'x.npz'}", *named, "--num_samples=50")
        assert json.loads((tmp_path / "x.npz.evaluation" / "results.json").read_text())["features"] == "points"
    samples = "--mode=evaluate", f"--samples={tmp_path / 'x.npz'}"
    assert "gaussians" in refused(*samples, named[0], "--config.eval.features=classifier")
    nowhere = refused(*samples, "--checkpoint=gaussians", "--config.eval.k=2")
    assert "there is no config.json in gaussians: name the configuration" in nowhere


@pytest.mark.slow
def test_flags_change_the_configuration_of_the_evaluated_run(points_run, tmp_path):
    for checkpoint in (points_run, points_run / "best", points_run / "checkpoints" / "4"):
        named = f"--checkpoint={checkpoint}", f"--out={tmp_path / 'of'}"
        succeed("--mode=evaluate", *named, "--config.eval.num_samples=40")
        assert json.loads((tmp_path / "of" / "results.json").read_text())["num_samples"] == 40


def test_the_run_that_an_evaluation_finds_without_flags(tmp_path, monkeypatch):
    """It has the configuration of that run, which flags change; samples of a file have that of the preset."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / presets.DEFAULT).mkdir(parents=True)
    (tmp_path / "runs" / presets.DEFAULT / "config.json").write_text("{}")
    for flags in (["--config.eval.k=4"], ["--checkpoint=best", "--config.eval.k=4"]):
        assert cli.config_of_run(["main.py", "--mode=evaluate", *flags]) == f"runs/{presets.DEFAULT}/config.json"
    assert cli.config_of_run(["main.py", "--mode=evaluate", "--samples=x.npz"]) is None


def test_fields_that_have_no_effect_on_a_model_are_noted(points_run, tmp_path):
    """A model has the configuration of its training. The size of a batch may be chosen."""
    fields = ["--config.diffusion.num_steps=8", "--config.train.lr_g=0.5", "--config.sample.batch_size=3"]
    done = succeed(POINTS, f"--workdir={points_run}", "--mode=sample", f"--out={tmp_path / 'x.npz'}", *fields)
    assert "note: --config.diffusion.num_steps=8 has no effect: the model has 4" in done.stdout
    assert "note: --config.train.lr_g=0.5 has no effect" in done.stdout and "batch_size" not in done.stdout
    same = succeed(POINTS, f"--workdir={points_run}", "--mode=sample", f"--out={tmp_path / 'x.npz'}", "--config.seed=0")
    assert "note" not in same.stdout


@pytest.mark.slow
def test_the_configuration_that_a_run_writes(points_run, tmp_path):
    """It is accepted by every mode, and is the configuration of that run."""
    file = points_run / "config.json"
    assert as_dict(presets.get(str(file))) == json.loads(file.read_text())
    again = tmp_path / "again"
    for arguments in (
        [f"--workdir={again}", "--config.train.lr_g=0.001", "--config.data.scale=2"],
        [f"--workdir={points_run}", "--mode=evaluate"],
        [f"--workdir={points_run}", "--mode=sample"],
    ):
        succeed(f"--config={file}", *arguments)
    found, before = json.loads((again / "config.json").read_text()), json.loads(file.read_text())
    before["train"]["lr_g"], before["data"]["scale"] = 0.001, 2.0
    assert found == before


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_file_of_settings_runs_no_code(mode, refused, tmp_path):
    settings = as_dict(presets.get("digits:smoke"))
    settings["eval"]["features"] = "os:abort"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    named = {"train": f"--config={tmp_path / 'config.json'}", "evaluate": "--config.eval.k=2"}[mode]
    error = refused(f"--mode={mode}", f"--workdir={tmp_path}", named)
    assert "a .json file cannot run code: add --config.eval.features=os:abort" in error


def test_the_best_checkpoint(refused, points_run):
    for arguments in (["--checkpoint=best", f"--workdir={points_run}"], [f"--checkpoint={points_run}/best"]):
        done = succeed("--mode=evaluate", *arguments, "--num_samples=40")
        assert f"written to {points_run}/evaluation/4" in done.stdout
    (points_run / "best.json").rename(points_run / "elsewhere")
    error = refused("--mode=sample", "--checkpoint=best", f"--workdir={points_run}")
    (points_run / "elsewhere").rename(points_run / "best.json")
    assert f"there is no best checkpoint in {points_run}: training marks it with --config.eval.every=N" in error


@pytest.mark.parametrize(
    "name, content, message",
    [
        (".py", "x = 1", "configuration FILE.py: the file has no function get_config: define one"),
        (".py", "\ndef get_config(:", "configuration FILE.py cannot be used: SyntaxError: invalid syntax (line 2)"),
        (".py", "def get_config():\n    return 1 / 0", "ZeroDivisionError: division by zero (line 2)"),
        (".py", "import nothing_of_this_name", "cannot be used: ModuleNotFoundError: No module named 'nothing_of_this"),
        (".py", "def get_config():\n    return 3", "FILE.py: get_config returns a value of type int, not a ConfigDict"),
        (".py", "def get_config(variant):\n    return 3", "FILE.py: get_config needs a variant: write --config=FILE."),
        (
            ".py:small",
            "def get_config():\n    return 3",
            "get_config takes no variant: leave :small out, or define get",
        ),
        (".json", '{"train"', "cannot be used: JSONDecodeError: Expecting"),
        (".json", '{"train": {"lr": 3}}', "no setting train.lr: did you mean --config.train.lr_g?"),
        (".json", "[]", "the configuration is (), and must be a group of settings"),
    ],
)
def test_configuration_files_that_cannot_be_used(name, content, message, refused, tmp_path):
    file = tmp_path / f"mine{name.removesuffix(':small')}"
    file.write_text(content)
    assert message.replace("FILE", str(tmp_path / "mine"), 1) in refused(f"--config={tmp_path}/mine{name}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--num_sample=3", "there is no flag --num_sample: did you mean --num_samples?"),
        ("--num_samples=x", "--num_samples=x must be an integer"),
        ("--restart=x", "--restart=x must be True or False"),
        ("--config.train.lr_g=x", "--config.train.lr_g=x must be a number"),
        ("--config.train.batch_size=many", "--config.train.batch_size=many must be"),
        ("--config.train.batch_siz=3", "--config.train.batch_siz: did you mean --config.train.batch_size?"),
        ("--config.generator.foo=3", "there is no flag --config.generator.foo: "),
        ("--config.generator.skip_rescale=1", "no flag --config.generator.skip_rescale: docs/configuration"),
        ("--config.train=3", "--config.train is a group of fields: set each of them"),
        ("--config", "there is no configuration ''"),
        ("--config=configs/nothing.py", "nothing.py"),
        ("--config=configs/digits.py:tiny", "unknown variant 'tiny'"),
        ("--workdir=", "--workdir= is empty: name a path, or leave it out"),
        ("--mode=evaluate --posterior=deterministic", "--posterior does nothing in --mode=evaluate: it is for"),
        ("--mode=evaluate --label=3", "--label does nothing in --mode=evaluate"),
        ("--mode=demo --out=x", "--out does nothing in --mode=demo"),
        ("--mode=export --sample_seed=3", "--sample_seed does nothing in --mode=export"),
        ("--help=1", "--help lists the flags, and has no value"),
        ("--mode=sample --checkpoint=digits --trajectory=x.mp4", "--trajectory=x.mp4 must end in .png (a grid)"),
        ("--mode=sample --start_step=1", "--start_step does nothing in --mode=sample: it is for edit; leave it"),
        ("--checkpoint=digits", "--checkpoint does nothing in --mode=train"),
        (f"{SMOKE} --mode=dream", "unknown --mode=dream: it is one of train, prepare, sample, vary, edit"),
        (f"{SMOKE} now", "unexpected argument 'now'"),
        (f"{SMOKE} --sample_seed=-1", "--sample_seed=-1 must be an integer from 0 to 4294967295"),
        (f"{SMOKE} --config.train.batch_size=6", "does not divide by 1 device and into groups of 4 images"),
        # Before the dataset is downloaded
        ("--config=stacked_mnist:small --config.data.dir=/proc/none --config.train.batch_size=6", "does not divide by"),
        (
            "--config=stacked_mnist:small --config.data.dir=/proc/none --config.model.patch_size=5",
            "does not halve 1 times",
        ),
        *(
            (f"--config=stacked_mnist:small --config.data.dir=/proc/none --config.train.init_from={name}", message)
            for name, message in (
                ("runs/no", "no checkpoint in runs/no"),
                ("x.safetensors", "there is no x.safetensors"),
            )
        ),
        ("--config=digits:smoke --mode=prepare --config.train.batch_size=6", "does not divide by"),
        (f"{SMOKE} --config.data.image_size=9", "data.image_size=9 does not halve"),
        (f"{SMOKE} --config.diffusion.kind=geometric", "not a diffusion"),
        (f"{SMOKE} --config.model.dtype=float16", "float32 or bfloat16"),
        (f"{SMOKE} --config.model.network=gpt", "model.network='gpt' is not supported: it is unet or mlp"),
        (f"{SMOKE} --config.data.name=gaussians", "examples of [2], but --config.model.network=unet is built"),
        (f"{POINTS} --config.data.flip=True", "data.flip=True mirrors images"),
        (f"{POINTS} --config.train.init_from=runs/nothing", "no checkpoint in runs/nothing"),
        (f"{SMOKE} --workdir=/proc/nothing", "cannot be used"),
        ("--config=digits:smoke --config.train.accumulate=3", "--config.train.accumulate=3 does not cut the"),
        ("--config=digits:smoke --config.data.path=x", "leave --config.data.path out"),
        ("--mode=sample --checkpoint=digits_conditional --label=77", "--label=77 must be a class of this model"),
        ("--mode=vary --checkpoint=digits --t=9", "--t=9 must be "),
        (f"{SMOKE} --mode=sample", "no checkpoint in"),
        (f"{SMOKE} --mode=evaluate", "no checkpoint in"),
        (f"{SMOKE} --mode=evaluate --num_samples=0", "--num_samples=0 must be at least 1"),
        (f"{SMOKE} --mode=evaluate --samples=nothing.npz", "nothing.npz cannot be read"),
    ],
)
def test_wrong_use_is_one_line(arguments, message, refused, tmp_path):
    assert message in refused(f"--workdir={tmp_path / 'run'}", *arguments.split())


def test_names_in_a_message_become_flags():
    text = "data.path=x: set data.dir, not config.data.dir; runs/data.path, data.paths and label=3; t=2"
    assert presets.as_flags(text) == (
        "--config.data.path=x: set --config.data.dir, not config.data.dir; runs/data.path, data.paths and --label=3; "
        "--t=2"
    )


def test_names_in_a_message_become_arguments():
    text = "--workdir=x: set --config.train.lr_g or data.path, not config.data.dir, --samples=a--b, or pass --restart"
    assert presets.as_arguments(text) == (
        "workdir=x: set train__lr_g or data__path, not config.data.dir, samples=a--b, or pass restart=True"
    )


@pytest.mark.parametrize(
    "program, installed, expected",
    [
        (f"{ROOT}/main.py", False, f"python {ROOT}/main.py"),
        (f"{ROOT}/ddgan_jax/__main__.py", True, "python -m ddgan_jax"),
        ("/x/main.py", True, "ddgan-jax"),
        ("/x/__main__.py", False, "python -m ddgan_jax"),
        ("/bin/ddgan-jax", True, "ddgan-jax"),
        ("mine.py", True, "ddgan-jax"),
        ("mine.py", False, "python -m ddgan_jax"),
    ],
)
def test_the_commands_to_try_next_begin_as_this_one(program, installed, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "orig_argv", ["python", program])
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if installed else None)
    config = read(presets.get("digits:smoke"))
    assert next_commands("runs/x", config, None)[0][0] == f"{expected} --mode=sample --workdir=runs/x"


@pytest.mark.slow
def test_the_commands_that_a_training_prints_run_as_printed(tmp_path):
    """Also from another directory; an evaluation that lacks weights or labels is not among them."""
    command = [sys.executable, str(ROOT / "main.py"), "--config=gaussians:smoke", "--config.train.num_steps=2"]
    done = subprocess.run([*command, "--workdir=a run"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    printed = [line.removeprefix("next:").strip() for line in done.stdout.splitlines() if "--mode=" in line]
    assert [shlex.split(line)[2] for line in printed] == ["--mode=sample", "--mode=evaluate", "--mode=demo"]
    for line in printed[:2]:
        done = subprocess.run(shlex.split(line), cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "features, evaluates, note",
    [
        ("inception", False, "evaluate cannot run yet: evaluation needs pt_inception-2015-12-05-6726825d.pth"),
        ("inception", True, ""),
        ("classifier", False, "evaluate cannot run yet: eval.features=classifier needs labels, and data.name=synth"),
        ("my_features:thumbnails", True, ""),
    ],
)
def test_an_evaluation_that_cannot_run_is_not_suggested(features, evaluates, note, tmp_path, capsys):
    config = presets.get("digits:smoke")
    config.eval.features, config.data.dir, config.eval.download = features, str(tmp_path), evaluates
    commands, found = next_commands("runs/x", read(config), Data(np.zeros((64, 8, 8, 1), np.uint8)))
    assert not capsys.readouterr().out
    named = [line for line in commands if line.endswith(f"--config.eval.features={features}")]
    assert named == (commands[1:2] if ":" in features else [])
    assert len(commands) == 2 + evaluates and (note in found if note else not found)


@pytest.mark.slow
def test_the_time_to_go_does_not_count_compilation(points_run, tmp_path):
    """Also after a resume, nor the grid of samples that the interrupted run did not write."""
    workdir = tmp_path / "run"
    shutil.copytree(points_run, workdir)
    flags = "--config.train.num_steps=10000", "--config.log.every=2", "--config.eval.every=0"
    with subprocess.Popen(
        [sys.executable, "main.py", POINTS, f"--workdir={workdir}", *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        line = next(line for line in process.stdout if line.startswith("step 6/10000"))
        process.kill()
    assert float(line.split(" images/s")[0].split()[-1]) > 20, line
