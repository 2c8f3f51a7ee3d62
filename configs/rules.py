"""Rules of single values, and rules that join keys: what a value cannot say of itself.

Each is one line when it is broken: the key, its value, what it must be and why.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

from .errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a single value must satisfy: `text` completes the sentence "key=value must ..."."""

    text: str
    holds: Callable[[Any], bool]


def at_least(low) -> Rule:
    return Rule(f"be at least {low}", lambda v: v >= low)


POSITIVE = at_least(1)


def more_than(low) -> Rule:
    return Rule(f"be more than {low}", lambda v: v > low)


def between(low, high) -> Rule:
    return Rule(f"lie between {low} and {high}", lambda v: low <= v <= high)


def one_of(*names: str) -> Rule:
    return Rule("be one of " + ", ".join(names), lambda v: v in names)


def _multiple(name_a, a, name_b, b):
    if a % b:
        raise ConfigError(f"{name_a}={a} must be a multiple of {name_b}={b}")


def check_model(m) -> None:
    """Raise `ConfigError` for an architecture whose keys contradict each other."""
    _multiple("model.num_heads", m.num_heads, "model.num_kv_heads", m.num_kv_heads)
    if m.rope_high_freq_factor < m.rope_low_freq_factor:
        raise ConfigError(
            f"model.rope_high_freq_factor={m.rope_high_freq_factor} must be at least "
            f"model.rope_low_freq_factor={m.rope_low_freq_factor}"
        )
    if m.temperature_scale and not m.nope_interval:
        raise ConfigError(
            f"model.temperature_scale={m.temperature_scale} acts on NoPE layers only and must be 0 "
            "where model.nope_interval=0"
        )
    if m.moe_interval:
        _check_experts(m)
    elif m.num_experts:
        raise ConfigError(
            f"model.num_experts={m.num_experts} must be 0 where model.moe_interval=0; "
            "set model.moe_interval=1 to make every layer mixture-of-experts"
        )
    if m.mlp_bias and m.moe_interval:
        raise ConfigError("model.mlp_bias=True must be False where model.moe_interval is set: "
                          "experts have no biases")  # fmt: skip
    if m.cross.interval:
        _check_cross(m)
    elif m.vision.num_layers:
        v = m.vision
        _multiple("model.vision.embed_dim", v.embed_dim, "model.vision.num_heads", v.num_heads)
        if v.embed_dim // v.num_heads % 4:
            raise ConfigError(
                f"model.vision.embed_dim={v.embed_dim} / model.vision.num_heads={v.num_heads} = "
                f"{v.embed_dim // v.num_heads} must be a multiple of 4 for the 2-D RoPE"
            )
        # The pixel shuffle joins 2 x 2 patches.
        _multiple("model.vision.image_size", v.image_size, "2 * model.vision.patch_size",
                  2 * v.patch_size)  # fmt: skip
        _below_vocab("model.vision.token_id", v.token_id, m)
    if m.audio.num_layers:
        a = m.audio
        _multiple("model.audio.embed_dim", a.embed_dim, "2 * model.audio.num_heads",
                  2 * a.num_heads)  # fmt: skip
        _below_vocab("model.audio.token_id", a.token_id, m)
        if m.vision.num_layers and a.token_id == m.vision.token_id:
            raise ConfigError(
                f"model.audio.token_id={a.token_id} must differ from model.vision.token_id"
            )


def _below_vocab(name, value, m):
    if value >= m.embedding_rows:
        more = f" + model.vision.extra_rows={m.vision.extra_rows}" if m.vision.extra_rows else ""
        raise ConfigError(f"{name}={value} must be below model.vocab_size={m.vocab_size}{more}")


# Of an image whose tiles are read together: the tables have an entry for each grid of them.
MOST_TILES = 64


def _check_cross(m):
    """Of layers that attend to images, and of their tower."""
    x, v = m.cross, m.vision
    if v.max_tiles > MOST_TILES:
        raise ConfigError(
            f"model.vision.max_tiles={v.max_tiles} must be at most {MOST_TILES} where "
            f"model.cross.interval={x.interval}"
        )
    for name, value in (("interval", x.interval), ("first", x.first + 1)):
        if value > m.num_layers:
            raise ConfigError(
                f"model.cross.{name}={getattr(x, name)} is beyond model.num_layers={m.num_layers}"
            )
    if x.first >= x.interval:
        raise ConfigError(
            f"model.cross.first={x.first} must be below model.cross.interval={x.interval}"
        )
    for name in ("num_layers", "global_layers"):
        if not getattr(v, name):
            raise ConfigError(
                f"model.vision.{name}=0 must be at least 1 where "
                f"model.cross.interval={x.interval}: there would be nothing to attend to"
            )
    if x.interval == 1:
        raise ConfigError("model.cross.interval=1 must be at least 2: no layer would read the text")
    for name, plain in (
        ("moe_interval", 0), ("tie_embeddings", False), ("attention_bias", "none"),
        ("mlp_bias", False),
    ):  # fmt: skip
        if getattr(m, name) != plain:
            raise ConfigError(
                f"model.{name}={getattr(m, name)} must be {plain} where "
                f"model.cross.interval={x.interval}: no Llama has both"
            )
    _multiple("model.vision.embed_dim", v.embed_dim, "model.vision.num_heads", v.num_heads)
    _multiple("model.vision.image_size", v.image_size, "model.vision.patch_size", v.patch_size)
    last = v.intermediate_layers.rpartition(",")[2]
    if last and int(last) >= v.num_layers:
        raise ConfigError(
            f"model.vision.intermediate_layers={v.intermediate_layers} must be below "
            f"model.vision.num_layers={v.num_layers}"
        )
    _below_vocab("model.vision.token_id", v.token_id, m)


