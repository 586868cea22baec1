"""The findings of a run: each rule on both sides of its threshold, what is printed and recorded, and the curves."""

import json
import os
import pathlib
import re
import signal

import numpy as np
import pytest
from commands import POINTS, ROOT, assert_same, succeed
from conftest import preset_with

from ddgan_jax.commands import figures, health
from ddgan_jax.commands import train as train_module
from ddgan_jax.commands.health import CHANCE, Monitor, begun, findings, sample_variety
from ddgan_jax.commands.train import train
from ddgan_jax.config.settings import as_dict, flat, read
from ddgan_jax.errors import Interrupted
from ddgan_jax.storage.log import read_metrics

EVERY, FID = 50, "eval/fid"
RUN = read(preset_with("gaussians", train__num_steps=1_000))  # a rule needs 300 steps, after the first 300
SOUND = {"d_loss": 1.2, "g_loss": 0.9, "d_real": 0.3, "d_fake": -0.3}
SOUND |= {f"{network}_loss_t{t}": {"d": 1.2, "g": 0.9}[network] for network in "dg" for t in range(3)}
GUESS = {"d_loss": CHANCE, "d_real": 0.0, "d_fake": 0.0}


def records(**values):
    """Twelve records until step 600; a list has the last values of a metric, one a record."""
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    made = [{"step": step} | SOUND | values for step in range(EVERY, 601, EVERY)]
    for name, listed in lists.items():
        for record in made:
            del record[name]
        for record, value in zip(made[-len(listed) :], listed, strict=True):
            record[name] = value
    return made


@pytest.mark.parametrize(
    "name, fails, sound",
    [
        ("d_at_chance", GUESS, GUESS | {"d_real": 0.03}),
        ("d_at_chance", GUESS | {"d_loss": CHANCE - 0.01}, GUESS | {"d_loss": CHANCE - 0.03}),
        ("d_at_chance", GUESS | {"d_loss": 1.6, "d_real": -0.1, "d_fake": 0.1}, {"d_loss": 1.6}),
        ("d_unstable", {"d_loss": CHANCE + 0.6}, {"d_loss": CHANCE + 0.4}),
        ("d_wins", {"d_real": 2.6, "d_fake": -2.6}, {"d_real": 2.4, "d_fake": -2.4}),
        ("t_apart", {"d_loss_t0": 0.29}, {"d_loss_t0": 0.31}),
        ("t_apart", {"d_loss_t2": 4.9}, {"d_loss_t2": 4.7}),
        ("t_apart", {"d_loss_t1": 0.0}, {"d_loss_t0": 0.3, "d_loss_t1": 0.3, "d_loss_t2": 1.38}),
        ("little_variety", {"sample_variety": [0.9, 0.4, 0.4]}, {"sample_variety": [0.4, 0.4, 0.6]}),
        ("little_variety", {"sample_variety": [0.4, 0.4]}, {"sample_variety": [0.4]}),
        ("evaluations_worsen", {FID: [9.0, 10.0, 11.0, 12.0]}, {FID: [9.0, 10.0, 11.0, 10.7]}),
        ("evaluations_worsen", {FID: [9.0, 10.0, 11.0, 11.2]}, {FID: [10.0, 10.1, 10.2, 10.3]}),
        ("evaluations_worsen", {FID: [9.0, 10.0, 11.0, 11.2]}, {FID: [10.0, 11.0, 12.0]}),
    ],
)
def test_rules(name, fails, sound):
    assert findings(records(**fails), RUN, FID) == [name]
    assert findings(records(**sound), RUN, FID) == []


@pytest.mark.parametrize("values", [GUESS, {"d_real": 9.0}, {"d_loss": 3.0}, {"d_loss_t0": 0.1}])
def test_a_rule_of_losses_needs_all_records_of_its_steps(values):
    """Neither before step 600, nor if one of the last six records is sound; earlier ones do not count."""
    made = records(**values)
    assert not findings(made[:-1], RUN, FID) and findings(made, RUN, FID)
    for i, expected in ((-6, []), (-1, []), (-7, findings(made, RUN, FID))):
        assert findings([record | SOUND if record is made[i] else record for record in made], RUN, FID) == expected


def test_patience_follows_the_length_of_the_run():
    lengths = (8, 3_000, 7_500, 20_000, 351_000, None)
    runs = [read(preset_with("image_folder:small", train__num_steps=steps)) for steps in lengths]
    assert [health.patience(c) for c in runs] == [300, 300, 750, 2_000, 5_000, 300]


