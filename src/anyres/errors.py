"""The one exception that the command line prints as a sentence."""


class UserError(ValueError):
    """Bad input from a person: the message names the value, the rule and the fix in one sentence."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line: libraries add pages to theirs."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
