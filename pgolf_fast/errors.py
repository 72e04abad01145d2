"""The one exception that the command line shows as a single line instead of a traceback."""


class UserError(Exception):
    """Wrong input or a missing thing, said in one sentence with the remedy."""