def test_grids_before_the_average_forgets_do_not_count():
    """With a decay of 0.9999, the moving average of G forgets its initial weights within 20,000 steps."""
    config = read(preset_with("cifar10"))
    made = [{"step": step, "sample_variety": 0.1, FID: step} for step in range(5_000, 45_001, 5_000)]
    assert not findings(made[:5], config, FID)
    assert findings(made[:6], config, FID) == ["little_variety"]
    assert findings(made[:8], config, FID) == ["little_variety", "evaluations_worsen"]


def test_only_evaluations_with_the_same_yardstick_are_compared():
    made = records(**{FID: [1.0, 2.0, 3.0, 4.0, 5.0]})
    made[-5]["yardstick"] = "other"
    assert findings(made, RUN, FID)
    made[-4]["yardstick"] = "other"
    assert not findings(made, RUN, FID)


def test_records_without_losses_of_d_have_no_findings():
    """Such as those of the Gaussian objective, or of a metric that is not finite."""
    assert not findings([{"step": step, "g_loss": 0.1} for step in range(EVERY, 601, EVERY)], RUN, FID)
    assert not findings(records(d_loss=None), RUN, FID)
    assert not findings(records(**{FID: [None, 1.0, 2.0, 3.0]}), RUN, FID)


def test_variety():
    images = np.random.default_rng(0).integers(0, 256, (80, 4, 4, 3), np.uint8)
    assert sample_variety(images[:1].repeat(9, axis=0), images) == 0
    assert sample_variety(images, images) == pytest.approx(1, abs=0.05)
    assert sample_variety(images // 2, images) == pytest.approx(0.5, abs=0.05)
    assert sample_variety(np.float32([[0, 0], [3, 4]]), np.float32([[0, 0], [0, 10]])) == 0.5
    assert sample_variety(images, images[:1].repeat(9, axis=0)) is None
    assert sample_variety(images[:1], images) is sample_variety(images, images[:1]) is None


def test_a_finding_is_reported_when_it_begins(capsys):
    """Once while it lasts, and again after it has ended; a resumed run does not repeat it."""
    monitor, kept = Monitor([], RUN, FID), []

    def add(step, **values):
        entry = monitor.add(step, SOUND | values)
        kept.append({"step": step} | SOUND | values | entry)
        return len(capsys.readouterr().out.splitlines())

    assert [add(step, d_real=np.float32(9.0)) for step in range(EVERY, 701, EVERY)] == [0] * 11 + [1, 0, 0]
    assert [record.get("findings") for record in kept] == [None] * 11 + [["d_wins"]] * 3
    monitor = Monitor(kept[:12], RUN, FID)  # resumed at step 600
    assert not add(650, d_real=9.0) and kept[-1]["findings"] == ["d_wins"]
    assert not add(700) and "findings" not in kept[-1]
    assert [add(step, d_real=9.0) for step in range(750, 1_051, EVERY)] == [0] * 5 + [1, 0]
    assert begun([kept[i] for i in (*range(12), *range(14, len(kept)))]) == [(600, "d_wins"), (1_000, "d_wins")]


def test_a_finding_is_reported_once_where_records_are_rare(capsys):
    """With fewer than one record in the steps that a rule needs, too."""
    monitor = Monitor([], RUN, FID)
    for step in range(400, 4_001, 400):
        monitor.add(step, SOUND | {"d_real": 9.0})
    assert capsys.readouterr().out.count("D has separated real from fake") == 1


@pytest.mark.parametrize(
    "name, values, fields, without",
    [
        ("d_at_chance", GUESS, {"train__r1_gamma": 0.0}, "lower --config.train.r1_gamma"),
        ("little_variety", {"sample_variety": [0.4, 0.4]}, {"objective": "gaussian"}, "r1_gamma"),
    ],
)
def test_the_advice_is_for_the_run(name, values, fields, without, capsys):
    """It names no penalty where there is none."""
    for config, expected in ((RUN, True), (read(preset_with("gaussians", train__num_steps=1_000, **fields)), False)):
        monitor = Monitor([], config, FID)
        for record in records(**values):
            monitor.add(record["step"], {key: value for key, value in record.items() if key != "step"})
        assert (without in capsys.readouterr().out) == expected


def test_the_guide_has_every_rule():
    guide = (ROOT / "docs" / "train.md").read_text()
    section = guide.partition("## Is it going well?")[2].partition("\n## ")[0]
    fields = flat(as_dict(RUN)).keys()
    for name, sentence in health.SENTENCES.items():
        assert f"`{name}`" in section, name
        assert set(re.findall(r"--config\.([\w.]+\w)", sentence)) <= fields


@pytest.mark.slow
def test_a_run_whose_d_learns_nothing(tmp_path):
    """It says so once, with the same results; a run that is resumed does not repeat it."""
    still = ["--config.train.lr_d=0.0", "--config.train.lr_min=0.0", "--config.train.lr_min_d=1e-12"]
    flags = [POINTS, f"--workdir={tmp_path}", *still, "--config.log.every=20", "--config.checkpoint.every=320"]
    flags += ["--config.log.samples_every=320", "--config.log.tensorboard=False"]
    sentence = "D has been at chance for 300 steps, so G gets no useful gradient: raise --config.train.lr_d"
    output = succeed(*flags, "--config.train.num_steps=640").stdout
    assert output.count("note: step") == 1 and f"note: step 600: {sentence}" in output
    resumed = succeed(*flags, "--config.train.num_steps=680").stdout
    assert "resuming from step 640" in resumed and "note: step" not in resumed
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert begun(found) == [(600, "d_at_chance")] and found[-1]["findings"] == ["d_at_chance"]
    assert [record["step"] for record in found if "sample_variety" in record] == [320]


def test_a_sound_run_has_no_findings(tmp_path, capsys, monkeypatch):
    """Also if a signal stops it at a step with a grid, whose record then comes when it is resumed."""
    config, report = preset_with("gaussians:smoke"), train_module.report_first_steps

    def report_and_stop(run, metrics, bar):
        report(run, metrics, bar)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="saved step 4"):
        patch.setattr(train_module, "report_first_steps", report_and_stop)
        train(config, str(tmp_path / "stopped"))
    assert [record["step"] for record in read_metrics(tmp_path / "stopped" / "metrics.jsonl")] == [2]
    for name in ("stopped", "whole"):
        train(config, str(tmp_path / name))
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("stopped", "whole"))
    for record in (*ours, *theirs):
        del record["seconds"], record["images_per_second"]
    assert ours == theirs and [record["step"] for record in ours if "sample_variety" in record] == [4]
    assert "note: step" not in capsys.readouterr().out and not begun(ours)


