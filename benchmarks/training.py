"""Tokens a second of training on CPU cores, beside `transformers` and the rate of bare products.

    pip install 'puna[reference]'
    python benchmarks/training.py [--models=dense,experts,lora --dtypes=bfloat16,float32]
    python benchmarks/training.py --models=dense --rounds=5 --json=training.json

Models of width 512, 8 layers, 8 query and 4 key heads, MLP 1408, vocabulary 32,000: dense, and with
8 experts of that width, top-1, and a shared one in every layer. 8 rows of 512 tokens, AdamW; `lora`
has adapters of rank 8 on every matrix of the dense model. puna's step is that of `puna train`.
`transformers` has its weights in the dtype, PyTorch's attention and its fused AdamW, as it is and
with `torch.compile`; the faster of the two is the one compared with. It has no adapters of its own.
Medians of rounds in which they take turns, each in a process of its own. The limit is what this
machine gives to a product [4096, 512] x [512, 1408] of the dtype, added up in float32; a step's
FLOPs are 6 a token and parameter that multiplies it, and attention's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np

import puna
from puna.configs import schema
from puna.models.parallel import sharding
from puna.models.transformer import abstract_params
from puna.train import ahead, objectives
from puna.train.metrics import flops_per_token
from puna.train.optimizer import make_optimizer
from puna.train.state import init_state

B, T, V = 8, 512, 32_000
SHAPE = {"embed_dim": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64,
         "mlp_dim": 1408, "vocab_size": V}  # fmt: skip
EXPERTS = {"num_experts": 8, "experts_per_token": 1, "expert_dim": 1408, "moe_interval": 1}
RATE = 1e-3


def config_of(model: str, dtype: str) -> schema.Config:
    """The experiment in puna."""
    config = puna.get_config("tiny")
    config.model.update(SHAPE | (EXPERTS if model == "experts" else {}))
    config.model.compute_dtype = dtype
    config.optimizer.update(name="adamw", learning_rate=RATE)
    config.data.update(seq_len=T)
    config.train.batch_size = B
    if model == "lora":
        config.adapter.rank = 8
    return schema.from_dict(config)


def ids() -> np.ndarray:
    """The tokens of a batch."""
    return np.random.default_rng(0).integers(0, V, (B, T), np.int32)


def ours(config: schema.Config):
    """A function that makes one step of puna's and gives the loss."""
    device = jax.devices()[:1]
    mesh = sharding.make_mesh(config.mesh, device)
    objective = objectives.make(config, np.ones(V, np.int32))
    tx = make_optimizer(config, abstract_params(config.model), objective.added(config))
    step = ahead.compile_step(config, device)
    state = init_state(config, tx, mesh, objective)
    tokens = ids()
    # As `transformers`: each token from those before it, the last of a row from none.
    weights = np.ones((B, T), np.float32)
    weights[:, -1] = 0
    batch = {
        "tokens_BT": tokens,
        "targets_BT": np.roll(tokens, -1, 1),
        "positions_BT": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        "segment_ids_BT": np.ones((B, T), np.int32),
        "weights_BT": weights,
    }
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run


def theirs(model: str, dtype: str, compiled: bool):
    """The same of `transformers`."""
    import torch
    import transformers

    shape = {
        "vocab_size": V, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048,
        "tie_word_embeddings": True, "use_cache": False,
    }  # fmt: skip
    torch.manual_seed(0)
    if model == "experts":
        config = transformers.Llama4TextConfig(
            **shape, intermediate_size=1408, intermediate_size_mlp=1408, num_local_experts=8,
            num_experts_per_tok=1, interleave_moe_layer_step=1, attention_chunk_size=2048,
            no_rope_layers=[1] * SHAPE["num_layers"], use_qk_norm=False,
            attn_temperature_tuning=False, pad_token_id=0,
        )  # fmt: skip
        peer = transformers.Llama4ForCausalLM(config)
    else:
        peer = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shape, intermediate_size=1408)
        )
    peer = peer.to(getattr(torch, dtype)).train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=RATE, fused=True)
    forward = torch.compile(peer) if compiled else peer
    tokens = torch.tensor(ids(), dtype=torch.long)

    def run() -> float:
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def limit(dtype: str):
    """A function that gives this machine's FLOP/s in one of the step's products."""
    shapes = (B * T, SHAPE["embed_dim"]), (SHAPE["embed_dim"], SHAPE["mlp_dim"])
    x, w = (jnp.full(shape, 0.01, dtype) for shape in shapes)
    product = jax.jit(lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(x, w))

    def run(calls=20) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(product(x, w))
        seconds = time.perf_counter() - start
        return calls * 2 * x.size * w.shape[1] / seconds

    return run


