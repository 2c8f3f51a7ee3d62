"""The documents of a task: records through templates, with the examples that stand before each."""

import functools
import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import numpy as np

from ...configs.errors import UserError
from ...models.decode.pictures import PLACE
from ...models.text import template
from ...train.data import files, remote, tfds_documents
from ...train.data.examples import RecordError
from ...train.data.transforms import readable
from . import made, pictures
from .definition import Task

_MAX_BYTES = 64 << 20  # of a record
# Between templates that are rendered as one, and between choices; text has neither.
_PART, _CHOICE = "\x1e", "\x1f"
_GLOBALS = {"raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner",
            "namespace"}  # fmt: skip


class Document(NamedTuple):
    """A question.

    number: of the record in its data. prompt: the question alone. target: of a choice, the number
    of the right one as text. choices: of a preference, the better answer and the worse one. shots:
    (prompt, answer) of each example before it. before, after: of code. facts: what the record says
    besides: a needle's depth, the instructions to check, the functions that can be called.
    pictures: paths or bytes of files, one for each `<|image|>` of the shots and of the prompt.
    """

    number: int
    prompt: str
    target: str
    choices: tuple[str, ...]
    shots: tuple[tuple[str, str], ...]
    before: str
    after: str
    facts: dict[str, Any]
    pictures: tuple[str | bytes, ...] = ()


def documents(task: Task, tokenizer, limit: int | None = None,
              part: tuple[int, int] = (0, 1)) -> list[Document]:  # fmt: skip
    """The documents of a task, or `limit` of them, chosen at random once and for all.

    Args:
      task: where the data are, and the templates.
      tokenizer: makes made texts as long as they are to be.
      limit: most documents.
      part: (i, n) reads every n-th of them from the i-th on.

    Raises:
      UserError: the data are not there, or a record does not suit the task.
    """
    if task.made:
        records = made.records(task, tokenizer)
        return [_made(task, records, i) for i in _chosen(len(records), limit)[part[0] :: part[1]]]
    records = _open(task, task.data)
    chosen = _chosen(len(records), limit)[part[0] :: part[1]]
    found = [_rendered(task, records, i) for i in chosen]
    if task.shots:
        others = _open(task, task.shots_data)
        if len(others) < task.shots:
            raise UserError(
                f"{task.name}: shots={task.shots} and {task.shots_data} holds {len(others)} records"
            )
        examples = [_rendered(task, others, i) for i in range(task.shots)]
        shots = tuple((e.prompt, right(task, e)) for e in examples)
        seen = tuple(picture for e in examples for picture in e.pictures)
        found = [d._replace(shots=shots, pictures=seen + d.pictures) for d in found]
    return found


def right(task: Task, document: Document) -> str:
    """The right answer as text."""
    if task.kind != "choice":
        return document.target
    return document.choices[int(document.target)]


def _chosen(count: int, limit: int | None) -> list[int]:
    """Numbers in order: the first ones may be one subject, every n-th may have one answer."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(0).sample(range(count), limit))


def _open(task: Task, source: str) -> Sequence:
    if source.startswith("tfds:"):
        spec = source.removeprefix("tfds:")
        return tfds_documents.TfdsRecords(spec, None, None, _MAX_BYTES)
    if not remote.is_remote(source) and not source.startswith(("~", "/")):
        source = os.path.join(task.folder, source)
    try:
        found = files.FileRecords(files.find_files(source), _MAX_BYTES)
    except UserError as error:
        raise UserError(
            f"{task.name}: {error}; --data_dir, or eval.tasks_dir of a run, says where data lie"
        ) from error
    if not len(found):
        raise UserError(f"{task.name}: {source} is empty")
    return found


def _plain(value):
    """A record as JSON has it: TFDS gives arrays, bytes and lists as a dict of columns."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, str) and "\ud800" <= max(value, default="") <= "\udfff":
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _pictures(task: Task, record: dict, folder: str, where: str) -> tuple[str | bytes, ...]:
    """Take the pictures out of a record, which keeps how many there were in each field."""
    if not set(task.images) & set(record):
        raise UserError(f"{where} has none of the fields of images={', '.join(task.images)}")
    found: list = []
    for key in task.images:
        value, before = record.get(key), len(found)
        for picture in value if isinstance(value, list | tuple) else [value]:
            if picture is not None:
                try:
                    found.append(pictures.file_of(readable(picture, key, folder)))
                except (RecordError, UserError) as error:
                    raise UserError(f"{where}: {key}: {error}") from None
        record[key] = len(found) - before
    return tuple(found)


