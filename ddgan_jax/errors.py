"""The exceptions that a command reports in one line instead of a traceback."""

import contextlib
import difflib
import errno
import re
from collections.abc import Iterator

from absl import flags


class UserError(ValueError):
    """An invalid setting or input: what is wrong, its value, and what would be right. Commands exit with code 2."""


class Fault(RuntimeError):
    """A fault such as a full disk or a non-finite loss: what failed, and what is safe. Commands exit with code 1."""


NOTHING_LOST = "nothing was lost; run the same command to continue"


class Interrupted(BaseException):
    """A signal ended a command early, and its progress is saved. Commands exit with code 75, which asks for a restart.

    Not an Exception, like KeyboardInterrupt: it is raised in the middle of code that would treat an Exception as a
    fault of its own.
    """


# What absl and Python say of a flag's value, as patterns, and what the value must be.
_EXPECTED = {
    "invalid literal for int": " must be an integer",
    "could not convert string to float": " must be a number",
    r"\('Non-boolean argument to boolean flag'": " must be True or False",
}


@contextlib.contextmanager
def of_flags() -> Iterator[None]:
    """Turns what absl's flags raise into a UserError."""
    try:
        yield
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("help"):
            raise UserError("--help lists the flags, and has no value") from error
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), 1)
        hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
        raise UserError(f"there is no flag --{error.flagname}: {hint}") from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError) as error:
        text = str(error).removeprefix("flag ")
        for said, right in _EXPECTED.items():
            text = re.sub(f": {said}.*", right, text, flags=re.DOTALL)
        raise UserError(text) from error


_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def is_missing(error: BaseException) -> bool:
    """Whether an error proves that there is no such file. Other errors of a read may pass."""
    return isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in _NO_SUCH_FILE


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of Python, XLA or TensorStore, means that memory ran out."""
    return isinstance(error, MemoryError) or any(
        sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "can't start new thread")
    )


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def of_a_folder(what: str, remedy: str = "") -> Iterator[None]:
    """Turns an OSError of writing into a folder that a user named into a UserError if another name is the remedy.

    That is so for a path that cannot exist or is not permitted. A full or failing disk is a Fault.
    """
    try:
        yield
    except OSError as error:
        refused = is_missing(error) or error.errno in (errno.EACCES, errno.EPERM, errno.EEXIST, errno.EINVAL)
        raise (UserError if refused else Fault)(f"{what}: {error}" + (remedy and f"; {remedy}")) from error


@contextlib.contextmanager
def of_a_file(what: str) -> Iterator[None]:
    """Turns failures to read a file that a user named into a UserError where there is no such file, else a Fault.

    A disk, a bucket, permissions or memory say nothing about the content, which may be read on another try.
    """
    try:
        yield
    except OSError as error:
        kind = UserError if is_missing(error) else Fault
        raise kind(f"{what} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise Fault(f"{what} cannot be read: not enough memory") from error
