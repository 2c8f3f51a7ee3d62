"""Verbatim memorisation: how many passages of the training data a model continues word for word.

A passage is extracted with k tokens if greedy decoding from the k tokens before it gives its next
tokens exactly (Carlini et al. 2022, arXiv 2202.07646). That is so if every token has the largest
logit after those before it, which one forward pass says. What is common everywhere is "extracted"
too, so the same is asked of passages that were never in the data. Left out: near copies, and
extraction by sampling many times.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ...configs import schema, storage
from ...configs.display import Results
from ...configs.errors import UserError
from ...models.decode.engine import for_decoding
from ...models.parallel import processes, sharding
from ...models.text.tokenizer import load_tokenizer
from ...models.transformer import Transformer
from ...models.weights.load import load
from ...train.data import sources
from ...train.data.examples import OTHER_KEY, RecordError, text_of
from ..scoring import score
from ..tasks import statistics


class Passage(NamedTuple):
    """ids: of the text. repeats: how often it stands in the training data; 0 = it is unseen."""

    ids: tuple[int, ...]
    repeats: int


def audit_memorisation(path, passages: str, unseen: str, *, prefixes: Sequence[int] = (16, 32, 64),
                       suffix: int = 32, text_key: str = "text", mesh_config=None,
                       compute_dtype: str = "float32", quantize: str = "", adapter: str = "",
                       batch_size: int = 8) -> Results:  # fmt: skip
    """Ask a model for the ends of passages.

    Args:
      path: run, checkpoint or model that `puna.load` reads.
      passages: a source of records that stood in the training data, each with a text, and
        "repeats", how often, if that is known (1 otherwise).
      unseen: the same of records that did not stand there.
      prefixes: tokens before the suffix that the model is given.
      suffix: tokens that it must give.
      text_key: field of the text.
      mesh_config, compute_dtype, quantize, adapter, batch_size: as of `evaluate_tasks`.

    Returns:
      "rows": by repeats (0: unseen) and prefix the number of passages, how many are extracted, the
      rate with its 95% interval, and the mean log-probability of a token of the suffix. "skipped":
      passages with fewer tokens than the longest prefix and the suffix together.

    Raises:
      UserError: no passage is long enough, the data or the model is not there.
    """
    path = storage.anywhere(path, "checkpoint")
    if not prefixes or min(prefixes) < 1 or suffix < 1:
        raise UserError(f"prefixes={list(prefixes)} and suffix={suffix} must be 1 or more")
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size} must be at least 1")
    tokenizer = load_tokenizer(path)
    need = max(prefixes) + suffix
    found: list[Passage] = []
    skipped = 0
    for source, seen in ((passages, True), (unseen, False)):
        read = list(_passages(source, seen, text_key, tokenizer))
        long = [p for p in read if len(p.ids) >= need]
        skipped += len(read) - len(long)
        if not long:
            raise UserError(
                f"{source} has no passage of {need} tokens, the longest prefix and the suffix: "
                "take a shorter --prefix or --suffix"
            )
        found += long
    mesh = sharding.make_mesh(mesh_config or schema.MeshConfig())
    model, params = load(path, mesh=mesh, quantize=quantize, adapter=adapter)
    model = for_decoding(
        Transformer(dataclasses.replace(model.config, compute_dtype=compute_dtype))
    )
    if need > model.config.max_positions:
        raise UserError(
            f"--prefix and --suffix are {need} tokens, more than the model's max_positions="
            f"{model.config.max_positions}"
        )
    asked = list(questions(found, prefixes, suffix))
    rows = collections.defaultdict(list)
    bar = tqdm(total=len(asked), desc="passages", disable=not processes.is_first() or None)
    with bar, jax.set_mesh(mesh):
        pairs = [pair for _, _, pair in asked]
        for number, answer in score(model, params, pairs, batch_size):
            repeats, prefix, _ = asked[number]
            rows[repeats, prefix].append(answer)
            bar.update()
    return Results(
        checkpoint=str(path), passages=passages, unseen=unseen, suffix=suffix, skipped=skipped,
        rows=[_row(*key, rows[key], suffix) for key in sorted(rows)],
    )  # fmt: skip


def questions(found: Sequence[Passage], prefixes: Sequence[int], suffix: int) -> Iterator:
    """(repeats, prefix, (ids of it, ids of the suffix)), the same suffix for each prefix."""
    at = max(prefixes)
    for passage in found:
        for prefix in sorted(set(prefixes)):
            yield passage.repeats, prefix, (
                passage.ids[at - prefix : at], passage.ids[at : at + suffix]
            )  # fmt: skip


def _passages(source: str, seen: bool, text_key: str, tokenizer) -> Iterator[Passage]:
    for record in sources.iter_records(source):
        try:
            text = text_of(record, text_key, OTHER_KEY)
        except RecordError as error:
            raise UserError(f"{source}: a record {error}") from None
        repeats: Any = record.get("repeats", 1) if not isinstance(record, str) else 1
        if isinstance(repeats, np.integer):
            repeats = int(repeats)
        if type(repeats) is not int or repeats < 1:
            raise UserError(f"{source}: repeats={repeats!r} must be a number of 1 or more")
        yield Passage(tuple(tokenizer.encode(text)), repeats if seen else 0)


def _row(repeats: int, prefix: int, answers, suffix: int) -> dict:
    hits = sum(answer.greedy for answer in answers)
    low, high = statistics.proportion(hits, len(answers))
    mean = sum(answer.logprob for answer in answers) / len(answers) / suffix
    return {
        "repeats": repeats, "prefix": prefix, "passages": len(answers), "extracted": hits,
        "rate": hits / len(answers), "low": low, "high": high, "logprob_per_token": mean,
    }  # fmt: skip


def table(results) -> str:
    """The rows as lines of text."""
    lines = ["repeats  prefix  passages  extracted   rate  95%           log p of a token"]
    for row in results["rows"]:
        name = str(row["repeats"]) if row["repeats"] else "unseen"
        lines.append(
            f"{name:>7}  {row['prefix']:>6}  {row['passages']:>8}  {row['extracted']:>9}  "
            f"{row['rate']:>5.3f}  {row['low']:.3f} .. {row['high']:.3f}  "
            f"{row['logprob_per_token']:.3f}"
        )
    if results["skipped"]:
        lines.append(f"{results['skipped']} passages are too short and were skipped")
    return "\n".join(lines)
