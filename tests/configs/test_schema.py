"""Every user mistake that the schema can see is one line that names the key and the rule."""

import dataclasses

import pytest

from puna.configs import get_config, names, schema
from puna.configs.errors import ConfigError
from puna.train import objectives

MISTAKES = [
    ("train.stepz", 3, "train.stepz is not a key; did you mean train.steps?"),
    ("train.learning_rate", 0.1, "did you mean optimizer.learning_rate?"),
    ("model.nheads", 4, "did you mean model.num_heads?"),
    ("model.vision.patchsize", 4, "did you mean model.vision.patch_size?"),
    ("zzz", 1, "zzz is not a key"),
    ("model", 3, "model=3 must be a section"),
    ("model.vision", 1, "model.vision=1 must be a section"),
    ("train.steps", 1.5, "train.steps=1.5 must be of type int, not float"),
    ("train.steps", "9", "train.steps='9' must be of type int, not str"),
    ("train.steps", True, "train.steps=True must be of type int, not bool"),
    ("train.steps", None, "train.steps=None must be of type int"),
    ("train.steps", 0, "train.steps=0 must be at least 1"),
    ("train.steps", 2**60, "must be less than 2**53"),
    ("train.batch_size", -4, "train.batch_size=-4 must be at least 1"),
    ("train.microbatches", 3, "train.batch_size=16 must be a multiple of train.microbatches=3"),
    ("train.seed", -1, "train.seed=-1 must lie between 0 and"),
    ("train.keep", 0, "train.keep=0 must be at least 1"),
    ("train.z_loss", -0.1, "train.z_loss=-0.1 must be at least 0"),
    ("train.z_loss", float("nan"), "train.z_loss=nan must be a finite number"),
    ("optimizer.learning_rate", float("inf"), "must be a finite number"),
    ("optimizer.learning_rate", 0.0, "optimizer.learning_rate=0.0 must be more than 0"),
    ("optimizer.name", "sgd", "must be one of adamw, adafactor, muon"),
    ("optimizer.schedule", "step", "must be one of constant, cosine, linear, wsd"),
    ("optimizer.b1", 1.5, "optimizer.b1=1.5 must lie between 0 and 0.9999"),
    ("optimizer.warmup_steps", -1, "optimizer.warmup_steps=-1 must be at least 0"),
    ("model.num_heads", 6, "model.num_heads=6 must be a multiple of model.num_kv_heads=4"),
    ("model.head_dim", 15, "model.head_dim=15 must be an even number"),
    ("model.norm_eps", 0.0, "model.norm_eps=0.0 must be more than 0"),
    ("model.tie_embeddings", 1, "model.tie_embeddings=1 must be of type bool, not int"),
    ("model.compute_dtype", "float16", "must be one of float32, bfloat16"),
    ("model.remat", "some", "must be one of none, dots, full"),
    ("model.rope_scaling_factor", 0.5, "must be at least 1.0"),
    ("model.rope_high_freq_factor", 0.5, "must be at least model.rope_low_freq_factor=1.0"),
    ("model.temperature_scale", 0.1, "must be 0 where model.nope_interval=0"),
    ("model.num_experts", 4, "must be 0 where model.moe_interval=0"),
    ("model.moe_interval", 1, "model.num_experts=0 must be at least 1"),
    ("model.moe_interval", 7, "must be at most model.num_layers=6"),
    ("model.router", "hash", "must be one of sigmoid, softmax, expert_choice"),
    ("model.vision.token_id", -1, "must be at least 0"),
    ("data.seq_len", 10**6, "data.seq_len=1000000 must be at most model.max_positions=8192"),
    ("data.seq_len", 1, "data.seq_len=1 must be at least 2"),
    ("data.train", " ", "data.train=' ' must not be empty"),
    ("data.workers", 1000, "data.workers=1000 must lie between 0 and 128"),
    ("data.shuffle", "yes", "data.shuffle='yes' must be of type bool"),
    ("mesh.fsdp", 0, "mesh.fsdp=0 must be at least 1, or -1"),
    ("mesh.fsdp", -1, "mesh.data=-1 and mesh.fsdp=-1: at most one axis"),
    ("eval.batch_size", 0, "eval.batch_size=0 must be at least 1"),
]

TOGETHER = [
    ({"moe_interval": 1, "num_experts": 4}, "model.expert_dim=0 must be at least 1"),
    (
        {"moe_interval": 1, "num_experts": 2, "expert_dim": 8, "experts_per_token": 3},
        "model.experts_per_token=3 must be at most model.num_experts=2",
    ),
    (
        {"moe_interval": 1, "num_experts": 2, "expert_dim": 8, "router": "expert_choice",
         "load_balance_weight": 0.1},
        "must be 0 where model.router=expert_choice",
    ),
    ({"vision": {"num_layers": 2}}, "model.vision.token_id=200092 must be below model.vocab_size"),
    (
        {"vision": {"num_layers": 2, "embed_dim": 30, "num_heads": 16}},
        "model.vision.embed_dim=30 must be a multiple of model.vision.num_heads=16",
    ),
    (
        {"vision": {"num_layers": 2, "image_size": 330}},
        "model.vision.image_size=330 must be a multiple of 2 * model.vision.patch_size=28",
    ),
    ({"audio": {"num_layers": 1}}, "model.audio.token_id=200093 must be below model.vocab_size"),
]  # fmt: skip


