"""Denoising Diffusion GANs. Without flags, trains on handwritten digits. docs/ documents all flags and settings.

--config.FIELD=VALUE sets a field of the configuration; docs/configuration.md lists the fields.
"""

import contextlib
import os
import pathlib
import signal
import sys
import traceback
from typing import Any

from absl import flags

from ddgan_jax.commands.streams import PatientStream
from ddgan_jax.config import presets
from ddgan_jax.config.types import SEEDS
from ddgan_jax.errors import NOTHING_LOST, Fault, Interrupted, UserError, is_out_of_memory, of_flags

MODES = ("train", "prepare", "sample", "vary", "edit", "inpaint", "interpolate", "export", "evaluate", "demo")

OF_A_MODEL = MODES[2:]  # the modes that use a trained model

# The modes that use a flag. In other modes it would have no effect, and is refused.
MODES_OF_FLAG = {
    "checkpoint": OF_A_MODEL,
    "samples": ("evaluate",),
    "out": tuple(mode for mode in OF_A_MODEL if mode != "demo"),
    "sample_seed": ("sample", "vary", "edit", "inpaint", "interpolate", "evaluate"),
    "host": ("demo",),
    "port": ("demo",),
    "num_samples": ("sample", "evaluate"),
    "label": ("sample", "vary", "edit", "inpaint", "interpolate"),
    "posterior": ("sample", "edit", "inpaint", "interpolate", "export"),
    "trajectory": ("sample",),
    "num_variants": ("vary", "edit", "inpaint", "interpolate"),
    "image": ("vary", "edit", "inpaint"),
    "mask": ("inpaint",),
    "start_step": ("edit",),
    "t": ("vary",),
    "rounds": ("inpaint",),
    "between": ("interpolate",),
    "restart": ("train",),
}

flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics and images; default: runs/NAME of --config.")
flags.DEFINE_bool("restart", False, "train: move an earlier run in --workdir aside, and start from step 0.")
flags.DEFINE_string("mode", "train", f"What to do: {', '.join(MODES)}.")
flags.DEFINE_string(
    "checkpoint",
    None,
    "Use this model: a workdir, checkpoint, file, bundled model or hf://OWNER/NAME; best: the best one of --workdir.",
)
flags.DEFINE_string("samples", None, "evaluate: measure these images, an .npz with one array or a folder.")
flags.DEFINE_string("out", None, "Where to write the result; docs/editing.md lists what each mode writes.")
flags.DEFINE_integer("num_samples", None, "Number of images to sample (64) or to evaluate (config.eval.num_samples).")
flags.DEFINE_integer("sample_seed", 0, "Seed of all samples; image i depends on the seed and on i alone.")
flags.DEFINE_string("label", None, "Class of the images of a class-conditional model, by name or index; default: all.")
flags.DEFINE_enum("posterior", "gaussian", ["gaussian", "deterministic"], "How x_t follows from x_{t+1} and x_0.")
flags.DEFINE_string("trajectory", None, "sample: also draw the denoising of the first samples into this .png or .gif.")
flags.DEFINE_integer("num_variants", 15, "vary, edit, inpaint, interpolate: number of images.")
flags.DEFINE_string("image", None, "edit, inpaint, vary: an image file; it is cropped and resized to the model's size.")
flags.DEFINE_string("mask", None, "inpaint: an image that is white where --image is to be filled in.")
flags.DEFINE_integer("start_step", None, "edit: diffuse to this step, 0 (no noise) to T (all noise); default: T / 2.")
flags.DEFINE_integer("t", None, "vary: the step x_{t+1} -> x_t, 0 to T-1; default: T-1.")
flags.DEFINE_integer("rounds", 1, "inpaint: repetitions of each step; more match the old and new parts better.")
flags.DEFINE_list("between", ["0", "1"], "interpolate: the indices of the first and the last sample.")
flags.DEFINE_string("host", "127.0.0.1", "demo: address of the page; 0.0.0.0 makes it reachable from other computers.")
flags.DEFINE_integer("port", 7860, "demo: port of the page.")
flags.DEFINE_integer("interrupted_exit_code", 75, "train: exit code after a signal ended the training early.")
flags.DEFINE_string(
    "compilation_cache", None, "Folder that keeps compiled programs; default: in ~/.cache/ddgan_jax; empty: none."
)


