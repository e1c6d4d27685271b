"""The one exception that a command turns into one sentence and exit code 2."""


class UserError(Exception):
    """Something the caller can put right: a path, a file's content, an option, a missing package.

    The text is one sentence that names the file (and the record in it) or the option, what is
    wrong, and where it helps, what to do.
    """
