"""The preparation of datasets of tensorflow-datasets (tfds) as array_record, with TensorFlow."""

import importlib.util
import pathlib
import shutil
import sys
import tempfile
from typing import Any

from ddgan_jax.data.tfds import builder_of, check_folder, check_image, manual_instructions
from ddgan_jax.errors import Fault, UserError, of_a_folder, reason_of
from ddgan_jax.storage import downloads, paths
from ddgan_jax.storage.dashboards import quiet

PREPARED_SIZE = 3  # times its downloads: what a dataset takes with its archives and their content
MAX_FILES = 16  # of a dataset that `prepare` downloads


def prepare(name: str, data_dir: str) -> None:
    """Downloads a dataset that is not in `data_dir`, and writes it there as array_record.

    A dataset that tfds does not know is left to `open_split`, which reports it. Files that a user has to download are
    taken from `data_dir`/downloads/manual. Another process that prepares the same dataset on this host waits. An
    interrupted preparation starts again, and resumes the downloads of a dataset of few files (`_download`).

    Raises:
        UserError: TensorFlow is missing, files have to be downloaded by hand, or `data_dir` cannot be written.
        Fault: files cannot be downloaded or are not the published ones; or the disk is full.
    """
    check_folder(data_dir)
    with quiet():
        builder = builder_of(name, data_dir)
        if builder is None or builder.is_prepared():
            return
    check_image(name, builder.info.features)
    manual = paths.path(data_dir) / "downloads" / "manual"
    if manual_instructions(builder) and not paths.names(manual):
        raise UserError(
            f"dataset {name} is not in {data_dir}, and tfds cannot download it: put what follows into {manual}, or set "
            f"data.path to a folder, zip or LMDB of its images. {manual_instructions(builder)}"
        )
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"dataset {name} is not in {data_dir}, and preparing it needs TensorFlow: run `pip install -r "
            "requirements.txt`, or prepare it on another computer and copy its folder"
        )
    if paths.is_remote(data_dir):
        _prepare(name, data_dir)
        return
    with of_a_folder(f"{data_dir} cannot be used for datasets"):
        folder = pathlib.Path(data_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with downloads.locked(folder / f".{name.replace('/', '-')}"):
            _prepare(name, data_dir)


def _prepare(name: str, data_dir: str) -> None:
    import tensorflow_datasets as tfds

    with quiet():
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        if builder.is_prepared():  # by another process, meanwhile
            return
    print(f"preparing dataset {name} in {data_dir}, once", flush=True)
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:  # bars would fill a log
        tfds.disable_progress_bar()
    config, extracted = tfds.download.DownloadConfig(), None
    if not paths.is_remote(data_dir):
        if not manual_instructions(builder):
            config.manual_dir = _download(name, builder, pathlib.Path(data_dir))
        # A new folder, since tfds uses what it finds extracted unchecked. Where there are no locks, another process may
        # prepare the same dataset.
        (pathlib.Path(data_dir) / "downloads").mkdir(exist_ok=True)
        extracted = tempfile.mkdtemp(prefix=f"extracted-{name.replace('/', '-')}-", dir=f"{data_dir}/downloads")
        config.extract_dir = extracted
    try:
        builder.download_and_prepare(download_config=config)
    except Exception as error:  # tfds, requests, TensorFlow and Beam have no base in common
        if manual_instructions(builder):
            raise UserError(
                f"dataset {name} cannot be prepared ({reason_of(error)}): put what follows into "
                f"{paths.path(data_dir) / 'downloads' / 'manual'}. {manual_instructions(builder)}"
            ) from error
        raise Fault(
            f"dataset {name} cannot be prepared in {data_dir}: {reason_of(error)}; run the same command again, or "
            "prepare it on another computer and copy its folder"
        ) from error
    finally:
        if extracted:
            shutil.rmtree(extracted, ignore_errors=True)
    if not builder.is_prepared():  # tfds leaves a folder of this version unchanged, whatever it contains
        raise UserError(f"{builder.data_dir} is no complete dataset: remove it, and run the same command again")


def _download(name: str, builder: Any, data_dir: pathlib.Path) -> pathlib.Path:
    """Downloads the files of a dataset, if they are few, to a folder where tfds looks for them first; returns it.

    tfds' own client neither resumes a download nor finds soon that there is no internet. It has to load the many files
    of the datasets that have configurations, of which not all are needed.
    """
    # Not the folder of what users download, where the files would pass for those
    folder, files = data_dir / "downloads" / "published" / name.replace("/", "-"), builder.url_infos or {}
    if builder.BUILDER_CONFIGS or len(files) > MAX_FILES or not all(info.filename for info in files.values()):
        return folder
    needed = PREPARED_SIZE * sum(int(info.size) for info in files.values())
    downloads.check_room(f"preparing dataset {name} takes up to", data_dir, needed, f", or {downloads.LARGER_DISK}")
    try:
        for url, info in files.items():
            downloads.fetch(url, folder / info.filename, info.checksum, int(info.size))
    except Fault as error:
        raise Fault(f"{error}: run the same command again, or put the files of dataset {name} into {folder}") from error
    return folder
