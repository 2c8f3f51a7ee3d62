"""`puna eval --tasks`: documents, requests, answers, grades, and the record of all of them.

The workdir gets `record.json` (what was asked of what: versions, hashes, BOS, template, settings),
`requests.jsonl` (ids and answer of every request), `samples.jsonl` (a line a document),
`results.json`, `report.html` and, of questions about pictures, the files in `pictures`.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Iterator, Mapping, Sequence

import jax
from tqdm import tqdm

from ...configs import files, paths, schema, storage
from ...configs.display import Results, text_table
from ...configs.errors import UserError
from ...models.decode.engine import for_decoding
from ...models.parallel import processes, sharding
from ...models.text.tokenizer import load_tokenizer
from ...models.transformer import Transformer, count_params
from ...models.weights.checksum import checksums
from ...models.weights.load import load
from ...train.objectives import reward
from ..answers import Answers
from . import documents, grade, report, statistics
from .definition import Task, load_tasks
from .pictures import Pictures
from .requests import Asker, Asking, Request

_PACKAGES = ("puna", "jax", "jaxlib", "flax", "numpy", "tokenizers", "jinja2", "math-verify",
             "reasoning-gym", "langdetect")  # fmt: skip


class TaskResults(Results):
    """What `results.json` holds; in a notebook the table of the report."""

    def _repr_html_(self) -> str:
        return report.scores(self)


def evaluate_tasks(path, names: Sequence[str], workdir, *, mesh_config=None,
                   compute_dtype: str = "float32", quantize: str = "", adapter: str = "",
                   data_dir: str | None = None, batch_size: int = 8,
                   max_length: int | None = None, limit: int | None = None,
                   num_fewshot: int | None = None, apply_chat_template: bool = False,
                   ) -> TaskResults:  # fmt: skip
    """Evaluate a model on tasks.

    Args:
      path: run, checkpoint or model that `puna.load` reads.
      names: packaged tasks, and .toml or .json files; see `definition.py`.
      workdir: see the top of this file. Answers of the same model that are there already are not
        computed again.
      mesh_config: a `schema.MeshConfig`; all devices by default.
      quantize, adapter: as of `puna.load`.
      data_dir: what relative paths of data are relative to.
      batch_size: rows at a time.
      max_length: longest context in tokens, the model's own by default.
      limit: documents of each task, a random choice that is always the same.
      num_fewshot: instead of what each task says.
      apply_chat_template: ask in a conversation; a system message and shots are its turns.

    Returns:
      What `results.json` holds: by task, its own metric, and of each metric value, stderr, and
      the 95% interval from low to high.

    Raises:
      UserError: a task, its data or a package is not there, or the model cannot be asked.
    """
    path, workdir = storage.anywhere(path, "checkpoint"), paths.local(workdir, "--workdir")
    tokenizer = load_tokenizer(path)
    tasks = load_tasks(names, data_dir, num_fewshot)
    if limit is not None and limit < 1 or batch_size < 1:
        raise UserError(f"--limit={limit} and --batch_size={batch_size} must be at least 1")
    # All that can be wrong with data, before the weights, which may take minutes to load.
    found = {task: documents.documents(task, tokenizer, limit) for task in tasks}
    for task, asked in found.items():
        grade.prepare(task, asked)
    mesh = sharding.make_mesh(mesh_config or schema.MeshConfig())
    asks = next((task.name for task in tasks if task.kind == "preference"), "")
    model, params = _load(path, mesh, asks, quantize, adapter)
    config = dataclasses.replace(model.config, compute_dtype=compute_dtype)
    model = for_decoding(Transformer(config))
    longest = max_length or config.max_positions
    if not 1 < longest <= config.max_positions:
        raise UserError(
            f"--max_length={max_length} must be 2 to the model's max_positions="
            f"{config.max_positions}"
        )
    pictures = Pictures(config, tokenizer)
    asking = Asking(tokenizer, longest, apply_chat_template, pictures)
    requests = {
        task: [asking.requests(task, document) for document in asked]
        for task, asked in found.items()
    }
    weights = _hash(checksums(params))
    record = {
        "checkpoint": str(path), "parameters": count_params(config), "weights": weights,
        "config": dataclasses.asdict(config), "tokenizer": tokenizer.fingerprint,
        "begin_ids": list(tokenizer.begin_ids), "bos_id": tokenizer.bos_id,
        "chat_template": tokenizer.chat_template if apply_chat_template else None,
        "quantize": quantize, "adapter": adapter, "batch_size": batch_size, "max_length": longest,
        "limit": limit, "apply_chat_template": apply_chat_template,
        "mesh": dict(mesh.shape), "device": jax.devices()[0].device_kind,
        "python": platform.python_version(), "versions": dict(_versions()),
        "tasks": {t.name: _about(t, asked) for t, asked in found.items()},
    }  # fmt: skip
    identity = _hash([weights, record["config"], tokenizer.fingerprint])
    answers = Answers(workdir / "requests.jsonl")
    asker = Asker(model, params, tokenizer, mesh, batch_size, answers, identity, pictures)
    lines = asker.ask([r for asked in requests.values() for one in asked for r in one])
    if not processes.is_first():
        return TaskResults(tasks={})
    answers.finish(lines)
    pictures.save(workdir / "pictures")
    samples = list(_samples(asking, found, requests, lines))
    results = TaskResults(checkpoint=str(path), tasks=summarise(tasks, samples))
    files.write_json(workdir / "record.json", record)
    files.write_text(
        workdir / "samples.jsonl", "".join(files.to_json(line) + "\n" for line in samples)
    )
    files.write_json(workdir / "results.json", results)
    files.write_text(workdir / "report.html", report.page(results, samples, record))
    return results


def replay(folder, path, **options) -> Results:
    """Ask again every request of a record, by its ids, and compare the answers.

    Args:
      folder: workdir of an evaluation.
      path: the model; another one than that of the record is told, not refused.
      options: quantize, adapter, mesh_config as of `evaluate_tasks`.

    Raises:
      UserError: there is no whole record.
    """
    folder = paths.local(folder, "--replay")
    record, lines = _read(folder / "record.json"), read_lines(folder / "requests.jsonl")
    path = storage.anywhere(path, "checkpoint")
    tokenizer = load_tokenizer(path)
    mesh = sharding.make_mesh(options.get("mesh_config") or schema.MeshConfig())
    asks = next((line["task"] for line in lines if line["kind"] == "reward"), "")
    model, params = _load(path, mesh, asks, options.get("quantize", ""), options.get("adapter", ""))
    config = dataclasses.replace(
        model.config, compute_dtype=record["config"]["compute_dtype"]
    )  # fmt: skip
    requests = [
        Request(**{k: tuple(v) if isinstance(v, list) else v for k, v in line.items()
                   if k in Request._fields})
        for line in lines
    ]  # fmt: skip
    asker = Asker(
        for_decoding(Transformer(config)), params, tokenizer, mesh, record["batch_size"],
        Answers(None), "", Pictures(config, tokenizer, folder / "pictures"),
    )  # fmt: skip
    again = asker.ask(requests)
    pairs = [(a["answer"], b["answer"]) for a, b in zip(lines, again, strict=True)]
    return Results(
        requests=len(pairs),
        same_weights=_hash(checksums(params)) == record["weights"],
        same_tokenizer=tokenizer.fingerprint == record["tokenizer"],
        equal=sum(a == b for a, b in pairs),
        largest_difference=max(
            (abs(a[0] - b[0]) for a, b in pairs if isinstance(a, list)), default=0.0
        ),
        other_texts=sum(a != b for a, b in pairs if isinstance(a, dict)),
    )


def compare(first, second, workdir=None) -> Results:
    """Two evaluations of the same documents, paired: how much better the second is.

    Args:
      first, second: their workdirs.
      workdir: gets `comparison.json` and `comparison.html`; by default `second`.

    Returns:
      by task and metric what `statistics.paired` gives.

    Raises:
      UserError: they share no task, or were asked different questions.
    """
    a, b = (paths.local(folder, "--compare") for folder in (first, second))
    ours, theirs = read_lines(a / "samples.jsonl"), read_lines(b / "samples.jsonl")
    by_key = {(line["task"], line["document"]): line for line in theirs}
    tasks: dict[str, dict] = {}
    for task in dict.fromkeys(line["task"] for line in ours):
        mine = [line for line in ours if line["task"] == task]
        pairs = [(line, by_key.get((task, line["document"]))) for line in mine]
        shared = [(x, y) for x, y in pairs if y is not None]
        if not shared:
            continue
        if len(shared) < len(mine) or len(shared) < sum(k[0] == task for k in by_key):
            raise UserError(
                f"--compare: {task} was asked with other documents in {first} than in {second}: "
                "give both the same --limit"
            )
        for x, y in shared:
            if any(x.get(key) != y.get(key) for key in ("prompt", "target", "pictures")):
                raise UserError(
                    f"--compare: document {x['document']} of {task} is not the same in {first} and "
                    f"{second}: other data, template or number of examples"
                )
            if x["scores"].keys() != y["scores"].keys():
                raise UserError(
                    f"--compare: {task} has {', '.join(x['scores'])} in {first} and "
                    f"{', '.join(y['scores'])} in {second}: give both the same metric"
                )
        tasks[task] = {
            metric: statistics.paired(
                [x["scores"][metric] for x, _ in shared], [y["scores"][metric] for _, y in shared]
            )
            for metric in mine[0]["scores"]
        }
    if not tasks:
        raise UserError(f"--compare: {first} and {second} share no task")
    results = Results(first=str(first), second=str(second), tasks=tasks)
    workdir = pathlib.Path(workdir or b)
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / "comparison.json", results)
    files.write_text(workdir / "comparison.html", report.comparison(results, ours, theirs))
    return results


def summarise(tasks: Sequence[Task], samples: Sequence[Mapping]) -> dict[str, dict]:
    """By task: its own metric, how many prompts were cut, and the statistics of each metric."""
    found: dict[str, dict] = {}
    for task in tasks:
        mine = [line for line in samples if line["task"] == task.name]
        found[task.name] = {"metric": task.metric, "cut": sum(line["cut"] > 0 for line in mine)}
        for metric in task.metrics:
            values = [line["scores"][metric] for line in mine]
            found[task.name][metric] = statistics.summary(values, [x["weight"] for x in mine])
    return found


def table(results: Mapping) -> str:
    """The results as lines of text."""
    rows = [("task", "metric", "value", "stderr", "95%", "documents")]
    for name, found in results["tasks"].items():
        for metric, s in found.items():
            if not isinstance(s, Mapping) or s["value"] is None:
                continue
            error = "-" if s["stderr"] is None else f"{s['stderr']:.4f}"
            interval = f"{s['low']:.4f} .. {s['high']:.4f}"
            value = f"{s['value']:.4f}" + ("*" if metric == found.get("metric") else "")
            if "p" in s:
                value = f"{s['value']:+.4f} p={s['p']:.3g}"
            rows.append((name, metric, value, error, interval, str(s["documents"])))
    lines = [text_table(rows)]
    cut = sum(found.get("cut", 0) for found in results["tasks"].values())
    if cut:
        lines.append(f"{cut} prompts were too long and have lost their beginning")
    return "\n".join(lines)


def _load(path, mesh, asks: str, quantize: str, adapter: str):
    """The model; with the vector of a reward model where a task, `asks`, asks for rewards."""
    if not asks:
        return load(path, mesh=mesh, quantize=quantize, adapter=adapter)
    if quantize or adapter:
        raise UserError(f"{asks} asks a reward model: leave --quantize and --adapter out")
    return reward.load(path, mesh=mesh)


def _samples(asking: Asking, found, requests, lines) -> Iterator[dict]:
    """A line for each document, graded."""
    answered = iter(lines)
    bar = tqdm(total=sum(map(len, found.values())), desc="grading",
               disable=not processes.is_first() or None)  # fmt: skip
    with bar:
        for task, asked in found.items():
            for document, of_it in zip(asked, requests[task], strict=True):
                got = [next(answered)["answer"] for _ in of_it]
                given = grade.grade(task, document, of_it, got)
                bar.update()
                facts = {k: document.facts[k] for k in ("length", "depth") if k in document.facts}
                facts |= {"pictures": of_it[0].pictures} if document.pictures else {}
                yield {
                    "task": task.name, "document": document.number, "scores": given.scores,
                    "weight": given.weight, "prompt": asking.prompt(task, document),
                    "choices": list(document.choices), "target": document.target,
                    "answer": given.shown, "cut": max((r.cut for r in of_it), default=0), **facts,
                }  # fmt: skip


def _about(task: Task, asked) -> dict:
    told = {k: v for k, v in dataclasses.asdict(task).items() if v not in ("", (), {}, 0)}
    told["folder"] = str(task.folder)
    return told | {
        "definition": task.fingerprint, "documents": len(asked),
        "data_hash": documents.fingerprint(asked),
    }  # fmt: skip


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _read(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: is this a finished evaluation?") from None
    except ValueError:
        raise UserError(f"{path} is damaged: it is not JSON") from None


def read_lines(path: pathlib.Path) -> list[dict]:
    """The lines of a record, `samples.jsonl` or `requests.jsonl`.

    Raises:
      UserError: it is not there, or damaged.
    """
    needed = {"task", "document", "scores" if path.name == "samples.jsonl" else "answer"}
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: is this a finished evaluation?") from None
    except ValueError:
        raise UserError(f"{path} is damaged: a line is not JSON") from None
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not needed <= line.keys():
            raise UserError(f"{path} is damaged: line {number} lacks {', '.join(sorted(needed))}")
    return lines
