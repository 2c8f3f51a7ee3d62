"""What a task is: a few declarative lines in a TOML or JSON file, checked when they are read.

Packaged ones lie in `definitions/`, most of them for benchmarks whose data the user has on disk.
Templates are Jinja, rendered by the process that renders chat templates; no file holds code.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
import tomllib
from collections.abc import Sequence
from typing import Any

from ...configs import paths
from ...configs.errors import UserError

PACKAGED = pathlib.Path(__file__).parent / "definitions"
# By kind, the metrics that a task may name as its own; the first is the default.
METRICS = {
    "choice": ("accuracy", "accuracy_per_byte", "accuracy_per_token"),
    "generate": ("exact", "number", "math", "regex", "contains", "reasoning_gym"),
    "code": ("passes",),
    "tools": ("arguments", "function", "valid"),
    "preference": ("accuracy",),
    "instructions": ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"),
    "text": ("bits_per_byte",),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A task.

    name: of the file. about: one line for people.
    kind: "choice" (the likeliest of given answers), "generate", "code" (the answer is run with
      tests), "instructions" (what the answer must look like is checked), "tools" (calls of
      functions), "preference" (which of two answers a reward model prefers) or "text" (likelihood).
    data: a source as of `data.train` without weights; relative to `folder`. made: instead of data,
      the keys of a maker in `made.py`.
    prompt, target, before, after: templates over the fields of a record. target: the answer, or
      of a choice its number from 0. before, after: of code, what stands around the answer.
    choices: templates, or one expression whose value is a list.
    tools: a template of the functions in JSON; target is then the calls, see `calls.py`.
    images: fields of a record that hold pictures, one or a list each; each picture takes the next
      `<|image|>` of the prompt, those without a place come first. In templates such a field is the
      number of its pictures.
    chosen, rejected: the better and the worse answer of a preference.
    metric: of `METRICS`; the others of the kind are reported too, where they cost nothing.
    shots, shots_data: examples in a prompt, and where they come from.
    delimiter: between prompt and answer. separator: between examples.
    filter: a regular expression; the first group of its last match in the answer counts.
    stop, max_tokens: of generation. stride: of text, tokens scored in a window; 0 = half of it.
    system: a system message, with a chat template only.
    samples, temperature: answers of a document, drawn at a temperature where there are several. A
      score is their mean. at: of code, the k of pass@k, also reported as `pass_at_k`.
    """

    name: str
    folder: pathlib.Path
    kind: str
    about: str = ""
    data: str = ""
    made: dict[str, Any] = dataclasses.field(default_factory=dict)
    prompt: str = ""
    target: str = ""
    before: str = ""
    after: str = ""
    choices: tuple[str, ...] | str = ()
    tools: str = ""
    images: tuple[str, ...] = ()
    chosen: str = ""
    rejected: str = ""
    metric: str = ""
    shots: int = 0
    shots_data: str = ""
    delimiter: str = " "
    separator: str = "\n\n"
    filter: str = ""
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    stride: int = 0
    system: str = ""
    samples: int = 1
    temperature: float = 0.0
    at: tuple[int, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is reported: the task's own metric first."""
        others = METRICS[self.kind] if self.kind in ("choice", "instructions", "tools") else ()
        others += tuple(f"pass_at_{k}" for k in self.at)
        return (self.metric, *(name for name in others if name != self.metric))

    @property
    def fingerprint(self) -> str:
        """A hash of all that the definition says, wherever it lies."""
        told = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("folder", "about")}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def names() -> list[str]:
    """The packaged tasks."""
    return sorted(path.stem for path in PACKAGED.glob("*.toml"))


def load_tasks(names: Sequence[str], folder: str | None = None, shots: int | None = None,
               key: str = "--tasks") -> list[Task]:  # fmt: skip
    """Read several definitions.

    Args:
      names, folder: see `load_task`.
      shots: examples of each, instead of what it says.
      key: what named them, for messages.

    Raises:
      UserError: none is named, or one twice; see `load_task`.
    """
    tasks = [load_task(name, folder, key) for name in names]
    if not tasks:
        raise UserError(f"{key} is empty: name tasks, separated by commas")
    twice = [t.name for t in tasks if sum(t.name == other.name for other in tasks) > 1]
    if twice:
        raise UserError(f"{key} names {twice[0]} twice")
    if shots is not None:
        if shots < 0:
            raise UserError(f"--num_fewshot={shots} must be at least 0")
        for task in tasks:
            if shots and not (task.shots_data or task.made):
                raise UserError(f"--num_fewshot={shots}: {task.name} has no shots_data")
        tasks = [dataclasses.replace(task, shots=shots) for task in tasks]
    return tasks


