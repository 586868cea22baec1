"""Downloads: complete, resumed, verified, once; and every fault of a network in one line."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from servers import serving

from ddgan_jax.errors import Fault, UserError
from ddgan_jax.metrics import inception, vgg
from ddgan_jax.storage import buckets, downloads

CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FETCH = """
import pathlib, sys
from ddgan_jax.storage import downloads
downloads.fetch(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3])
"""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv(downloads.MIRROR, raising=False)
    monkeypatch.setattr(buckets, "DOWNLOAD_RETRY_SECONDS", 0.3)
    with serving({"/weights.pth": CONTENT}) as server:
        yield server


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "weights.pth"


def fetch(server, file):
    downloads.fetch(f"{server.url}/weights.pth", file, SHA256)


def assert_complete(file):
    assert file.read_bytes() == CONTENT and {entry.suffix for entry in file.parent.iterdir()} == {".pth", ".lock"}


def test_a_file_is_downloaded_once(server, file):
    fetch(server, file)
    assert_complete(file)
    fetch(server, file)
    assert len(server.requests) == 1


@pytest.mark.parametrize("faults", [[1_000_000], [1_000_000, 5, 0, 1_000_000], ["503", "429", 100, "500"]])
def test_a_cut_download_is_resumed(faults, server, file):
    server.faults = list(faults)
    fetch(server, file)
    assert_complete(file)
    begun = [int(wanted[6:-1]) for _, wanted in server.requests if wanted]
    assert begun == sorted(begun) and begun[-1] == sum(fault for fault in faults if isinstance(fault, int))


def test_without_ranges_or_lengths(server, file):
    server.ranges, server.faults = False, [1_000_000]
    fetch(server, file)
    assert_complete(file)
    file.unlink()
    server.lengths = False
    fetch(server, file)
    assert_complete(file)


def test_a_killed_download_is_resumed(server, file):
    server.pause = 0.005
    command = [sys.executable, "-c", FETCH, f"{server.url}/weights.pth", str(file), SHA256]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        part = file.with_name("weights.pth.part")
        while not (part.exists() and part.stat().st_size > 1_000_000):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    server.pause = 0
    fetch(server, file)
    assert_complete(file)
    assert int(server.requests[-1][1][6:-1]) >= 1_000_000


def test_a_part_of_another_file_is_dropped(server, file):
    file.parent.mkdir()
    for wrong in (b"other" * 1000, bytes(len(CONTENT)), bytes(len(CONTENT) + 1)):
        file.with_name("weights.pth.part").write_bytes(wrong)
        fetch(server, file)
        assert_complete(file)
        file.unlink()


def test_a_complete_part_needs_no_network(file):
    """A process that was killed before it gave the file its name left such a part."""
    file.parent.mkdir()
    file.with_name("weights.pth.part").write_bytes(CONTENT)
    downloads.fetch("http://127.0.0.1:1/weights.pth", file, SHA256)
    assert_complete(file)


def test_two_processes_download_once(server, file):
    server.pause = 0.001
    command = [sys.executable, "-c", FETCH, f"{server.url}/weights.pth", str(file), SHA256]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert_complete(file)
    assert len(server.requests) == 1


def test_a_mirror_and_a_proxy(server, file, monkeypatch):
    monkeypatch.setenv(downloads.MIRROR, f"{server.url}/")
    downloads.fetch("https://example.invalid/other/name", file, SHA256)
    assert_complete(file)
    file.unlink()
    monkeypatch.delenv(downloads.MIRROR)
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setattr("urllib.request._opener", None)  # which keeps the proxies of its first use
    downloads.fetch("http://example.invalid/weights.pth", file, SHA256)
    assert_complete(file)
    assert server.requests[-1][0] == "http://example.invalid/weights.pth"
    for mirror in ("mirror", "http://", "file:///mirror"):
        monkeypatch.setenv(downloads.MIRROR, mirror)
        with pytest.raises(UserError, match=f"DDGAN_MIRROR={mirror} must be an address"):
            downloads.fetch("https://example.invalid/weights.pth", file.with_name("b"), SHA256)


@pytest.mark.parametrize("mirror", ["http://[::1", "http://127.0.0.1:9/\N{DEGREE SIGN}", "http://127.0.0.1:x"])
def test_a_mirror_that_cannot_be(mirror, file, monkeypatch):
    monkeypatch.setenv(downloads.MIRROR, mirror)
    monkeypatch.setattr("urllib.request._opener", None)
    with pytest.raises(UserError, match=r"is no valid address: .*; check DDGAN_MIRROR and https_proxy"):
        downloads.fetch("https://example.invalid/weights.pth", file, SHA256)


@pytest.mark.parametrize(
    "faults, message",
    [
        (["404"], "the server answers 404"),
        (["403"], "the server answers 403"),
        (["503"] * 99, "cannot be downloaded: Service Unavailable"),
        ([0] * 99, "the connection ended after 0 of 3,000,000 bytes"),
    ],
)
def test_faults_are_one_line(faults, message, server, file):
    server.faults = list(faults)
    with pytest.raises(Fault, match=message) as error:
        fetch(server, file)
    assert server.url in str(error.value) and "\n" not in str(error.value) and not file.exists()


def test_a_server_that_is_not_there_or_sends_nothing(server, file, monkeypatch):
    with pytest.raises(Fault, match=r"127.0.0.1:1/weights.pth cannot be downloaded: .*refused"):
        downloads.fetch("http://127.0.0.1:1/weights.pth", file, SHA256)
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    server.pause = 1
    with pytest.raises(Fault, match=r"cannot be downloaded: .*timed out"):
        fetch(server, file)


def test_another_file_is_refused(server, file):
    server.files["/weights.pth"] = CONTENT[:-1] + b"x"
    with pytest.raises(
        Fault, match=f"weights.pth is not the published file: its SHA-256 is [0-9a-f]{{64}}, not {SHA256}"
    ):
        fetch(server, file)
    assert [entry.suffix for entry in file.parent.iterdir()] == [".lock"] and len(server.requests) == 1


def test_a_disk_without_room_and_a_server_without_end(server, file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=2**20))
        with pytest.raises(Fault, match=r"takes 3 MiB, and .*cache has 1 MiB free: make room there"):
            fetch(server, file)
    monkeypatch.setattr(downloads, "MAX_BYTES", 2**20)
    with pytest.raises(Fault, match="sends more than 1,048,576 bytes: it is not the published file"):
        fetch(server, file)
    downloads.fetch(f"{server.url}/weights.pth", file, SHA256, size=len(CONTENT))  # its size is known
    assert_complete(file)


def test_a_file_with_other_content_is_not_used(server, file):
    file.parent.mkdir()
    file.write_bytes(CONTENT[:1000])
    with pytest.raises(UserError, match=r"weights.pth is damaged, .*; remove it, and run the same command again"):
        fetch(server, file)
    assert file.read_bytes() == CONTENT[:1000] and not server.requests


def test_a_folder_that_cannot_be_written(server, file):
    file.parent.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be used for downloads"):
        fetch(server, file)


@pytest.mark.parametrize("module", [inception, vgg])
def test_the_addresses(module):
    assert re.fullmatch(r"https://[a-z.]+/\S+", module.URL) and os.path.basename(module.URL) == module.FILE
    assert re.fullmatch(r"[0-9a-f]{64}", module.SHA256) and f"-{module.SHA256[:8]}." in module.FILE
