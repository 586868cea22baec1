"""The two exceptions that are told in one sentence instead of a traceback."""


class UserError(ValueError):
    """A wrong setting or input: what is wrong, its value, what would be right. Commands exit with code 2."""


class Fault(RuntimeError):
    """Something outside went wrong (a full disk, a non-finite loss): what, and what is safe. Commands exit with 1."""
