"""Signs in the records of a run that its training goes wrong, which are reported while it trains.

A finding is the name of a rule that holds. It is reported when it begins, and listed as `findings` in every record as
long as it lasts. Findings change nothing in the training.
"""

import math
import numbers
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ddgan_jax.config.settings import Config
from ddgan_jax.data.batches import epoch_permutation
from ddgan_jax.devices.processes import say
from ddgan_jax.storage.log import as_recorded

Record = dict[str, Any]  # a line of metrics.jsonl

CHANCE = 2 * math.log(2)  # D's loss if its logits are 0
NEAR_CHANCE = 0.02  # by which D's loss may be below CHANCE, and the mean logits of real above those of fake
UNSTABLE = CHANCE + 0.5  # D's loss
WON = 5.0  # by which the mean logits of real are above those of fake
APART = 4.0  # ratio between D's loss at one t and the median of those at the other t
FEW_STEPS, MANY_STEPS = 300, 5_000  # limits of the steps in a row that a rule needs
LITTLE_VARIETY, GRIDS = 0.5, 2  # of `sample_variety`, in so many grids in a row
RISES, RISE = 3, 1.2  # rises in a row of the measure that ranks checkpoints, and its ratio to the best one
COMPARED = 64  # samples of a grid, and real images: 2,016 pairs

SENTENCES = {
    "d_at_chance": "D has been at chance for {steps:,} steps, so G gets no useful gradient: raise "
    "--config.train.lr_d, or lower --config.train.r1_gamma, and look at the data and at samples/",
    "d_unstable": "D's loss has been far above that of a guess, 1.39, for {steps:,} steps: lower --config.train.lr_d "
    "and --config.train.lr_g",
    "d_wins": "D has separated real from fake widely for {steps:,} steps, and G cannot follow: lower "
    "--config.train.lr_d, raise --config.train.r1_gamma, or make D smaller",
    "t_apart": "D's loss at one t has been far from that at the others for {steps:,} steps: raise "
    "--config.train.r1_gamma, or try a larger G or another --config.diffusion.beta_max in a new workdir",
    "little_variety": "samples differ less than half as much as real images: lower --config.train.lr_g, or raise "
    "--config.train.r1_gamma, and look at samples/",
    "evaluations_worsen": "{measure} has risen three times in a row: the checkpoint in best.json is better than the "
    "last one; lower --config.train.lr_g and lr_d, or end the run",
}


