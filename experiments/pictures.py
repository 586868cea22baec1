"""Images of the documentation, and the measures of the model that all but vary.png are of.

    python -m experiments.pictures                              # ten minutes on 2 cores

Trains `python main.py` in runs/experiments/pictures, unless it is finished there, and makes these images in docs/ with
the commands of docs/editing.md and docs/evaluation.md.
"""

import json
import shutil

from experiments import common

DOCS, RUNS = common.ROOT / "docs", common.ROOT / "runs" / "experiments" / "pictures"
STROKE, HOLE = f"--image={DOCS}/stroke.png", f"--mask={DOCS}/mask.png"
COMMANDS = {
    "mnist.png": ["--mode=sample", "--num_samples=100"],
    "vary.png": ["--mode=vary", "--t=1", "--checkpoint=digits"],  # mnist hardly uses z
    "edit.png": ["--mode=edit", STROKE, "--start_step=1", "--label=7"],
    "inpaint.png": ["--mode=inpaint", STROKE, HOLE, "--label=7"],
    "between.gif": ["--mode=interpolate", "--between=0,1", "--label=8"],
}


def pictures() -> None:
    """Train, and draw the images."""
    workdir = RUNS / "mnist"
    found = common.train_and_evaluate(workdir, "--config=configs/mnist.py")
    for name, flags in COMMANDS.items():
        common.main(f"--workdir={workdir}", *flags, f"--out={DOCS / name}")
    trajectory = [f"--trajectory={DOCS}/trajectory.png", f"--out={RUNS}/x.png"]
    common.main(f"--workdir={workdir}", "--mode=sample", *trajectory)
    shutil.copy(workdir / "evaluation" / "neighbours.png", DOCS / "mnist_neighbours.png")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    pictures()