def test_curves_of_every_t(tmp_path, monkeypatch):
    """Also of one that the last record lacks, in the order of t."""
    legends, save = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: (legends.append(figure.axes), save(figure, path)))
    made = [{"step": step, **{f"d_loss_t{t}": 1.0 for t in (10, 0, 2)}} for step in (1, 2)]
    del made[-1]["d_loss_t2"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
    figures.curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    (panel,) = (axis for axis in legends[0] if axis.get_title() == "loss of D by t")
    assert panel.get_legend_handles_labels()[1] == ["d_loss_t0", "d_loss_t2", "d_loss_t10"]


def test_curves_mark_where_findings_began(tmp_path, monkeypatch):
    drawn, save = [], figures.save_figure

    def keep(figure, path: pathlib.Path):
        drawn.append(([len(axis.lines) for axis in figure.axes], figure.get_supxlabel()))
        save(figure, path)

    monkeypatch.setattr(figures, "save_figure", keep)
    monkeypatch.setattr(figures, "MAX_POINTS", 3)  # of a curve: the others have findings, too
    for marked in (False, True):
        made = records(r1=0.1)
        for record in made[8:] if marked else []:
            record["findings"] = ["d_wins"]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
        figures.curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    (without, nothing), (with_marks, names) = drawn
    assert with_marks == [count + 1 for count in without]
    assert nothing == "" and names == "findings, dotted: 450 d_wins"
    assert (tmp_path / "curves.png").exists()


def test_records_that_are_damaged_are_no_findings():
    made = records(**GUESS)
    for damage in ({"d_real": None}, {"d_loss": "text"}, {"findings": None}):
        broken = [*made[:-3], made[-3] | damage, *made[-2:]]
        monitor = Monitor(broken[:-1], RUN, FID)
        expected = {"findings": ["d_at_chance"]} if "findings" in damage else {}
        assert monitor.add(600, {k: v for k, v in broken[-1].items() if k != "step"}) == expected, damage


def test_a_long_run_keeps_few_records():
    """And finds the same."""
    monitor, all_of_them = Monitor([], RUN, FID), []
    for step in range(1, 3_000):
        values = SOUND | (GUESS if step > 2_000 else {}) | ({FID: 9.0 + step / 500} if step % 500 == 0 else {})
        entry = monitor.add(step, values)
        all_of_them.append({"step": step} | values | entry)
        if step % 250 == 0:
            assert entry.get("findings", []) == findings(all_of_them, RUN, FID)
    assert len(monitor._records) < 320
