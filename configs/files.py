"""Writing small files whole: a reader finds the old one or the new one, never half."""

import json
import os
import pathlib


def write_text(path: pathlib.Path, text: str) -> None:
    """Replace a file at once: a reader finds the old or the new, never half."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: pathlib.Path, value) -> None:
    """Replace a JSON file at once."""
    write_text(path, json.dumps(value, indent=2) + "\n")
