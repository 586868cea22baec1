"""The experiments: exact ones in closed form, and tables that follow from the committed results."""

import json
import os
import sys
import time

import numpy as np
import pytest

from ddgan_jax.config import presets
from ddgan_jax.config.settings import as_dict, flat
from ddgan_jax.errors import Fault, UserError
from ddgan_jax.method.diffusion import Schedule
from ddgan_jax.metrics.modes import grid_centres
from experiments import common, gaussians, recipe, trilemma
from experiments import why_gaussian_fails as why


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_denoising_distribution_is_bayes(k):
    """q(x_{k-1} | x_k) ~ q(x_{k-1}) q(x_k | x_{k-1}), normalised by numerical integration."""
    schedule, x_k = Schedule.create(4), 0.3
    x = np.linspace(-6, 6, 48_001)
    a, s = schedule.a_s_cum[k - 1], schedule.sigmas_cum[k - 1]
    prior = sum(
        w * np.exp(-((x - a * c) ** 2) / (2 * (a**2 * why.LINE.std**2 + s**2)))
        for w, (c,) in zip(why.LINE.weights, why.LINE.centres, strict=True)
    )
    product = prior * np.exp(-((x_k - schedule.a_s[k] * x) ** 2) / (2 * schedule.betas[k]))
    product /= product.sum() * (x[1] - x[0])
    means, log_weights, variance = why.denoising(why.LINE, schedule, k, np.array([[x_k]]))
    found = np.exp(why.log_density(x[:, None], means.repeat(len(x), 0), log_weights.repeat(len(x), 0), variance))
    np.testing.assert_allclose(found, product, atol=1e-4 * product.max())


@pytest.mark.parametrize("distance, modes", [(1.9, 1), (2.1, 2)])
def test_two_equal_gaussians_are_bimodal_beyond_two_standard_deviations(distance, modes):
    means = np.array([[[0.0], [distance]]])
    assert why.count_modes(means, np.log([[0.5, 0.5]]), 1.0) == modes


def test_the_gap_of_a_gaussian_is_zero_and_of_far_modes_known():
    """Two modes at +-c of variance u << c^2: KL = log(sqrt(c^2 + u) / sqrt(u)) - log 2."""
    random = np.random.default_rng(0)
    assert abs(why.gap(np.zeros((2, 1, 1)), np.zeros((2, 1)), 0.5, random, 2000)) < 1e-12
    means, u = np.array([[[-1.0], [1.0]]]), 1e-4
    expected = 0.5 * np.log((1 + u) / u) - np.log(2)
    assert abs(why.gap(means, np.log([[0.5, 0.5]]), u, random, 20_000) - expected) < 0.02


def test_draws_follow_the_forward_process():
    schedule = Schedule.create(4)
    x = why.draw(why.GRID, np.random.default_rng(0), 100_000, schedule, 2)
    variance = schedule.a_s_cum[2] ** 2 * (8 + why.GRID.std**2) + schedule.sigmas_cum[2] ** 2
    np.testing.assert_allclose(x.var(0), variance, rtol=0.02)


def test_the_trilemma_is_of_the_committed_results():
    results = json.loads((common.RESULTS / "trilemma" / "results.json").read_text())
    assert results["rows"] == trilemma.rows()


def test_the_parts_of_the_recipe_are_all_that_it_changes():
    paper, ours = (flat(as_dict(presets.get(f"digits:{variant}"))) for variant in ("paper", ""))
    config = presets.get("digits:paper")
    config.update_from_flattened_dict(recipe.RECIPES["ours"])  # as it is timed
    changed = set(recipe.PARTS.values())
    found = flat(as_dict(config))
    assert found == paper | {name: ours[name] for name in changed}
    assert all(paper[name] != ours[name] for name in changed)
    assert changed | {"train.num_steps"} == {name for name in ours if ours[name] != paper[name]}  # and nothing else is


