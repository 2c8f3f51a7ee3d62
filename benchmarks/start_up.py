"""Where the time from `puna train` to its first step goes, without and with what a start keeps.

    python benchmarks/start_up.py [--config=tiny --rounds=3 --json=FILE]

Each round starts twice in fresh folders: the first start finds no compiled programs and no index of
the data, the second finds those of the first. Other keys are those of --config; of the run one step
is made. Medians of the rounds, in seconds, and processor seconds of the whole process.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

# What JAX reports of itself, of all programs: the step and those that make the state.
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "of all programs: tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "of all programs: lowering",
    "/jax/core/compile/backend_compile_duration": "of all programs: compiling, or reading",
}


def one_start(config: str, folder: str) -> None:
    """Train one step in this process and print where its time went, as JSON."""
    from puna.train.resilience import goodput

    began = goodput.process_start() or time.time()
    interpreter = time.time() - began
    from puna import __main__ as cli
    from puna.train import loop  # noqa: F401 (what `puna train` imports)

    imported = time.time() - began
    import jax

    told = dict.fromkeys(EVENTS.values(), 0.0)

    def listen(event: str, seconds: float, **_):
        if event in EVENTS:
            told[EVENTS[event]] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    cli._run(["train", f"--config={config}", f"--workdir={folder}", "--config.train.steps=1",
              "--config.optimizer.warmup_steps=0", "--config.train.eval_every=0",
              "--config.data.validation="])  # fmt: skip
    spent = json.loads((pathlib.Path(folder) / goodput.FILE).read_text())["seconds"]
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "Python itself": interpreter,
        "imports": imported - interpreter,
        "tokenizer, data, state": spent["start_up"] - imported,
        "the step: tracing to compiling": spent["compile"],
        "the first step": spent["step"] + spent["input_wait"],
        "until the first step is made": spent["start_up"] + spent["compile"] + spent["step"]
        + spent["input_wait"],
    }  # fmt: skip
    print(json.dumps(found | told | {"processor, saving too": used.ru_utime + used.ru_stime}))


def start(config: str, home: pathlib.Path, name: str) -> dict[str, float]:
    """Seconds of a start in a process of its own, whose caches are in `home`."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(home),
        "JAX_COMPILATION_CACHE_DIR": str(home / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, __file__, f"--config={config}", f"--start={home / name}"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Print a table, and JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    parser.add_argument("--start", help="used by itself: the folder of a run")
    args = parser.parse_args()
    if args.start:
        one_start(args.config, args.start)
        return
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as home:
            names = ("first", "second")
            rounds.append([start(args.config, pathlib.Path(home), name) for name in names])
    medians = {
        row: [statistics.median(starts[i][row] for starts in rounds) for i in (0, 1)]
        for row in rounds[0][0]
    }
    print("| seconds | first start | second start |\n|---|---|---|")
    for row, (first, second) in medians.items():
        print(f"| {row} | {first:.2f} | {second:.2f} |")
    if args.json:
        args.json.write_text(json.dumps({"config": args.config, "seconds": medians}))


if __name__ == "__main__":
    main()
