"""The training command: set up, loop, finish.

Everything periodic depends on the number of the training step alone: learning rates, data, records, checkpoints. The
same command, run again, therefore resumes from the newest valid checkpoint and ends with the numbers of a run that was
never interrupted.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
from tqdm import tqdm

from ddgan_jax.commands.compiled import CompiledSteps
from ddgan_jax.commands.health import sample_variety
from ddgan_jax.commands.progress import Meter, clock, losses_line, next_commands, report_first_steps, rounded
from ddgan_jax.commands.results import evaluate_last, finish, save_samples
from ddgan_jax.commands.run import DONE, STOPPED, Outcome, Run, ranked_by
from ddgan_jax.commands.setup import set_up
from ddgan_jax.commands.signals import Interrupt, raise_on_signal
from ddgan_jax.config.settings import as_dict
from ddgan_jax.data.batches import batches, match_label_frequencies
from ddgan_jax.data.folder import listed_once
from ddgan_jax.data.sources import Data
from ddgan_jax.devices import parallel, processes
from ddgan_jax.devices.processes import say
from ddgan_jax.errors import Interrupted, UserError
from ddgan_jax.method.build import noise_seed
from ddgan_jax.method.state import norms
from ddgan_jax.metrics.evaluator import measure
from ddgan_jax.storage import paths


def train(
    config: Any, workdir: str, data: Data | None = None, restart: bool = False, refuse_other_data: bool = False
) -> Any:
    """Trains by `config` in `workdir`, from its newest checkpoint if there is one, and returns the last state.

    `data` replaces what `config.data` names, for instance `Data(images)` of an array in memory. `restart` moves the
    files of an earlier run in `workdir` to `workdir`/before-1, or -2, and so on, and starts from step 0.
    If `data` is not that of the run, there is a note, or a UserError if `refuse_other_data`.

    Writes checkpoints/, config.json, metrics.jsonl, results.json, curves.png, samples/ and tensorboard/.

    Raises UserError for settings that do not fit together or do not fit the data, Fault or OSError for a fault of a
    disk, a bucket or a device, and Interrupted after SIGTERM, SIGINT or SIGUSR1 to any process, with the step at which
    the signal came saved.
    """
    workdir = os.fspath(workdir)
    if data is not None and not isinstance(data, Data):
        raise UserError(f"data is a {type(data).__name__}: wrap the array, Data(images) or Data(images, labels)")
    with Interrupt() as interrupt, contextlib.ExitStack() as lock:
        with listed_once():
            run = set_up(config, paths.path(workdir), interrupt, lock, data, restart, refuse_other_data)
        with closed_after_a_fault(run):
            with interrupt.held():
                outcome = loop(run, interrupt)
                if run.files:
                    run.files.checkpoints.close()
                # No process leaves this exchange before the checkpoint is complete.
                signals = [name for name in processes.exchange(interrupt.signal) if name]
            if outcome is DONE:
                then, note = next_commands(workdir, run.config, run.data if data is None else None)
                finish(run, then)
            elif run.files:
                run.files.log.close()
        evaluates = run.config.eval.at_end and data is None
        if outcome is STOPPED or (signals and evaluates):
            same = "the same command without --restart" if restart else "the same command"
            aim = "continue" if outcome is STOPPED else "evaluate it"
            raise Interrupted(f"{signals[0]}: saved step {run.step} in {workdir}; run {same} to {aim}")
    if evaluates:  # after the signals' handlers, since everything is saved
        evaluate_last(run.config, workdir, run.step)
    say("next: " + "\n      ".join(then) + note)
    return run.state


@contextlib.contextmanager
def closed_after_a_fault(run: Run) -> Iterator[None]:
    """Completes the writes that have begun before an exception may end the process."""
    try:
        yield
    except BaseException:  # whatever it is, it is raised again
        for part in (run.files.checkpoints, run.files.log) if run.files else ():
            with contextlib.suppress(Exception):  # the first error is the one to report
                part.close()
        raise


# --- The loop -----------------------------------------------------------------------------------------------------


def loop(run: Run, interrupt: Interrupt) -> Outcome:
    """Trains to the last step, or until a signal comes to any process. The last step taken is saved in both cases."""
    meter = Meter(run.method.batch_size, run.step, run.files.unlogged if run.files else None)
    if finish_interrupted_step(run, meter, interrupt) is STOPPED:
        return STOPPED
    if run.step >= run.num_steps:
        return DONE
    stream, stop, r1_every = parallel.prefetch(batches_of(run)), parallel.Stop(), run.config.train.r1_every
    with meter.paused():  # compilation begins here
        first = next(stream)
        steps = CompiledSteps(run.method, noise_seed(run.config), r1_every, stop, run.state, first)
    hidden = None if processes.is_primary() else True
    with tqdm(
        total=run.num_steps, initial=run.step, desc="compiling", unit="step", disable=hidden, file=sys.stdout
    ) as bar:
        for batch in itertools.chain([first], stream):
            with_r1 = run.step % r1_every == 0
            with meter.paused():  # the meter and the time to go count steps, not compilation
                if run.step == run.first_step and jax.process_count() == 1:
                    steps.wait(with_r1, interrupt.check, run.open_dashboards)
                    run.place_initial_state()
                step = steps.get(with_r1)
            run.state, metrics = stop.step(step, run.state, batch, lambda: bool(interrupt.signal))
            meter.add(metrics)
            run.step += 1
            bar.update()
            report_first_steps(run, metrics, bar)

            if run.is_checkpoint_step() or stop.now:  # before the evaluation, which may fail
                save(run, meter)
            if run.is_log_step() and record(run, meter, interrupt, stop.now, bar) is STOPPED:
                return STOPPED
            if run.step == run.num_steps:
                return DONE
            if stop.now:
                return STOPPED
            if run.is_sample_step():
                with meter.paused():
                    save_samples(run, run.samples_file)
            if run.is_log_step() or run.is_sample_step():
                processes.barrier()  # a collective of the next step may time out while process 0 still writes
    raise AssertionError("batches are endless")


def finish_interrupted_step(run: Run, meter: Meter, interrupt: Interrupt) -> Outcome:
    """Does what an interrupted run did not do at its last step: the record, the mark of the best, the samples."""

    def lacks() -> tuple[bool, bool]:
        assert run.files
        recorded = run.files.log.last.get("step") == run.step
        return run.is_log_step() and not recorded, run.is_sample_step() and not run.has_samples()

    if not run.step:
        return DONE
    lacks_record, lacks_samples = processes.broadcast_from_primary(lacks)
    if lacks_record and record(run, meter, interrupt) is STOPPED:
        return STOPPED
    if run.files and run.files.log.last.get("step") == run.step:
        update_best(run, run.files.log.last)
    if lacks_samples:
        with meter.paused():
            save_samples(run, run.samples_file)
    return DONE


def batches_of(run: Run) -> Any:
    """This process's part of every batch from the next step on."""
    return batches(
        run.data.images,
        global_batch=run.method.batch_size,
        seed=run.config.seed,
        start_step=run.step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        labels=run.labels,
    )


