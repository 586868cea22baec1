"""How much is tried, and where what was found is written.

pytest -m chaos tests/chaos                                       # minutes
pytest -m chaos tests/chaos --full --record=docs/results/reliability   # hours; the numbers of docs/reliability.md
"""

import json
import pathlib

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`lives(few, many)` repeats a test with `life` = 0, 1, ...: `few` times, or `many` with --full."""
    if marker := metafunc.definition.get_closest_marker("lives"):
        few, many = marker.args
        metafunc.parametrize("life", range(many if metafunc.config.getoption("--full") else few))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker("chaos")


@pytest.fixture
def full(request) -> bool:
    return request.config.getoption("--full")


@pytest.fixture
def count(request):
    """Add to the figures of docs/reliability.md: count("killed", kills=3) after what it tells has held."""
    folder = request.config.getoption("--record")
    name = request.node.originalname

    def add(**figures: float) -> None:
        print({name: figures})
        if folder:
            line = {"test": name, "case": request.node.name} | figures
            path = pathlib.Path(folder)
            path.mkdir(parents=True, exist_ok=True)
            with open(
                path / "cases.jsonl", "a"
            ) as file:  # one write: processes that share the tests append whole lines
                file.write(json.dumps(line) + "\n")

    return add
