"""Every table and figure again, from the results that are committed: `python -m experiments.report`."""

from experiments import common


def report() -> None:
    """Draw what has results, and join it into docs/results/README.md."""
    parts = ["# Results", "Made by `python -m experiments.report` from the `results.json` beside each figure."]
    parts += [common.show(name) for name in sorted(path.parent.name for path in common.RESULTS.glob("*/results.json"))]
    (common.RESULTS / "README.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    report()
