"""How a configuration key is declared, and how one value is held to its type and rule."""

import dataclasses
import math
from typing import Any

from .errors import ConfigError
from .rules import Rule


@dataclasses.dataclass(frozen=True)
class Only:
    """Where a key has an effect: where `key` is one of `values`, or set at all if there are none.

    Elsewhere it must be left at its default, since a value that nothing reads is a mistake.
    """

    key: str
    values: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return f"only where {self.key} is {' or '.join(self.values) or 'set'}"

    def holds(self, value) -> bool:
        return value in self.values if self.values else bool(value)


def key(default, doc: str, rule: Rule | None = None, only: Only | None = None) -> Any:
    """Declare one configuration key."""
    return dataclasses.field(default=default, metadata={"doc": doc, "rule": rule, "only": only})


def section(cls, only: Only | None = None) -> Any:
    """Declare a section of keys, and where they have an effect."""
    return dataclasses.field(default_factory=cls, metadata={"only": only})


def checked(name: str, value: Any, kind: type, rule: Rule | None) -> Any:
    """Return a key's value, an int as a float where the key is one.

    Raises:
      ConfigError: another type, no finite number, or against the rule.
    """
    if kind in (int, float) and type(value) is int and abs(value) > 2**53:
        raise ConfigError(f"{name}={shown(value)} must be less than 2**53")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name}={shown(value)} must be of type {kind.__name__}, not "
                          f"{type(value).__name__}")  # fmt: skip
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} must be a finite number")
    if rule and not rule.holds(value):
        raise ConfigError(f"{name}={value!r} must {rule.text}")
    return value


def shown(value: Any) -> str:
    """The value as a message quotes it."""
    try:
        return repr(value)
    except ValueError:  # Python writes out no int of more than 4,300 digits
        return f"<{type(value).__name__}>"
