"""Reads that fail: what a bucket raises, and how long reads are retried, in buckets and on disks alike."""

import contextlib
import errno
import functools
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ddgan_jax.errors import UserError, is_missing, reason_of

Given = str | os.PathLike
T = TypeVar("T")

# Seconds for which a failed read is retried: outages of buckets last longer than those of disks.
DISK_RETRY_SECONDS = 1.0
BUCKET_RETRY_SECONDS = 60.0  # or the environment variable DDGAN_RETRY_SECONDS
DOWNLOAD_RETRY_SECONDS = 10.0  # without a byte: many computers have no internet
MAX_PAUSE = 10.0  # seconds between two attempts
MIN_ATTEMPTS = 3  # unless DDGAN_RETRY_SECONDS is 0, or an attempt takes longer than BUCKET_RETRY_SECONDS


def is_remote(given: Given) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(given).startswith("gs://")


def is_address(given: Given) -> bool:
    """Whether a name is an address of the web."""
    return os.fspath(given).startswith(("http://", "https://"))


@contextlib.contextmanager
def os_errors(what: Given) -> Iterator[None]:
    """Turns what gcsfs, aiohttp or google.auth raise within it into an OSError, as a local disk would raise it."""
    try:
        yield
    except FileNotFoundError as error:
        if not is_remote(what):
            raise
        raise FileNotFoundError(errno.ENOENT, "No such file", os.fspath(what)) from error
    except (OSError, UserError):
        raise
    except Exception as error:  # gcsfs, aiohttp, requests and google.auth have no base in common
        if not is_remote(what):
            raise
        raise OSError(reason_of(error)) from error


def retry(what: Given, action: Callable[[], T]) -> T:
    """Returns `action()`, which reads `what`, after retries while it raises an OSError that may pass.

    A missing file is final. Anything else is retried for a second on a disk, for 10 s at an address and for a minute in
    a bucket, with growing pauses, and at least twice, unless an attempt takes more than a minute, within which some
    clients retry themselves. The last OSError is then raised.
    """
    given = os.environ.get("DDGAN_RETRY_SECONDS") or BUCKET_RETRY_SECONDS
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise UserError(f"DDGAN_RETRY_SECONDS={given} must be a number of seconds of at least 0")
    most = math.inf if is_remote(what) else DOWNLOAD_RETRY_SECONDS if is_address(what) else DISK_RETRY_SECONDS
    seconds = min(limit, most)
    deadline = time.monotonic() + seconds
    pause, attempts = 0.1, 0
    while True:
        attempts, began = attempts + 1, time.monotonic()
        try:
            with os_errors(what):
                return action()
        except OSError as error:
            late = time.monotonic() + pause > deadline
            enough = attempts >= MIN_ATTEMPTS or time.monotonic() - began > BUCKET_RETRY_SECONDS
            if is_missing(error) or limit == 0 or (late and enough):
                raise
            if (is_remote(what) or is_address(what)) and pause == 0.1:
                cause = " ".join(str(error).split())[:200]
                print(f"note: {what} cannot be read ({cause}); trying again for {seconds:.0f} s", file=sys.stderr)
        time.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE)


def silence_gcsfs() -> None:
    """Silences gcsfs's log of each way to credentials that it tries, and of failures, which it also raises."""
    for name in ("gcsfs", "fsspec", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@functools.cache
def bucket_reader() -> Any:
    """The file system that reads from buckets, without a cache of listings.

    It has none of gcsfs's own retries, which take 30 s per request: `retry` replaces them.
    """
    import fsspec

    silence_gcsfs()
    kind = fsspec.get_filesystem_class("gcs")
    request = getattr(kind._request, "__wrapped__", kind._request)  # what a decorator retries
    return type("Reader", (kind,), {"_request": request})(use_listings_cache=False)
