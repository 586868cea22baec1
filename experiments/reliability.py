"""The table of docs/reliability.md, from what tests/chaos recorded.

`pytest -m chaos tests/chaos --full --record=docs/results/reliability` records; of a case that was run again, the last
record counts. For a new set of numbers, record into an empty folder. `python -m experiments.report` writes the table.
"""

import json
import string
from collections import defaultdict

from experiments import common

KILLS = "{kills} kills of {runs} trainings"
# {test: (what was tried, what was seen)}. The names in braces are figures that a case passed to `count`, as `summed`
# returns them
ROWS = {
    "test_at_random_moments": ("SIGKILL at random moments, points", KILLS),
    "test_images_at_random_moments": ("the same, with images to prepare and a classifier to train", KILLS),
    "test_at_every_write": ("SIGKILL before each write to the workdir", "{kills} kills"),
    "test_in_a_save": ("SIGKILL while a checkpoint is written", "{kills} kills, {unfinished} left a partial one"),
    "test_in_a_bucket": ("SIGKILL, workdir in a bucket (emulated)", KILLS),
    "test_one_of_two_processes": ("SIGKILL of one of two processes", KILLS),
    "test_sigterm": ("SIGTERM at random moments", "{signals} signals in {runs} trainings"),
    "test_while_training": ("a failing disk during a training", "{cases} combinations of write, fault and moment"),
    "test_while_writing_a_result": ("a failing disk while a result is written", "{cases} combinations"),
    "test_every_file": (
        "a damaged file of a workdir, then resume, sample or evaluate",
        "{cases} cases: {right_numbers} right numbers, {reported} reported what is lost, "
        "{one_sentence} ended with a one-line error",
    ),
    "test_reads_of_a_disk": (
        "a kind of file that cannot be read, or with short reads, and each command that reads it",
        "{cases} cases: {right} gave the fault-free result, {one_line} a one-line error with no file changed, "
        "{no_such_read} made no such read",
    ),
    "test_reads_of_a_bucket": (
        "the same in a bucket (emulated): 403, 404, 429, 503, dropped connections",
        "{cases} cases: {right} gave the fault-free result, {one_line} a one-line error with no object changed, "
        "{reported_what_is_missing} reported what is missing, {no_such_read} made no such read",
    ),
    "test_all_checkpoints_are_unreadable": (
        "all checkpoints unreadable, then readable again",
        "{runs} run ended with no file changed; the next one ended like an uninterrupted run",
    ),
    "test_a_bucket_is_down": (
        "a bucket that answers 503 (emulated) for two minutes, then recovers",
        "{ended} runs ended with no object changed; the next one ended like an uninterrupted run",
    ),
    "test_settings": ("random values in fields", "{trained} trained a step, {refused} were refused"),
    "test_flags": ("random values in flags", "{done} were carried out, {refused} were refused"),
    "test_mutated_files": (
        "mutated files, of 12 kinds",
        "{cases} files, {refused} refused; at most {most_slowest:.1f} s and {most_mib:.0f} MiB each",
    ),
    "test_bombs": ("images that unpack to gigabytes, in folders and zips", "{cases} cases, at most {most_mib:.0f} MiB"),
    "test_what_is_no_file": ("pipes, devices, links and folders named as images", "{cases} kinds"),
    "test_fifty_at_once": (
        "visitors of the page at once",
        "{visitors}, each with the right images within {most_longest_seconds:.0f} s",
    ),
    "test_who_goes_away_leaves_nothing_running": (
        "visitors of the page who leave",
        "{left}; no work continues for them",
    ),
    "test_a_long_run": (
        "a long training that logs, saves, draws and evaluates 200 times",
        "{runs} trainings of {most_steps:,} steps; memory grew at most {most_growth:.3f} times",
    ),
    "test_against_torch_fidelity": (
        "measures against torch-fidelity, up to {most_samples} x 2,048 features",
        "largest differences: FID {most_fid:.0e}, KID {most_kid:.0e}, IS {most_inception_score:.0e} of their values; "
        "precision {most_precision:.0e}, recall {most_recall:.0e}",
    ),
    "test_without_a_network": ("a machine without a network", "{commands} commands"),
    "test_licences": (
        "licences of the packages that are installed",
        "{with_extras} free ones, {core} of them in the core",
    ),
}


def summed(runs: list[dict]) -> dict:
    """The sum of each figure over the cases of a test, and its largest value as most_NAME."""
    figures = {"runs": len(runs)}
    for run in runs:
        for name, value in run.items():
            if isinstance(value, (int, float)):
                figures[name] = figures.get(name, 0) + value
                figures[f"most_{name}"] = max(value, figures.get(f"most_{name}", value))
    return figures


class Formatter(string.Formatter):
    """Formats integers with commas; a figure that no case recorded is 0."""

    def get_value(self, key, args, kwargs):
        return kwargs.get(key, 0)

    def format_field(self, value, format_spec):
        return f"{value:,}" if isinstance(value, int) else format(value, format_spec)


def table() -> str:
    """Markdown with a row for each test."""
    cases: dict[str, dict[str, dict]] = defaultdict(dict)
    for line in (common.RESULTS / "reliability" / "cases.jsonl").read_text().splitlines():
        record = json.loads(line)
        cases[record["test"]][record["case"]] = record
    lines = ["| tried | seen |", "|---|---|"]
    for test, row in ROWS.items():
        if runs := list(cases[test].values()):
            lines.append("| " + " | ".join(Formatter().format(cell, **summed(runs)) for cell in row) + " |")
    everything = [run for runs in cases.values() for run in runs.values()]
    machines, days = (sorted({run[name] for run in everything}) for name in ("machine", "date"))
    lines += ["", f"{'; '.join(machines)}, {' to '.join(sorted({days[0], days[-1]}))}."]
    return "\n".join(lines)
