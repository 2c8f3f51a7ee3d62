"""Training end to end: it learns, resumes bit for bit, and gives one loss on every mesh."""

import gzip
import json
import re
import shutil

import jax
import numpy as np
import pytest

from puna.configs import schema
from puna.configs.errors import UserError
from puna.models.text.tokenizer import byte_tokenizer, load_tokenizer
from puna.train import loop, metrics
from puna.train.data import make_train_loader
from puna.train.data.tokenizer import prepare_tokenizer
from puna.train.loop import train
from puna.train.optimizer import schedule
from puna.train.resilience import lock
from puna.train.resilience.mirror import Mirror
from puna.train.validation import evaluate_loss


def losses(workdir):
    return {m["step"]: m["loss"] for m in metrics.read(workdir / "metrics.jsonl")}


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


@pytest.fixture(scope="module")
def whole(make_config, corpus, tmp_path_factory):
    """A finished run, which nobody may change: its folder and its last state."""
    folder, config = tmp_path_factory.mktemp("whole"), make_config()
    config.data.validation = f"{corpus}/validation/*.txt"
    return folder, train(config, folder)


def test_a_run_leaves_what_it_should(config, corpus, tmp_path):
    config.data.validation = f"{corpus}/validation/*.txt"
    train(config, tmp_path, {"validation": evaluate_loss})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["step"] == 6 and results["validation_bits_per_byte"] < 9
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "events").glob("events*"))
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 6
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]
    assert not (tmp_path / lock.FILE).exists()
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in records] == [1, 2, 3, 4, 5, 6]
    expected = {"loss", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second",
                "step_seconds", "input_wait_seconds"}  # fmt: skip
    assert expected <= records[0].keys()
    assert "model_flops_utilisation" not in records[0]  # a CPU's peak is not known
    assert "validation_loss" in records[2] and "validation_loss" not in records[1]


def test_resuming_is_bit_identical(whole, config, corpus, tmp_path, cut):
    folder, state = whole
    config.data.validation = f"{corpus}/validation/*.txt"
    resumed = train(config, cut(folder, tmp_path / "cut"))
    assert losses(tmp_path / "cut") == losses(folder)
    assert same(state, resumed)


def test_resuming_elsewhere_skips_and_repeats_nothing(config, tmp_path, monkeypatch, cut):
    """A mixture, read by other processes onto another mesh after the cut: each document once."""
    config.train.update(steps=6, save_every=3, eval_every=0)
    folder = tmp_path / "data"
    folder.mkdir()
    texts = [f"#{i}, " + "grass " * (i % 7) for i in range(400)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines[:250]).encode()))
    (folder / "b.jsonl").write_text("".join(lines[250:]))
    config.data.train = f"2*{folder}/a.jsonl.gz,1*{folder}/b.jsonl"
    read = []

    class Loader:
        def __init__(self, *args):
            self.inner = make_train_loader(*args)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __next__(self):
            read.append(next(self.inner))
            return read[-1]

    monkeypatch.setattr(loop, "make_train_loader", Loader)
    whole = train(config, tmp_path / "whole")
    expected = read.copy()
    config.data.workers = 2
    train(config, tmp_path / "first")
    cut(tmp_path / "first", tmp_path / "cut")
    del read[3 + 6 :]  # what came after the cut is lost with the process
    config.data.workers = 1
    config.mesh.update(data=2, fsdp=2, tensor=2)
    resumed = train(config, tmp_path / "cut")

    found = read[6:]
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in other)
    rows = [np.concatenate([b["tokens_BT"][r].tolist() + [b["targets_BT"][r, -1]] for b in found])
            for r in range(8)]  # fmt: skip
    decode = byte_tokenizer().decode
    numbers = [int(n) for row in rows for n in re.findall(r"#(\d+),", decode(row.tolist()))]
    assert len(numbers) == len(set(numbers)) > 50 and min(numbers) < 250 <= max(numbers)
    a, b = losses(tmp_path / "cut"), losses(tmp_path / "whole")
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    for x, y in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


def test_a_finished_run_stays_as_it_is(whole, config, tmp_path, capsys):
    folder, state = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert same(state, train(config, tmp_path))
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "results.json").read_text())["step"] == 6
    assert "step 6 of 6 is trained already; raise train.steps" in capsys.readouterr().out
    # Fewer steps than are trained is a mistake, whose folder stays as it is.
    before = {p: p.read_bytes() for p in tmp_path.glob("*.json*") if p.name != "goodput.json"}
    config.train.steps = 5
    with pytest.raises(UserError, match="train.steps=5 must be at least 6, the step of .*/6"):
        train(config, tmp_path)
    assert before == {path: path.read_bytes() for path in before}


