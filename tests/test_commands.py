"""Every command that a page or a docstring shows is real, and those of the pages run.

The fast tests read them: flags, keys, files and targets exist. `puna` commands are read as far as
the point where they would start, of benchmarks the arguments are read from the source. What a page
shows beside commands, flags such as `--fresh` and keys such as `train.keep_every`, exists too.

The slow ones run them, page by page and in order, in a folder that holds such files as the page
names: small ones (`folder`). `SHORTER` says what is added to a command that would take long,
`NOT_RUN` which ones are not run, and why.
"""

import ast
import contextlib
import functools
import gzip
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import puna
from puna import __main__ as cli
from puna.configs import command_line, schema

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# A changelog tells of what was; the made pages have a test of their own.
PAGES = [page for page in PAGES if page.name not in ("CHANGELOG.md", "config.md", "files.md")]
DOCSTRINGS = [
    *sorted((ROOT / "configs").rglob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]
STARTS = ("puna", "python", "pytest", "make", "pip", "bash")
STARTERS = (
    "_join", "_train", "_eval", "_audit", "_generate", "_chat", "_serve", "_data", "_plan",
    "_launch", "_convert",
)  # fmt: skip


def blocks(text, language=""):
    """The fenced blocks of a language, by default of none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def spans(text):
    """Code in running text and tables."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def command(line):
    """The words of the command in a line, or none: `A=b srun --x puna train` is `puna train`."""
    if found := re.search(r"--command='(.*)'", line):
        line = found[1]
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a line of a command's output, with a quotation mark
        return []
    words = [word for word in words if word != "..."]
    while words and (re.match(r"[A-Z_]+=", words[0]) or words[0] == "srun"):
        words = words[1:]
        while words and words[0].startswith("--"):
            words = words[1:]
    if words[:3] == [".venv/bin/python", "-m", "pytest"]:
        words = words[2:]
    return words if words and words[0] in STARTS else []


def shown():
    """Each command: where it stands, and its words."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        block = "\n".join(blocks(text)).replace("\\\n", " ")
        for line in [*block.splitlines(), *spans(text)]:
            for part in line.split("&&"):
                if words := command(part):
                    yield str(page.relative_to(ROOT)), words
    for path in DOCSTRINGS:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for line in doc.replace("\\\n", " ").splitlines():
            # Optional arguments are in brackets, a remark is in parentheses behind.
            plain = re.sub(r"\[(--[^]]*)\]", r"\1", re.sub(r"\s{2,}\(.*", "", line.strip()))
            for part in plain.split("&&"):
                words = command(part)
                if words[1:] and (words[1] in cli.COMMANDS or words[1].endswith(".py")):
                    yield str(path.relative_to(ROOT)), words


COMMANDS = [(where, words) for where, words in shown() if len(words) > 1]


@pytest.fixture
def nothing_starts(monkeypatch):
    for function in STARTERS:
        monkeypatch.setattr(cli, function, lambda *args: None)
    monkeypatch.setattr(cli, "_launch", lambda args, arguments: cli._run(arguments))


def some_of(name):
    found = [(where, words) for where, words in COMMANDS if words[0] == name]
    ids = [f"{where}: {shlex.join(words)}" for where, words in found]
    return pytest.mark.parametrize("words", [words for _, words in found], ids=ids)


@some_of("puna")
def test_puna(words, nothing_starts):
    name, *arguments = words[1:]
    # A placeholder for a number; `puna launch --restarts=N` in running text.
    arguments = [re.sub(r"=[NI]$", "=1", argument) for argument in arguments]
    if not arguments:
        assert name == "--help" or name in cli.COMMANDS
        return
    if name in ("train", "eval", "data", "plan") and not any(
        a.startswith("--config=") for a in arguments
    ):
        arguments.append("--config=tiny")
    with contextlib.redirect_stdout(None):
        cli._run([name, *arguments])


@some_of("python")
def test_benchmarks(words):
    path, *arguments = words[1:]
    assert path == "docs/make.py" or path.startswith("benchmarks/"), words
    assert (ROOT / path).exists(), f"{path} does not exist"
    known = benchmark_arguments(path)
    keys = [a for a in arguments if a.startswith("--config.")]
    assert not keys or "--config" in known
    command_line.prepare(keys)
    for argument in set(arguments) - set(keys):
        if argument.startswith("-"):
            assert argument.split("=")[0] in known, f"{path} has no {argument}"
        else:
            assert argument == ">" or arguments[arguments.index(argument) - 1] == ">", argument


@functools.cache
def benchmark_arguments(path) -> set[str]:
    """The first argument of every `add_argument`; --config where the file reads it by itself."""
    text = (ROOT / path).read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    names = {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
    }
    return names | ({"--config"} if '"--config"' in text else set())


@some_of("pytest")
def test_pytest(words):
    arguments, paths, names = iter(words[1:]), [], []
    for argument in arguments:
        if argument == "-k":
            names.append(next(arguments))
        elif argument == "-m":
            next(arguments)
        else:
            paths.append(ROOT / argument)
    assert paths and all(path.exists() for path in paths), words
    files = [f for path in paths for f in ([path] if path.is_file() else path.rglob("test_*.py"))]
    tests = " ".join(re.findall(r"^def (test_\w+)", "\n".join(map(Path.read_text, files)), re.M))
    for name in names:
        assert name in tests, f"-k {name} chooses no test of {paths}"


@some_of("make")
def test_make(words):
    rules = re.findall(r"^([\w./-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = [word for word in words[1:] if "=" not in word]
    assert set(targets) <= set(rules), words


@some_of("pip")
def test_pip(words):
    assert words[1] == "install"
    extras = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    known = next(
        {key.value for key in node.value.keys}
        for node in ast.walk(extras)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS"
    )
    for word in words[2:]:
        if found := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(found[1].split(",")) <= known, word


@some_of("bash")
def test_bash(words):
    assert (ROOT / words[1]).exists()


def test_flags_and_keys_in_running_text():
    flags = {"--version", "--dist"} | {
        name
        for b in (ROOT / "benchmarks").glob("*.py")
        for name in benchmark_arguments(b.relative_to(ROOT))
    }
    for name in cli.COMMANDS:
        flags |= {f"--{flag}" for flag in command_line.define(name, [])}
    keys = {name for name, *_ in schema.keys()}
    sections = {key.split(".")[0] for key in keys}
    wrong = []
    for page in PAGES:
        for span in spans(page.read_text(encoding="utf-8")):
            name = span.removeprefix("--config.").split("=")[0].strip()
            if span.startswith("--config.") or re.fullmatch(
                r"[a-z]+(\.[a-z0-9_]+)+(?<!\.jsonl)", name
            ):
                known = name in keys or any(key.startswith(name + ".") for key in keys)
                if not known and name.split(".")[0] in sections:
                    wrong.append(f"{page.name}: {span}")
            elif span.startswith("--") and span[2:3] in string.ascii_letters:
                wrong += [f"{page.name}: {f}" for f in re.findall("--[a-z_]+", span)
                          if f not in flags]  # fmt: skip
    assert not wrong, wrong


def test_python_of_the_pages_names_what_puna_has():
    trees = [ast.parse(b) for p in PAGES for b in blocks(p.read_text(encoding="utf-8"), "python")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute)]
    names = {name.split(".")[1] for name in names if name.startswith("puna.")}
    assert names and names <= set(puna.__all__)
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "puna.get_config":
            puna.get_config(*map(ast.literal_eval, node.args))


def test_pages_show_commands_of_every_kind():
    kinds = {words[0] for _, words in COMMANDS}
    assert kinds == set(STARTS)
    shown_of_puna = {words[1] for where, words in COMMANDS if words[0] == "puna" and words[2:]}
    assert shown_of_puna >= set(cli.COMMANDS)


STEPS = (
    "--config.train.steps=2 --config.train.batch_size=8 --config.train.microbatches=1 "
    "--config.data.seq_len=64 --config.optimizer.warmup_steps=1 --config.train.loss_chunk=64"
)
SHAPE = (
    "--config.model.num_layers=2 --config.model.embed_dim=32 --config.model.num_heads=4 "
    "--config.model.num_kv_heads=2 --config.model.head_dim=8 --config.model.mlp_dim=48 "
    "--config.model.vocab_size=264 --config.data.tokenizer=bytes"
)
TEXTS = "--config.data.train=books/a.jsonl.gz --config.data.validation=held_out.txt"
# What is added to a command that matches, to make it short; of several patterns the first counts.
SHORTER = {
    "train .*--init_from": STEPS,
    "train .*eval.tasks=": f"{SHAPE} {STEPS} {TEXTS} --config.eval.tasks_limit=1",
    "train .*--profile": f"{SHAPE} {STEPS} {TEXTS} --config.train.steps=7",
    "train .*--config.data.train": f"{SHAPE} {STEPS}",
    "train": f"{SHAPE} {STEPS} {TEXTS}",
    "eval --config=tiny": "--config.data.validation=held_out.txt",
    "eval --config=llama3": "--config.data.seq_len=64",
    "eval .*--config=reward": STEPS,
    "eval .*--tasks": "--limit=1",
    # Compiling for TPUs takes minutes: tests/train/plan has its own, of small models.
    "plan .*--topology=v5p-8": "--no_compile",
    "benchmarks/kill_evaluation.py": "--kills=1",
    "benchmarks/load_memory.py": "--gigabytes=0.02",
    "benchmarks/checkpoints.py": "--gigabytes=0.02",
    "benchmarks/decode.py --prefill": "--rounds=1 --prefill=32 --cache=64,128",
    "benchmarks/quantized.py": "--rows=1 --length=32",
    "benchmarks/start_up.py": "--rounds=1",
    "benchmarks/serving.py": "--requests=20 --clients=2 --tokens=2",
}
# Words that stand for what the reader has.
NAMES = {
    "MODEL": "path/to/Llama-3.2-1B-Instruct", "OTHER": "path/to/Llama-3.2-1B",
    "SRC": "path/to/base", "DST": "release", "DIR": "runs/dir", "/shared/run": "runs/shared",
}  # fmt: skip
# Patterns of commands that are not run here: why, and what covers them.
NOT_RUN = {
    r"pip install 'puna\[": ("puna is on no package index", "test_pip"),
    r"pip install -e '\.\[cuda\]'": ("2 GB that only a GPU needs", "make .cache/cuda in .ci/run"),
    "make demo$": ("its commands stand in the README", "test_the_demo_is_what_the_readme_shows"),
    "make demo-real": ("its benchmark is run", "tests/models/weights/test_real_model.py"),
    "make test-lower": ("takes as long as `make test`", "before a bound of setup.py is changed"),
    "make (format|clean)": ("changes the checkout", "make lint in .ci/run"),
    "puna eval .*--harness": ("downloads data sets", "tests/eval/test_harness.py"),
    "puna launch --restarts=N$": ("a flag's name", "tests/train/resilience/test_launch.py"),
    "python benchmarks/compile_ahead": ("compiles for minutes", "tests/train/test_ahead.py"),
    "python benchmarks/decode_ahead": ("compiles for minutes", "tests/models/decode/test_ahead.py"),
    "python benchmarks/compile_depth": ("compiles for minutes", "tests/train/test_ahead.py"),
    "python benchmarks/fine_tune_memory": ("compiles for minutes", "tests/train/test_ahead.py"),
    "python benchmarks/plan_table": ("compiles for minutes", "tests/train/plan/test_plan.py"),
    "python benchmarks/experts": ("compiles for minutes", "tests/models/kernels/test_experts.py"),
    "python benchmarks/eight_bits": ("trains for minutes", "tests/models/test_eight_bits.py"),
    "python benchmarks/predicted_time": ("minutes", "tests/train/plan/test_timing.py"),
    "python benchmarks/fine_tune.py": ("minutes", "tests/models/weights/test_real_model.py"),
    "python benchmarks/media_demo": ("trains for minutes", "tests/train/test_media.py"),
    "python benchmarks/teach": ("trains for minutes", "tests/train/objectives"),
    "python benchmarks/serving.py --rounds": ("minutes", "tests/models/decode/server/test_app.py"),
    "python benchmarks/decode.py --rounds": ("minutes", "tests/models/decode/test_generate.py"),
    "python benchmarks/page": ("needs Chromium", "tests/models/decode/server/test_page.py"),
    "python benchmarks/speculation": ("minutes", "tests/models/decode/test_speculation.py"),
    "python benchmarks/gguf_in": ("needs llama.cpp", "tests/models/release/test_gguf_release.py"),
    ".*/kill_anywhere.* --bucket": ("is run there", "tests/train/test_object_storage.py"),
    ".*/kill_anywhere": ("is run there", "tests/train/resilience/test_kill_anywhere.py"),
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def of_page(page):
    """The commands of a page; `puna train` in running text is only a name."""
    return [w for where, w in COMMANDS if where == page and (w[0] != "puna" or w[2:])]


def reason_not_to_run(words):
    """The pattern of NOT_RUN that a command matches, if there is one."""
    said = shlex.join(words)
    return next((pattern for pattern in NOT_RUN if re.match(pattern, said)), None)


def ci_runs(words) -> bool:
    """Whether .ci/run runs a command: all tests, some targets, and what those install."""
    if words[0] == "make":
        ran = re.findall(r"^ *make (.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
        return set(words[1:]) <= set(" ".join(ran).split())
    if words[0] == "pip":
        extras = re.search(r"^SLOW_EXTRAS .*= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        known = {*(extras[1] if extras else "").split(","), ""}
        return words[-1][0] == "." and set(words[-1].strip(".[]").split(",")) <= known
    return words[0] in ("pytest", "bash")


def test_every_command_runs_or_is_listed():
    left = [words for page in PAGES for words in of_page(page.relative_to(ROOT).as_posix())
            if not ci_runs(words)]  # fmt: skip
    reasons = [reason_not_to_run(words) for words in left]
    assert set(reasons) - {None} == NOT_RUN.keys(), "a pattern that no command matches"
    run_here = [words for words, why in zip(left, reasons, strict=True) if why is None]
    assert {words[0] for words in run_here} == {"puna", "python"}
    for _, test in NOT_RUN.values():
        assert not test.startswith("tests/") or (ROOT / test).exists(), test


def test_the_demo_is_what_the_readme_shows():
    found = re.search(r"^demo:.*\n((\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = [shlex.split(line.replace("$(BIN)/", "")) for line in found[1].splitlines()]
    assert lines == [words for words in of_page("README.md") if "runs/demo" in shlex.join(words)]


def completed(words):
    """The words of a command with files that are there, and what makes it short."""
    for name, file in NAMES.items():
        words = [re.sub(f"(^|=){name}$", rf"\1{file}", word) for word in words]
    if "--" in words:  # what `puna launch` runs: in two processes, however many are shown
        at = words.index("--")
        command = completed(["puna", *words[at + 1 :]])[1:]
        return [*words[:at], "-n", "2", "--devices=4", "--", *command]
    said = " ".join(words[1:])
    more = next((text for pattern, text in SHORTER.items() if re.match(pattern, said)), "")
    return [*words, *more.split()]


def run(words, monkeypatch):
    """Run a command, `puna` in this process, which has compiled most programs by then."""
    name, *arguments = completed(words)
    if name == "python":
        script = [sys.executable, ROOT / arguments[0], *arguments[1:]]
        done = subprocess.run(script, capture_output=True, text=True, check=False,
                              env={**os.environ, "XLA_FLAGS": ""})  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    elif arguments[0] == "serve":
        serve(arguments)
    else:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Who walks over the puna?\n"))
        cli._run(arguments)


def serve(arguments):
    """Start it, wait until it is ready, and end it as the system does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = [re.sub("--port=[0-9]+", f"--port={port}", word) for word in arguments]
    process = subprocess.Popen(
        [sys.executable, "-m", "puna", *arguments], env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, out


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def table(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the commands find: texts, conversations, pairs, quizzes, models and adapters."""
    home = tmp_path_factory.mktemp("made")
    texts = [f"llama {i} walks over the puna and looks at the grass. " * 8 for i in range(40)]
    for name in ("books/a.jsonl.gz", "data/a.jsonl.gz", "texts/a.jsonl"):
        write(home / name, [{"text": text} for text in texts])
    write(home / "planted.jsonl", [{"text": text, "repeats": 1} for text in texts])
    write(home / "never.jsonl", [{"text": "no alpaca does what it is told. " * 9}] * 4)
    write(home / "questions.jsonl", [{"text": text} for text in texts])
    (home / "held_out.txt").write_text("a llama looks at the grass of the puna. " * 40)
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A llama."}]
    pair = {"prompt": "Who?", "chosen": " A llama.", "rejected": " A cat."}
    for name in ("train.jsonl", "held_out.jsonl", "pairs.jsonl"):
        write(home / name, [{"messages": said} | pair] * 40)
    question = {"question": "Who?", "a": "llama", "b": "cat", "right": 0}
    for name in ("quiz/a.jsonl", "quiz/examples.jsonl"):
        write(home / name, [question] * 4)
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (home / "mine.toml").write_text(blocks(page, "toml")[0])
    asked = {"question": "Who?", "subject": "puna", "choices": [*"abcd"], "answer": 1}
    for name in ("test", "dev"):
        table(home / f"benchmarks_on_disk/mmlu/all/{name}-0.parquet", [asked] * 6)
    for name in ("test", "train"):
        answer = {"question": "How many?", "answer": "#### 3"}
        table(home / f"benchmarks_on_disk/gsm8k/main/{name}-0.parquet", [answer] * 9)
    for i, (parameters, tokens) in enumerate(itertools.product((1e6, 1e7, 1e8), (2e7, 2e8, 2e9))):
        loss = 1.7 + 400 / parameters**0.34 + 410 / tokens**0.28
        folder = home / "runs" / f"small-{i}"
        folder.mkdir(parents=True)
        results = {"parameters": parameters, "tokens": tokens, "validation_loss": loss}
        (folder / "results.json").write_text(json.dumps(results))
    with contextlib.chdir(home):
        for workdir in ("base", "runs/demo"):
            cli._run(completed(["puna", "train", "--config=tiny", f"--workdir={workdir}"])[1:])
        for name in ("base", "Llama-3.2-1B", "Llama-3.2-1B-Instruct", "Llama-3.1-8B"):
            cli._run(["convert", "base", f"path/to/{name}", "--to=hf"])
            tokenizer = home / "path" / "to" / name / "tokenizer_config.json"
            known = json.loads(tokenizer.read_text())
            tokenizer.write_text(json.dumps(known | {"chat_template": TEMPLATE}))
        for recipe in ("lora", "reward"):
            words = ["puna", "train", f"--config={recipe}", "--init_from=path/to/Llama-3.2-1B",
                     "--config.data.train=train.jsonl", f"--workdir=runs/{recipe}"]  # fmt: skip
            cli._run(completed(words)[1:])
        for name in ("a", "b"):
            shutil.copytree("runs/demo", f"runs/{name}")
        cli._run(["convert", "runs/reward", "path/to/reward", "--to=hf"])
        for name in ("adapter", "one", "another"):
            cli._run(["convert", "runs/lora", f"path/to/{name}", "--to=peft"])
    return home


# Benchmarks that several pages name are run once.
FIRST = {tuple(words): where for where, words in reversed(COMMANDS)}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page.relative_to(ROOT).as_posix() for page in PAGES])
def test_they_run(page, made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for words in of_page(page):
        if words[:2] == ["puna", "train"]:  # what a page trains is not there before
            for folder in re.findall(r"--workdir=(\S+)", " ".join(completed(words))):
                shutil.rmtree(folder, ignore_errors=True)
    for words in of_page(page):
        if not (ci_runs(words) or reason_not_to_run(words)):
            if words[0] == "puna" or FIRST[tuple(words)] == page:
                run(words, monkeypatch)
