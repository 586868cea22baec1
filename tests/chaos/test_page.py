"""The page under a crowd: many at once, some that go away, and requests that no browser sends."""

import concurrent.futures
import io
import json
import os
import pathlib
import time
import urllib.error
import urllib.request
import uuid

import numpy as np
import pytest
from PIL import Image

import ddgan_jax

pytest.importorskip("gradio")
from test_demo import Served
from test_long import weight

from ddgan_jax.commands.demo import MAX_SAMPLES

MODEL = "digits_conditional"
OUTSIDE = {"path": "/etc/passwd"}


class Client:
    """One visitor of a page, who speaks as its JavaScript does."""

    def __init__(self, url: str):
        self.url, self.session = url, uuid.uuid4().hex
        with urllib.request.urlopen(f"{url}/config", timeout=60) as answer:
            config = json.load(answer)
        names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        self.functions = {
            names[target[0]]: function["id"]
            for function in config["dependencies"]
            for target in function["targets"]
            if target[0] in names
        }

    def ask(self, button: str, *data: object) -> None:
        """Press a button, with these values in its fields."""
        body = dict(data=data, fn_index=self.functions[button], session_hash=self.session)
        request = urllib.request.Request(f"{self.url}/gradio_api/queue/join", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        urllib.request.urlopen(request, timeout=60).close()

    def hear(self, until: str = "process_completed", seconds: float = 300) -> list[dict]:
        """What the page says, up to the first message of this kind."""
        said: list[dict] = []
        stream = urllib.request.urlopen(
            f"{self.url}/gradio_api/queue/data?session_hash={self.session}", timeout=seconds
        )
        with stream:
            for line in stream:
                if line.startswith(b"data:"):
                    said.append(json.loads(line[5:]))
                    if said[-1]["msg"] == until:
                        return said
        raise AssertionError(f"the page hung up after {said[-1:]}")

    def press(self, button: str, *data: object) -> dict:
        """The last message about a press: its `success`, and its `output`."""
        self.ask(button, *data)
        return self.hear()[-1]

    def error(self, button: str, *data: object) -> str:
        """What the page says of a press that fails."""
        told = self.press(button, *data)
        assert not told["success"], told
        return told["output"]["error"]

    def picture(self, image: dict) -> np.ndarray:
        """A picture of a gallery, as an array."""
        with urllib.request.urlopen(f"{self.url}/gradio_api/file={image['path']}", timeout=60) as answer:
            return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))


def busy(pid: int, seconds: float) -> float:
    """How many cores a process uses."""

    def used() -> int:
        return sum(map(int, pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))

    before = used()
    time.sleep(seconds)
    return (used() - before) / os.sysconf("SC_CLK_TCK") / seconds


@pytest.fixture(scope="module")
def served():
    page = Served(MODEL)
    Client(page.url).press("go", 0, "0", 0, 1, 2)  # what is compiled is compiled
    yield page
    page.close()


def test_fifty_at_once(served, count):
    """Everybody gets the pictures of the own seed and class."""
    model = ddgan_jax.load(MODEL)

    def visit(number: int) -> float:
        client, start = Client(served.url), time.time()
        told = client.press("go", number, str(number % 10), 0, 1, 4)
        seconds = time.time() - start
        assert told["success"], told
        images = [client.picture(shown["image"]) for shown in told["output"]["data"][0]]
        expected = model.interpolate(4, 0, 1, number, label=number % 10)
        for image, of in zip(images, expected, strict=True):
            np.testing.assert_array_equal(image[::24, ::24, 0], of[..., 0])
        return seconds

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        seconds = list(pool.map(visit, range(50)))
    count(visitors=50, longest_seconds=max(seconds))


def test_who_goes_away_leaves_nothing_running(served, count):
    Client(served.url).press("sample", 0, "1", 16)
    busy(served.process.pid, 3)
    before = weight(served.process.pid)
    for number in range(20):
        client = Client(served.url)
        client.ask("sample", number, "1", MAX_SAMPLES)
        client.hear(until=("estimation", "process_starts", "process_generating")[number % 3])
    start = time.time()
    assert Client(served.url).press("sample", 0, "1", 16)["success"]
    waited = time.time() - start
    time.sleep(5)
    idle = busy(served.process.pid, 5)
    after = weight(served.process.pid)
    count(left=20, waited_seconds=waited, cores=idle, before=before, after=after)
    assert idle < 0.2
    assert all(after[name] <= before[name] + 2 for name in ("threads", "files"))


@pytest.mark.parametrize(
    "button, data",
    [
        ("sample", (0, "1", 10**9)),
        ("sample", (0, "1", -1)),
        ("sample", (0, "1", "many")),
        ("sample", (0, "11", 4)),
        ("sample", (-1, "1", 4)),
        ("sample", (1e300, "1", 4)),
        ("sample", (OUTSIDE, "1", 4)),
        ("go", (0, "1", 0, 2**40, 4)),
        ("edit", (None, 99, 0, "1")),
        ("edit", ({"background": OUTSIDE, "layers": [], "composite": OUTSIDE}, 1, 0, "1")),
        ("bring_to_draw", (OUTSIDE,)),
        ("bring_to_draw", ({"path": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}},)),
    ],
)
def test_what_no_browser_sends(served, button, data):
    """It is refused, and the page goes on."""
    try:
        said = Client(served.url).error(button, *data)
    except urllib.error.HTTPError as error:
        assert 400 <= error.code < 500
    else:
        assert said is None or "root:" not in said
    assert Client(served.url).press("go", 0, "0", 0, 1, 2)["success"]
