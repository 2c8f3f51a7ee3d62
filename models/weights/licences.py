"""What the licence of a base model asks of a release: its name, its notice, what it must show.

From the Community Licenses of Llama 2 (1.b), 3 (1.b.i) and 3.1, 3.2, 3.3, 4 (1.b.i). A reading,
not legal advice. Where a model comes from is taken from what stands beside its weights; what does
not stand there is unknown, never guessed from the shape of the network.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from ...configs.errors import UserError

UNKNOWN = "unknown"
NONE = "none"

# Copied along with the weights.
FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY.md", "USE_POLICY.txt", "NOTICE",
         "Notice", "NOTICE.txt")  # fmt: skip
_MAX_TEXT = 2**20


@dataclasses.dataclass(frozen=True)
class Licence:
    """The duties of one Llama licence; `name_start` is how a derived model's name must begin."""

    title: str
    shown: str
    name_start: str

    @property
    def notice(self) -> str:
        return (
            f"{self.title} is licensed under the {self.long_title}, "
            "Copyright (c) Meta Platforms, Inc. All Rights Reserved.\n"
        )

    @property
    def long_title(self) -> str:
        case = self.title.upper() if self.title == "Llama 2" else self.title
        return f"{case} Community License"


LICENCES = {
    "llama2": Licence("Llama 2", "", ""),
    "llama3": Licence("Meta Llama 3", "Built with Meta Llama 3", "Llama 3"),
    "llama3.1": Licence("Llama 3.1", "Built with Llama", "Llama"),
    "llama3.2": Licence("Llama 3.2", "Built with Llama", "Llama"),
    "llama3.3": Licence("Llama 3.3", "Built with Llama", "Llama"),
    "llama4": Licence("Llama 4", "Built with Llama", "Llama"),
}
CHOICES = (*LICENCES, NONE)


def check_choice(licence: str | None) -> None:
    """Raise `UserError` unless `licence` is None or something that --base_licence may say."""
    if licence is not None and licence not in CHOICES:
        raise UserError(f"base_licence={licence!r} must be one of {', '.join(CHOICES)}")


def check_name(name: str, licence: str) -> None:
    """Refuse a name that the base model's licence does not allow.

    Raises:
      UserError: names the rule and what to do.
    """
    if licence not in LICENCES:
        return
    start = LICENCES[licence].name_start
    if not re.match(re.escape(start).replace(r"\ ", "[ _-]?"), name):
        raise UserError(
            f"the name {name!r} must begin with {start!r}: the licence of the base model "
            f"({licence}) asks for that; choose one with --name, or pass --ignore_licence_name"
        )


def origin_of(path: pathlib.Path, config_json: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Find out what base model and licence the files of a directory name.

    Args:
      path: the directory of the weights.
      config_json: its config.json, if it has one.

    Returns:
      "base_model": its name or "unknown"; "licence": a key of `LICENCES`, another licence's name,
      or "unknown"; "files": text of the licence files by name.
    """
    files = {}
    for name in FILES:
        file = path / name
        if file.is_file() and file.stat().st_size <= _MAX_TEXT:
            files[name] = file.read_text(encoding="utf-8", errors="replace")
    card = path / "README.md"
    front: dict[str, str] = {}
    if card.is_file() and card.stat().st_size <= _MAX_TEXT:
        front = front_matter(card.read_text(encoding="utf-8", errors="replace"))
    base = config_json.get("_name_or_path") or front.get("base_model")
    base = base if isinstance(base, str) and not re.match(r"[./~]|.*//", base) else None
    named = front.get("license")
    if named == "other":
        named = front.get("license_name")
    texts = [text for name, text in files.items() if name.startswith("LICENSE")]
    licence = normal(named) or _of_text(texts) or _of_name(base)
    return {"base_model": base or UNKNOWN, "licence": licence or UNKNOWN, "files": files}


def front_matter(card: str) -> dict[str, str]:
    """The plain `key: value` lines that a model card opens with; a list gives its first entry."""
    match = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    found, key = {}, None
    for line in match[1].splitlines() if match else ():
        if pair := re.fullmatch(r"([A-Za-z_]+):\s*(.*?)\s*", line):
            key = pair[1]
            found[key] = pair[2].strip("\"'")
        elif key and not found[key] and (item := re.fullmatch(r"\s*-\s+([^:]+?)\s*", line)):
            found[key] = item[1].strip("\"'")
    return {key: value for key, value in found.items() if value}


def normal(name: str | None) -> str | None:
    """The key in `LICENCES` of a licence's name, or the name itself."""
    if not name or not isinstance(name, str):
        return None
    short = re.sub(r"[\s_-]|community|license|meta", "", name.lower())
    return short if short in LICENCES else name.lower()


def _of_text(texts) -> str | None:
    for text in texts:
        if match := re.search(r"LLAMA\s+([234](?:\.\d)?)\s+COMMUNITY LICENSE", text, re.IGNORECASE):
            return normal(f"llama{match[1]}")
        if "Apache License" in text:
            return "apache-2.0"
    return None


def _of_name(name) -> str | None:
    """Only Meta's own names: whose weights stand behind another's is not known."""
    match = re.match(r"meta-llama/(?:Meta-)?Llama-([234](?:\.[123])?)\b", name or "")
    found = f"llama{match[1]}" if match else ""
    return found if found in LICENCES else None
