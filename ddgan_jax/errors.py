"""The one exception that stands for a mistake of the user rather than of the program."""


class UserError(ValueError):
    """A wrong setting or input, told in one sentence: what is wrong, its value, what would be right.

    Commands print the sentence alone and exit with code 2; anything else that is raised is a fault of
    the program and keeps its traceback.
    """
