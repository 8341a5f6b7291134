"""The one error that users are meant to see."""


class InputError(Exception):
    """Something that the user gave cannot be used.

    The message is one line that names the argument or the file, what it is and what it has to be.
    The command `vsod` prints it without a traceback and exits with 2.
    """
