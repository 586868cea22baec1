"""The page to play with: every tab used in a real browser; what it refuses; what of this machine can be reached."""

import contextlib
import io
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import zipfile

import numpy as np
import pytest
from commands import command, free_port
from PIL import Image
from test_model import workdir_of

from ddgan_jax.errors import UserError

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.filterwarnings("ignore")  # of Gradio's and selenium's own


def in_a_browser(test):
    """A slow test, run by .ci/run. Repeated once, on a fresh page: one upload stayed pending for 90 s, and ten
    repetitions, some on a loaded machine, did not show why."""
    return pytest.mark.slow(pytest.mark.flaky(reruns=1)(test))


class Served:
    """The page of a workdir, in a process of its own."""

    def __init__(self, workdir):
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        argv, options = command("--mode=demo", f"--checkpoint={workdir}", f"--port={port}")
        self.process = subprocess.Popen(argv, **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        line = self.process.stdout.readline()
        assert line == f"open {self.url}/ in a browser; Ctrl-C ends it\n", line + self.process.stdout.read()

    def close(self):
        self.process.terminate()
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    of_job = {"data": {"classes": [*"012345678", "nine"]}}
    workdir = workdir_of(tmp_path_factory.mktemp("demo") / "tens", num_classes=10, of_job=of_job)
    with contextlib.closing(Served(workdir)) as page:
        yield page


def test_the_page_of_a_model_without_classes(tmp_path):
    Served(workdir_of(tmp_path / "digits")).close()


class Browser:
    """Chromium without a window, on one page."""

    def __init__(self, url, width=1280, height=1600):
        if not (CHROMIUM and DRIVER):
            pytest.skip("there is no chromium, or no chromedriver")
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "enable-unsafe-swiftshader"):
            options.add_argument(f"--{argument}")
        options.add_argument(f"--window-size={width},{height}")
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.get(url)
        self.until(lambda: self.find("#sample"))

    def close(self):
        self.driver.quit()

    def find(self, css):
        return [found for found in self.driver.find_elements("css selector", css) if found.is_displayed()]

    def until(self, condition, seconds=90):
        """The first true value of a condition."""
        end = time.time() + seconds
        while time.time() < end:
            try:
                if found := condition():
                    return found
            except Exception as error:  # of elements that come and go
                last = error
            time.sleep(0.2)
        console = [entry["message"] for entry in self.driver.get_log("browser")]
        text = self.driver.find_element("css selector", "body").text
        last = locals().get("last", "")
        raise AssertionError(f"nothing after {seconds} s {last}; page: {text!r}; console: {console}")

    def click(self, css):
        self.until(lambda: self.find(css))[0].click()

    def tab(self, name):
        self.until(lambda: [tab for tab in self.find("button[role=tab]") if tab.text == name])[0].click()

    def pictures(self, css, count):
        """The addresses of `count` pictures below an element, when they are all there."""
        images = self.until(lambda: len(found := self.find(f"{css} img")) == count and found)
        return [image.get_attribute("src") for image in images]

    def arrays(self, css, count):
        def read(address):
            with urllib.request.urlopen(address) as answer:
                return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))

        return [read(address) for address in self.pictures(css, count)]

    def downloads_into(self, folder):
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", dict(behavior="allow", downloadPath=str(folder)))

    def idle(self, css):
        """Wait until nothing is on its way to an element."""
        time.sleep(1)
        self.until(lambda: self.driver.find_elements("css selector", f"{css} > [data-testid=status-tracker].hide"))

    def bring(self, css, file):
        """Choose a file for an upload button, whose field for it lies before it."""
        self.driver.execute_script("return document.querySelector(arguments[0]).previousElementSibling", css).send_keys(
            str(file)
        )

    def drag(self, css):
        """A stroke over the canvas below an element."""
        from selenium.webdriver.common.action_chains import ActionChains

        canvas = self.until(lambda: self.find(f"{css} canvas"))[0]
        time.sleep(2)  # it is drawn a moment after it is there
        self.click(f"{css} button[aria-label=Brush]")
        stroke = ActionChains(self.driver).move_to_element_with_offset(canvas, -40, -40).click_and_hold()
        for _ in range(8):
            stroke.move_by_offset(10, 10)
        stroke.release().perform()

    def sentence(self):
        """What the page says of a mistake."""
        text = self.until(lambda: self.find(".toast-body.error"))[0].text
        self.click(".toast-body.error .toast-close")
        self.until(lambda: not self.find(".toast-body.error"))
        return text


