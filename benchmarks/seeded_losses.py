"""Train a dense and a mixture-of-experts model from fixed seeds: the bits of every loss.

    python benchmarks/seeded_losses.py > after.json

A change that is meant to change no number prints the same text before and after it (`diff`). The
text holds each step's loss and gradient norm as hexadecimal floats, and the same for packed rows,
two microbatches and, with eight simulated devices, a mesh of fsdp 2, tensor 2 and expert 2.
"""

import contextlib
import json
import os
import pathlib
import sys
import tempfile

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import puna

DENSE = {"num_layers": 2}
EXPERTS = {
    "num_layers": 4, "num_experts": 4, "experts_per_token": 1, "moe_interval": 2,
    "nope_interval": 4, "chunk_size": 16, "expert_dim": 24, "qk_norm": True,
}  # fmt: skip
MESHES = {"one device": {}, "fsdp 2, expert 2, tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2}}


def run(folder: pathlib.Path, shape: dict, mesh: dict, steps: int = 8) -> list[dict]:
    """Loss and gradient norm of each step, exactly."""
    config = puna.get_config("tiny")
    model = {
        "vocab_size": 512, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
        "mlp_dim": 48, "compute_dtype": "float32",
    }  # fmt: skip
    config.model.update(model | shape)
    config.mesh.update({"data": -1} | mesh)
    config.data.update(
        train=str(folder / "*.txt"), validation="", seq_len=64, tokenizer="bytes",
    )  # fmt: skip
    config.train.update(
        steps=steps, batch_size=16, microbatches=2, log_every=1, save_every=1000, eval_every=0
    )
    workdir = folder / ("run" + str(len(list(folder.iterdir()))))
    with contextlib.redirect_stdout(sys.stderr):
        puna.train(config, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: json.loads(x)[k].hex() for k in ("loss", "grad_norm")} for x in lines]


def main():
    """Print the JSON."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for i in range(20):
            text = f"{i}: the llama eats grass on the puna, {i * 7 % 11} times a day.\n"
            (folder / f"{i:02}.txt").write_text(text * (2 + i % 5))
        for shape, model in (("dense", DENSE), ("experts", EXPERTS)):
            for title, mesh in MESHES.items():
                found[f"{shape}, {title}"] = run(folder, model, mesh)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
