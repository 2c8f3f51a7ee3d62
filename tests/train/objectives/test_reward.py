"""The loss of reward models against NumPy in float64, and a run that is resumed and loaded."""

import functools
import json
import shutil

import autograd
import autograd.numpy as anp
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import puna
from puna.configs.errors import UserError
from puna.models.release.convert import convert
from puna.models.transformer import Transformer
from puna.train.data.packing import Cursor, Room, pack_row, to_batch
from puna.train.data.pairs import PairTransform
from puna.train.loop import train
from puna.train.objectives import reward
from puna.train.state import join

PAIRS = [([5, 9], [7, 3, 2], [11, 2]), ([4], [6, 2], [8, 13, 9, 2]), ([3, 3, 8], [10, 2], [12, 2])]
CENTER = 0.1


class Ids:
    """A tokenizer of texts that are ids already."""

    begin_ids, eos_id = (), None

    def encode(self, text):
        return [ord(c) for c in text]

    def spans(self, ids, text):
        return np.array([[i, i + 1] for i in range(len(ids))])


def batch(pairs, length):
    """Rows of pairs, made of texts of one character an id."""
    transform = PairTransform(Ids(), length + 1, "", ends=True)
    texts = [["".join(map(chr, x)) for x in pair] for pair in pairs]
    examples = [transform.encode((*text, None)) for text in texts]
    cursor = Cursor(examples.__getitem__, 0, stop=len(examples))
    rows = [pack_row(cursor, Room(length + 1)) for _ in range(3)]
    return to_batch({key: np.stack([row[key] for row in rows]) for key in rows[0]})


@pytest.mark.parametrize("length", [20, 24])  # the first row ends with the last token of a text
def test_loss_and_gradients_are_those_of_bradley_and_terry(tiny, oracle, length):
    model = tiny("llama3_2")
    head = np.random.default_rng(0).standard_normal(model.config.embed_dim) * 0.3

    def value(weights, head, ids):
        # The value is the logit of a vocabulary of one.
        named = {name: weights[name] for name in model.weights}
        named["lm_head.weight"] = anp.reshape(head, (1, -1))
        json = model.json | {"tie_word_embeddings": False}
        logits = oracle.forward(json, named, [ids])[0]
        return logits[-1][0]

    def mean(weights, head):
        total = 0.0
        for prompt, *answers in PAIRS:
            c, r = (value(weights, head, [*prompt, *answer]) for answer in answers)
            total += anp.log(1 + anp.exp(r - c)) + CENTER * (c + r) ** 2
        return total / len(PAIRS)

    wanted, wanted_head = autograd.value_and_grad(mean, 1)(model.weights, head)
    wanted_gradient = autograd.grad(mean, 0)(model.weights, head)
    objective = reward.Reward(CENTER)
    rows = batch(PAIRS, length)
    assert objective.weight_B(rows).sum() == 3
    assert (length == 20) == (rows["weights_BT"][0, -1] == 1)

    def ours(params):
        found = objective.loss(Transformer(model.config), params, {}, rows)
        return found.total / 3, found.rows_B

    params = model.params(model.weights) | {"reward": {"head_D": np.float32(head)}}
    (loss, sums), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)

    def close(found, wanted):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.max(np.abs(wanted)))

    close(loss, wanted)
    close(gradient.pop("reward")["head_D"], wanted_head)
    gradient = model.by_name(jax.tree.map(np.asarray, gradient))
    for name, w in wanted_gradient.items():
        close(gradient[name], w)
    pairs = [[value(model.weights, head, [*p, *a]) for a in answers] for p, *answers in PAIRS]
    close(sums["reward_chosen"].sum(), sum(c for c, _ in pairs))
    close(sums["reward_rejected"].sum(), sum(r for _, r in pairs))
    assert sums["reward_accuracy"].sum() == sum(c > r for c, r in pairs)


def test_rewards_and_gradients_are_those_of_trl(tiny, trl):
    model, recorded = tiny("llama3_2"), trl("reward")
    head = np.random.default_rng(0).standard_normal(model.config.embed_dim) * 0.3
    params = model.params(model.moved(1)) | {"reward": {"head_D": np.float32(head)}}
    objective = reward.Reward(CENTER)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, rows):
        found = objective.loss(Transformer(model.config), params, {}, rows)
        return found.total / objective.weight_B(rows).sum(), found.rows_B

    (loss, _), gradient = run(params, batch(PAIRS, 24))
    gradient = jax.tree.map(np.asarray, gradient)
    score = gradient.pop("reward")["head_D"]
    recorded.check(loss, model.by_name(gradient) | {"score.weight": score[None]})
    for pair, each in zip(PAIRS, recorded.each, strict=True):
        (_, sums), _ = run(params, batch([pair], 24))
        for side in ("chosen", "rejected"):
            wanted = each[f"rewards/{side}"]
            np.testing.assert_allclose(sums[f"reward_{side}"].sum(), wanted, rtol=1e-5)


