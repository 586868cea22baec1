"""A bucket of Google Cloud Storage on this machine: an emulator on loopback, in a process of its own.

from buckets import bucket  # a fixture

def test_it(bucket): run(..., f"--workdir={bucket.url}/run", env=bucket.env)
"""

import json
import os
import pathlib
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import NamedTuple

import pytest
from commands import ROOT, free_port


class Bucket(NamedTuple):
    """`url` is gs://NAME; a process with the variables of `env` finds the bucket there."""

    url: str
    env: dict[str, str]
    process: subprocess.Popen
    control: pathlib.Path

    def be(self, *words: str) -> None:
        """From now on `refuse` writes, be `slow`, or fail as bucket_server.py says; without words, be well."""
        self.fired.unlink(missing_ok=True)
        self.control.write_text(" ".join(words))

    @property
    def fired(self) -> pathlib.Path:
        """Holds a line for each read that failed since then; or is not there."""
        return self.control.with_name(f"{self.control.name}.fired")

    def contents(self, below: str) -> dict[str, str]:
        """{name: checksum} of all objects whose names begin with `below`."""
        items = json.loads(self._request("GET", f"/storage/v1/b/{self.url[5:]}/o?prefix={below}"))["items"]
        return {item["name"]: item["md5Hash"] for item in items}

    def get(self, name: str) -> bytes:
        quoted = urllib.parse.quote(name, safe="")
        return self._request("GET", f"/storage/v1/b/{self.url[5:]}/o/{quoted}?alt=media")

    def put(self, name: str, content: bytes) -> None:
        quoted = urllib.parse.quote(name, safe="")
        self._request("POST", f"/upload/storage/v1/b/{self.url[5:]}/o?uploadType=media&name={quoted}", content)

    def delete(self, name: str) -> None:
        self._request("DELETE", f"/storage/v1/b/{self.url[5:]}/o/{urllib.parse.quote(name, safe='')}")

    def _request(self, method: str, path: str, content: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/octet-stream"}
        url = self.env["STORAGE_EMULATOR_HOST"] + path
        request = urllib.request.Request(url, content, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def python(self, script: str, *arguments: object) -> str:
        """The standard output of lines of Python, `epath` among their names, which run with the bucket."""
        command = [sys.executable, "-c", f"import sys\nimport os\nfrom etils import epath\n{script}"]
        env = os.environ | self.env | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run([*command, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    def files(self, below: str) -> list[str]:
        """The names of all files below a folder of the bucket."""
        script = "import gcsfs\nprint('\\n'.join(gcsfs.GCSFileSystem().find(sys.argv[1])))"
        return [f"gs://{line}" for line in self.python(script, f"{self.url}/{below}").split()]


def start(folder: pathlib.Path, name: str = "bkt") -> Bucket:
    """Start an emulator with one empty bucket; `folder` is for its control file."""
    port, control = free_port(), folder / "control"
    address = f"http://127.0.0.1:{port}"
    control.write_text("")
    server = ROOT / "tests" / "bucket_server.py"
    command = [sys.executable, "-W", "ignore", str(server), str(port), name, str(control)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{address}/storage/v1/b/{name}", timeout=5).close()
            break
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    env = {
        "EPATH_USE_TF": "false",
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,
        "NO_GCE_CHECK": "true",
        "GCE_METADATA_HOST": "127.0.0.1:1",
        "GCE_METADATA_ROOT": "127.0.0.1:1",
        "GOOGLE_CLOUD_PROJECT": "p",
    }
    return Bucket(f"gs://{name}", env, process, control)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """One emulator for the tests of a module; each takes a folder of its own."""
    pytest.importorskip("gcp_storage_emulator")
    started = start(tmp_path_factory.mktemp("bucket"))
    yield started
    started.process.kill()
    started.process.wait()
