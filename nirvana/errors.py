"""The one exception type that a user of nirvana has to catch."""


class NirvanaError(Exception):
    """Bad input. The message is one line that names the value, the limit and the remedy.

    The command line prints it and exits with code 2; anything else that escapes is a bug and exits with 1.
    """
