"""The exceptions that are told in one sentence instead of a traceback."""

import contextlib
import re
from collections.abc import Iterator

from absl import flags


class UserError(ValueError):
    """A wrong setting or input: what is wrong, its value, what would be right. Commands exit with code 2."""


class Fault(RuntimeError):
    """Something outside went wrong (a full disk, a non-finite loss): what, and what is safe. Commands exit with 1."""


class Interrupted(Exception):
    """A signal ended a job early; what was done is saved. Commands exit with 75, which asks to be started again."""


@contextlib.contextmanager
def of_flags() -> Iterator[None]:
    """What absl's flags and the configuration files that they read raise within, as a UserError."""
    try:
        yield
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # A traceback inside the message ends in the sentence that a configuration raised.
        text = " ".join(str(error).split("Error: ")[-1].replace("\\n", " ").split())
        if name := re.fullmatch(r"[\"']*(\w+)[\"']*", text):  # all that a KeyError says
            text = f"this configuration has no field {name[1]!r}: a flag sets one that it has; add others in its file"
        if "Did you mean" in text:
            text = "unknown field of the configuration: did you mean" + text.split("Did you mean")[1].rstrip("'")
        raise UserError(text) from error
