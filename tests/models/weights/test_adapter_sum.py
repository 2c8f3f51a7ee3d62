"""Adapters side by side: a row, or a request, gives what its adapter alone gives."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import puna
from puna.configs.errors import UserError
from puna.models.adapters import choose
from puna.models.decode import slots
from puna.models.decode.generate import complete
from puna.models.decode.sampling import Sampling
from puna.models.decode.slots import Engine
from puna.models.text.tokenizer import byte_tokenizer
from puna.models.weights import adapter_sum, peft

PREFIX = "base_model.model.model."
TOKENIZER = byte_tokenizer()


def write(folder, rng, rank, shapes, embedding=None, experts=None, **values):
    """A LoRA of Linears of these [out, in]; `experts` [E, middle, last] for down_proj of one."""
    tensors = {}
    for name, (out, inner) in shapes.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = rng.normal(size=(rank, inner))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = rng.normal(size=(out, rank))
    if embedding:
        tensors[f"{PREFIX}embed_tokens.lora_embedding_A"] = rng.normal(size=(rank, embedding[0]))
        tensors[f"{PREFIX}embed_tokens.lora_embedding_B"] = rng.normal(size=(embedding[1], rank))
    if experts:
        E, middle, last = experts
        key = f"{PREFIX}layers.1.feed_forward.experts"
        tensors[f"{key}.lora_A.weight"] = rng.normal(size=(rank * E, last))
        tensors[f"{key}.lora_B.weight"] = rng.normal(size=(middle, rank * E))
    folder.mkdir()
    save_file({n: np.float32(0.3 * x) for n, x in tensors.items()}, folder / peft.WEIGHTS)
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 4.0, "peft_version": "0.21.2",
        "target_parameters": ["experts.down_proj"] if experts else None,
    }  # fmt: skip
    (folder / peft.CONFIG).write_text(json.dumps(config | values))
    return folder


@functools.cache
def made(files, folder):
    """A base whose embedding is tied, and three adapters of other ranks and targets."""
    changes = {"tie_embeddings": True, "vocab_size": 272, "max_positions": 96,
               "num_layers": 3, "nope_interval": 2}  # fmt: skip
    config = files.model_config(files.SCOUT | changes)
    weights = files.random_tensors(files.hf_shapes(config))
    base = files.write_hf(
        folder / "base", files.hf_table(config)[1], {n: 0.3 * w for n, w in weights.items()}
    )
    rng, D, H = np.random.default_rng(0), config.embed_dim, config.num_heads * config.head_dim
    wq, wo = {"layers.0.self_attn.q_proj": (H, D)}, (D, H)
    experts = (config.num_experts, config.expert_dim, D)
    found = {
        "first": write(folder / "first", rng, 3, wq | {"layers.2.self_attn.o_proj": wo}),
        "second": write(
            folder / "second", rng, 2, wq | {"layers.1.self_attn.o_proj": wo}, experts=experts
        ),
        "third": write(folder / "third", rng, 5, {}, embedding=(272, D)),
    }
    return base, found


@functools.cache
def loaded(files, folder):
    """Models and parameters: with all adapters, and by name each alone; "" is the base."""
    base, found = made(files, folder)
    alone = {name: puna.load(base, adapter=path) for name, path in found.items()}
    return puna.load(base, adapter=found), alone | {"": puna.load(base)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


def test_rows_of_a_batch_have_an_adapter_each(files, folder):
    (model, params), alone = loaded(files, folder)
    assert not model.config.tie_embeddings
    tokens_BT = np.random.default_rng(1).integers(0, 272, (4, 9))
    names = ["second", "", "third", "first"]
    chosen_B = np.array([["first", "second", "third", ""].index(n) for n in names])

    def logits_BTV(model, params, tokens_BT):
        return jax.jit(model.apply)({"params": params}, tokens_BT).logits_BTV

    found = logits_BTV(model, choose(params, chosen_B), tokens_BT)
    for row, name in enumerate(names):
        wanted = logits_BTV(*alone[name], tokens_BT[row : row + 1])[0]
        np.testing.assert_allclose(found[row], wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("speculate", [0, 3])
def test_requests_have_an_adapter_each_and_no_prefix_of_another(
    files, folder, monkeypatch, speculate
):
    monkeypatch.setattr(slots, "PIECES", (16,))
    (model, params), alone = loaded(files, folder)
    names = ["first", "second", "third"]
    engine = Engine(model, params, TOKENIZER, 3, 64, names, speculate)
    rng, made = np.random.default_rng(2), {}
    begin = rng.integers(0, 256, 12).tolist()
    # All begin alike; every prompt is asked of every adapter, and of none.
    asked = [(*begin, *rng.integers(0, 256, rng.integers(1, 4)).tolist()) for _ in range(4)]
    asked = [(name, list(prompt)) for prompt in asked for name in [*names, ""]]
    waiting, held = list(range(len(asked))), {}
    rng.shuffle(waiting)
    while waiting or held:
        while waiting and engine.free:
            r = waiting.pop()
            name, prompt = asked[r]
            held[engine.insert(prompt, Sampling(), 6, adapter=name)], made[r] = r, []
        for slot, token in engine.step():
            made[held[slot]].append(token)
            if token.finish_reason:
                del held[slot]
    # A prefix is taken from a row of the same adapter, and those alone.
    assert 0 < engine.reused < 12 * (len(asked) - len(names))
    texts = set()
    for name in [*names, ""]:
        rows = [r for r in made if asked[r][0] == name]
        prompts = [asked[r][1] for r in rows]
        for r, wanted in zip(rows, complete(*alone[name], TOKENIZER, prompts, 6), strict=True):
            assert [t.id for t in made[r]] == wanted.ids
            np.testing.assert_allclose([t.logprob for t in made[r]], wanted.logprobs, atol=1e-4)
            texts.add((asked[r][1][-1], tuple(wanted.ids)))
    assert len(texts) > len(asked) // 2
    with pytest.raises(UserError, match="adapter=fourth is not loaded; there is first, second, th"):
        engine.insert([1], adapter="fourth")


def test_what_cannot_be_chosen_by_row_is_refused(files, folder, tmp_path):
    base, found = made(files, folder)
    config = puna.load(base)[0].config
    whole = write(tmp_path / "whole", np.random.default_rng(0), 2, {})
    table = np.zeros((config.vocab_size, config.embed_dim), np.float32)
    save_file({f"{PREFIX}embed_tokens.weight": table}, whole / peft.WEIGHTS)
    with pytest.raises(
        UserError,
        match="^adapter=b=.*whole has modules_to_save on embed/table_VD, "
        "which cannot be chosen row by row$",
    ):
        puna.load(base, adapter={"a": found["first"], "b": whole})


def test_flags_name_adapters_or_one_without_a_name(tmp_path):
    there = tmp_path / "lr=0.1"
    there.mkdir()
    assert adapter_sum.of_flags([]) == ""
    for text in ("a/b", "0.7*a,0.3*b", "0.7*lr=0.1/b,c", str(there)):
        assert adapter_sum.of_flags([text]) == text
    found = adapter_sum.of_flags(["org/poet=a/b", "clerk=0.7*a,0.3*b=c"])
    assert found == {"org/poet": "a/b", "clerk": "0.7*a,0.3*b=c"}
    with pytest.raises(UserError, match="^--adapter=b must be NAME=DIR where it is given 2 times"):
        adapter_sum.of_flags(["x=a", "b"])
    with pytest.raises(UserError, match="^--adapter=x=b: x is a already$"):
        adapter_sum.of_flags(["x=a", "x=b"])
