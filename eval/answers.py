"""The answers of an evaluation in a file, from which an interrupted one resumes."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from ..configs import files
from ..models.parallel import processes


class Answers:
    """`requests.jsonl`: a line for each request, written as soon as it is answered.

    Args:
      path: the file; what an earlier evaluation left there is read, but for a line that its end
        has cut short. With several processes the first one reads and writes. None for no file.
    """

    def __init__(self, path: pathlib.Path | None):
        self.path = path
        found = {}
        if path is not None and processes.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            found = _read(path)
        self._found: dict[str, Any] = processes.merge(found)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str):
        return self._found[key]

    def add(self, line: Mapping) -> None:
        """Note an answered request: `line` has its "key", its "answer" and what else to tell."""
        self._found[line["key"]] = line["answer"]
        if self.path is not None and processes.is_first():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(files.to_json(line) + "\n")

    def finish(self, lines: Iterable[Mapping]) -> None:
        """Replace the file by the lines of the evaluation that has come to its end."""
        if self.path is not None and processes.is_first():
            files.write_text(self.path, "".join(files.to_json(line) + "\n" for line in lines))


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    lines = map(json.loads, whole.splitlines())
    return {line["key"]: line["answer"] for line in lines}