def nested(name, value):
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("name,value,message", MISTAKES)
def test_a_mistake_is_one_line(name, value, message):
    with pytest.raises(ConfigError) as caught:
        schema.from_dict(nested(name, value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model,message", TOGETHER)
def test_keys_that_contradict_each_other(model, message):
    with pytest.raises(ConfigError) as caught:
        schema.from_dict({"model": model})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name", ["nothing", "llama3:9b", "llama1:70b", "missing.py", "llama2:", "tiny:x"]
)
def test_an_unknown_experiment(name):
    with pytest.raises(ConfigError) as caught:
        get_config(name)
    assert "\n" not in str(caught.value)


def test_a_config_file_that_fails(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        get_config(str(file))
    file.write_text("def get_config():\n    return 3\n")
    with pytest.raises(ConfigError, match="must return a ConfigDict"):
        get_config(str(file))


@pytest.mark.parametrize("name", names())
def test_packaged_experiments_are_valid(name):
    config = get_config(name)
    assert config.is_locked
    assert schema.from_dict(schema.to_dict(schema.from_dict(config))) == schema.from_dict(config)


def test_each_key_is_explained():
    assert all(doc for *_, doc in schema.keys())


# A key that has no effect, where it stands: the keys that are set, and the message.
WITHOUT_EFFECT = [
    ({"optimizer.name": "adafactor", "optimizer.b1": 0.95},
     "optimizer.b1=0.95 must be left at 0.9 where optimizer.name=adafactor: it has an effect only "
     "where optimizer.name is adamw or muon"),
    ({"optimizer.name": "adafactor", "optimizer.b2": 0.99}, "optimizer.b2=0.99 must be left"),
    ({"optimizer.name": "adafactor", "optimizer.eps": 1e-6}, "optimizer.eps=1e-06 must be left"),
    ({"optimizer.decay_fraction": 0.5}, "must be left at 0.2 where optimizer.schedule=cosine"),
    ({"optimizer.schedule": "constant", "optimizer.final_fraction": 0.0},
     "only where optimizer.schedule is cosine or linear or wsd"),
    ({"train.local_every": 20}, "train.local_dir='': it has an effect only where train.local_dir "
     "is set"),
    ({"model.load_balance_weight": 0.01}, "must be left at 0.0 where model.moe_interval=0"),
    ({"model.router_z_weight": 0.01}, "only where model.moe_interval is set"),
    ({"model.bias_update_rate": 0.01}, "only where model.moe_interval is set"),
    ({"model.capacity_factor": 1.25}, "only where model.moe_interval is set"),
    ({"model.router": "softmax"}, "only where model.moe_interval is set"),
    ({"optimizer.warmup_steps": 11, "train.steps": 10},
     "optimizer.warmup_steps=11 must be at most train.steps=10"),
    ({"train.steps": 50}, "optimizer.warmup_steps=100 must be at most train.steps=50"),
    ({"optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.95},
     "optimizer.decay_fraction=0.95 of train.steps=1000 must leave room for "
     "optimizer.warmup_steps=100"),
]  # fmt: skip


def with_keys(values):
    config = {}
    for name, value in values.items():
        section, key = name.split(".")
        config.setdefault(section, {})[key] = value
    return config


@pytest.mark.parametrize("values,message", WITHOUT_EFFECT)
def test_a_key_without_effect_is_refused(values, message):
    with pytest.raises(ConfigError) as caught:
        schema.from_dict(with_keys(values))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer.name": "adafactor", "optimizer.weight_decay": 0.0},
        {"optimizer.name": "muon", "optimizer.b1": 0.95, "optimizer.b2": 0.99},
        {"optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.9},
        {"train.steps": 100},
        {"train.local_dir": "/tmp/x", "train.local_every": 20},
    ],
)
def test_a_key_with_an_effect_is_not(values):
    schema.from_dict(with_keys(values))


def test_conditions_name_keys_and_values_that_exist():
    # A condition that no value can meet would refuse the key for ever.
    def conditions(cls):
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.default_factory):
                yield from conditions(field.default_factory)
            if field.metadata["only"]:
                yield field.metadata["only"]

    rules = {name: doc for name, _, _, doc in schema.keys()}
    found = list(conditions(schema.Config))
    assert found
    for only in found:
        assert only.key in rules
        known = rules[only.key].split("be one of")[-1]
        if only.key == "train.objective":  # each is a file
            known = objectives.names()
        assert all(value in known for value in only.values)


@pytest.mark.parametrize(
    "text,value",
    [
        ("train.steps=5", 5),
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("optimizer.clip_norm=1", 1.0),
        ("data.shuffle=False", False),
        ("model.tie_embeddings=1", True),
        ("data.train=a=b,c", "a=b,c"),
        ("data.validation=", ""),
        ("model.vision.num_layers=2", 2),
    ],
)
def test_a_key_as_text(text, value):
    config = get_config("tiny", [text])
    assert config.is_locked
    found = config.to_dict()
    for part in text.partition("=")[0].split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text,message",
    [
        ("train.stps=5", "did you mean train.steps?"),
        ("train=5", "train is a section, not a key"),
        ("train.steps", "train.steps='' must be of type int"),
        ("--config.train.steps=5", "--config.train.steps is not a key; did you mean train.steps?"),
        ("train.steps=five", "train.steps='five' must be of type int"),
        ("train.steps=1.5", "must be of type int"),
        ("data.shuffle=maybe", "must be of type bool"),
    ],
)
def test_a_mistake_as_text_is_one_line(text, message):
    with pytest.raises(ConfigError) as caught:
        get_config("tiny", [text])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_left_out_takes_its_default():
    assert schema.from_dict({}) == schema.Config()
