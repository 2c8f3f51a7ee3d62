"""Every command that a page or a docstring shows is real: its flags, keys, files and targets exist.

None is run here. `puna` commands are read as far as the point where they would start, of
benchmarks the arguments are read from the source. What a page shows beside commands, flags such as
`--fresh` and keys such as `train.keep_every`, exists too.
"""

import ast
import contextlib
import functools
import re
import shlex
import string
from pathlib import Path

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
