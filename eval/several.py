"""Several checkpoints or models: which a pattern names, and their results side by side."""

import glob
import pathlib
import re
from collections.abc import Mapping, Sequence

from ..configs import storage
from ..configs.display import Results, text_table
from ..configs.errors import UserError
from ..models.weights import run


def expand(named: Sequence[str]) -> list[pathlib.Path]:
    """The models that paths and patterns name, those of a pattern by their numbers, each once.

    Of a pattern's matches only runs, finished checkpoints, directories with a config.json or
    params.json, and GGUF files are taken.

    Raises:
      UserError: a pattern has no such match.
    """
    found: dict[str, pathlib.Path] = {}
    for text in named:
        path = storage.anywhere(text, "--checkpoint")
        # A folder may have a name that looks like a pattern.
        plain = not glob.has_magic(str(path)) or path.exists()
        matches = [path] if plain else sorted(filter(_is_model, _matches(path)), key=_natural)
        if not matches:
            raise UserError(f"--checkpoint={text} matches no finished checkpoint and no model")
        found |= {str(match): match for match in matches}
    return list(found.values())


def _matches(pattern: pathlib.Path) -> list[pathlib.Path]:
    anchor = next(p for p in pattern.parents if not glob.has_magic(str(p)))
    rest = str(pattern)[len(str(anchor)) :].lstrip("/\\")
    with storage.explained(anchor):
        return list(anchor.glob(rest)) if anchor.is_dir() else []


def _is_model(path: pathlib.Path) -> bool:
    if run.is_run(path):
        return path.name.isdigit() and (path / "meta").is_dir() or bool(run.steps(path))
    return path.suffix == ".gguf" or any(
        (path / name).is_file() for name in ("config.json", "params.json")
    )


def _natural(path: pathlib.Path) -> list:
    """Step 1000 after step 500."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _checkpoint(path: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """The run, and the step where one of its checkpoints is named; else the path."""
    if path.name.isdigit() and path.parent.name == run.CHECKPOINTS:
        return path.parent.parent, int(path.name)
    return path, None


def labels(models: Sequence[pathlib.Path]) -> list[str]:
    """A short name of each, none twice: the run's folder and the step."""
    names: list[str] = []
    for path in models:
        folder, step = _checkpoint(path)
        name = (folder.resolve() if isinstance(folder, pathlib.Path) else folder).name
        name = name if step is None else f"{name}-{step}"
        again = sum(re.fullmatch(rf"{re.escape(name)}(\.\d+)?", other) is not None
                    for other in names)  # fmt: skip
        names.append(f"{name}.{again + 1}" if again else name)
    return names


def home(models: Sequence[pathlib.Path]) -> pathlib.Path:
    """Where results of several go: into their run if there is one, and it lies on this machine."""
    folders = {str(folder) for folder, _ in map(_checkpoint, models)}
    [first, *others] = folders
    return pathlib.Path("eval" if others or "://" in first else f"{first}/eval")


def measured(models: Sequence[pathlib.Path], results: Sequence[Mapping]) -> Results:
    """What `results.json` holds of several: "checkpoints", the results of each with its step.

    Of lm-eval's results, which have a file for each model, the numbers only.
    """
    rows = []
    for path, found in zip(models, results, strict=True):
        if "results" in found:  # of lm-eval
            found = {"results": found["results"]}
        step = int(run.find(path).name) if run.is_run(path) else None
        rows.append({"checkpoint": str(path), "step": step, **found})
    return Results(checkpoints=rows)


def table(names: Sequence[str], results: Mapping) -> str:
    """A line a checkpoint, a column a number; of a task the metric that is its own."""
    rows = results["checkpoints"]
    numbers = [_numbers(row) for row in rows]
    columns = list(dict.fromkeys(name for found in numbers for name in found))
    lines = [("checkpoint", "step", *columns)]
    for name, row, found in zip(names, rows, numbers, strict=True):
        step = "-" if row["step"] is None else str(row["step"])
        lines.append((name, step, *(_shown(found.get(column)) for column in columns)))
    return text_table(lines)


def _numbers(row: Mapping) -> dict[str, float]:
    if "tasks" in row:
        return {name: found[found["metric"]]["value"] for name, found in row["tasks"].items()}
    if "results" in row:
        return {
            f"{task} {key.removesuffix(',none')}": value
            for task, found in row["results"].items()
            for key, value in found.items()
            if isinstance(value, float) and "_stderr" not in key
        }
    return {key: value for key, value in row.items()
            if isinstance(value, float) or key == "tokens"}  # fmt: skip


def _shown(value) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