def test_width_of_exact_samples():
    """Within three of its standard deviations a 2-D Gaussian's mean square is 2 s^2 (1 - 5.5 e^-4.5) / (1 - e^-4.5)."""
    random = np.random.default_rng(0)
    points = grid_centres()[random.integers(0, 25, 100_000)] + 0.05 * random.standard_normal((100_000, 2))
    expected = 0.05 * np.sqrt((1 - 5.5 * np.exp(-4.5)) / (1 - np.exp(-4.5)))
    np.testing.assert_allclose(gaussians.width(points), expected, rtol=0.01)


def test_runs_share_the_cores_and_come_back_in_order(tmp_path, monkeypatch):
    cores = os.sched_getaffinity(0)

    def measured(workdir, *flags, quiet):
        return {"workdir": workdir.name, "flags": flags, "cores": os.sched_getaffinity(0), "quiet": quiet}

    monkeypatch.setattr(common, "train_and_evaluate", measured)
    jobs = {tmp_path / str(i): [f"--config.seed={i}"] for i in range(5)}
    alone = common.run_all(jobs, 1)
    shared = common.run_all(jobs, 2)
    assert [run["workdir"] for run in alone] == [run["workdir"] for run in shared] == list("01234")
    assert all(run["cores"] == cores and not run["quiet"] for run in alone)
    assert all(run["cores"] < cores or len(cores) == 1 for run in shared) and all(run["quiet"] for run in shared)
    assert os.sched_getaffinity(0) == cores


def test_after_a_failed_run_no_other_begins(tmp_path, monkeypatch):
    """What was under way beside it may finish, and the failure is told."""
    begun = []

    def measured(workdir, *flags, quiet):
        begun.append(workdir.name)
        if "--fail" in flags:
            raise Fault("no luck")
        time.sleep(0.5)
        return {}

    monkeypatch.setattr(common, "train_and_evaluate", measured)
    jobs = {tmp_path / name: ["--fail"] if name == "first" else [] for name in ("first", "second", "third", "fourth")}
    with pytest.raises(Fault, match="no luck"):
        common.run_all(jobs, 1)
    assert begun[0] == "first" and "fourth" not in begun


def test_a_failed_run_says_where_to_look(tmp_path):
    with pytest.raises(Fault, match=r"exit code 2, see .*output.txt"):
        common.train_and_evaluate(tmp_path, "--config=configs/none.py", quiet=True)
    assert "configs/none.py" in (tmp_path / "output.txt").read_text()


def test_results_of_other_flags_are_not_taken_for_these(tmp_path):
    """A finished run is taken as it is, unless it was of another method, whose number has changed."""
    found = {"flags": ["--config=configs/digits.py", "--config.seed=0"], "steps": 7}
    (tmp_path / "measured.json").write_text(json.dumps(found))
    assert common.train_and_evaluate(tmp_path, *found["flags"]) == found
    with pytest.raises(Fault, match=r"holds a run of --config=configs/digits.py --config.seed=0: move it away"):
        common.train_and_evaluate(tmp_path, "--config=configs/digits.py", "--config.seed=1")


def test_a_run_that_was_stopped_goes_on_with_its_own_flags_alone(tmp_path, monkeypatch):
    def stopped(*flags, output):
        raise Fault("stopped")

    monkeypatch.setattr(common, "main", stopped)
    for _ in range(2):
        with pytest.raises(Fault, match=r"^stopped$"):
            common.train_and_evaluate(tmp_path / "run", "--config.seed=0")
    with pytest.raises(Fault, match=r"holds a run of --config.seed=0: move it away"):
        common.train_and_evaluate(tmp_path / "run", "--config.seed=1")


