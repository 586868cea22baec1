"""Any value in any field and any flag: it trains a step, or one sentence says what would be right.

A mistake ends with exit code 2, in one sentence that names the field or the flag, before anything is compiled.
"""

import hypothesis
import pytest
from forks import SIGTERM, at_step
from hypothesis import strategies as st

from ddgan_jax.config import presets
from ddgan_jax.config import settings as config

PRESETS = ("gaussians", "digits", "image_folder", "cifar10", "stacked_mnist", "lsun_church_256")
NUMBERS = ["0", "1", "2", "3", "7", "-1", "0.5", "1e-30", "1e30", "1000000000", "100000000000000000000", "nan", "inf"]
WORDS = ["", " ", "True", "None", "abc", "é", "a=b", "../..", "/dev/null", "gs://", "x" * 5000, "%s", "'", '"', "$HOME"]
LISTS = ["()", "[]", "(1,)", "(0,)", "(1,2", "(1,2.5)", "1,2", "((4,True),)", "((2,False),(4,True))", "{'a':1}"]
FIELDS = sorted(config.flat(config.as_dict(config.Config())))
FIELDS += ["discriminator.stages", "discriminator.start", "generator", "train", "", "train.batchsize", "a.b.c"]
ONE_STEP = at_step(0, SIGTERM)  # a run ends after it
FLAGS = {
    "mode": ["train", "sample", "vary", "edit", "inpaint", "interpolate", "export", "evaluate", "training"],
    **{name: [] for name in "num_samples sample_seed label posterior num_variants start_step t rounds between".split()},
    **{name: [] for name in "checkpoint samples image mask interrupted_exit_code host port config nothing".split()},
}


def values(name: str):
    """What someone could write: numbers, words, lists, and what the field is in another preset."""
    others = [config.flat(config.as_dict(presets.get(preset))).get(name) for preset in PRESETS]
    return st.sampled_from([*NUMBERS, *WORDS, *LISTS, *sorted({str(value) for value in others})])


@st.composite
def settings(draw) -> list[str]:
    """One or two fields of a preset that is shrunk."""
    preset = draw(st.sampled_from(PRESETS))
    chosen = draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=2, unique=True))
    one_program = "--config.train.r1_every=1"  # instead of one with R1 and one without
    return [f"--config={preset}:smoke", one_program, *(f"--config.{name}={draw(values(name))}" for name in chosen)]


@st.composite
def flags(draw) -> list[str]:
    """A mode, and one or two flags."""
    mode = draw(st.sampled_from(FLAGS["mode"]))
    chosen = draw(st.lists(st.sampled_from(sorted(FLAGS)), min_size=1, max_size=2, unique=True))
    told = (f"--{name}={draw(st.sampled_from([*NUMBERS, *WORDS, *LISTS, *FLAGS[name]]))}" for name in chosen)
    return [f"--mode={mode}", *told]


def failures_of(case, number: int, seed: int, check) -> list[str]:
    """What `check(arguments)` says is wrong, for so many cases, the same ones for a seed each time."""
    wrong = []

    def one(told) -> None:
        try:
            check(told)
        except AssertionError as error:
            wrong.append(f"{' '.join(told)[:300]}: {str(error)[:1500]}")

    quiet = dict(deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    phases = [hypothesis.Phase.generate]
    sample = hypothesis.settings(max_examples=number, phases=phases, **quiet)(hypothesis.given(case)(one))
    hypothesis.seed(seed)(sample)()
    return wrong


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """Of this module alone: programs that other tests have compiled would hide an error that comes too late."""
    return f"--compilation_cache={tmp_path_factory.mktemp('cache')}"


@pytest.mark.lives(1, 14)
def test_settings(life, forks, full, count, tmp_path, cache):
    seen = {"trained": 0, "refused": 0}

    def check(told):
        workdir = tmp_path / str(sum(seen.values()))
        argv = [*told, f"--workdir={workdir}", cache, "--config.log.tensorboard=False"]
        ended = forks.run(*argv, before=ONE_STEP, seconds=300)
        seen["refused" if ended.code == 2 else "trained"] += 1
        judge(ended, (75, 0))

    wrong = failures_of(settings(), 50 if full else 6, life, check)
    assert not wrong, "\n\n".join(wrong)
    count(**seen)


@pytest.mark.lives(1, 8)
def test_flags(life, forks, full, count, tmp_path, cache):
    """With a model of the digits, and without one."""
    seen = {"done": 0, "refused": 0}

    def check(told):
        out = tmp_path / str(sum(seen.values()))
        out.mkdir()
        model = [] if "--mode=train" in told else ["--checkpoint=digits_conditional"]
        argv = [*model, *told, f"--workdir={out}", f"--out={out}/out", cache]
        ended = forks.run(*argv, before=ONE_STEP, seconds=300)
        seen["refused" if ended.code == 2 else "done"] += 1
        judge(ended, (0, 75))

    wrong = failures_of(flags(), 50 if full else 30, life, check)
    assert not wrong, "\n\n".join(wrong)
    count(**seen)


def judge(ended, good) -> None:
    """UserErrors name what is wrong in one sentence, and come before the compiler."""
    assert "Traceback" not in ended.errors, ended.errors[-1500:]
    assert ended.code in (2, *good), f"{ended.code}, {ended.seconds:.0f} s, {ended.mib:.0f} MiB: {ended.errors}"
    if ended.code == 2:
        assert ended.sentence.startswith("error: ") and len(ended.sentence) < 1000, ended.errors
        assert not ended.compiled, f"only after compiling: {ended.sentence}"
