"""Comma-separated lists in a key: names, numbers, and patterns of parameters' paths."""

import difflib
import re
from collections.abc import Sequence

from .errors import ConfigError


def names(text: str) -> tuple[str, ...]:
    """The names in a list, without the blanks around them."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def are_names(text: str) -> bool:
    """Whether a text is empty or a list of different names."""
    found = names(text)
    return not text or len(set(found)) == len(found) > 0


def are_options(text: str) -> bool:
    """Whether a text is empty or a list of `auto` and NAME=VALUE."""
    return all(x == "auto" or re.fullmatch(r"\w+\s*=\s*\S+", x) for x in names(text))


def are_rising(text: str) -> bool:
    """Whether a text is empty or a list of numbers, each larger than the one before."""
    if not text:
        return True
    found = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 9 for part in found):
        return False
    numbers = list(map(int, found))
    return numbers == sorted(set(numbers))


def matching(key: str, text: str, paths: Sequence[str]) -> list[str]:
    """Those of `paths` in which one of the expressions is found.

    Args:
      key: the configuration key whose value is `text`, for messages.
      paths: such as `blocks/layer_0/attention/wq_DNH`.

    Raises:
      ConfigError: an expression is malformed, or nothing matches it.
    """
    patterns = []
    for part in names(text):
        try:
            patterns.append(re.compile(part))
        except re.error as e:
            raise ConfigError(f"{key}={text}: {part} is no regular expression: {e}") from None
    for pattern in patterns:
        if not any(pattern.search(path) for path in paths):
            close = difflib.get_close_matches(pattern.pattern, paths, 1, 0.3) or paths[:1]
            raise ConfigError(
                f"{key}={text}: no parameter's path has {pattern.pattern}; "
                f"a path is like {close[0]}"
            )
    return [path for path in paths if any(pattern.search(path) for pattern in patterns)]