@pytest.fixture(scope="module")
def window(served):
    with contextlib.closing(Browser(served.url)) as found:
        yield found


@pytest.fixture
def browser(window, served):
    """A fresh page."""
    window.driver.get(served.url)
    window.until(lambda: window.find("#sample"))
    return window


@in_a_browser
def test_samples_and_what_is_behind_one(browser, tmp_path):
    browser.click("#sample")
    images = browser.arrays("#samples", 32)
    assert all(image.shape == (192, 192, 3) for image in images)
    assert len({image.tobytes() for image in images}) == 32
    browser.downloads_into(tmp_path)
    browser.until(lambda: browser.find("#download:not([disabled])"))[0].click()
    archive = browser.until(lambda: [file for file in tmp_path.glob("*.zip") if zipfile.is_zipfile(file)])[0]
    with zipfile.ZipFile(archive) as files:
        assert len(files.namelist()) == 32
        fifth = np.asarray(Image.open(files.open("000005.png")))
    np.testing.assert_array_equal(images[5][::24, ::24, 0], fifth)

    browser.find("#samples .thumbnail-item")[5].click()
    varied = browser.arrays("#varied", 12)
    assert len({image.tobytes() for image in varied}) == 12
    (last,) = browser.arrays("#frame", 1)
    np.testing.assert_array_equal(last, images[5])
    slider = browser.find("#at input[type=range]")[0]
    shown = []
    for _ in range(8):  # T = 4: x_4, x_0 as seen in it, ..., x_1, x_0 as seen in it, x_0
        slider.send_keys("\ue012")  # to the left, by the keyboard
        browser.until(lambda: browser.pictures("#frame", 1)[0] not in shown)
        shown.append(browser.pictures("#frame", 1)[0])
    assert "x_4" in browser.find("#frame")[0].text


@in_a_browser
def test_a_stroke_or_a_picture_becomes_images(browser, tmp_path):
    browser.tab("Draw")
    browser.click("#edit")
    assert "Draw something or upload an image first." in browser.sentence()
    browser.drag("#stroke")
    browser.click("#edit")
    assert len({image.tobytes() for image in browser.arrays("#edited", 12)}) == 12
    browser.find("#start input[type=range]")[0].send_keys("\ue011")  # to its low end: the drawing itself
    before = browser.pictures("#edited", 12)
    browser.click("#edit")
    browser.until(lambda: browser.pictures("#edited", 12) != before)
    drawn = browser.arrays("#edited", 12)
    assert len({image.tobytes() for image in drawn}) == 1 and drawn[0].max() > 200 and drawn[0].min() == 0
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).resize((160, 160)).save(tmp_path / "own.png")
    browser.bring("#bring_to_draw", tmp_path / "own.png")
    browser.idle("#stroke")
    before = browser.pictures("#edited", 12)
    browser.click("#edit")
    browser.until(lambda: browser.pictures("#edited", 12) != before)
    assert abs(browser.arrays("#edited", 12)[0].mean() - 126) < 15
    (tmp_path / "none.png").write_bytes(b"GIF89a")
    browser.bring("#bring_to_draw", tmp_path / "none.png")
    assert "This image cannot be read" in browser.sentence()


