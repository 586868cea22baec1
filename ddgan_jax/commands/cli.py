"""Denoising Diffusion GANs. Without flags this trains on digits; docs/ explains the flags and all else.

--config.FIELD=VALUE sets a field of the configuration; docs/configuration.md lists them.
"""

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import flags

from ddgan_jax.config import presets
from ddgan_jax.config.types import SEEDS
from ddgan_jax.errors import NOTHING_LOST, Fault, Interrupted, UserError, is_out_of_memory

MODES = ("train", "sample", "vary", "edit", "inpaint", "interpolate", "export", "evaluate", "demo")

# The modes that read a flag; elsewhere it would change nothing, and is refused.
READ_BY = {
    "checkpoint": MODES[1:],
    "samples": ("evaluate",),
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

flags.DEFINE_string(
    "workdir", None, "Where a run keeps its checkpoints, metrics and pictures; runs/NAME of --config if not given."
)
flags.DEFINE_bool("restart", False, "train: move what an earlier run left in --workdir aside, and start from step 0.")
flags.DEFINE_string("mode", "train", f"What to do: {', '.join(MODES)}.")
flags.DEFINE_string(
    "checkpoint", None, "Use this model instead of --workdir: a workdir, checkpoint or file, or one that comes along."
)
flags.DEFINE_string(
    "samples", None, "Evaluate these images, an .npz with one array or a folder, instead of a checkpoint."
)
flags.DEFINE_string("out", None, "Where the result goes; docs/editing.md says what each mode writes.")
flags.DEFINE_integer("num_samples", None, "How many images to sample (64) or evaluate (config.eval.num_samples).")
flags.DEFINE_integer("sample_seed", 0, "Image i depends on this and on i alone.")
flags.DEFINE_integer("label", None, "Class of the images of a class-conditional model; all in turn if not given.")
flags.DEFINE_enum("posterior", "gaussian", ["gaussian", "deterministic"], "How x_t follows from x_{t+1} and x_0.")
flags.DEFINE_string("trajectory", None, "sample: also write here (.png, .gif) how the first samples came about.")
flags.DEFINE_integer("num_variants", 15, "vary, edit, inpaint: how many images; interpolate: how many from end to end.")
flags.DEFINE_string("image", None, "edit, inpaint, vary: a picture; it is cropped and resized to the model's size.")
flags.DEFINE_string("mask", None, "inpaint: a picture that is white where --image is to be filled in.")
flags.DEFINE_integer("start_step", None, "edit: diffuse to this step, 0 (nothing) to T (all); T / 2 if not given.")
flags.DEFINE_integer("t", None, "vary: the step x_{t+1} -> x_t to look at, 0 to T-1; T-1 if not given.")
flags.DEFINE_integer("rounds", 1, "inpaint: times that each step is taken; more let old and new agree better.")
flags.DEFINE_list("between", ["0", "1"], "interpolate: from this sample to that one.")
flags.DEFINE_string("host", "127.0.0.1", "demo: the address that the page answers on; 0.0.0.0 for other machines.")
flags.DEFINE_integer("port", 7860, "demo: of the page.")
flags.DEFINE_integer("interrupted_exit_code", 75, "Of a training that a signal ended early: ask to be started again.")
flags.DEFINE_string("compilation_cache", None, "Keep compiled programs in this directory for the next start.")


def run(argv: list[str]) -> None:
    """Read the flags and do the job. Raises UserError for wrong use."""
    FLAGS = flags.FLAGS
    if {"--help", "-help", "-h"} & set(argv):
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` has enough of it before its end
        print(f"{__doc__}\n{FLAGS.module_help(__name__)}\n  --config: A preset or a file, with :VARIANT.")
        print(f"    <{'|'.join(presets.names())}|FILE.py>\n    (default: 'digits')")
        return
    rest, config = presets.read_flags(argv, "digits"), FLAGS.config
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: every option is a flag, --name=value")
    workdir = FLAGS.workdir or f"runs/{presets.name_of_flag()}"
    if FLAGS.mode not in MODES:
        raise UserError(f"unknown --mode={FLAGS.mode}: it is one of {', '.join(MODES)}")
    if FLAGS.num_samples is not None and FLAGS.num_samples < 1:
        raise UserError(f"--num_samples={FLAGS.num_samples} must be at least 1")
    if not SEEDS.holds(FLAGS.sample_seed):
        raise UserError(f"--sample_seed={FLAGS.sample_seed} must be {SEEDS.text}")
    for flag, least, most in (("port", 1, 65_535), ("interrupted_exit_code", 0, 255)):
        if not least <= getattr(FLAGS, flag) <= most:
            raise UserError(f"--{flag}={getattr(FLAGS, flag)} must be an integer from {least} to {most}")
    for flag, modes in READ_BY.items():
        if FLAGS[flag].present and FLAGS.mode not in modes:
            raise UserError(f"--{flag} does nothing in --mode={FLAGS.mode}: it is for {', '.join(modes)}; leave it out")
    from ddgan_jax.devices import processes  # with jax, whose second neither --help nor a mistake waits for

    if FLAGS.compilation_cache:
        from ddgan_jax.devices import compiler
        from ddgan_jax.storage import paths

        compiler.cache_programs(paths.path(FLAGS.compilation_cache))
    processes.initialize()
    if FLAGS.mode == "train":
        from ddgan_jax.commands.train import train

        train(config, workdir, restart=FLAGS.restart)
        return
    path = FLAGS.checkpoint or workdir
    if FLAGS.mode == "evaluate":
        from ddgan_jax.commands.evaluate import evaluate

        told = FLAGS.samples or path.endswith(".pth") or any(flag.startswith(("--config", "-config")) for flag in argv)
        job: Callable[[], Any] = functools.partial(
            evaluate,
            config if told else None,
            path,
            FLAGS.samples or "",
            FLAGS.out or "",
            FLAGS.num_samples or 0,
            FLAGS.sample_seed,
        )
        by_all = not FLAGS.samples
    elif FLAGS.mode == "demo":
        job, by_all = functools.partial(demo, path), False
    else:
        job, by_all = functools.partial(generate, config, path), FLAGS.mode == "sample"
    job() if by_all else processes.by_primary(job)


def demo(path: str) -> None:
    """Serve the page of the model in `path`."""
    from ddgan_jax.commands.demo import demo
    from ddgan_jax.model import loading

    demo(loading.load(path), os.path.basename(path.rstrip("/")), flags.FLAGS.host, flags.FLAGS.port)


def generate(config: Any, path: str) -> None:
    """Do what --mode says, with the model in `path`."""
    from ddgan_jax.commands import generate
    from ddgan_jax.model import loading

    FLAGS = flags.FLAGS
    num, image = FLAGS.num_variants, FLAGS.image or ""
    name = "model.safetensors" if FLAGS.mode == "export" else f"{FLAGS.mode}.png"
    one = dict(seed=FLAGS.sample_seed, label=FLAGS.label)
    how = dict(posterior=FLAGS.posterior) | one
    options = {
        "sample": dict(num=FLAGS.num_samples or 64, trajectory=FLAGS.trajectory or "", **how),
        "vary": dict(num=num, t=FLAGS.t, image=image, **one),
        "edit": dict(num=num, image=image, start_step=FLAGS.start_step, **how),
        "inpaint": dict(num=num, image=image, mask=FLAGS.mask or "", rounds=FLAGS.rounds, **how),
        "interpolate": dict(num=num, samples=FLAGS.between, **how),
        "export": dict(posterior=FLAGS.posterior),
    }
    told = config if FLAGS["config"].present else None  # of a .pth, which does not tell everything
    generate.generate(
        FLAGS.mode, loading.load(path, told), FLAGS.out or loading.default_output(path, name), **options[FLAGS.mode]
    )


def shortened(sentence: str, most: int = 800) -> str:
    """A sentence on one line; its middle is left out where a value in it is very long."""
    line = " ".join(sentence.split())
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def interrupted(number: int, frame: Any) -> None:
    """End the process after Ctrl-C, unless a training handles it (`signals.py`).

    At once: an exception could be swallowed by a module that is being imported.
    """
    training = flags.FLAGS["mode"].value == "train"
    os.write(2, f"SIGINT: {NOTHING_LOST if training else 'interrupted'}\n".encode())
    os._exit(flags.FLAGS["interrupted_exit_code"].value if training else 130)  # type: ignore[arg-type]


def main() -> int:
    """Run, and tell mistakes (exit code 2), faults (1), signals to a training (75) and Ctrl-C (130) in one sentence."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")  # a name of a file or class need not be UTF-8
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupted)
    try:
        run(sys.argv)
    except UserError as error:
        print(f"error: {shortened(str(error))}", file=sys.stderr)
        code = 2
    except (Fault, OSError) as error:  # the latter of a disk or a bucket
        print(f"stopped: {shortened(str(error))}", file=sys.stderr)
        code = 1
    except Interrupted as error:
        from ddgan_jax.devices import processes

        print(error)
        processes.leave(flags.FLAGS.interrupted_exit_code, at_once=True)
    except Exception as error:  # of a bug, or of any library: the other processes must learn that this one ends
        from ddgan_jax.devices import processes

        if is_out_of_memory(error):
            print(f"stopped: there is not enough memory: {shortened(str(error))}", file=sys.stderr)
        elif processes.lost_others(error):
            print("stopped: another process of this job is gone; the checkpoints are intact", file=sys.stderr)
        else:
            traceback.print_exc()
        code = 1
    if code and "ddgan_jax.devices.processes" in sys.modules:  # it may have joined others
        from ddgan_jax.devices import processes

        # after a fault at once: the threads that still try to write would hold the process for minutes
        processes.leave(code, at_once=code == 1)
    return code
