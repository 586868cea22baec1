"""What is installed, under which licences, and that nothing is fetched while it runs."""

import importlib.metadata
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from commands import ROOT, command
from packaging.requirements import Requirement

# As packages name them. MPL-2.0, of certifi, orjson and tqdm, is about changes to their own files.
FREE = "apache|bsd|mit|isc|python software foundation|psf|mpl|mozilla|zlib|unlicense|hpnd|cc0|cnri"
UNSAID = {"namex": "Apache-2.0"}  # in their repositories only
OF_NVIDIA = ("nvidia", "jax-cuda", "jax_cuda")  # proprietary libraries, of the extras [cuda12] and [cuda13]


def licence(metadata: importlib.metadata.PackageMetadata) -> str:
    """As the package says it: an expression, a classifier, or a line of text."""
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    text = (metadata.get("License") or "").strip().splitlines() or [""]
    said = [metadata.get("License-Expression"), *[c for c in classifiers if c != "OSI Approved"], text[0][:60]]
    return next(filter(None, said), UNSAID.get(metadata["Name"], "?"))


def installed(requirements: list[str], found: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """{name: (version, licence)} of these and all that they need, as far as it is installed."""
    for requirement in map(Requirement, requirements):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if name in found or not applies:
            continue
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = package.version, licence(package.metadata)
        installed(package.requires or [], found)
    return found


def test_licences(request, count):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = installed(project["dependencies"], {})
    all_ = installed([r for rs in project["optional-dependencies"].values() for r in rs], dict(core))
    assert len(core) > 20
    for name, (_, said) in all_.items():
        assert re.search(FREE, said, re.IGNORECASE) or name.startswith(OF_NVIDIA), f"{name}: {said}"
    if folder := request.config.getoption("--record"):
        lines = ["# Licences", "", "Of what is installed, as the packages themselves name them.", ""]
        lines += ["| package | version | licence | needed by |", "|---|---|---|---|"]
        for name, (version, said) in sorted(all_.items()):
            lines.append(f"| {name} | {version} | {said} | {'all' if name in core else 'extras'} |")
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / "licences.md").write_text("\n".join(lines) + "\n")
    count(core=len(core), with_extras=len(all_))


def test_no_known_vulnerability(full, count):
    """Of all that is installed here, by pip-audit; new ones come to be known, so that it is asked for by --full."""
    pytest.importorskip("pip_audit")
    if not full:
        pytest.skip("asks the network: --full")
    command = [sys.executable, "-m", "pip_audit", "--local", "--format=json", "--progress-spinner=off"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout or '{"dependencies": []}')
    asked = {package["name"]: package["vulns"] for package in found["dependencies"] if "vulns" in package}
    if not asked:
        pytest.skip("the database of known vulnerabilities cannot be reached")
    count(packages=len(asked))
    assert not {name: vulns for name, vulns in asked.items() if vulns}


def test_without_a_network(count, tmp_path):
    """Training, evaluation and sampling, in a process that has no network but is told of none either."""
    alone = [shutil.which("unshare") or "unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs network namespaces")
    for arguments in (
        ["--config=digits:smoke", "--config.data.name=digits", f"--config.data.dir={tmp_path / 'data'}"],
        ["--mode=evaluate", "--checkpoint=digits", "--num_samples=100", f"--out={tmp_path / 'judged'}"],
        ["--mode=sample", "--checkpoint=digits", f"--out={tmp_path / 'x.png'}"],
        ["--mode=export", "--checkpoint=digits", f"--out={tmp_path / 'x.bin'}"],
    ):
        argv, options = command(*arguments, f"--workdir={tmp_path / 'run'}")
        ended = subprocess.run([*alone, *argv], **options, capture_output=True, timeout=900)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    count(commands=4)
