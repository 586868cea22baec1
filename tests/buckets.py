"""A bucket of Google Cloud Storage on this machine: an emulator on loopback, in a process of its own.

from buckets import bucket  # a fixture

def test_it(bucket): run(..., f"--workdir={bucket.url}/run", env=bucket.env)
"""

import os
import pathlib
import subprocess
import sys
import time
import urllib.error
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
        """From now on `refuse` writes, be `slow`, or neither."""
        self.control.write_text(" ".join(words))

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