PROGRAMS = ("puna", "transformers", "compiled")


def program(name: str, model: str, dtype: str):
    """The function that makes a step of one of PROGRAMS."""
    if name == "puna":
        return ours(config_of(model, dtype))
    return theirs(model, dtype, compiled=name == "compiled")


def answer(make) -> None:
    """Call what `make` gives for each line on stdin; print its result and how long it took."""
    run = make()
    for _ in sys.stdin:
        start = time.perf_counter()
        found = run()
        print(json.dumps([found, time.perf_counter() - start]), flush=True)


class Process:
    """A process that answers."""

    def __init__(self, *arguments: str):
        command = [sys.executable, __file__, "--of", *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self) -> tuple[float, float]:
        """What its function gave, and seconds."""
        print(file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            sys.exit(f"{' '.join(self._process.args)} has ended")
        return tuple(json.loads(line))

    def end(self) -> None:
        """Let it end."""
        self._process.stdin.close()
        self._process.wait()


def row(model: str, dtype: str, rounds: int) -> dict:
    """The figures of one model."""
    names = PROGRAMS[:1] if model == "lora" else PROGRAMS
    processes = {name: Process(name, model, dtype) for name in names}
    bare, limits, took, losses = Process("limit", model, dtype), [], {x: [] for x in names}, {}
    for i in range(rounds + 1):
        limits.append(bare()[0])
        for name in names:
            losses[name], seconds = processes[name]()
            if i:  # the first one compiles
                took[name].append(B * T / seconds)
    for process in (bare, *processes.values()):
        process.end()
    speeds = {name: statistics.median(x) for name, x in took.items()}
    peer, most = max(speeds[x] for x in names[1:]) if names[1:] else None, statistics.median(limits)
    flops = flops_per_token(config_of(model, dtype).model, T)
    return {
        "model": model, "dtype": dtype, "tokens_per_second": speeds, "limit": most,
        "losses": losses, "ratio": peer and speeds["puna"] / peer,
        # A frozen matrix has no gradient of its own: fewer than 6 a parameter.
        "of_limit": None if model == "lora" else speeds["puna"] * flops / most,
    }  # fmt: skip


def main():
    """Print a row for each model and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="dense,experts,lora", help="which of these")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="which of these")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are printed")
    parser.add_argument("--json", default="", help="file for the figures")
    parser.add_argument("--of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.of:
        name, model, dtype = args.of
        answer(lambda: limit(dtype) if name == "limit" else program(name, model, dtype))
        return
    print("| model, dtype | puna, tokens/s | transformers | compiled | ratio | of the limit "
          "| limit, GFLOP/s |\n|---|---|---|---|---|---|---|")  # fmt: skip
    found = []
    for model in args.models.split(","):
        for dtype in args.dtypes.split(","):
            found.append(row(model, dtype, args.rounds))
            speeds, ratio, share = (
                found[-1][x] for x in ("tokens_per_second", "ratio", "of_limit")
            )
            cells = [f"{speeds[x]:.0f}" if x in speeds else "" for x in PROGRAMS]
            cells += [f"{ratio:.2f}" if ratio else "", f"{share:.0%}" if share else ""]
            cells.append(f"{found[-1]['limit'] / 1e9:.0f}")
            print(f"| {model}, {dtype} | {' | '.join(cells)} |", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