def write(path, count, first=0):
    records = []
    for i in range(first, first + count):
        good, bad = ("grass", "stones") if i % 2 else ("leaves", "nails")
        records.append({"prompt": f"{i % 5} llamas eat ", "chosen": good, "rejected": bad})
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.mark.slow
def test_a_recipe_learns_resumes_and_is_loaded(config, tmp_path, cut):
    found = puna.get_config("reward")
    found.model.update(config.model)
    found.data.update(train=write(tmp_path / "a.jsonl", 40),
                      validation=write(tmp_path / "b.jsonl", 10, 40), seq_len=64)  # fmt: skip
    found.optimizer.update(learning_rate=3e-3, warmup_steps=1)
    found.train.update(steps=12, batch_size=16, microbatches=2, save_every=6, eval_every=6,
                       trainable="blocks")  # fmt: skip
    whole = train(found, tmp_path / "whole")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert metrics[0]["loss"] == pytest.approx(np.log(2)) and metrics[0]["reward_accuracy"] == 0
    assert metrics[-1]["validation_reward_accuracy"] > 0.8 and metrics[-1]["loss"] < 0.5
    assert set(whole.params) == {"blocks", "reward"}
    resumed = train(found, cut(tmp_path / "whole", tmp_path / "cut"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    model, params = reward.load(tmp_path / "whole")
    assert np.array_equal(params["reward"]["head_D"], whole.params["reward"]["head_D"])
    assert "reward" not in puna.load(tmp_path / "whole")[1]
    # `puna eval` of the run gives the numbers that training gave.
    numbers = puna.evaluate(found, tmp_path / "whole")
    for name in ("loss", "reward_accuracy", "reward_margin", "pairs"):
        assert numbers[name] == pytest.approx(metrics[-1][f"validation_{name}"], rel=1e-6), name
    with pytest.raises(UserError, match="--quantize=int8 --adapter=: .*as it was trained"):
        puna.evaluate(found, tmp_path / "whole", quantize="int8")
    found.reward.center = 0.5
    with pytest.raises(UserError, match="reward.center=0.5 differs from 0.0 of"):
        puna.evaluate(found, tmp_path / "whole")
    found.reward.center = 0.0
    config.train.update(steps=2, save_every=2, eval_every=0)
    train(config, tmp_path / "base")
    with pytest.raises(UserError, match="these weights have none: name that run"):
        puna.evaluate(found, tmp_path / "base")
    with pytest.raises(UserError, match="is no reward model: train.objective=next_token"):
        reward.load(tmp_path / "base")


@pytest.mark.slow
def test_adapters_and_the_vector_train_together(config, tmp_path, cut):
    found = puna.get_config("reward")
    found.model.update(config.model)
    found.data.update(train=write(tmp_path / "a.jsonl", 40), seq_len=64)
    found.optimizer.update(learning_rate=1e-2, warmup_steps=1)
    found.train.update(steps=8, batch_size=16, microbatches=2, save_every=4, eval_every=0)
    found.adapter.update(rank=2, targets="blocks/.*/w", quantize="int8")
    found.model.param_dtype = "bfloat16"
    whole = train(found, tmp_path / "whole")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[0] == pytest.approx(np.log(2)) and losses[-1] < 0.6
    assert {x.dtype.name for x in jax.tree.leaves(whole.params)} == {"float32"}
    assert np.any(np.asarray(whole.params["blocks"]["layer_0"]["attention"]["wq_DNH"].b))
    resumed = train(found, cut(tmp_path / "whole", tmp_path / "cut"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    model, params = reward.load(tmp_path / "whole")
    rows = batch(PAIRS, 24)
    values = [
        np.asarray(reward.rewards(model, x, rows)[0])
        for x in (params, join(whole.params, whole.frozen))
    ]
    assert np.array_equal(*values) and np.any(values[0])
    for to in ("gguf", "peft"):
        with pytest.raises(UserError, match="is a reward model, which is written with --to=hf"):
            convert(tmp_path / "whole", tmp_path / "none", to=to)


@pytest.mark.slow
def test_a_release_scores_and_trains_on_as_its_run_does(config, tmp_path):
    found = puna.get_config("reward")
    found.model.update(config.model)
    found.data.update(train=write(tmp_path / "a.jsonl", 40),
                      validation=write(tmp_path / "b.jsonl", 10, 40), seq_len=64)  # fmt: skip
    found.optimizer.update(learning_rate=3e-3, warmup_steps=1)
    found.train.update(steps=8, batch_size=16, microbatches=2, save_every=8, eval_every=0)
    train(found, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "release", name="scores")
    whole, release = (puna.evaluate(found, tmp_path / name) for name in ("run", "release"))
    for name in ("loss", "reward_accuracy", "reward_margin", "reward_chosen", "pairs"):
        assert release[name] == pytest.approx(whole[name], rel=1e-5), name
    (_, ours), (model, theirs) = (reward.load(tmp_path / name) for name in ("run", "release"))
    assert np.array_equal(ours["reward"]["head_D"], theirs["reward"]["head_D"])
    assert model.config.tie_embeddings and "unembed" not in theirs
    firsts = []
    for name in ("run", "release"):
        found.train.update(init_from=str(tmp_path / name), steps=2, save_every=2)
        train(found, tmp_path / f"more-{name}")
        line = (tmp_path / f"more-{name}" / "metrics.jsonl").read_text().splitlines()[0]
        firsts.append(json.loads(line)["loss"])
    assert firsts[0] < 0.9 * np.log(2)
    assert firsts[1] == pytest.approx(firsts[0], rel=1e-5)
    for ask in (puna.load, lambda path: convert(path, tmp_path / "x", to="puna")):
        with pytest.raises(UserError, match="release: is a reward model, which scores texts and"):
            ask(tmp_path / "release")
    with pytest.raises(UserError, match="is no reward model: train.objective=multi_token"):
        config.train.update(objective="multi_token", steps=2, save_every=2, eval_every=0)
        train(config, tmp_path / "base")
        reward.load(tmp_path / "base")
    shutil.copytree(tmp_path / "release", tmp_path / "labels")
    tensors = load_file(tmp_path / "release" / "model.safetensors")
    tensors["score.weight"] = np.ones((2, 16), np.float32)
    save_file(tensors, tmp_path / "labels" / "model.safetensors")
    with pytest.raises(UserError, match=r"score.weight has shape \(2, 16\)"):
        reward.load(tmp_path / "labels")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_gives_a_release_s_texts_the_same_rewards(config, tmp_path, tied):
    transformers, torch = (pytest.importorskip(name) for name in ("transformers", "torch"))
    found = puna.get_config("reward")
    found.model.update(config.model, tie_embeddings=tied)
    found.data.update(train=write(tmp_path / "a.jsonl", 40), seq_len=64)
    found.optimizer.update(learning_rate=1e-2, warmup_steps=1)
    found.train.update(steps=4, batch_size=16, microbatches=2, save_every=4, eval_every=0)
    if tied:
        found.adapter.update(rank=2, targets="/w")
    train(found, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "release", name="scores")
    names = load_file(tmp_path / "release" / "model.safetensors")
    assert names["score.weight"].shape == (1, 16) and "lm_head.weight" not in names
    card = (tmp_path / "release" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "release")
    assert type(theirs).__name__ == "LlamaForSequenceClassification" and theirs.num_labels == 1
    pipe = transformers.AutoTokenizer.from_pretrained(tmp_path / "release")
    model, params = reward.load(tmp_path / "run")
    tokenizer = puna.load_tokenizer(tmp_path / "run")
    texts = ["3 llamas eat grass", "3 llamas eat stones", "a longer text, to be padded beside"]
    with torch.no_grad():
        found = theirs(**pipe(texts, return_tensors="pt", padding=True)).logits[:, 0].numpy()
    for text, score in zip(texts, found, strict=True):
        ids = np.array([[*tokenizer.begin_ids, *tokenizer.encode(text)]])
        ones = np.ones_like(ids)
        rows = {"tokens_BT": ids, "positions_BT": np.arange(ids.size)[None],
                "segment_ids_BT": ones}  # fmt: skip
        values_BT, _ = reward.rewards(model, params, rows)
        np.testing.assert_allclose(values_BT[0, -1], score, rtol=1e-5, atol=1e-6)
