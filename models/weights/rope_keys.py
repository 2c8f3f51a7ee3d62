"""RoPE in a Hugging Face `config.json` <-> the `rope_*` fields of `ModelConfig`.

Types are those of transformers 5.23. Linear scaling (arXiv 2306.15595) is that of Llama 3.1 where
each wavelength counts as long; dynamic scaling changes no text up to the model's longest context,
the longest that puna takes; YaRN (arXiv 2309.00071) has a ramp and a factor of its own. longrope is
left out: its frequencies depend on the length of the text.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from . import keys

KEYS = {"original_max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"}

_EVERY_FREQUENCY = 1e9
_OLD_CONTEXT = "original_max_position_embeddings"
# Keys of each type, and the field that each is where it is one.
_LLAMA3 = {
    "factor": "rope_scaling_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "low_freq_factor": "rope_low_freq_factor",
    _OLD_CONTEXT: "rope_original_positions",
}
_YARN = {
    "factor": "rope_scaling_factor",
    "beta_fast": "rope_high_freq_factor",
    "beta_slow": "rope_low_freq_factor",
    _OLD_CONTEXT: "rope_original_positions",
}
_TYPES: dict[str, set[str]] = {
    "default": set(),
    "dynamic": {"factor", _OLD_CONTEXT},
    "linear": {"factor"},
    "llama3": set(_LLAMA3),
    "yarn": {*_YARN, "attention_factor", "mscale", "mscale_all_dim", "truncate", "finetuned"},
}


def from_hf(
    values: Mapping[str, Any], get: Callable[[str], Any], max_positions: int
) -> dict[str, Any]:
    """Read both layouts: rope_theta beside rope_scaling (before v5), or all in rope_parameters.

    Args:
      values: the parsed config.json.
      get: reads a key of it, or its class's default.
      max_positions: max_position_embeddings.

    Raises:
      UserError: one line that names the key.
    """
    old, new = values.get("rope_scaling"), values.get("rope_parameters")
    if old and new and old != new:
        raise UserError("config.json: rope_scaling and rope_parameters differ; keep one of them")
    name = "rope_scaling" if old else "rope_parameters"
    if not isinstance(old or new or {}, Mapping):
        raise UserError(f"config.json: {name}={keys.short(old or new)} must be an object")
    rope = {key: value for key, value in dict(old or new or {}).items() if value is not None}
    other = rope.pop("type", "default")
    kind = rope.pop("rope_type", other)
    theta = rope.pop("rope_theta") if "rope_theta" in rope else get("rope_theta")
    made: dict[str, Any] = {"rope_theta": _number("rope_theta", theta)}
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise UserError(f"config.json: {name}.partial_rotary_factor must be 1")
    if kind == "linear" and rope.get("factor") == 1:
        kind = "default"
    if kind not in _TYPES:
        *most, last = _TYPES
        raise UserError(
            f"config.json: {name}.rope_type={kind!r} must be {', '.join(most)} or {last}"
        )
    for key, value in rope.items():
        if key not in _TYPES[kind] and not keys.changes_nothing(key, value):
            raise UserError(
                f"config.json: {name}.{key}={keys.short(value)} is not a key of rope_type={kind}"
            )
    if kind in ("llama3", "yarn") and (outside := values.get(_OLD_CONTEXT)) is not None:
        rope[_OLD_CONTEXT] = outside  # in transformers the one outside wins
    read = _Numbers(name, kind, rope)
    if kind == "linear":
        made["rope_scaling_factor"] = read("factor")
        made["rope_low_freq_factor"] = made["rope_high_freq_factor"] = _EVERY_FREQUENCY
    if kind == "llama3":
        rope.setdefault(_OLD_CONTEXT, max_positions)
        made |= {field: read(key) for key, field in _LLAMA3.items()}
    if kind == "yarn":
        made |= _yarn(read, rope, name, max_positions)
    if "rope_original_positions" in made:
        made["rope_original_positions"] = int(made["rope_original_positions"])
    return made


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `rope_parameters` of a model."""
    out: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling_factor == 1.0:
        return out
    if config.rope_ramp != "periods":
        return out | {
            "rope_type": "yarn",
            "attention_factor": config.rope_attention_factor,
            "truncate": config.rope_ramp == "rounded_dims",
            **{key: getattr(config, field) for key, field in _YARN.items()},
        }
    if config.rope_low_freq_factor >= _EVERY_FREQUENCY:
        return out | {"rope_type": "linear", "factor": config.rope_scaling_factor}
    return out | {"rope_type": "llama3"} | {k: getattr(config, f) for k, f in _LLAMA3.items()}


def notes(values: Mapping[str, Any]) -> list[str]:
    """What a model's RoPE does in other programs and not here."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if "dynamic" not in (rope.get("type"), rope.get("rope_type")):
        return []
    return ["config.json: dynamic scaling of RoPE begins beyond max_position_embeddings; "
            "puna has none, and takes no longer text"]  # fmt: skip


def _yarn(read, rope, name, max_positions):
    """As `_compute_yarn_parameters`: unset keys have the values of the paper."""
    old = rope.setdefault(_OLD_CONTEXT, max_positions)
    rope.setdefault("factor", max_positions / _number(f"{name}.{_OLD_CONTEXT}", old))
    for key, usual in (("beta_fast", 32), ("beta_slow", 1)):
        rope[key] = rope.get(key) or usual
    made = {field: read(key) for key, field in _YARN.items()}
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise UserError(f"config.json: {name}.truncate={keys.short(truncate)} must be true or "
                        "false")  # fmt: skip
    made["rope_ramp"] = "rounded_dims" if truncate else "dims"
    factor = made["rope_scaling_factor"]

    def mscale(scale):
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if "attention_factor" in rope:
        made["rope_attention_factor"] = read("attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        made["rope_attention_factor"] = mscale(read("mscale")) / mscale(read("mscale_all_dim"))
    else:
        made["rope_attention_factor"] = mscale(1.0)
    return made


class _Numbers:
    """The numbers of one type of RoPE, by key."""

    def __init__(self, name, kind, rope):
        self.name, self.kind, self.rope = name, kind, rope

    def __call__(self, key):
        if key not in self.rope:
            raise UserError(
                f"config.json: {self.name}.{key} is missing, rope_type={self.kind} needs it"
            )
        return _number(f"{self.name}.{key}", self.rope[key])


def _number(key, value):
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"config.json: {key}={keys.short(value)} must be a number")
    return float(value)
