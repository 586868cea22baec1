"""Every table and figure again, from the results that are committed: `python -m experiments.report`."""

from experiments import common


def report() -> None:
    """Draw what has results, and join the tables into results/README.md."""
    parts = ["# Results", "Made by `python -m experiments.report` from the `results.json` beside each figure."]
    for name in sorted(path.parent.name for path in common.RESULTS.glob("*/results.json")):
        common.show(name)
        about, machine = common.about(name)
        parts += [f"## {about}", f"`python -m experiments.{name}`, {machine}"]
        parts += [(common.RESULTS / name / "table.md").read_text().strip(), f"![{about}]({name}/figure.png)"]
    (common.RESULTS / "README.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    report()