@pytest.mark.parametrize("name", [name for name in common.names() if hasattr(common.module(name), "METHODS")])
def test_committed_results_have_the_flags_of_today(name):
    """A method whose flags have changed has to be trained again, or a table would show another one under its name."""
    of, firsts = common.module(name), set()
    for run in common.read_results(name)["runs"]:
        if run["method"] in getattr(of, "TRAINED", of.METHODS):  # others are rows of another experiment
            seed = run["flags"].index(f"--config.seed={run['seed']}")
            firsts.add(tuple(run["flags"][:seed]))
            assert run["flags"][seed + 1 :] == list(of.METHODS[run["method"]])
    assert len(firsts) == 1
    if isinstance(getattr(of, "FLAGS", None), list):
        assert firsts == {tuple(of.FLAGS)}


def test_a_method_that_starts_from_another_trains_last(monkeypatch):
    begun = []
    monkeypatch.setattr(common, "train_and_evaluate", lambda workdir, *flags, quiet: begun.append(workdir.name) or {})
    runs = common.sweep("known", [], {"after": [], "before": []}, 1, last="after")
    assert begun == ["1_seed0", "1_seed1", "1_seed2", "0_seed0", "0_seed1", "0_seed2"]
    assert [(run["method"], run["seed"]) for run in runs] == [(m, s) for m in ("before", "after") for s in common.SEEDS]


def test_a_sweep_of_no_cases_trains_nothing(monkeypatch):
    monkeypatch.setattr(common, "train_and_evaluate", lambda workdir, *flags, quiet: {})
    methods = {"a": [], "b": []}
    assert common.sweep("known", [], methods, 1, []) == []
    assert len(common.sweep("known", [], methods, 1)) == len(methods) * len(common.SEEDS)


def test_a_measure_that_is_not_finite_is_nan_in_a_table():
    assert common.measure("kl", ".2f")({"kl": None}) == "nan" and common.measure("kl", ".2f")({"kl": 0.126}) == "0.13"


@pytest.mark.parametrize(
    "arguments, error, code, message",
    [
        (["--at_once=1000"], None, 2, "--at_once=1000 must be from 1 to "),
        ([], UserError("there is no folder x"), 2, "there is no folder x"),
        ([], Fault("a run ended with exit code 1"), 1, "a run ended with exit code 1"),
    ],
)
def test_exit_codes(arguments, error, code, message, monkeypatch, capsys):
    def experiment(args):
        assert args.only == ["b", "a"] and args.seeds == [1]
        raise error

    given = ["x", "--only", "b", "a", "b", "--seeds", "1", "1", *arguments]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as ended:
        common.run("x.py", experiment, trains=True, methods=["a", "b"], seeds=common.SEEDS)
    told = capsys.readouterr().err
    if code == 1:  # which Python prints, with exit code 1
        assert ended.value.code == message
    else:
        assert ended.value.code == 2 and message in told


def test_committed_results_of_other_methods_and_seeds_stay(monkeypatch):
    committed = [{"method": "a", "seed": 0, "old": True}, {"method": "a", "seed": 1}, {"method": "b", "seed": 0}]
    monkeypatch.setattr(common, "names", lambda: ["known"])
    monkeypatch.setattr(common, "read_results", lambda name: {"runs": committed})
    new = [{"method": "a", "seed": 0}]
    assert common.with_committed("known", new) == new + committed[1:]
    assert common.with_committed("unknown", new) == new


def test_the_commands_of_a_table_are_kept_together(tmp_path, monkeypatch):
    """A run of some methods or seeds adds its command to those of the results beside it; a run of all replaces them."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "draw", lambda name: None)
    monkeypatch.setattr(common, "table", lambda name: "")
    monkeypatch.setattr("experiments.report.write_tables", lambda: None)
    commands = []
    for given in (["--only", "a"], ["--seeds", "1"], ["--seeds", "1"], ["--at_once=1"]):
        monkeypatch.setattr(sys, "argv", ["x", *given])
        common.run("known.py", lambda args: {"runs": []}, trains=True, methods=["a"], seeds=common.SEEDS)
        commands.append(common.read_results("known")["command"])
    known = "python -m experiments.known"
    both = f"{known} --only a; {known} --seeds 1"
    assert commands == [f"{known} --only a", both, both, f"{known} --at_once=1"]
