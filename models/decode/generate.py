"""Text from a model: `generate`, `stream`, and `complete` with ids and log-probabilities.

Thin callers of `engine.decode`, which is for rows of ids.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ...configs.errors import UserError
from ..media.images import tile_together
from ..tiled_vision import batch_images
from .engine import decode
from .sampling import Sampling
from .text import Row


class Completion(NamedTuple):
    """What a model made of one prompt.

    text: without the stop string or end token, and without a character that the end has cut in
      half. ids: all tokens made, the last one included. logprobs: of each id, by the model itself
      at temperature 1, see `engine.Block`. finish_reason: "stop" at a stop string or end token,
      "length" at `max_tokens`.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    finish_reason: str


def begin_rows(tokenizer, prompts, stop):
    """Prompts as ids and a `Row` for each; arguments and errors as those of `complete`."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stop):
        raise UserError("stop has an empty string: leave it out")
    # Control tokens leave no text in which a stop string could be found.
    named = {tokenizer.special[s] for s in stop if s in tokenizer.special}
    stop_ids = named.union(tokenizer.stop_ids, {tokenizer.eos_id} - {None})
    ids, rows = [], []
    for prompt in prompts:
        if isinstance(prompt, str):
            prompt = [*tokenizer.begin_ids, *tokenizer.encode(prompt)]
        elif not _is_ids(prompt):
            raise UserError(f"a prompt must be a text or a list of ids, not {prompt!r:.60}")
        ids.append(prompt)
        size = tokenizer.vocab_size
        follows_text = any(tokenizer.token_bytes[i] for i in prompt if 0 <= i < size)
        rows.append(Row(tokenizer, stop, stop_ids, follows_text))
    return ids, rows


def sampling_for(tokenizer, seed, **told) -> Sampling:
    """Settings as told, else those of the model's generation_config.json, else greedy.

    Raises:
      UserError: the file's settings are no numbers.
    """
    said = tokenizer.generation if tokenizer.generation.get("do_sample") else {}
    made = {"temperature": 1.0 if said else 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    for name, value in told.items():
        if value is not None:
            made[name] = value
        elif said.get(name) is not None:
            if type(said[name]) not in (int, float):
                raise UserError(f"generation_config.json: {name}={said[name]!r} must be a number")
            made[name] = said[name]
    return Sampling(**made, seed=seed)


def _is_ids(prompt) -> bool:
    return isinstance(prompt, Sequence | np.ndarray) and all(
        isinstance(i, int | np.integer) for i in prompt
    )


def _run(model, params, tokenizer, ids, rows, max_tokens, sampling, **options):
    """An iterator that runs `decode` into the rows, a block a step."""
    finished_B = np.zeros(len(rows), bool)
    blocks = decode(
        model, params, ids, max_tokens, sampling, vocab_size=tokenizer.vocab_size,
        stop_ids=rows[0].stop_ids if rows else (), finished_B=finished_B, **options,
    )  # fmt: skip

    def run():
        for made in blocks:
            for row, *new in zip(
                rows, made.ids_BT.tolist(), made.logprobs_BT.tolist(), strict=True
            ):
                row.push(*new)
            finished_B[:] = [row.done for row in rows]
            yield

    return run()


def complete(model, params, tokenizer, prompts, max_tokens=64, temperature=None, top_k=None,
             top_p=None, min_p=None, seed=0, stop=(), first_row=0,
             images=None) -> list[Completion]:  # fmt: skip
    """Continue texts or rows of ids.

    Args:
      model, params: as `puna.load` gives them; works under `jax.set_mesh`.
      tokenizer: a `Tokenizer`; its `begin_ids` are put before each text.
      prompts: a list of texts or of lists of ids (taken as they are).
      max_tokens: most tokens to make; with the prompt at most `model.config.max_positions`.
      temperature, top_k, top_p, min_p: see `sample`; temperature 0 is greedy. None for what the
        model's generation_config.json says, which is greedy unless it has do_sample.
      seed: see `Sampling`.
      stop: a string or several; the text ends before the first that appears. The tokenizer's
        stop ids always end it.
      first_row: see `engine.decode`.
      images: for each prompt its pictures: paths, bytes of files or `PIL.Image.Image`s, one for
        each `<|image|>` of a text, for a model whose layers attend to images (Llama 3.2 Vision).

    `max_tokens` and the settings from `temperature` to `seed` may be arrays of a value for each
    prompt.

    Raises:
      UserError: see `engine.decode`; a picture that cannot be read.
    """
    if images is not None:
        prompts, images = _with_images(model.config, tokenizer, prompts, images)
    ids, rows = begin_rows(tokenizer, prompts, stop)
    sampling = sampling_for(
        tokenizer, seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    options = {"first_row": first_row, "images": images}
    for _ in _run(model, params, tokenizer, ids, rows, max_tokens, sampling, **options):
        pass
    return [
        Completion(row.text, row.ids, row.logprobs, "stop" if row.done else "length")
        for row in rows
    ]


def _with_images(config, tokenizer, prompts, images):
    """Prompts as ids, with one for each picture, and the `TiledImages` of these."""
    if len(images) != len(prompts):
        raise UserError(f"images has {len(images)} rows, which must be one for each of "
                        f"{len(prompts)} prompts")  # fmt: skip
    found = [[tile_together(config.vision, picture) for picture in row] for row in images]

    def ids(prompt):
        if not isinstance(prompt, str):
            return prompt
        parts = [tokenizer.encode(part) if part else [] for part in prompt.split("<|image|>")]
        text = [i for part in parts for i in (config.vision.token_id, *part)][1:]
        return [*tokenizer.begin_ids, *text]

    return [ids(prompt) for prompt in prompts], batch_images(config.vision, found)


def generate(model, params, tokenizer, prompts, max_tokens=64, temperature=None, top_k=None,
             top_p=None, min_p=None, seed=0, stop=(), first_row=0, images=None):  # fmt: skip
    """The texts of `complete`, which has the arguments: a string for a string, else a list."""
    single = isinstance(prompts, str)
    made = complete(
        model, params, tokenizer, [prompts] if single else prompts, max_tokens, temperature, top_k,
        top_p, min_p, seed, stop, first_row, [images] if single and images is not None else images,
    )  # fmt: skip
    texts = [completion.text for completion in made]
    return texts[0] if single else texts


def stream(model, params, tokenizer, prompt, max_tokens=64, temperature=None, top_k=None,
           top_p=None, min_p=None, seed=0, stop=()) -> Iterator[str]:  # fmt: skip
    """Yield what `generate` would return for one prompt, each piece as soon as it is certain."""
    ids, rows = begin_rows(tokenizer, [prompt], stop)
    sampling = sampling_for(
        tokenizer, seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    steps = _run(model, params, tokenizer, ids, rows, max_tokens, sampling, block=1)

    def pieces():
        shown = 0
        for _ in steps:
            text = rows[0].certain()
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
        if len(rows[0].text) > shown:
            yield rows[0].text[shown:]

    return pieces()
