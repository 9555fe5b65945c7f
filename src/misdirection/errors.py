"""The one exception a user is meant to read."""


class MisdirectionError(Exception):
    """Bad input or an impossible request, in one line that names the culprit and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """
