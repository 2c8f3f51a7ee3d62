"""Every configuration key: its type, default, meaning and rule; `architecture.py` has the model's.

A configuration is a `ConfigDict` at the edge (files, command line) and this frozen
`Config` inside; `from_dict` is the only door between the two. A key that is unknown, of
the wrong type or against its rule stops there with one line, see `ConfigError`.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from . import paths
from .architecture import ModelConfig as ModelConfig  # offered here, too
from .errors import ConfigError
from .fields import Only, checked, key, section, shown
from .patterns import are_names, are_options
from .rules import POSITIVE, Rule, at_least, between, check, check_model, more_than, one_of

NOT_EMPTY = Rule("not be empty", lambda v: bool(v.strip()))
NAMES = Rule("be different names, comma separated", are_names)
OPTIONS = Rule("be auto, NAME=VALUE, ..., or empty", are_options)
BELOW_HALF = Rule("be at least 0 and below 0.5", lambda v: 0 <= v < 0.5)
_COPIED = (
    "a path of this machine: copy there first what a URL names (a model of the Hugging Face Hub by "
    "`hf download ID --local-dir DIR`)"
)
_OF_RUNS = f"a run in object storage (gs://BUCKET/RUN), or {_COPIED}"
LOCAL = Rule(f"be {_COPIED}", lambda v: not paths.is_url(v))
RUN = Rule(f"be {_OF_RUNS}", lambda v: not paths.is_url(v) or paths.in_bucket(v))
TOKENIZER = Rule(
    f"be bytes, train, {_OF_RUNS}",
    lambda v: v.strip() and (not paths.is_url(v) or paths.in_bucket(v)),
)
AXIS_SIZE = Rule("be at least 1, or -1 for all devices that are left", lambda v: v == -1 or v >= 1)
ENDS = one_of("auto", "always", "never")
WSD = Only("optimizer.schedule", ("wsd",))
DECAYING = Only("optimizer.schedule", ("cosine", "linear", "wsd"))
ADAPTED = Only("adapter.rank")
STARTED = Only("train.init_from")
ADAM = Only("optimizer.name", ("adamw", "muon"))  # Adafactor has decays of its own


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read: sources are `tfds:NAME[:SPLIT]`, a file, a glob or a URL, comma separated.

    `WEIGHT*` before a source makes a mixture: `3*tfds:python_source:train,1*notes/*.jsonl`.
    """

    train: str = key("tfds:python_source:train", "training sources", NOT_EMPTY)
    validation: str = key("tfds:python_source:validation", "held-out sources; empty = none")
    licences: str = key("", "licence of each part of train, in its order, comma separated; for "
                        "checkpoints and model cards")  # fmt: skip
    seq_len: int = key(512, "tokens of a row", at_least(2))
    text_key: str = key("text", "field of a record that holds its text", NOT_EMPTY)
    images: int = key(0, "image tiles that a row has room for; 0 = no pictures", at_least(0))
    clips: int = key(0, "audio clips that a row has room for; 0 = no sound", at_least(0))
    tokenizer: str = key("bytes", "bytes, train (a BPE on the training data), or a path", TOKENIZER)
    add_bos: str = key("auto", "begin each text with BOS; auto = as the tokenizer says", ENDS)
    add_eos: str = key("auto", "end each document with EOS; auto = as the tokenizer says", ENDS)
    new_tokens: str = key("", "control tokens to add to those of train.init_from, comma separated",
                          NAMES, STARTED)  # fmt: skip
    tokenizer_vocab: int = key(8192, "vocabulary of a BPE trained here", POSITIVE)
    data_dir: str = key("", "where TFDS keeps its data sets; empty = its default", LOCAL)
    workers: int = key(0, "reader processes; 0 = a thread", between(0, 128))
    shuffle: bool = key(True, "shuffle the training documents, differently each epoch")
    bad_records: str = key("skip", "malformed records: skip and note them, or refuse the first",
                           one_of("skip", "refuse"))  # fmt: skip
    max_document_bytes: int = key(64 << 20, "a longer document is a bad record", POSITIVE)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its learning rate over the steps."""

    name: str = key("adamw", "update rule", one_of("adamw", "adafactor", "muon"))
    learning_rate: float = key(1e-3, "peak of the schedule", more_than(0))
    schedule: str = key(
        "cosine", "shape after warm-up", one_of("constant", "cosine", "linear", "wsd")
    )
    warmup_steps: int = key(100, "steps of linear warm-up", at_least(0))
    decay_fraction: float = key(0.2, "share of the steps that wsd decays in", between(0, 1), WSD)
    final_fraction: float = key(0.1, "last learning rate / peak", between(0, 1), DECAYING)
    b1: float = key(0.9, "decay of the first moment, or Muon's momentum", between(0, 0.9999), ADAM)
    b2: float = key(0.95, "decay of the second moment", between(0, 0.99999), ADAM)
    eps: float = key(1e-8, "added to the root of the second moment", more_than(0), ADAM)
    weight_decay: float = key(0.1, "decoupled decay of matrices, not of norms", at_least(0))
    clip_norm: float = key(1.0, "largest global norm of the gradient; 0 = no clipping", at_least(0))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how often."""

    objective: str = key("next_token", "the loss: a file of train/objectives", NOT_EMPTY)
    init_from: str = key("", "weights to start from: a model, a run or RUN@STEP; empty = random",
                         RUN)  # fmt: skip
    with_optimizer: bool = key(False, "init_from is a run, whose moments are kept too")
    trainable: str = key("", "regular expressions of parameters that train; empty = all")
    steps: int = key(1000, "optimizer updates", POSITIVE)
    batch_size: int = key(16, "rows of the global batch", POSITIVE)
    microbatches: int = key(1, "parts the batch is split into, one after another", POSITIVE)
    seed: int = key(0, "of the parameters and of the data order", between(0, 2**31 - 1))
    z_loss: float = key(0.0, "weight of log(Z)^2 in the loss", at_least(0),
                        Only("train.objective", ("next_token", "sft", "multi_token")))  # fmt: skip
    mtp_weight: float = key(0.3, "weight of the loss of the token after the next one", at_least(0),
                            Only("train.objective", ("multi_token",)))  # fmt: skip
    loss_chunk: int = key(1024, "tokens whose logits exist at one time, a device", POSITIVE)
    compiler_options: str = key("auto", "NAME=VALUE, ...; auto = of models/hardware.py", OPTIONS)
    bad_step: str = key("skip", "what to do where the gradient is not finite or spikes",
                        one_of("skip", "rewind", "stop"))  # fmt: skip
    spike_factor: float = key(
        0.0, "a norm of this many times the usual is a spike; 0 = off", at_least(0)
    )
    check_replicas_every: int = key(0, "steps between comparisons of replicas; 0 = never",
                                    at_least(0))  # fmt: skip
    log_every: int = key(10, "steps between logged steps", POSITIVE)
    save_every: int = key(500, "steps between checkpoints, the last step apart", POSITIVE)
    keep: int = key(2, "newest checkpoints kept", POSITIVE)
    keep_best: int = key(
        0, "checkpoints of least validation loss kept beside them; 0 = none", at_least(0)
    )
    keep_every: int = key(0, "multiples of it are kept for ever; 0 = none", at_least(0))
    local_dir: str = key("", "faster disk for checkpoints between those; empty = none", LOCAL)
    local_every: int = key(
        50, "steps between checkpoints in local_dir", POSITIVE, Only("train.local_dir")
    )
    eval_every: int = key(500, "steps between evaluations; 0 = only at the end", at_least(0))


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Learning from pairs of a chosen and a rejected answer, `train.objective=preference`."""

    loss: str = key(
        "sigmoid", "loss of a pair: sigmoid is DPO",
        one_of("sigmoid", "sigmoid_norm", "robust", "ipo", "ipo_norm", "hinge", "simpo", "orpo"),
    )  # fmt: skip
    beta: float = key(0.1, "weight of the difference of log-probabilities", more_than(0))
    label_smoothing: float = key(
        0.0, "share of pairs that are labelled the wrong way round", BELOW_HALF,
        Only("preference.loss", ("sigmoid", "sigmoid_norm", "robust", "simpo")),
    )  # fmt: skip
    margin: float = key(0.5, "gamma of SimPO: how far a chosen answer must win", at_least(0),
                        Only("preference.loss", ("simpo",)))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters (LoRA, DoRA), which alone train; `rank=0` trains without."""

    rank: int = key(0, "rank of the adapters; 0 = none", at_least(0))
    alpha: float = key(16.0, "adapters are scaled by alpha / rank", more_than(0), ADAPTED)
    rslora: bool = key(False, "scale by alpha / sqrt(rank) instead", None, ADAPTED)
    dora: bool = key(False, "train the length of each output's weights apart", None, ADAPTED)
    targets: str = key("^(blocks|tail)/.*/w", "regular expressions of the weights that are adapted",
                       NOT_EMPTY, ADAPTED)  # fmt: skip
    quantize: str = key(
        "none", "how the frozen weights are stored", one_of("none", "int8", "int4", "nf4"), ADAPTED
    )


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Learning from a teacher's distribution, `train.objective=distill`."""

    teacher: str = key("", "model or run with the vocabulary of the student", LOCAL)
    records: str = key("text", "what is read", one_of("text", "conversations"))
    beta: float = key(0.0, "divergence: 0 = forward KL, 1 = reverse KL, between = Jensen-Shannon",
                      between(0, 1))  # fmt: skip
    temperature: float = key(1.0, "what logits of both are divided by", more_than(0))
    top_k: int = key(0, "ids of the teacher, the others being one; 0 = all", at_least(0))
    hard: float = key(0.0, "weight of the cross-entropy; the rest is the divergence's",
                      between(0, 1))  # fmt: skip
    hard_schedule: str = key("constant", "how that weight changes over train.steps",
                             one_of("constant", "linear", "cosine"))  # fmt: skip
    hard_end: float = key(1.0, "that weight in the last step", between(0, 1),
                          Only("distill.hard_schedule", ("linear", "cosine")))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Reward models from pairs of answers, `train.objective=reward`."""

    center: float = key(0.0, "weight of the squared sum of a pair's rewards", at_least(0))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices."""

    slices: int = key(1, "replicas over the data-centre network", AXIS_SIZE)
    pipeline: int = key(1, "stages that the layers are split into", AXIS_SIZE)
    data: int = key(-1, "replicas that split the batch", AXIS_SIZE)
    fsdp: int = key(1, "split of batch, parameters and optimizer state", AXIS_SIZE)
    expert: int = key(1, "split of batch, parameters and the experts", AXIS_SIZE)
    context: int = key(1, "split of the row's length and of the parameters", AXIS_SIZE)
    tensor: int = key(1, "split of heads, MLP width and vocabulary", AXIS_SIZE)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How much of the validation data is measured, and tasks that a run is asked as it trains."""

    batch_size: int = key(16, "rows of a batch", POSITIVE)
    max_rows: int = key(0, "rows evaluated; 0 = the whole split", at_least(0))
    tasks: str = key("", "packaged tasks, and TOML or JSON files of tasks, comma separated", NAMES)
    tasks_every: int = key(
        0, "steps between the tasks; 0 = only at the end", at_least(0), Only("eval.tasks")
    )
    tasks_limit: int = key(0, "documents of each task; 0 = all", at_least(0), Only("eval.tasks"))
    tasks_dir: str = key("", "what relative paths of tasks are relative to; empty = their file's "
                         "folder", LOCAL, Only("eval.tasks"))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """What `train.objective=sft` learns of a conversation."""

    learn: str = key("assistant", "whose tokens are learnt", one_of("assistant", "all"))
    date: str = key("26 Jul 2024", "today, for chat templates that write it; the same every day")


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainConfig = section(TrainConfig)
    preference: PreferenceConfig = section(
        PreferenceConfig, Only("train.objective", ("preference",))
    )
    distill: DistillConfig = section(DistillConfig, Only("train.objective", ("distill",)))
    reward: RewardConfig = section(RewardConfig, Only("train.objective", ("reward",)))
    adapter: AdapterConfig = section(AdapterConfig)
    mesh: MeshConfig = section(MeshConfig)
    eval: EvalConfig = section(EvalConfig)
    sft: SftConfig = section(SftConfig)


def from_dict(values: Mapping, cls: type = Config, prefix: str = "") -> Any:
    """Build and check the frozen configuration `cls` from nested mappings.

    Args:
      values: a `ConfigDict` or plain nested dict; a key left out takes its default.
      cls: the section to build, `Config` for a whole experiment.
      prefix: where `values` stands in the whole, for messages.

    Raises:
      ConfigError: one line naming the key, its value, the rule and, where close, the fix.
    """
    config = build(values, cls, prefix)
    if isinstance(config, Config):
        check(config)
    elif isinstance(config, ModelConfig):
        check_model(config)
    return config


def build(values: Mapping, cls: type = Config, prefix: str = "") -> Any:
    """`from_dict` without the rules that join keys, for what is to be completed and checked.

    Raises:
      ConfigError: a key that does not exist, a value of a wrong type or against its own rule.
    """
    return _build(values, cls, prefix)


def flatten(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one of dotted names."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def to_dict(config) -> dict:
    """The nested plain dict of a configuration, as it is saved."""
    return dataclasses.asdict(config)


def keys(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, type, Any, str]]:
    """Every key under `cls` as (dotted name, type, default, meaning)."""
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(types[field.name]):
            yield from keys(types[field.name], f"{prefix}{field.name}.")
        else:
            doc = field.metadata["doc"]
            if rule := field.metadata["rule"]:
                doc = f"{doc} (must {rule.text})"
            if only := field.metadata["only"]:
                doc = f"{doc} ({only.text})"
            yield f"{prefix}{field.name}", types[field.name], field.default, doc


def parse(name: str, text: str) -> Any:
    """The value of a dotted key from its text on the command line, not yet held to its rule.

    Raises:
      ConfigError: there is no such key, or the text is of another type.
    """
    kinds = {known: kind for known, kind, *_ in keys()}
    if name not in kinds:
        raise ConfigError(explain_unknown(name))
    kind = kinds[name]
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{name}={text!r} must be of type {kind.__name__}") from None


def explain_unknown(name: str) -> str:
    """The one-line message for a dotted key that does not exist."""
    known = [k for k, *_ in keys()]
    sections = {k.rsplit(".", i)[0] for k in known for i in (1, 2) if k.count(".") >= i}
    if name in sections:
        return f"{name} is a section, not a key; name a key in it, such as {name}.{_first(name)}"
    last = name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(name, known, 1, 0.75)
    close = close or [k for k in known if k.rsplit(".", 1)[-1] == last]
    close = close or difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {close[0]}?" if close else "docs/config.md lists the keys"
    return f"{name} is not a key; {hint}"


def _first(section_name: str) -> str:
    return next(k for k, *_ in keys() if k.startswith(section_name + "."))[len(section_name) + 1 :]


def _build(values, cls, prefix):
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ConfigError(
            f"{prefix.rstrip('.') or 'the configuration'}={shown(values)} must be a section of keys"
        )
    types = typing.get_type_hints(cls)
    for name in values:
        if name not in types:
            raise ConfigError(explain_unknown(f"{prefix}{name}"))
    made = {}
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        name, kind = f"{prefix}{field.name}", types[field.name]
        try:
            value = values[field.name]
        except Exception as e:  # a placeholder of ml_collections that nobody filled
            raise ConfigError(f"{name} has no value ({e}); set --config.{name}=VALUE") from e
        if dataclasses.is_dataclass(kind):
            made[field.name] = _build(value, kind, f"{name}.")
        else:
            made[field.name] = checked(name, value, kind, field.metadata["rule"])
    return cls(**made)
