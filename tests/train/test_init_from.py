"""A run starts from any model's weights, or branches from another run, and resumes bit for bit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import puna
from puna.configs import base, command_line, schema
from puna.configs.errors import ConfigError, UserError
from puna.models import leaf
from puna.models.parallel import sharding
from puna.models.release.convert import convert
from puna.models.transformer import abstract_params
from puna.models.weights import run
from puna.train import init_from
from puna.train.loop import train
from puna.train.optimizer import make_optimizer


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


@pytest.fixture(scope="session")
def plain(corpus):
    """A configuration that says nothing of the architecture."""

    def make(**train_keys):
        config = base.get_config()
        config.model.compute_dtype = "float32"
        config.data.update(train=f"{corpus}/train/*.txt", validation="", seq_len=32)
        config.optimizer.update(warmup_steps=1, learning_rate=3e-3)
        config.train.update(
            steps=4, batch_size=8, log_every=1, save_every=2, eval_every=0, **train_keys
        )
        return config

    return make


@pytest.fixture(scope="session")
def first(corpus, plain, tmp_path_factory):
    """A run of four steps, and the same as a Hugging Face directory."""
    config = plain()
    config.model.update(
        vocab_size=264, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        mlp_dim=24, max_positions=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("first")
    train(config, folder / "run")
    convert(folder / "run", folder / "hf", name="first")
    return folder


@pytest.mark.parametrize("kind", ["hf", "run", "run@2", "run/checkpoints/4"])
def test_weights_are_where_the_run_starts(first, plain, tmp_path, kind):
    config = plain(init_from=f"{first}/{kind}")
    c = init_from.resolve(schema.build(config), tmp_path)
    assert c.model.embed_dim == 16 and c.model.max_positions == 64  # the weights' own
    step = 2 if kind == "run@2" else None
    _, params = puna.load(run.find(first / "run", step) if "run" in kind else first / "hf")
    for axes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = sharding.make_mesh(schema.MeshConfig(**({"data": 8} | axes)))
        tx = make_optimizer(c, abstract_params(c.model))
        with jax.set_mesh(mesh):
            assert equal(init_from.initial_state(c, tx, mesh).params, params)


NEW = "<|tool|>, <|recall|>,<note>"


@pytest.mark.parametrize("kind", ["hf", "run"])
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_rows_of_new_tokens_are_the_mean_of_the_others(first, plain, tmp_path, kind, axes):
    config = plain(init_from=f"{first}/{kind}")
    config.data.new_tokens = NEW
    c = init_from.resolve(schema.build(config), tmp_path)
    # 259 ids of bytes, and three: 264 rows have room for them.
    assert c.model.vocab_size == 264
    mesh = sharding.make_mesh(schema.MeshConfig(**axes))
    with jax.set_mesh(mesh):
        tx = make_optimizer(c, abstract_params(c.model))
        found = init_from.initial_state(c, tx, mesh).params
    _, old = puna.load(first / kind)
    for name, was in (
        ("embed", old["embed"]["table_VD"]),
        ("unembed", old["unembed"]["table_DV"].T),
    ):
        wanted = np.array(was)
        wanted[259:262] = np.mean(np.float64(wanted[:259]), 0)
        (table,) = found[name].values()
        np.testing.assert_allclose(table if name == "embed" else table.T, wanted, atol=1e-7)
        assert np.array_equal(wanted[262:], np.asarray(was)[262:])
    assert equal(found["blocks"], old["blocks"])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_tables_grow_where_new_tokens_need_it(first, plain, tmp_path, kind):
    config = plain(init_from=f"{first}/hf")
    config.data.new_tokens = ",".join(f"<|{i}|>" for i in range(10))
    config.adapter.update(rank=2, targets="/w,embed/,unembed/", quantize=kind)
    c = init_from.resolve(schema.build(config), tmp_path)
    assert c.model.vocab_size == 272  # a multiple of 8, as 264 is
    mesh = sharding.make_mesh(c.mesh)
    with jax.set_mesh(mesh):
        state = init_from.initial_state(c, make_optimizer(c, abstract_params(c.model)), mesh)
    table = state.frozen["base"]["unembed"]["table_DV"]
    wanted = np.mean(np.asarray(leaf.dense(table))[:, :259], 1, keepdims=True)
    assert table.shape == (16, 272)
    assert np.all(np.abs(leaf.dense(table)[:, 259:269] - wanted) <= table.scale[:, 259:269])


@pytest.mark.slow
def test_new_tokens_are_learnt_and_exported(first, plain, tmp_path):
    config = plain(init_from=f"{first}/hf", seed=1)
    config.data.new_tokens = NEW
    config.train.update(steps=2, save_every=1)
    state = train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    assert equal(state, train(config, tmp_path / "run"))  # resumed
    convert(tmp_path / "run", tmp_path / "release", name="new")
    for path in (tmp_path / "run", tmp_path / "release"):
        tokenizer = puna.load_tokenizer(path)
        assert [tokenizer.special[n.strip()] for n in NEW.split(",")] == [259, 260, 261]
        ids = tokenizer.encode("a<|tool|>b<note>", allow_special=True)
        assert ids == [97, 259, 98, 261]
        assert tokenizer.encode("<|tool|>") == list(b"<|tool|>")  # as text
    assert equal(puna.load(tmp_path / "release")[1], state.params)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["init_from"]["new_tokens"] == ["<|tool|>", "<|recall|>", "<note>"]
    assert (
        "- New tokens: `<|tool|>, <|recall|>, <note>`"
        in (tmp_path / "release" / "README.md").read_text()
    )


@pytest.mark.slow
def test_transformers_reads_the_new_tokens(first, plain, tmp_path):
    transformers, torch = (pytest.importorskip(name) for name in ("transformers", "torch"))
    config = plain(init_from=f"{first}/hf")
    config.data.new_tokens = f"{NEW},<|a|>,<|b|>,<|c|>"
    config.train.update(steps=2, save_every=2)
    train(config, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "release", name="new")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "release")
    ours = puna.load_tokenizer(tmp_path / "release")
    texts = ["plain", "<|tool|>x", "a <note><|c|> b<|recall|>"]
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text, allow_special=True)
        assert theirs.decode(ids) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    assert model.config.vocab_size == 272
    tokens = np.array([ours.encode(texts[2], allow_special=True)])
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).logits.numpy()
    model, params = puna.load(tmp_path / "run")
    found = jax.jit(model.apply)({"params": params}, tokens).logits_BTV
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data.new_tokens": "a,,a"}, "data.new_tokens='a,,a' must be different names"),
        ({"data.new_tokens": "<|end_of_text|>"}, "'<|end_of_text|>' is a token already, of id 257"),
        ({"data.new_tokens": "<a>", "train.init_from": ""}, "only where train.init_from is set"),
        ({"data.new_tokens": "<a>", "adapter.rank": 2}, "must reach embed/table.* stay the same"),
        ({"data.new_tokens": "<a>", "train.trainable": "norm"}, "train.trainable=norm must reach"),
    ],
)
def test_new_tokens_that_cannot_be(first, plain, tmp_path, keys, message):
    config = plain(init_from=f"{first}/hf")
    config.update_from_flattened_dict(keys)
    with pytest.raises(UserError, match=message.replace("|", "[|]")):
        train(config, tmp_path)


def test_a_run_from_weights_resumes_bit_for_bit_and_without_them(first, plain, tmp_path, cut):
    shutil.copytree(first / "hf", tmp_path / "hf")
    config = plain(init_from=str(tmp_path / "hf"))
    whole = train(config, tmp_path / "whole")
    shutil.rmtree(tmp_path / "hf")
    resumed = train(config, cut(tmp_path / "whole", tmp_path / "cut"))
    assert equal(whole, resumed)
    # Where it came from stands in the config, the results, the checkpoint and the card.
    saved = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert saved["train"]["init_from"] == str(tmp_path / "hf")
    assert saved["model"]["embed_dim"] == 16 and saved["data"]["tokenizer"] == str(tmp_path / "hf")
    results = json.loads((tmp_path / "cut" / "results.json").read_text())
    assert results["init_from"] == {"path": str(tmp_path / "hf")}
    convert(tmp_path / "cut", tmp_path / "release", name="second")
    assert f"Started from: {tmp_path}/hf" in (tmp_path / "release" / "README.md").read_text()


def test_a_run_is_readable_under_newer_rules(first, monkeypatch, tmp_path):
    def newer(config):
        raise ConfigError("a rule that the run does not know")

    monkeypatch.setattr(schema, "check", newer)
    assert run.read_config(run.find(first / "run")).train.steps == 4
    _, params = puna.load(first / "run")
    convert(first / "run", tmp_path / "hf", name="second")
    assert equal(puna.load(tmp_path / "hf")[1], params)


def test_a_branch_keeps_parameters_and_moments(first, plain, tmp_path):
    config = plain(init_from=f"{first}/run@2", with_optimizer=True)
    config.optimizer.update(learning_rate=1e-4, schedule="linear", warmup_steps=0)
    config.data.seq_len = 64
    config.model.update(max_positions=128, rope_theta=2e6)
    config.train.batch_size = 16
    state = train(config, tmp_path / "branch")
    assert int(state.step) == 4
    results = json.loads((tmp_path / "branch" / "results.json").read_text())["init_from"]
    assert results["step"] == 2 and results["with_optimizer"]
    changed = results["changed"]
    assert changed["optimizer.learning_rate"] == [3e-3, 1e-4]
    assert changed["data.seq_len"] == [32, 64]
    assert changed["model.rope_theta"] == [500000.0, 2e6] and "model.embed_dim" not in changed
    # The schedule begins anew, and the moments do not: their count goes on from 2.
    counts = {int(x) for x in arrays(state.opt_state) if x.ndim == 0 and x.dtype == np.int32}
    assert {4, 2 + 4} <= counts
    record = json.loads((tmp_path / "branch" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["learning_rate"] == pytest.approx(1e-4)
    # What the weights had read before stands in each checkpoint, beside what the run itself read.
    meta = run.read_meta(tmp_path / "branch/checkpoints/4")
    source = config.data.train
    read = {"source": source, "licence": "unknown", "tokens": 2 * 8 * 33}
    ancestor = {"path": f"{first}/run/checkpoints/2", "step": 2, "read": [read]}
    assert meta["origin"]["ancestors"] == [ancestor]
    own = {"source": source, "licence": "unknown", "tokens": 4 * 16 * 65}
    assert meta["provenance"] == [own]
    convert(tmp_path / "branch", tmp_path / "hf", name="third")
    card = (tmp_path / "hf" / "README.md").read_text()
    before = card.split(f"Read before, by `{first}/run/checkpoints/2` up to step 2:")[1]
    assert f"| `{source}` | unknown | 528 |" in before
    assert f"| `{source}` | unknown | 4,160 |" in card and "4,160" not in before
    # A branch of the branch names both, the oldest first.
    later = dataclasses.replace(schema.build(config), train=dataclasses.replace(
        schema.build(config).train, init_from=f"{tmp_path}/branch@4"))  # fmt: skip
    found = init_from.lineage(later, tmp_path / "later")["ancestors"]
    assert found == [
        ancestor,
        {"path": f"{tmp_path}/branch/checkpoints/4", "step": 4, "read": [own]},
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.embed_dim": 32}, "model.embed_dim=32 differs from 16.*leave the key out"),
        ({"model.vision.num_layers": 1}, "model.vision.num_layers=1 differs from 0"),
        ({"data.seq_len": 100}, "data.seq_len=100 must be at most model.max_positions=64"),
        ({"train.init_from": "{first}/nothing"}, "no such file"),
        ({"train.init_from": "{first}/run@3"}, "has no checkpoint of step 3"),
        ({"train.init_from": "{first}/hf@3"}, "is not a run of puna"),
        ({"train.init_from": "", "train.with_optimizer": True}, "needs train.init_from"),
        ({"train.with_optimizer": True}, "needs a run"),
        (
            {"train.init_from": "{first}/run", "train.with_optimizer": True,
             "optimizer.name": "muon"},
            "optimizer.name='muon' must be 'adamw'",
        ),
        (
            {"train.init_from": "{first}/run", "train.with_optimizer": True,
             "train.trainable": "mlp"},
            "train.trainable='mlp' must be ''",
        ),
    ],
)  # fmt: skip
def test_what_contradicts_the_weights_is_one_line(first, plain, tmp_path, changes, message):
    config = plain(init_from=f"{first}/hf")
    for key, value in changes.items():
        value = value.format(first=first) if isinstance(value, str) else value
        config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_alone_are_no_run_to_resume(first, config, tmp_path):
    convert(first / "hf", tmp_path / "converted", to="puna")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="without optimizer state.*--init_from=.*/converted") as e:
        train(config, tmp_path / "converted")
    assert "damaged" not in str(e.value) and sorted(tmp_path.rglob("*")) == before


def test_a_run_resumes_where_the_run_it_branched_from_is_gone(first, plain, tmp_path):
    shutil.copytree(first / "run", tmp_path / "source")
    for where in ("source", "source@2"):
        config = schema.build(plain(init_from=f"{tmp_path}/{where}"))
        assert init_from.resolve(config, tmp_path / "new").data.tokenizer.endswith(
            "/checkpoints/4" if where == "source" else "/checkpoints/2"
        )
    shutil.copytree(first / "run", tmp_path / "branch")
    shutil.rmtree(tmp_path / "source")
    for where in ("source", "source@2"):
        config = schema.build(plain(init_from=f"{tmp_path}/{where}", with_optimizer=True))
        assert init_from.resolve(config, tmp_path / "branch").data.tokenizer == "bytes"


def test_a_converted_model_has_no_moments(first, plain, tmp_path):
    convert(first / "hf", tmp_path / "converted", to="puna")
    config = plain(init_from=str(tmp_path / "converted"), with_optimizer=True)
    with pytest.raises(ConfigError, match="no optimizer state"):
        train(config, tmp_path / "run")


def test_the_flag_is_the_key():
    prepared = command_line.prepare(["--init_from=x", "--with_optimizer"])
    assert prepared == ["--config.train.init_from=x", "--config.train.with_optimizer=true"]
