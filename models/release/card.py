"""The model card and licence files of a release."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...configs.files import write_text
from ...configs.schema import ModelConfig
from ..weights import licences
from ..weights.config import LLAMA4, MLLAMA, family

# Licences that Hugging Face knows by the names used here; others go in as "other".
_KNOWN = {*licences.LICENCES, "apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "bsd-3-clause"}  # fmt: skip  # noqa: E501


def facts_of_run(home: pathlib.Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's own files say for its card: data, steps, results."""
    facts: dict[str, Any] = {}
    for name in ("results.json", "eval/results.json"):
        path = home / name
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                continue
            facts["results"] = facts.get("results", {}) | found
    config = meta["config"]
    if init_from := (meta.get("origin") or {}).get("init_from"):
        step = f", step {init_from['step']}" if "step" in init_from else ""
        facts["init_from"] = f"{init_from['path']}{step}"
        facts["new_tokens"] = ", ".join(init_from.get("new_tokens", ()))
    facts["ancestors"] = (meta.get("origin") or {}).get("ancestors", [])
    if meta["data"]:  # a model of others that was only converted has no data position
        train = config["train"]
        facts["data"] = config["data"]["train"]
        facts["provenance"] = meta.get("provenance", [])
        facts["training"] = (
            f"{train['steps']:,} steps of {train['batch_size']} rows of "
            f"{config['data']['seq_len']:,} tokens, {config['optimizer']['name']}"
        )
    return facts


def write(
    folder: pathlib.Path,
    name: str,
    config: ModelConfig,
    origin: Mapping[str, Any],
    facts: Mapping[str, Any],
    library: str = "transformers",
) -> None:
    """Write README.md, the licence files that came with the base model, and NOTICE if it is due.

    Args:
      folder, name, config, origin: of the release.
      facts: what is known of its training and results.
      library: what loads it, in the words of the hub; empty to say nothing.
    """
    for file, text in origin["files"].items():
        write_text(folder / file, text)
    licence = licences.LICENCES.get(origin["licence"])
    if licence is not None:
        notice = folder / "NOTICE"
        old = notice.read_text(encoding="utf-8") if notice.exists() else ""
        if licence.notice.strip() not in old:
            write_text(notice, old + licence.notice)
    write_text(folder / "README.md", _text(name, config, origin, facts, library))


def _text(name, config, origin, facts, library) -> str:
    licence = licences.LICENCES.get(origin["licence"])
    lines = ["---", *([f"library_name: {library}"] if library else [])]
    task = "text-classification" if facts.get("rewards") else "text-generation"
    lines.append(f"pipeline_tag: {task}")
    if origin["licence"] in _KNOWN:
        lines.append(f"license: {origin['licence']}")
    elif origin["licence"] not in (licences.UNKNOWN, licences.NONE):
        lines += ["license: other", f"license_name: {json.dumps(origin['licence'])}"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", origin["base_model"]):  # only a name that can be a link
        lines.append(f"base_model: {json.dumps(origin['base_model'])}")
    lines += ["---", "", f"# {name}", ""]
    if licence is not None and licence.shown:
        lines += [f"**{licence.shown}**", ""]
    lines += [
        "## Origin",
        "",
        f"- Base model: {origin['base_model']}",
        f"- Licence of the base model: {origin['licence']}",
        "",
        "## Architecture",
        "",
        *(f"- {key}: {value}" for key, value in _architecture(config).items()),
        "",
        "## Data",
        "",
        *([f"- Started from: {facts['init_from']}"] if "init_from" in facts else []),
        *([f"- New tokens: `{facts['new_tokens']}`"] if facts.get("new_tokens") else []),
        f"- Training data: {facts.get('data', licences.UNKNOWN)}",
        f"- Training: {facts.get('training', licences.UNKNOWN)}",
        "",
        *_provenance(facts.get("provenance", ())),
    ]
    for run in facts.get("ancestors", ()):
        lines += [f"Read before, by `{run['path']}` up to step {run['step']}:", ""]
        lines += _provenance(run["read"])
    results = facts.get("results", {})
    energy = {k: v for k, v in results.items() if any(w in k for w in ("energy", "kwh", "joule"))}
    for title, found in (
        ("Evaluation", {k: v for k, v in results.items() if k not in energy}),
        ("Energy", energy),
    ):
        rows = [f"- {key}: {_number(value)}" for key, value in found.items()
                if isinstance(value, int | float | str)]  # fmt: skip
        lines += [f"## {title}", "", *(rows or ["Not measured."]), ""]
    if licence is not None:
        lines += ["## Licence", "", licence.notice.strip(), "See LICENSE and NOTICE.", ""]
    return "\n".join(lines)


def _provenance(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of what was read, as the checkpoint has it."""
    if not sources:
        return []
    cells = [(s["source"].replace("|", "\\|"), s["licence"].replace("|", "\\|"), s["tokens"])
             for s in sources]  # fmt: skip
    rows = [f"| `{source}` | {licence} | {tokens:,} |" for source, licence, tokens in cells]
    return ["| source | licence | tokens read |", "|---|---|---|", *rows, ""]


def _architecture(config: ModelConfig) -> dict[str, Any]:
    found = {
        "family": {LLAMA4: "Llama 4", MLLAMA: "Llama 3.2 Vision"}.get(family(config), "Llama 1-3"),
        "layers": config.num_layers,
        "width": config.embed_dim,
        "query / key-value heads": f"{config.num_heads} / {config.num_kv_heads}",
        "vocabulary": f"{config.vocab_size:,}",
        "context, tokens": f"{config.max_positions:,}",
    }
    if config.moe_interval:
        found["routed experts / per token"] = f"{config.num_experts} / {config.experts_per_token}"
    if config.vision.num_layers:
        found["image encoder, layers"] = config.vision.num_layers
    return found


def _number(value) -> str:
    return f"{value:,.5g}" if isinstance(value, float) else str(value)