def load_task(name: str, folder: str | None = None, key: str = "--tasks") -> Task:
    """Read a definition.

    Args:
      name: of a packaged task, or the path of a .toml or .json file.
      folder: what relative paths of data are relative to: for a file its own folder by default,
        for a packaged task the current one.
      key: what named it, for messages.

    Raises:
      UserError: there is none, or it cannot be; the line names the file and the key.
    """
    path = PACKAGED / f"{name}.toml"
    if name in names():
        home = pathlib.Path.cwd()
    elif name.endswith((".toml", ".json")):
        path = paths.local(name, key)
        home = path.parent
        if not path.is_file():
            raise UserError(f"{key}={name}: no such file")
    else:
        raise UserError(
            f"{key}={name} is neither a packaged task ({', '.join(names())}) nor a .toml or "
            ".json file"
        )
    try:
        text = path.read_text(encoding="utf-8")
        told = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:  # of UTF-8, TOML and JSON alike
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(told, dict):
        raise UserError(f"{path}: must be an object of keys and values")
    return _checked(path, told, home if folder is None else paths.local(folder, "--data_dir"))


def _checked(path: pathlib.Path, told: dict, folder: pathlib.Path) -> Task:
    """The task of a file's keys, or the first thing that is wrong with them."""

    def wrong(text: str) -> UserError:
        return UserError(f"{path}: {text}")

    fields = {f.name: f for f in dataclasses.fields(Task) if f.name not in ("name", "folder")}
    for key, value in told.items():
        if key not in fields:
            raise wrong(f"{key} is not a key of a task; they are {', '.join(fields)}")
        if key == "choices":
            good = isinstance(value, str) or _is_texts(value)
        elif key in ("stop", "images"):
            good = _is_texts(value) and all(value)
        elif key == "made":
            good = isinstance(value, dict)
        elif key in ("shots", "max_tokens", "stride", "samples"):
            good = type(value) is int and value >= (key in ("max_tokens", "samples"))
        elif key == "temperature":
            good = type(value) in (int, float) and 0 <= value < math.inf
        elif key == "at":
            good = isinstance(value, list) and all(type(k) is int and k > 0 for k in value)
        else:
            good = isinstance(value, str)
        if good and key == "filter":
            try:
                re.compile(value)
            except re.error as error:
                raise wrong(f"filter={value!r} is not a regular expression: {error}") from None
        if not good:
            raise wrong(f"{key}={value!r} must be {_RULES.get(key, 'a text')}")
    kind = told.get("kind")
    if not isinstance(kind, str) or kind not in METRICS:
        raise wrong(f"kind={kind!r} must be one of {', '.join(METRICS)}")
    metric = told.setdefault("metric", METRICS[kind][0])
    if metric not in METRICS[kind]:
        raise wrong(f"metric={metric!r} must be one of {', '.join(METRICS[kind])} with kind={kind}")
    if bool(told.get("data")) == bool(told.get("made")):
        raise wrong("a task has either data or made")
    if metric == "reasoning_gym" and told.get("data"):
        raise wrong("metric='reasoning_gym' needs made, with maker='reasoning_gym'")
    needed = {
        "choice": ("prompt", "choices", "target"), "generate": ("prompt", "target"),
        "code": ("prompt", "after"), "instructions": ("prompt",), "text": ("prompt",),
        "tools": ("prompt", "tools", "target"), "preference": ("prompt", "chosen", "rejected"),
    }[kind]  # fmt: skip
    made = bool(told.get("made"))
    for key in needed:
        if not told.get(key) and not made:
            raise wrong(f"{key} is needed with kind={kind}")
    if told.get("shots") and not (told.get("shots_data") or made):
        raise wrong("shots needs shots_data: the examples must not be the questions")
    if told.get("shots") and kind not in ("choice", "generate"):
        raise wrong(f"shots must be 0 with kind={kind}")
    if told.get("images") and (kind not in ("choice", "generate") or made):
        raise wrong(f"images={told['images']} needs data, and kind=choice or kind=generate")
    samples, at = told.get("samples", 1), told.get("at", [])
    if samples > 1 and (kind in ("choice", "text", "preference") or not told.get("temperature")):
        raise wrong(f"samples={samples} needs written answers and a temperature above 0")
    if at and (kind != "code" or max(at) > samples):
        raise wrong(f"at={at} needs kind=code and numbers of at most samples={samples}")
    keys = ("choices", "stop", "at", "images")
    lists = {k: tuple(told[k]) for k in keys if isinstance(told.get(k), list)}
    return Task(name=path.stem, folder=folder, **{**told, **lists})


_RULES = {
    "choices": "a list of templates, or an expression that gives a list",
    "stop": "a list of texts that are not empty",
    "images": "a list of names of fields",
    "made": "a table",
    "shots": "a number of 0 or more",
    "stride": "a number of 0 or more",
    "max_tokens": "a number of 1 or more",
    "samples": "a number of 1 or more",
    "temperature": "a number of 0 or more",
    "at": "a list of numbers of 1 or more",
}


def _is_texts(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)