def run(argv: list[str]) -> None:
    """Read the flags and run the mode. Raises UserError for invalid flags."""
    FLAGS = flags.FLAGS
    with of_flags():
        argv = FLAGS.read_flags_from_files(argv, force_gnu=False)  # of --flagfile, for the lines below that read argv
    FLAGS["mode"].value = presets.value_of("mode", argv) or "train"  # for a signal before the flags are parsed
    if {"--help", "-help", "-h"} & set(argv):
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as for `--help | head`
        print(f"{__doc__}\n{FLAGS.module_help(__name__)}\n  --config: A preset or a file, with :VARIANT.")
        print(f"    <{'|'.join(presets.names())}|FILE.py|RUN/config.json>\n    (default: {presets.DEFAULT!r})")
        return
    named = presets.value_of("config", argv)
    of_run = None if named else config_of_run(argv)
    rest, config = presets.read_flags(argv, of_run or presets.DEFAULT), FLAGS.config
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: every option is a flag, --name=value")
    workdir = FLAGS.workdir or default_workdir(named)
    check_flags()
    check_features(named or of_run or "", config, argv)
    if FLAGS.mode == "train":
        for number in (signal.SIGTERM, signal.SIGUSR1):  # of a scheduler, during the imports
            signal.signal(number, exit_on_signal)
    from ddgan_jax.devices import compiler, processes  # imports jax, which takes a second: after --help and the checks
    from ddgan_jax.storage import paths

    compiler.keep_freed_memory()
    given = FLAGS.compilation_cache
    if given is None and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        given = ""  # JAX's own choice stays
    if cache := compiler.default_cache() if given is None else given and paths.path(given):
        compiler.cache_programs(cache)
    processes.initialize()
    if FLAGS.mode == "train":
        from ddgan_jax.commands.train import train

        train(config, workdir, restart=FLAGS.restart)
        return
    if FLAGS.mode == "prepare":
        from ddgan_jax.commands.prepare import prepare

        processes.run_on_primary(lambda: prepare(config))
        return
    path = FLAGS.checkpoint or workdir
    if path == "best" and (FLAGS.workdir or not os.path.exists(path)):
        path = str(paths.path(workdir) / "best")
    if FLAGS.mode == "evaluate":
        from ddgan_jax.commands.evaluate import evaluate

        # A checkpoint contains its configuration, unless the user explicitly passes another one.
        explicit = any(flag.startswith(("--config", "-config", "--noconfig")) for flag in argv)
        has_model = FLAGS.workdir or FLAGS.checkpoint
        if FLAGS.samples and has_model and explicit and not (named or of_run):
            raise UserError(f"there is no config.json in {path}: name the configuration of the samples, --config=NAME")
        given = config if explicit or path.endswith(".pth") or (FLAGS.samples and not has_model) else None
        evaluate(given, path, FLAGS.samples or "", FLAGS.out or "", FLAGS.num_samples or 0, FLAGS.sample_seed)
    elif FLAGS.mode == "demo":
        processes.run_on_primary(lambda: demo(path))
    elif FLAGS.mode == "sample":
        generate(config if named else None, path, argv)
    else:
        processes.run_on_primary(lambda: generate(config if named else None, path, argv))


def default_workdir(config: str | None) -> str:
    """The workdir of a run of the preset or file `config`, by default of the default preset."""
    return f"runs/{presets.name_of(config or presets.DEFAULT)}"


def config_of_run(argv: list[str]) -> str | None:
    """The config.json of the run that --mode=evaluate evaluates, if --config is not given; None without one.

    Flags such as --config.eval.num_samples=100 then change the configuration of that run.
    """
    given = presets.value_of("checkpoint", argv)
    given = presets.value_of("workdir", argv) if given in (None, "best") else given
    if given is None and presets.value_of("samples", argv) is None:
        given = default_workdir(None)
    if presets.value_of("mode", argv) != "evaluate" or not given:
        return None
    path = pathlib.Path(given).expanduser()
    folder = path.parent if path.name == "best" else path.parent.parent if path.parent.name == "checkpoints" else path
    file = folder / "config.json"
    return str(file) if file.is_file() else None


def check_features(file: str, config: Any, argv: list[str]) -> None:
    """Raises UserError if the settings in a .json file would run a Python function that no flag names."""
    code = str(config.get("eval", {}).get("features"))
    named = any(flag.startswith("--config.eval.features") for flag in argv)
    if file.endswith(".json") and ":" in code and not named and flags.FLAGS.mode in ("train", "evaluate"):
        raise UserError(
            f"{file} names the Python function {code}, and a .json file cannot run code: "
            f"add --config.eval.features={code}"
        )


def check_flags() -> None:
    """Raises UserError for a flag that is invalid, or has no effect in this mode."""
    FLAGS = flags.FLAGS
    if FLAGS.mode not in MODES:
        raise UserError(f"unknown --mode={FLAGS.mode}: it is one of {', '.join(MODES)}")
    if FLAGS.num_samples is not None and FLAGS.num_samples < 1:
        raise UserError(f"--num_samples={FLAGS.num_samples} must be at least 1")
    if not SEEDS.holds(FLAGS.sample_seed):
        raise UserError(f"--sample_seed={FLAGS.sample_seed} must be {SEEDS.text}")
    for flag, low, high in (("port", 1, 65_535), ("interrupted_exit_code", 0, 255)):
        if not low <= getattr(FLAGS, flag) <= high:
            raise UserError(f"--{flag}={getattr(FLAGS, flag)} must be an integer from {low} to {high}")
    for flag in ("workdir", "checkpoint", "samples", "out"):
        if FLAGS[flag].present and not getattr(FLAGS, flag):
            raise UserError(f"--{flag}= is empty: name a path, or leave it out")
    for flag, modes in MODES_OF_FLAG.items():
        if FLAGS[flag].present and FLAGS.mode not in modes:
            raise UserError(f"--{flag} does nothing in --mode={FLAGS.mode}: it is for {', '.join(modes)}; leave it out")


