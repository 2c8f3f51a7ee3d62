"""Several adapters of one base as one, by joining their ranks: their weighted sum, or side by side.

`W + w1 A1 B1 + w2 A2 B2` is `W + [A1 A2] [w1 B1; w2 B2]`, what PEFT calls "cat". Its "linear",
which adds the As and the Bs and so multiplies one adapter's A by another's B, is left out.
Where it is known which rank is of which adapter, each row of a batch can have one of its own.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ...configs import paths
from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from ..parallel import sharding
from ..transformer import abstract_params
from . import peft

_NAMED = re.compile(r"([\w./:-]+)=(.+)")
_WEIGHTED = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\*(.+)")


def read(adapters, base: pathlib.Path, config: ModelConfig) -> peft.Adapter:
    """Read `DIR`, or several with commas between, each `DIR` or `WEIGHT*DIR`.

    Args:
      adapters: text, or the path of one.
      base, config: of the model, as of `peft.read`.

    Raises:
      UserError: see `peft.read`; a weight is 0, or an adapter holds what cannot be added: whole
        weights or the lengths of DoRA.
    """
    parts = _parse(adapters)
    found = [peft.read(paths.local(name, "adapter"), base, config) for _, name in parts]
    if len(parts) == 1 and parts[0][0] == 1:
        return found[0]
    for (_, name), adapter in zip(parts, found, strict=True):
        _check_low_rank(
            adapter, f"adapter={adapters}: {name}", "be weighed or added to another adapter"
        )
    return _joined(found, [weight for weight, _ in parts], config)


def of_flags(given: Sequence[str]) -> str | dict[str, str]:
    """What `--adapter` asks for, given once or more: what `read` takes, or such by name.

    Raises:
      UserError: several without a name, or of one name.
    """
    named: dict[str, str] = {}
    for text in given:
        match = None if pathlib.Path(text).exists() else _NAMED.fullmatch(text)
        if not match:
            if len(given) == 1:
                return text
            raise UserError(
                f"--adapter={text} must be NAME=DIR where it is given {len(given)} times; their "
                "sum is one: 0.7*DIR,0.3*DIR"
            )
        if match[1] in named:
            raise UserError(f"--adapter={text}: {match[1]} is {named[match[1]]} already")
        named[match[1]] = match[2]
    return named or ""


def side_by_side(
    adapters: Mapping[str, object], base: pathlib.Path, config: ModelConfig
) -> tuple[peft.Adapter, dict[str, np.ndarray]]:
    """Read adapters of which each row of a batch has one: their joined ranks, and whose those are.

    Args:
      adapters: by name, what `read` takes.

    Returns:
      the adapter, and by path of a weight `adapters.Adapted.owner_r`: numbers in the order given.

    Raises:
      UserError: see `read`.
    """
    found = [read(one, base, config) for one in adapters.values()]
    for name, adapter in zip(adapters, found, strict=True):
        _check_low_rank(adapter, f"adapter={name}={adapters[name]}", "be chosen row by row")
    owners: dict[str, list[int]] = {}
    for number, adapter in enumerate(found):
        for path, (a, _) in adapter.factors.items():
            owners.setdefault(path, []).extend([number] * a.shape[-1])
    return _joined(found, [1.0] * len(found), config), {
        path: np.array(numbers, np.int32) for path, numbers in owners.items()
    }


def _check_low_rank(adapter: peft.Adapter, name: str, what: str) -> None:
    for kind, held in (("DoRA", adapter.magnitudes), ("modules_to_save", adapter.replaced)):
        if held:
            raise UserError(f"{name} has {kind} on {min(held)}, which cannot {what}")


def _joined(
    found: Sequence[peft.Adapter], weights: Sequence[float], config: ModelConfig
) -> peft.Adapter:
    names = sharding.names(abstract_params(_untied(config)))
    factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for adapter, weight in zip(found, weights, strict=True):
        for path, (a, b) in adapter.factors.items():
            b = np.float32(weight) * b
            if path in factors:
                first_a, first_b = factors[path]
                stacked = a.ndim + b.ndim - 2 - len(names[path])
                a, b = np.concatenate([first_a, a], -1), np.concatenate([first_b, b], stacked)
            factors[path] = (a, b)
    untied = next((x.config for x in found if x.config != config), config)
    return peft.Adapter(factors, {}, {}, untied)


def _untied(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, tie_embeddings=False)


def _parse(adapters) -> list[tuple[float, str]]:
    text = str(adapters)
    if pathlib.Path(text).exists():
        return [(1.0, text)]
    parts = []
    for part in text.split(","):
        match = _WEIGHTED.fullmatch(part.strip())
        weight, name = (float(match[1]), match[2]) if match else (1.0, part.strip())
        if not name or not weight:
            raise UserError(
                f"adapter={text} must be folders with commas between, each with a weight that is "
                f"not 0 if any: 0.7*DIR,0.3*DIR; {part!r} is neither"
            )
        parts.append((weight, name))
    return parts