# --- What the loop does at some steps -------------------------------------------------------------------------------


def save(run: Run, meter: Meter) -> None:
    """Starts to save the state, with the metrics that are in no record yet.

    Raises Fault, and saves nothing, if the state is not finite.
    """
    meter.check(run.last_complete_step, lambda: norms_of(run))
    if run.files:
        run.files.log.flush()
        of_job = {"unlogged": meter.unlogged(), "log": run.files.log.checksum, "data": run.files.sketch}
        run.files.checkpoints.save(run.step, run.state, as_dict(run.config), of_job)


def record(run: Run, meter: Meter, interrupt: Interrupt, stopping: bool = False, bar: tqdm | None = None) -> Outcome:
    """Evaluates if it is time, logs a record, prints it, and marks the checkpoint if it is the best.

    Returns STOPPED and logs nothing if a signal interrupts the evaluation, or came before samples are due (`stopping`).
    """
    meter.check(run.last_complete_step)
    measured: dict[str, float] = {}
    if stopping and (run.is_evaluation_step() or run.is_sample_step()):
        return STOPPED
    if run.is_evaluation_step():
        try:
            with meter.paused():
                measured = evaluate_samples(run, interrupt)
        except Interrupted:
            return STOPPED
    about: dict[str, Any] = {"yardstick": run.evaluator.yardstick} if measured and run.evaluator else {}
    if run.is_sample_step():
        with meter.paused():
            measured |= measure_variety(run)
    values, seconds_per_step = meter.values(lambda: norms_of(run), run.last_complete_step)
    values |= measured
    if run.files:
        about |= run.files.monitor.add(run.step, values, about)
        run.files.log.scalars(run.step, values | {"seconds": run.seconds()}, about)
        line = losses_line(values)
        if bar is not None:
            bar.set_postfix_str(line)
        if bar is None or bar.disable:
            left = clock((run.num_steps - run.step) * seconds_per_step)
            say(f"step {run.step}/{run.num_steps}: {line}, {left} to go")
        update_best(run, values | about)
    return DONE


def update_best(run: Run, values: dict[str, Any]) -> None:
    """Marks the checkpoint of this step as the best, in process 0, if an evaluation among `values` ranks it first."""
    name, yardstick = ranked_by(run.config), values.get("yardstick", "")
    if not run.files or name not in values:
        return
    if run.files.checkpoints.update_best(run.step, name, values[name], yardstick):
        say(f"step {run.step} is the best so far: {name} {values[name]:.4g}")
    elif (best := run.files.checkpoints.best) and best["step"] != run.step:
        say(f"step {run.step}: {name} {values[name]:.4g}; the best is {best['value']:.4g}, of step {best['step']}")


def norms_of(run: Run) -> dict[str, jax.Array]:
    """The norms of the parameters and gradients of the networks that are trained."""
    trained = "dg" if run.method.losses.has_discriminator else "g"
    return {name: value for name, value in norms(run.state).items() if name[0] in trained}


def evaluate_samples(run: Run, interrupt: Interrupt) -> dict[str, float]:
    """Measures new samples; {} in all processes except the first. Raises Interrupted within a chunk of a signal."""
    assert run.evaluator
    count = run.config.eval.online_samples
    say(f"evaluating step {run.step} with {count:,} samples")
    labels = match_label_frequencies(run.labels, count)
    chunks = raise_on_signal(interrupt, run.sampler.chunks(jax.device_get(run.state.ema_params), 0, count, labels))
    try:
        measured = measure(run.evaluator, chunks, count, "evaluating", labels)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:  # of settings, a device, a disk
        if jax.process_count() > 1:  # the other processes may wait for this one in the middle of it
            raise
        say(f"note: the evaluation at step {run.step} failed, and training continues: {error}")
        return {}
    results = measured.results if measured else {}
    if "fid" in results:  # which is larger for fewer samples
        results = results | {f"fid_{rounded(count)}": results["fid"]}
    return {f"eval/{name}": float(value) for name, value in results.items()}


def measure_variety(run: Run) -> dict[str, float]:
    """The `sample_variety` of the grid of this step; {} in all processes except the first."""
    samples = run.sample_grid()
    variety = sample_variety(samples, run.data.images) if run.files else None
    return {} if variety is None else {"sample_variety": variety}
