"""The one exception a caller can mend."""


class LedeError(ValueError):
    """Bad input. The message names the value, what was expected, and how to fix it."""
