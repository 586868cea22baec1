"""Models in repositories of the Hugging Face Hub: `hf://OWNER/NAME`, with `@REVISION` and `/FILE.safetensors`.

huggingface_hub downloads a file into its own cache, with the credentials of `hf auth login` or HF_TOKEN, and this
module chooses the file and bounds its size. Only .safetensors files are read, which contain numbers and text.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from ddgan_jax.devices.processes import say
from ddgan_jax.errors import Fault, UserError, reason_of
from ddgan_jax.storage import paths, safetensors

DEFAULT_FILE = "model.safetensors"  # the one that is read if a repository has several
MAX_BYTES = 4 * 2**30  # of a file: a billion weights in float32
TIMEOUT = 30.0  # seconds until the Hub answers
LISTED = 20  # files in an error message
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib")  # endings of files that can run code
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"

_WORD = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"hf://({_WORD}/{_WORD})(?:@(refs/pr/[0-9]+|{_WORD}))?(?:/(.+))?", re.ASCII)


def is_hub(path: str) -> bool:
    """Whether `path` names a model of the Hub. pathlib makes one slash of two: `parse` refuses what it leaves."""
    return path.startswith("hf:/")


def parse(path: str) -> tuple[str, str, str]:
    """(OWNER/NAME, revision, file or '') of a path. Raises UserError if it is malformed, or names another file type."""
    if path.endswith(PICKLES):
        raise UserError(f"{path}: only .safetensors files are read from the Hub, since a pickle can run any program")
    match = _NAME.fullmatch(path)
    repo, revision, file = match.groups() if match else ("", None, None)
    valid_file = file is None or (file.endswith(".safetensors") and _is_plain(file))
    if not match or not valid_file or repo.endswith(".safetensors"):
        raise UserError(
            f"{path} names no model of the Hub: write hf://OWNER/NAME, hf://OWNER/NAME@REVISION or "
            "hf://OWNER/NAME/FILE.safetensors; a revision is a commit, a tag or a branch"
        )
    return repo, revision or "main", file or ""


def local_name(path: str) -> str:
    """The name of a model without its owner and revision, 'NAME' or 'NAME.FILE', for results in the working folder."""
    repo, _, file = parse(path)
    stem = os.path.basename(file).removesuffix(".safetensors")
    return ".".join([repo.partition("/")[2], *([stem] if stem else [])])


def read(path: str) -> tuple[safetensors.Arrays, dict[str, Any], int, dict[str, str]]:
    """The content of the file that `path` names, as `safetensors.read` returns it. Downloads it unless it is cached.

    Raises:
        UserError: the repository, revision or file does not exist, is not accessible, or is not of this project.
        Fault: the Hub cannot be reached, or the file is damaged.
    """
    file = download(path)
    try:
        _check_size(path, paths.size_of(file))
        return safetensors.read(file)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Fault as error:
        repo = parse(path)[0]
        remedy = f"`hf cache rm model/{repo}` removes this copy, and the next use downloads it again"
        raise Fault(f"{path}: {error}; {remedy}") from error


def download(path: str) -> str:
    """The file that `path` names, in huggingface_hub's cache; it is downloaded unless its newest version is there.

    Without a network, and with HF_HUB_OFFLINE=1, it is the version in the cache. Raises as `read`.
    """
    repo, revision, file = parse(path)
    try:
        from huggingface_hub import HfApi, constants
    except ImportError as error:
        raise UserError(
            f"{path} is on the Hub, which needs huggingface_hub: run `pip install huggingface_hub`"
        ) from error
    if constants.HF_HUB_OFFLINE:
        if cached := _in_cache(path):
            return cached
        raise UserError(f"{path} is not in the cache, and HF_HUB_OFFLINE is set: unset it to download the model")
    api = HfApi(library_name="ddgan_jax")
    try:
        with _one_line(path):
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
            sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
            file = _choose(path, file, sizes)
            _check_size(path, sizes[file])
            return api.hf_hub_download(repo, file, revision=revision)
    except Fault as fault:
        if cached := _in_cache(path):
            say(f"note: {fault}; the copy in the cache is used")
            return cached
        raise


def _is_plain(file: str) -> bool:
    """Whether a name in a repository is a path below it, of printable characters, on every system."""
    parts = file.split("/")
    return file.isprintable() and not set("\\:") & set(file) and not {"", ".", ".."} & set(parts)


def _choose(path: str, file: str, names: Iterable[str]) -> str:
    """`file`, or if it is '' the model among the `names` in a repository. Raises UserError unless there is one."""
    names = sorted(filter(_is_plain, names))
    found = [name for name in names if name.endswith(".safetensors")]
    listed = ", ".join(found[:LISTED]) + ", ..." * (len(found) > LISTED)
    if not found:
        pickles = [name for name in names if name.endswith(PICKLES)]
        only = f", only {pickles[0]}, and a pickle can run any program" if pickles else ""
        raise UserError(f"{path} has no .safetensors file{only}: `Model.save` and --mode=export write one")
    if file and file not in found:
        raise UserError(f"{path}: there is no such file; the repository has {listed}")
    if not file and len(found) > 1 and DEFAULT_FILE not in found:
        raise UserError(f"{path} has several models: add the file to the name, one of {listed}")
    return file or (found[0] if len(found) == 1 else DEFAULT_FILE)


def _check_size(path: str, size: int | None) -> None:
    """Raises UserError for a file that is larger than any generator, and Fault if its size is unknown."""
    if size is None:
        raise Fault(f"{path} cannot be downloaded: the Hub does not report its size")
    if size > MAX_BYTES:
        raise UserError(
            f"{path} has {size / 2**30:,.1f} GiB, and at most {MAX_BYTES / 2**30:.0f} GiB are read from the Hub: "
            "download it with `hf download`, and name the local file"
        )


def _in_cache(path: str) -> str:
    """The file that `path` names, in the last version of its revision that is in the cache; '' if it has none."""
    from huggingface_hub import constants, errors, scan_cache_dir

    repo, revision, file = parse(path)
    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except errors.CacheNotFound:
        return ""
    versions = [v for found in repos if (found.repo_type, found.repo_id) == ("model", repo) for v in found.revisions]
    files: dict[str, str] = {}
    for version in versions:
        if revision == version.commit_hash or revision in version.refs:
            files = {f.file_path.relative_to(version.snapshot_path).as_posix(): str(f.file_path) for f in version.files}
    if file or not files:
        return files.get(file, "")
    return files[_choose(path, file, files)]


@contextlib.contextmanager
def _one_line(path: str) -> Iterator[None]:
    """Turns errors of huggingface_hub into a UserError if another name or a login is the remedy, else into a Fault."""
    from huggingface_hub import errors

    repo, revision, _ = parse(path)
    try:
        yield
    except (UserError, Fault):
        raise
    except errors.GatedRepoError as error:
        raise UserError(f"{path} is gated: accept the conditions on the page of {repo}, and {LOG_IN}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{path}: there is no model {repo}, or it is private: check the name, or {LOG_IN}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{path}: {repo} has no revision {revision}: name a commit, a tag or a branch") from error
    except errors.HFValidationError as error:
        raise UserError(f"{path} names no model of the Hub: {reason_of(error)}") from error
    except Exception as error:  # httpx, requests, hf_xet and the server's JSON have no common base class
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(f"{path} is not accessible ({reason_of(error)}): {LOG_IN}") from error
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None  # the failed request
        raise Fault(f"{path} cannot be downloaded: {reason_of(cause or error)}") from error
