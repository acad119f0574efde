"""The exception that the command line prints as an error message, without a traceback."""


class UserError(ValueError):
    """Bad input from the user. The message is one sentence with the value, the rule and the fix."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, because those of libraries can be pages long."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