def test_the_best_checkpoint_outlives_a_restart(config, tmp_path):
    """Its loss is known to the session after the one that evaluated it."""
    found = iter([3.0, 1.0, 2.0, 2.5, 2.0, 1.5])

    def evaluate(*_):
        return {"loss": next(found)}

    config.data.validation = config.data.train
    config.train.update(save_every=1, eval_every=1, keep=1, keep_best=1, steps=3)
    train(config, tmp_path, {"validation": evaluate})
    assert json.loads((tmp_path / "results.json").read_text())["best_step"] == 2
    config.train.steps = 6
    train(config, tmp_path, {"validation": evaluate})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "6"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["best_step"], results["best_validation_loss"]) == (2, 1.0)


def test_a_longer_run_says_what_becomes_of_its_rate(config, tmp_path, capsys):
    """The schedule spans the new number of steps; the old one had ended."""
    train(config, tmp_path)
    capsys.readouterr()
    config.train.steps = 12
    train(config, tmp_path)
    rates = {m["step"]: m["learning_rate"] for m in metrics.read(tmp_path / "metrics.jsonl")}
    new = schedule(schema.from_dict(config))
    config.train.steps = 6
    old = schedule(schema.from_dict(config))
    assert rates[6] == pytest.approx(float(old(5))) and rates[7] == pytest.approx(float(new(6)))
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("train.steps"))
    assert line == (
        "train.steps=12 was 6: the schedule spans the new one, so step 7 has a learning rate of "
        f"{new(6):.4g}, not {old(6):.4g}"
    )


def test_the_tokenizer_is_that_of_the_config_until_there_is_a_checkpoint(whole, config, tmp_path):
    text = "the llama eats grass"
    tokenizer = prepare_tokenizer(schema.from_dict(config), Mirror(tmp_path / "new"))
    assert tokenizer.vocab_size == 259
    config.data.update(tokenizer="train", tokenizer_vocab=270)
    config.model.vocab_size = 272
    trained = prepare_tokenizer(schema.from_dict(config), Mirror(tmp_path / "new"))
    assert trained.encode(text) != tokenizer.encode(text)
    assert load_tokenizer(tmp_path / "new" / "tokenizer").encode(text) == trained.encode(text)
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    kept = prepare_tokenizer(schema.from_dict(config), Mirror(tmp_path / "run"))
    assert (
        kept.encode(text) == tokenizer.encode(text) == load_tokenizer(tmp_path / "run").encode(text)
    )


def test_a_mesh_and_microbatches_give_the_same_losses(whole, config, tmp_path):
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.train.microbatches = 2
    train(config, tmp_path)
    a, b = losses(tmp_path), losses(whole[0])
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)


