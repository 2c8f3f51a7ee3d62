"""Several adapters of one base as one: the weighted sum of what they add, by joining their ranks.

`W + w1 A1 B1 + w2 A2 B2` is `W + [A1 A2] [w1 B1; w2 B2]`, what PEFT calls "cat". Its "linear",
which adds the As and the Bs and so multiplies one adapter's A by another's B, is left out.
"""

import dataclasses
import pathlib
import re

import numpy as np

from ...configs import paths
from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from ..parallel import sharding
from ..transformer import abstract_params
from . import peft

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
    names = sharding.names(abstract_params(_untied(config)))
    factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for (weight, name), adapter in zip(parts, found, strict=True):
        for what, held in (("DoRA", adapter.magnitudes), ("modules_to_save", adapter.replaced)):
            if held:
                raise UserError(
                    f"adapter={adapters}: {name} has {what} on {min(held)}, which cannot be "
                    "weighed or added to another adapter"
                )
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
