"""Train a tiny model with canaries planted 1 to 64 times, and audit what it has learnt by heart.

    python benchmarks/memorisation.py --steps=400 --canaries=12

The corpus is made: sentences, and canaries of random words, each planted as often as its group
says. Prints the table of `puna audit` for the planted ones and for as many that were never planted.
"""

import argparse
import json
import pathlib
import random
import tempfile

import puna
from puna.eval.audits import memorisation

_COUNTS = (1, 4, 16, 64)
_WORDS = 12  # of a canary, each of five letters and a space
_SENTENCES = 2000


def canary(rng) -> str:
    """Words that no sentence has."""
    letters = "bcdfghjklmnpqrstvwxyz"
    return " ".join("".join(rng.choices(letters, k=5)) for _ in range(_WORDS))


def sentence(rng) -> str:
    """What the rest of the corpus is made of."""
    who, what, where = (rng.choice(words.split()) for words in (
        "Ana Bruno Carla Diego Elena Hugo", "found lost sold painted took washed",
        "barn market bridge harbour mill station"))  # fmt: skip
    return f"{who} {what} {rng.randrange(2, 99)} baskets near the {where}."


def main():
    """Make the corpus, train, audit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--canaries", type=int, default=12, help="of each group")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        planted = [(canary(rng), count) for count in _COUNTS for _ in range(args.canaries)]
        unseen = [canary(rng) for _ in range(args.canaries * len(_COUNTS))]
        documents = [text for text, count in planted for _ in range(count)]
        documents += [" ".join(sentence(rng) for _ in range(4)) for _ in range(_SENTENCES // 4)]
        rng.shuffle(documents)
        lines(work / "corpus.jsonl", [{"text": text} for text in documents])
        lines(work / "held_out.jsonl", [{"text": sentence(rng)} for _ in range(50)])
        lines(work / "planted.jsonl", [{"text": t, "repeats": count} for t, count in planted])
        lines(work / "unseen.jsonl", [{"text": text} for text in unseen])
        settings = {
            "model.vocab_size": 264, "model.embed_dim": 96, "model.num_layers": 2,
            "model.num_heads": 4, "model.head_dim": 24, "model.mlp_dim": 256,
            "data.tokenizer": "bytes", "data.train": work / "corpus.jsonl",
            "data.validation": work / "held_out.jsonl", "data.seq_len": 128,
            "train.steps": args.steps, "train.batch_size": 16, "train.log_every": 50,
            "train.save_every": args.steps, "train.eval_every": args.steps,
        }  # fmt: skip
        config = puna.get_config("tiny", [f"{key}={value}" for key, value in settings.items()])
        puna.train(config, work / "run")
        results = memorisation.audit_memorisation(
            work / "run", str(work / "planted.jsonl"), str(work / "unseen.jsonl"),
            prefixes=(6, 18, 36), suffix=30,
        )  # fmt: skip
        print(memorisation.table(results))


def lines(path: pathlib.Path, records) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