@pytest.mark.slow
def test_8_bits_resume_bit_for_bit_and_change_little_on_a_mesh(config, tmp_path, cut):
    config.model.update(moe_interval=2, num_experts=4, expert_dim=16, compute_dtype="float8")
    train(config, tmp_path / "by rows")
    config.mesh.update(data=2, expert=2, tensor=2)
    state = train(config, tmp_path / "whole")
    resumed = train(config, cut(tmp_path / "whole", tmp_path / "cut"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert same(state, resumed)
    # Scales are the same anywhere. Between layers there is bfloat16, whose roundings depend on the
    # order of sums.
    a, b = (list(losses(tmp_path / name).values()) for name in ("by rows", "whole"))
    np.testing.assert_allclose(a, b, rtol=2.0**-8)


# Each is a program of its own. Of the fast tests, test_master_weights.py trains experts with muon
# on a mesh, and test_multi_token.py learns with AdamW.
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_every_optimizer_learns_with_experts(config, tmp_path, optimizer):
    config.model.update(moe_interval=2, num_experts=4, expert_dim=16, bias_update_rate=0.01,
                        load_balance_weight=0.01)  # fmt: skip
    config.optimizer.update(name=optimizer, learning_rate=1e-2)
    config.train.update(steps=20, save_every=20, eval_every=0)
    config.mesh.update(data=2, fsdp=2, expert=2)
    state = train(config, tmp_path)
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert sum(records[-1]["router_load"]) == pytest.approx(1.0, abs=1e-5)
    bias = state.params["blocks"]["layer_1"]["moe"]["router_bias_E"]
    assert 0 < np.abs(bias).max() <= 20 * 0.01 + 1e-6


def test_another_config_is_refused(whole, config, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    config.model.mlp_dim = 32
    with pytest.raises(UserError, match=r"model.mlp_dim=32 differs from 24 in .*checkpoints"):
        train(config, tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "change,message",
    [
        ({"mesh": {"fsdp": 3}}, "mesh.fsdp=3 = 3 does not divide the 8 devices"),
        ({"mesh": {"data": 1, "tensor": 4}}, "mesh.tensor=4 = 4 must equal the 8 devices"),
        ({"train": {"batch_size": 12}, "mesh": {"data": 8}}, "must be a multiple of mesh.data=8"),
        ({"mesh": {"tensor": 8}}, "must be a multiple of mesh.tensor=8"),
        ({"model": {"vocab_size": 100}}, "model.vocab_size=100 must be at least the 259 ids"),
        ({"data": {"train": "nowhere/*.txt"}}, "nowhere"),
        ({"data": {"tokenizer": "nowhere.json"}}, "nowhere.json"),
    ],
)
def test_a_mistake_leaves_nothing_behind(config, tmp_path, change, message):
    for section, values in change.items():
        config[section].update(values)
    with pytest.raises(UserError, match=message.replace("*", ".*")) as caught:
        train(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_has_one_run_at_a_time(config, tmp_path):
    with lock.Lock(tmp_path / lock.FILE), pytest.raises(UserError, match="is in use by process"):
        train(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_whose_folder_another_has_taken_saves_nothing_more(config, tmp_path):
    def another_comes(*args):
        (tmp_path / lock.FILE).write_text('{"token": "x", "pid": 7, "host": "far", "since": "now"}')
        return {}

    config.train.eval_every = 3
    with pytest.raises(UserError, match="now in use by process 7 on far since now"):
        train(config, tmp_path, {"x": another_comes})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_an_evaluation_that_fails_loses_no_step(config, tmp_path):
    """The checkpoint is there by then, and the next start evaluates what was not."""

    def number(c, model, params, tokenizer, mesh):
        return {"norm": float(sum(np.abs(x).sum() for x in jax.tree.leaves(params)))}

    def fails(*args):
        raise UserError("the evaluation failed")

    train(config, tmp_path / "whole", {"x": number})
    with pytest.raises(UserError, match="the evaluation failed"):
        train(config, tmp_path / "cut", {"x": fails})
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["3"]
    train(config, tmp_path / "cut", {"x": number})
    whole, cut = (metrics.read(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    for a, b in zip(whole, cut, strict=True):
        assert a.keys() ^ b.keys() <= {"step_seconds", "tokens_per_second", "input_wait_seconds"}
        assert all(a[k] == b[k] for k in ("step", "loss", "x_norm", "data_bad_records") if k in a)
    assert "x_norm" in cut[2] and "x_norm" in cut[5]


def test_the_last_evaluation_is_made_up_for(config, tmp_path):
    config.train.update(steps=2, eval_every=0)

    def fails(*args):
        raise UserError("the evaluation failed")

    for _ in range(2):
        with pytest.raises(UserError, match="the evaluation failed"):
            train(config, tmp_path, {"x": fails})
        assert (tmp_path / "checkpoints" / "2").exists()
    train(config, tmp_path, {"x": lambda *args: {"number": 3.0}})
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in records] == [1, 2] and records[1]["x_number"] == 3.0
    assert "loss" in records[1]
    assert json.loads((tmp_path / "results.json").read_text())["x_number"] == 3.0


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ("nofile.txt", "nofile.txt: no such file"),
        ("{}/empty.jsonl", "holds no document: it is empty"),
        ("{}/blank.jsonl", "there is no text in its documents"),
        ("2*{}/good.jsonl", "good.jsonl cannot have a weight"),
        ("{}/other.jsonl", "has no key 'text'"),
        ("tfds:no_such_set", "no data set of this name"),
    ],
)
def test_validation_data_is_opened_before_anything_is_compiled(
    config, tmp_path, monkeypatch, validation, message
):
    for name, line in (("empty", ""), ("blank", '{"text": ""}'), ("good", '{"text": "a"}'),
                       ("other", '{"body": "a"}')):  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text(line)
    config.data.validation = validation.format(tmp_path)
    monkeypatch.setattr(loop, "make_train_step", None)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")


def test_a_corpus_trains_alike_in_every_format(config, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    rows = [{"text": f"document {i}: the llama eats {'grass ' * (i % 5)}é"} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    config.train.update(steps=3, eval_every=0)
    config.data.validation = ""
    found = []
    for name in ("a.jsonl", "a.jsonl.zst", "a.parquet"):
        config.data.train = str(tmp_path / name)
        train(config, tmp_path / f"run {name}")
        found.append(losses(tmp_path / f"run {name}"))
    assert found[0] == found[1] == found[2] and sorted(found[0]) == [1, 2, 3]