def demo(path: str) -> None:
    """Serve the page of the model in `path`."""
    from ddgan_jax.commands.demo import demo
    from ddgan_jax.model import loading

    demo(loading.load(path), os.path.basename(path.rstrip("/")), flags.FLAGS.host, flags.FLAGS.port)


def generate(config: Any, path: str, argv: list[str]) -> None:
    """Run --mode with the model in `path`."""
    from ddgan_jax.commands import generate
    from ddgan_jax.model import loading
    from ddgan_jax.model.classes import parse_label

    FLAGS = flags.FLAGS
    num, image = FLAGS.num_variants, FLAGS.image or ""
    name = "model.safetensors" if FLAGS.mode == "export" else f"{FLAGS.mode}.png"
    found = loading.load(path, config)
    if not path.endswith(".pth"):
        fields = [flag.partition("=")[0].partition(".")[2] for flag in argv if flag.startswith("--config.")]
        found = generate.with_flags(found, FLAGS.config, fields)
    label = None if FLAGS.label is None else parse_label(FLAGS.label, found.classes)
    seed_label = dict(seed=FLAGS.sample_seed, label=label)
    common = dict(posterior=FLAGS.posterior) | seed_label
    options = {
        "sample": dict(num=FLAGS.num_samples or 64, trajectory=FLAGS.trajectory or "", **common),
        "vary": dict(num=num, t=FLAGS.t, image=image, **seed_label),
        "edit": dict(num=num, image=image, start_step=FLAGS.start_step, **common),
        "inpaint": dict(num=num, image=image, mask=FLAGS.mask or "", rounds=FLAGS.rounds, **common),
        "interpolate": dict(num=num, samples=FLAGS.between, **common),
        "export": dict(posterior=FLAGS.posterior),
    }
    generate.generate(FLAGS.mode, found, FLAGS.out or loading.default_output(path, name), **options[FLAGS.mode])


def one_line(message: str, max_length: int = 800) -> str:
    """A message on one line, without its middle if it is very long."""
    line = " ".join(message.split())
    return line if len(line) <= max_length else f"{line[: max_length // 2]} ... {line[-max_length // 2 :]}"


def exit_on_signal(number: int, frame: Any) -> None:
    """End the process immediately; a running training installs its own handler (`signals.py`).

    A module that is being imported could swallow an exception.
    """
    training = flags.FLAGS["mode"].value == "train"
    paths: Any = sys.modules.get("ddgan_jax.storage.paths")
    if hasattr(paths, "BEGINNING"):  # a module that is being imported lacks it
        paths.BEGINNING.acquire(timeout=5)  # longer only if a disk hangs
        for file in list(paths.UNFINISHED):
            with contextlib.suppress(OSError):
                os.unlink(file)
    os.write(2, f"{signal.Signals(number).name}: {NOTHING_LOST if training else 'interrupted'}\n".encode())
    os._exit(flags.FLAGS["interrupted_exit_code"].value if training else 130)  # type: ignore[arg-type]


def main() -> int:
    """Run the command and return its exit code, with a one-line message if it fails.

    User errors end with 2, faults with 1, Ctrl-C with 130, and a training that a signal ends with 75.
    """
    code = 0
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            stream = open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):  # a notebook's lacks it
            stream.reconfigure(errors="backslashreplace")  # a name of a file or class need not be UTF-8
        if not isinstance(stream, PatientStream):
            setattr(sys, name, PatientStream(stream))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, exit_on_signal)
    try:
        run(sys.argv)
    except UserError as error:
        print(f"error: {one_line(presets.as_flags(str(error)))}", file=sys.stderr)
        code = 2
    except (Fault, OSError) as error:
        print(f"stopped: {one_line(str(error))}", file=sys.stderr)
        code = 1
    except Interrupted as error:
        from ddgan_jax.devices import processes

        print(error)
        processes.exit_process(flags.FLAGS.interrupted_exit_code, at_once=True)
    except Exception as error:  # a bug, in any library: the other processes must still learn that this one ends
        from ddgan_jax.devices import processes

        if is_out_of_memory(error):
            print(
                f"stopped: there is not enough memory: {one_line(str(error))} (docs/recipes.md#out-of-memory)",
                file=sys.stderr,
            )
        elif processes.is_lost_process(error):
            print("stopped: another process of this job is gone; the checkpoints are intact", file=sys.stderr)
        else:
            traceback.print_exc()
        code = 1
    if code and "ddgan_jax.devices.processes" in sys.modules:  # this process may have joined others
        from ddgan_jax.devices import processes

        # After a fault, threads that still try to write would delay the end for minutes.
        processes.exit_process(code, at_once=code == 1)
    return code