def _rendered(task: Task, records, number: int) -> Document:
    where = f"{task.name}: record {number}"
    record, seen = records[number], ()
    record = {"text": record} if isinstance(record, str) else dict(record)
    if task.images:
        seen = _pictures(task, record, records.folder(number), where)
    record = _plain(record)
    missing = _fields(task) - set(record)
    if missing:
        raise UserError(
            f"{where} has no {sorted(missing)[0]!r}, which a template of the task names (its keys: "
            f"{', '.join(record)})"
        )
    text, _ = template.render(_source(task), record)
    prompt, target, before, after, tools, *rest = text.split(_PART)
    choices = tuple(rest[0].split(_CHOICE)[:-1]) if len(rest) == 1 else ()
    if len(rest) != 1:
        raise UserError(f"{where} holds the control character U+001E, which separates its parts")
    if task.kind == "choice":
        target = target.strip()
        if len(choices) < 2 or not all(choices):
            raise UserError(f"{where} has {len(choices)} choices, of which none may be empty")
        if not target.isdecimal() or int(target) >= len(choices):
            raise UserError(
                f"{where}: target={target!r} must be the number of the right choice, 0 to "
                f"{len(choices) - 1}"
            )
    if task.images:
        prompt = _placed(prompt, len(seen), where)
        if any(PLACE in text for text in (target, *choices)):
            raise UserError(f"{where} has {PLACE} in an answer: pictures stand in prompts only")
    if not prompt and task.kind != "text":
        raise UserError(f"{where} has an empty prompt")
    facts: dict = {}
    if task.kind == "instructions":
        facts = {key: record.get(key) for key in ("instruction_id_list", "kwargs")}
    if task.kind == "tools":
        facts = {"tools": _json(where, tools)}
    if task.kind == "preference":
        target = "0"
        if not all(choices):
            raise UserError(f"{where} has an empty answer")
    return Document(number, prompt, target, choices, (), before, after, facts, seen)


def _placed(prompt: str, count: int, where: str) -> str:
    """The prompt with a place for each picture: those that it has none for come first."""
    missing = count - prompt.count(PLACE)
    if missing < 0:
        raise UserError(
            f"{where}: the prompt has {prompt.count(PLACE)} {PLACE} and there are {count} pictures"
        )
    return PLACE * missing + prompt


def _json(where: str, text: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: tools={text[:80]!r} must be JSON: {error}") from None


def _made(task: Task, records: Sequence[Mapping], number: int) -> Document:
    record = dict(records[number])
    examples = record.pop("shots", ())
    shots = tuple(
        (r["prompt"], r["choices"][int(r["target"])] if "choices" in r else r["target"])
        for r in examples
    )
    seen = tuple(x for r in (*examples, record) for x in r.get("images", ()))
    record.pop("images", None)
    prompt, target = record.pop("prompt"), record.pop("target")
    return Document(
        number, prompt, target, tuple(record.pop("choices", ())), shots, "", "", record, seen
    )  # fmt: skip


def _source(task: Task) -> str:
    """All templates of a task as one, which is rendered once a record."""
    if task.kind == "preference":
        choices = f"{task.chosen}{_CHOICE}{task.rejected}{_CHOICE}"
    elif isinstance(task.choices, str):
        choices = "{% for _c in (" + task.choices + ") %}{{ _c }}" + _CHOICE + "{% endfor %}"
    else:
        choices = "".join(choice + _CHOICE for choice in task.choices)
    return _PART.join([task.prompt, task.target, task.before, task.after, task.tools, choices])


def _fields(task: Task) -> set[str]:
    """The names that the templates read and do not set: what Jinja would print as nothing."""
    return _undeclared(task.name, _source(task))


@functools.cache
def _undeclared(name: str, source: str) -> set[str]:
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
    try:
        # The second names filters that there are not.
        found = jinja2.meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{name}: a template is not Jinja: {error.message}") from None
    return found - _GLOBALS


def fingerprint(found: Sequence[Document]) -> str:
    """A hash of what documents ask."""
    digest = hashlib.sha256()
    for document in found:
        document = document._replace(pictures=tuple(map(pictures.name, document.pictures)))
        digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:32]
