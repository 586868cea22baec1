"""The exceptions that are told in one sentence instead of a traceback."""

import contextlib
import errno
import re
from collections.abc import Iterator

from absl import flags


class UserError(ValueError):
    """A wrong setting or input: what is wrong, its value, what would be right. Commands exit with code 2."""


class Fault(RuntimeError):
    """Something outside went wrong (a full disk, a non-finite loss): what, and what is safe. Commands exit with 1."""


class Interrupted(BaseException):
    """A signal ended a job early; what was done is saved. Commands exit with 75, which asks to be started again.

    Like KeyboardInterrupt no Exception: it is raised in the middle of code that takes an Exception for a fault of its
    own.
    """


@contextlib.contextmanager
def of_flags() -> Iterator[None]:
    """What absl's flags and the configuration files that they read raise within, as a UserError."""
    try:
        yield
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError) as error:
        # A traceback inside the message ends in the sentence that a configuration raised.
        text = " ".join(str(error).split("Error: ")[-1].replace("\\n", " ").split())
        if name := re.fullmatch(r"[\"']*(\w+)[\"']*", text):  # all that a KeyError says
            text = f"this configuration has no field {name[1]!r}: a flag sets one that it has; add others in its file"
        if "Did you mean" in text:
            text = "unknown field of the configuration: did you mean" + text.split("Did you mean")[1].rstrip("'")
        raise UserError(text) from error


_NOT_A_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


@contextlib.contextmanager
def of_a_file(what: str) -> Iterator[None]:
    """What reading a file that a user named raises within: UserError if `what` is no file, Fault if reading it fails.

    A disk, a bucket, permissions or memory say nothing about the content, which may be read on another try.
    """
    try:
        yield
    except OSError as error:
        missing = isinstance(error, FileNotFoundError) or error.errno in _NOT_A_FILE  # buckets give no number
        raise (UserError if missing else Fault)(f"{what} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise Fault(f"{what} cannot be read: not enough memory") from error