def _check_experts(m):
    if m.moe_interval > m.num_layers:
        raise ConfigError(
            f"model.moe_interval={m.moe_interval} must be at most model.num_layers={m.num_layers}, "
            "or no layer has experts"
        )
    for name in ("num_experts", "expert_dim"):
        if not getattr(m, name):
            raise ConfigError(
                f"model.{name}=0 must be at least 1 where model.moe_interval={m.moe_interval}"
            )
    if m.experts_per_token > m.num_experts:
        raise ConfigError(
            f"model.experts_per_token={m.experts_per_token} must be at most "
            f"model.num_experts={m.num_experts}"
        )
    if m.router == "expert_choice":
        for name in ("load_balance_weight", "bias_update_rate"):
            if getattr(m, name):
                raise ConfigError(
                    f"model.{name}={getattr(m, name)} must be 0 where model.router=expert_choice, "
                    "whose load is even by construction"
                )


def check(c) -> None:
    """Raise `ConfigError` for keys that contradict each other."""
    check_model(c.model)
    _check_effects(c, c)
    _check_schedule(c.optimizer, c.train.steps)
    if c.data.seq_len > c.model.max_positions:
        raise ConfigError(
            f"data.seq_len={c.data.seq_len} must be at most "
            f"model.max_positions={c.model.max_positions}"
        )
    if c.data.tokenizer == "train" and c.data.tokenizer_vocab > c.model.vocab_size:
        raise ConfigError(
            f"data.tokenizer_vocab={c.data.tokenizer_vocab} must be at most "
            f"model.vocab_size={c.model.vocab_size}"
        )
    if c.model.cross.interval:
        _multiple("data.images", c.data.images, "model.vision.max_tiles", c.model.vision.max_tiles)
    for key, encoder, section in (
        ("images", c.model.vision, "vision"), ("clips", c.model.audio, "audio"),
    ):  # fmt: skip
        if getattr(c.data, key) and not encoder.num_layers:
            raise ConfigError(
                f"data.{key}={getattr(c.data, key)} must be 0 where model.{section}.num_layers=0: "
                "the model has no encoder for them"
            )
    _multiple("train.batch_size", c.train.batch_size, "train.microbatches", c.train.microbatches)
    _multiple("train.keep_every", c.train.keep_every, "train.save_every", c.train.save_every)
    if c.train.keep_best:
        _check_best(c)
    if c.train.local_dir and c.train.local_every >= c.train.save_every:
        raise ConfigError(
            f"train.local_every={c.train.local_every} must be below "
            f"train.save_every={c.train.save_every} where train.local_dir is given"
        )
    if c.adapter.rank:
        for name in ("trainable", "with_optimizer"):
            if value := getattr(c.train, name):
                raise ConfigError(
                    f"train.{name}={value} must be left out where adapter.rank={c.adapter.rank}: "
                    "new adapters train, and nothing else"
                )
    axes = {f.name: getattr(c.mesh, f.name) for f in dataclasses.fields(c.mesh)}
    if sum(v == -1 for v in axes.values()) > 1:
        inferred = " and ".join(f"mesh.{k}=-1" for k, v in axes.items() if v == -1)
        raise ConfigError(f"{inferred}: at most one axis can take the devices that are left")


def _check_best(c):
    """What is evaluated must be saved, or the best is not there to be kept."""
    best, evaluates, saves = c.train.keep_best, c.train.eval_every, c.train.save_every
    if not c.data.validation:
        raise ConfigError(
            f"train.keep_best={best} must be 0 where data.validation is empty: there is no loss to "
            "judge by"
        )
    if not evaluates or evaluates % saves:
        raise ConfigError(
            f"train.eval_every={evaluates} must be a multiple of train.save_every={saves} where "
            f"train.keep_best={best}: what is evaluated must be saved"
        )


def _check_effects(c, section, prefix="", of_section=None):
    """A key that has no effect where another is as it is must be left at its default."""
    for field in dataclasses.fields(section):
        name, value = prefix + field.name, getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _check_effects(c, value, f"{name}.", field.metadata["only"])
            continue
        for only in filter(None, (of_section, field.metadata["only"])):
            other = operator.attrgetter(only.key)(c)
            if value != field.default and not only.holds(other):
                raise ConfigError(
                    f"{name}={value} must be left at {field.default} where "
                    f"{only.key}={other or repr(other)}: it has an effect {only.text}"
                )


def _check_schedule(o, steps):
    if o.warmup_steps > steps:
        raise ConfigError(
            f"optimizer.warmup_steps={o.warmup_steps} must be at most train.steps={steps}: a short "
            "run needs a short warm-up"
        )
    if o.schedule == "wsd" and o.warmup_steps + round(o.decay_fraction * steps) > steps:
        raise ConfigError(
            f"optimizer.decay_fraction={o.decay_fraction} of train.steps={steps} must leave room "
            f"for optimizer.warmup_steps={o.warmup_steps}"
        )