@in_a_browser
def test_a_hole_is_filled(browser):
    browser.tab("Fill in")
    browser.click("#fill")
    assert "Upload an image or take a sample first." in browser.sentence()
    browser.click("#take")
    browser.idle("#hole")
    browser.click("#fill")
    assert "Paint over the part to fill in first." in browser.sentence()
    browser.drag("#hole")
    browser.click("#fill")
    filled = np.array(browser.arrays("#filled", 12)).astype(int)
    changed = filled.std(axis=0)[..., 0] > 0
    assert 0 < changed.mean() < 0.7, "nothing, or all, was filled in"


@in_a_browser
def test_from_one_to_another(browser):
    browser.tab("Between")
    browser.click("#go")
    images = browser.arrays("#between", 16)
    assert len({image.tobytes() for image in images}) == 16


@in_a_browser
def test_nothing_comes_from_elsewhere(browser, served):
    resources = browser.driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(resources) > 10
    assert [name for name in resources if not name.startswith((served.url, "blob:", "data:"))] == []


@in_a_browser
def test_a_phone_and_the_keyboard(served, browser):
    """Nothing is wider than the screen; samples come by Tab and Enter alone."""
    from selenium.webdriver.common.action_chains import ActionChains

    with contextlib.closing(Browser(served.url, 500, 900)) as phone:
        phone.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", dict(width=390, height=844, deviceScaleFactor=2, mobile=True)
        )
        for _ in range(30):
            ActionChains(phone.driver).send_keys("\ue004").perform()
            if phone.driver.switch_to.active_element.get_attribute("id") == "sample":
                break
        ActionChains(phone.driver).send_keys("\ue007").perform()
        phone.pictures("#samples", 32)
        assert phone.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")


@in_a_browser
def test_two_at_once_wait_for_each_other(served, browser):
    with contextlib.closing(Browser(served.url)) as other:
        for page in (browser, other):
            page.driver.get(served.url)
            page.until(lambda page=page: page.find("#sample"))
        for page in (browser, other):
            page.click("#sample")
        ours, theirs = (page.arrays("#samples", 32) for page in (browser, other))
        np.testing.assert_array_equal(ours, theirs)


@in_a_browser
def test_points_show_their_scatter(tmp_path):
    with (
        contextlib.closing(Served(workdir_of(tmp_path / "points", name="gaussians"))) as page,
        contextlib.closing(Browser(page.url)) as browser,
    ):
        assert not browser.find("button[role=tab]")
        browser.click("#sample")
        (scatter,) = browser.arrays("#frame", 1)
        assert scatter.shape[0] > 300 and 0.001 < (scatter.min(axis=-1) < 200).mean() < 0.9


# --- Without a browser --------------------------------------------------------------------------------------------


def answer(url, **options):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **options), timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize("path", ["/etc/hostname", "main.py", "README.md", "../main.py", "ddgan_jax/commands/cli.py"])
def test_no_other_file_is_served(served, path):
    for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/", ""):
        status, content = answer(f"{served.url}/{route}{path}")
        assert status >= 400 or b"<!doctype html>" in content[:200].lower(), f"{route}{path}: {content[:100]}"


def test_classes_are_chosen_by_name(served):
    components = json.loads(answer(f"{served.url}/config")[1])["components"]
    choices = [part["props"]["choices"] for part in components if part["type"] == "dropdown"]
    classes = [[str(i), str(i)] for i in range(9)] + [["nine", "9"]]
    assert choices == [[["all in turn", "all in turn"], *classes]] * 3 + [classes]  # for images between two, one class


def test_uploads_are_bounded(served):
    def upload(size):
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + b"0" * size
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        return answer(f"{served.url}/gradio_api/upload", data=body + b"\r\n--x--\r\n", headers=headers)

    assert upload(1000)[0] == 200
    assert upload(9_000_000)[0] == 413


def test_gradio_is_missing(monkeypatch):
    import sys

    from ddgan_jax.commands import demo

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="the page needs gradio: run `pip install gradio`"):
        demo.demo(None, "x")
