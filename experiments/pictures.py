"""Images of the documentation, and the numbers that it states of the digits with and without classes.

    python -m experiments.pictures                              # ten minutes on 2 cores

Trains `python main.py` and configs/digits.py:conditional in runs/experiments/pictures, unless they are
finished there, and makes the images in docs/ with the commands of docs/editing.md and docs/evaluation.md.
"""

import json
import shutil

from experiments import common

DOCS, RUNS = common.ROOT / "docs", common.ROOT / "runs" / "experiments" / "pictures"
STROKE, HOLE = f"--image={DOCS}/stroke.png", f"--mask={DOCS}/mask.png"
COMMANDS = {
    "digits.png": ["--mode=sample"],
    "vary.png": ["--mode=vary", "--t=1"],
    "edit.png": ["--mode=edit", STROKE, "--start_step=1"],
    "inpaint.png": ["--mode=inpaint", STROKE, HOLE],
    "between.gif": ["--mode=interpolate", "--between=0,1"],
}


def pictures() -> None:
    """Train, and draw the images."""
    digits, labels = RUNS / "digits", RUNS / "labels"
    found = [
        common.train_and_evaluate(digits, "--config=configs/digits.py"),
        common.train_and_evaluate(labels, "--config=configs/digits.py:conditional"),
    ]
    for name, flags in COMMANDS.items():
        common.main(f"--workdir={digits}", *flags, f"--out={DOCS / name}")
    common.main(f"--workdir={digits}", "--mode=sample", f"--trajectory={DOCS}/trajectory.png", f"--out={RUNS}/x.png")
    common.main(f"--workdir={labels}", "--mode=sample", "--num_samples=100", f"--out={DOCS}/labels.png")
    shutil.copy(digits / "evaluation" / "neighbours.png", DOCS / "digits_neighbours.png")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    pictures()
