"""The one exception that the command line prints as a sentence."""


class UserError(ValueError):
    """Bad input from a person: the message names the value, the rule and the fix in one sentence."""
