"""The errors that are the user's to mend: one line each, exit status 2."""


class UserError(Exception):
    """A mistake of the user: one line naming the key or file, the value, the rule and the fix."""


class ConfigError(UserError):
    """A configuration that cannot be: names the key, its value and the rule."""