def patience(c: Config) -> int:
    """Steps for which a rule of the losses must hold: a tenth of the run, but 300 to 5,000.

    The first such number of steps of a run does not count, since D is often at chance there.
    """
    return min(max((c.train.num_steps or 0) // 10, FEW_STEPS), MANY_STEPS)


def findings(records: Sequence[Record], c: Config, measure: str) -> list[str]:
    """Names of the rules that hold at the last of the records, which are in the order of their steps.

    `measure` is the metric that ranks checkpoints, such as 'eval/fid'; smaller is better.
    """
    step, steps = records[-1]["step"], patience(c)
    recent = [record for record in records if record["step"] > step - steps] if step >= 2 * steps else []
    # Grids and evaluations are of G's moving average, which holds its initial weights for some time.
    forgotten = max(steps, 2 / max(1 - c.train.ema_decay, 1e-9))
    later = [record for record in records if record["step"] > forgotten]
    evaluated = [record for record in later if measure in record]
    comparable = [r for r in evaluated if r.get("yardstick") == evaluated[-1].get("yardstick")]
    holds = {
        "d_at_chance": _throughout(recent, _is_at_chance),
        "d_unstable": _throughout(recent, lambda r: r["d_loss"] > UNSTABLE),
        "d_wins": _throughout(recent, lambda r: r["d_real"] - r["d_fake"] > WON),
        "t_apart": bool(recent) and bool(set.intersection(*map(_apart, recent))),
        "little_variety": has_little_variety(_values(later, "sample_variety")),
        "evaluations_worsen": has_risen(_values(comparable, measure)),
    }
    return [rule for rule, held in holds.items() if held]


def _throughout(records: Sequence[Record], condition: Callable[[Record], bool]) -> bool:
    """Whether a condition holds in every one of the records; False if one lacks D's loss or logits."""
    complete = all(record.get(name) is not None for record in records for name in ("d_loss", "d_real", "d_fake"))
    return bool(records) and complete and all(map(condition, records))


def _is_at_chance(record: Record) -> bool:
    return record["d_loss"] > CHANCE - NEAR_CHANCE and record["d_real"] - record["d_fake"] < NEAR_CHANCE


def _apart(record: Record) -> set[str]:
    """Names of D's losses of one t that are far from the median of those of the other t, such as 'd_loss_t0'.

    A loss closer to CHANCE than that median does not count: it is normal at large t, where x_t is mostly noise.
    """
    losses = {name: loss for name, loss in record.items() if name.startswith("d_loss_t") and loss is not None}
    found = set()
    for name, loss in losses.items():
        median = statistics.median([other for t, other in losses.items() if t != name] or [loss])
        if not 1 / APART < loss / max(median, 1e-9) < APART and abs(loss - CHANCE) > abs(median - CHANCE):
            found.add(name)
    return found


def _values(records: Iterable[Record], name: str) -> list[float]:
    return [record[name] for record in records if record.get(name) is not None]


def has_little_variety(varieties: Sequence[float]) -> bool:
    """Whether the last grids of samples had little variety (`sample_variety`)."""
    return len(varieties) >= GRIDS and max(varieties[-GRIDS:]) < LITTLE_VARIETY


def has_risen(values: Sequence[float]) -> bool:
    """Whether a measure has risen in each of the last evaluations, to clearly above the smallest of all."""
    last = values[-RISES - 1 :]
    return len(last) > RISES and list(last) == sorted(set(last)) and last[-1] > RISE * min(values)


def sample_variety(samples: np.ndarray, real: Any) -> float | None:
    """The mean distance between two samples, divided by that between two real images of the array or dataset `real`.

    Both are uint8 [N, H, W, C], or points [N, d]; up to 64 of each are compared, in the Euclidean distance of pixels.
    None if there are fewer than 2, or if the real ones do not differ.
    """
    from scipy.spatial.distance import pdist  # which takes 0.2 s to import

    count = min(COMPARED, len(samples), len(real))
    chosen = np.sort(epoch_permutation(len(real), 0, 0)[:count])
    of_samples, of_real = (
        float(np.mean(pdist(np.reshape(x, (count, -1)).astype(np.float64)))) if count > 1 else 0.0
        for x in (samples[:count], real[chosen])
    )
    return of_samples / of_real if of_real else None


def begun(records: Iterable[Record]) -> list[tuple[int, str]]:
    """The steps at which findings began, with their names, from the records of a run."""
    found: list[tuple[int, str]] = []
    before: list[str] = []
    for record in records:
        now = record.get("findings") or []
        found += [(record["step"], name) for name in now if name not in before]
        before = now
    return found


class Monitor:
    """Reports the findings of a run when they begin, in process 0."""

    def __init__(self, records: Iterable[Record], c: Config, measure: str):
        """Starts after the earlier `records` of a resumed run, whose findings are not reported again."""
        self._config, self._measure = c, measure
        self._records = [self._needed(record) for record in records]
        self._forget()

    def add(self, step: int, values: dict[str, float], about: dict[str, str] | None = None) -> Record:
        """Adds the record of a step, with texts `about` it, and reports what begins with it.

        Returns the entry `findings` for the record, if there are any.
        """
        before = self._records[-1]["findings"] if self._records else []
        # As a resumed run reads it, so that it has the same findings
        self._records.append(self._needed({"step": step} | as_recorded(values) | (about or {})))
        found = findings(self._records, self._config, self._measure)
        self._records[-1]["findings"] = found
        self._forget()
        for name in [name for name in found if name not in before]:
            sentence = SENTENCES[name].format(steps=patience(self._config), measure=self._measure)
            if not self._config.train.r1_gamma:
                sentence = sentence.replace(", or lower --config.train.r1_gamma", "")
            if self._config.objective == "gaussian":
                sentence = sentence.replace(", or raise --config.train.r1_gamma", "").replace(" and lr_d", "")
            say(f"note: step {step}: {sentence} (docs/train.md#is-it-going-well)")
        return {"findings": found} if found else {}

    def _forget(self) -> None:
        """Drops the records that no rule reads any more, so that the last ones of a long run take no longer."""
        after = self._records[-1]["step"] - patience(self._config) if self._records else 0
        lasting = {"sample_variety", self._measure}
        self._records = [record for record in self._records if record["step"] > after or record.keys() & lasting]

    def _needed(self, record: Record) -> Record:
        """The finite entries that rules read."""
        names = [name for name in record if name.startswith(("d_loss", "d_real", "d_fake"))]
        read = {name: record.get(name) for name in (*names, "sample_variety", self._measure)}
        finite = {name: v for name, v in read.items() if isinstance(v, numbers.Real) and math.isfinite(v)}
        texts = {"findings": record.get("findings") or [], "yardstick": record.get("yardstick", "")}
        return {"step": record["step"]} | finite | texts
