"""How a command ends: errors that are the user's to mend, one line each, and exit statuses."""

# Exit statuses of a command: a mistake of the user, told to end and saved (EX_TEMPFAIL of
# sysexits.h: the same command, given again, goes on), another process of the run lost, Ctrl-C.
MISTAKE = 2
SAVED = 75
LOST = 76
INTERRUPTED = 130

_LONGEST = 1000  # characters of a message; what is longer quotes a value without end


class UserError(Exception):
    """A mistake of the user: one line naming the key or file, the value, the rule and the fix."""

    def __str__(self) -> str:
        # One line whatever is in the names and values that it quotes, and safe on any terminal.
        line = " ".join(super().__str__().split())
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class ConfigError(UserError):
    """A configuration that cannot be: names the key, its value and the rule."""
