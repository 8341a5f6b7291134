"""The one error that users are meant to see, and how it is worded."""


class InputError(Exception):
    """Something that the user gave cannot be used.

    The message is one line that names the argument or the file, what it is and what it has to be.
    The command `vsod` prints it without a traceback and exits with 2.
    """


def describe(error: Exception) -> str:
    """One line for an error; the file first, where there is one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    return " ".join(str(error).split())


class Stopped(Exception):
    """The user stopped it (Ctrl-C, or SIGTERM); the message says what is kept.  Exit code 130."""


def one_line(error: BaseException) -> str:
    """The message of an error of another library, whose first line says it; its kind if empty."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)
