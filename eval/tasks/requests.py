"""What a model is asked for a document: ids of a context and of a continuation, or of a prompt.

A continuation's ids are those of the whole text from the last border between ids that all choices
share with the context: no character is left unscored, and all choices are compared from one place
(lm-eval cuts by the number of ids, see `harness_model.py`). BOS is put as the tokenizer puts it.
"""

import collections
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ...configs.errors import UserError
from ...models.decode.generate import complete
from ...models.decode.pictures import PLACE, place_id
from ...models.decode.sampling import Sampling
from ...models.decode.slots import Engine
from ...models.parallel import processes
from ...models.text import chat
from ...train.data.examples import RecordError
from ...train.data.pairs import PairTransform
from ..answers import Answers
from ..scoring import padded, rewards, score
from . import calls
from .definition import Task
from .documents import Document
from .pictures import Pictures

# How functions are told of without a chat template.
_TOOLS = (
    'Call one of these functions. Answer with JSON of the form {"name": ..., "parameters": {...}} '
    "and nothing else.\n\n"
)
_DATE = "26 Jul 2024"  # Llama 3's templates would write today's, and ask something else each day


class Request(NamedTuple):
    """One question to the model.

    kind: "logprob" of the continuation, "text" that follows the context, "call": the same with its
    control tokens written out, or "reward" of the context as a whole.
    continuation: ids; none of the others. size: bytes that the continuation stands for.
    max_tokens, stop, temperature: of a text; one at a temperature above 0 is drawn by its index.
    cut: tokens of the prompt that had no room, from its beginning.
    pictures: names of those in the context, see `pictures.py`.
    """

    task: str
    document: int
    index: int
    kind: str
    context: tuple[int, ...]
    continuation: tuple[int, ...] = ()
    size: int = 0
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    cut: int = 0
    temperature: float = 0.0
    pictures: tuple[str, ...] = ()

    @property
    def asked(self) -> str:
        """All that its answer depends on but the model."""
        drawn = [self.temperature, self.index] if self.temperature else []
        seen = [self.pictures] if self.pictures else []
        return json.dumps(
            [self.kind, self.context, self.continuation, self.max_tokens, self.stop, *drawn, *seen]
        )


class Asking:
    """How documents become requests.

    Args:
      tokenizer: of the model.
      max_length: tokens that the model reads at most.
      as_chat: by the tokenizer's chat template; a shot is then a turn of the conversation.
      pictures: gets those of the documents; without it no document may have any.
    """

    def __init__(self, tokenizer, max_length: int, as_chat: bool,
                 pictures: Pictures | None = None):  # fmt: skip
        self.tokenizer, self.max_length, self.as_chat = tokenizer, max_length, as_chat
        self.pictures = pictures
        begin = tokenizer.begin_ids
        # What a text without a context is predicted from.
        first = next((i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None), None)
        self._first = tuple(begin) or (() if first is None else (first,))

    def prompt(self, task: Task, document: Document) -> str:
        """The text of the prompt, examples first; that of a chat before its template."""
        if task.kind == "tools" and not self.as_chat:
            told = "\n".join(json.dumps(f) for f in calls.functions(document.facts["tools"]))
            return f"{_TOOLS}{told}\n\n{document.prompt}\n"
        shots = [p + task.delimiter + a for p, a in document.shots]
        return task.separator.join([*shots, document.prompt])

    def requests(self, task: Task, document: Document) -> list[Request]:
        """The requests of a document.

        Raises:
          UserError: the tokenizer or its template cannot express it, or it has no room.
        """
        seen: tuple[str, ...] = ()
        if document.pictures:
            assert self.pictures is not None
            seen = self.pictures.add(document.pictures)
        make = functools.partial(Request, task.name, document.number, pictures=seen)
        if task.kind == "text":
            return list(self._windows(task, document, make))
        if task.kind == "preference":
            return [make(i, "reward", ids) for i, ids in enumerate(self._answers(task, document))]
        if task.kind != "choice":
            if task.max_tokens >= self.max_length:
                raise UserError(
                    f"{task.name}: max_tokens={task.max_tokens} must be less than the "
                    f"{self.max_length} tokens that the model reads"
                )
            ids = self._ids(task, document)
            context, cut = self._shown(task, document, ids, seen, self.max_length - task.max_tokens)
            kind = "call" if task.kind == "tools" else "text"
            most, drawn = task.max_tokens, float(task.temperature)
            return [
                make(i, kind, context, max_tokens=most, stop=task.stop, cut=cut, temperature=drawn)
                for i in range(task.samples)
            ]
        found = []
        for index, (ids, continuation) in enumerate(self._choices(task, document)):
            if not continuation or len(continuation) >= self.max_length:
                raise UserError(
                    f"{task.name}: choice {index} of document {document.number} is "
                    f"{len(continuation)} tokens: it must be 1 to {self.max_length - 1}"
                )
            room = self.max_length + 1 - len(continuation)
            context, cut = self._shown(task, document, ids, seen, room)
            size = len(document.choices[index].encode())
            found.append(make(index, "logprob", context, continuation, size, cut=cut))
        return found

    def _ids(self, task: Task, document: Document) -> tuple[int, ...]:
        if not self.as_chat:
            return (*self._first, *self._encode(document, self.prompt(task, document)))
        messages = [{"role": "system", "content": task.system}] if task.system else []
        for prompt, answer in document.shots:
            messages += [{"role": "user", "content": _content(document, prompt)},
                         {"role": "assistant", "content": answer}]  # fmt: skip
        messages.append({"role": "user", "content": _content(document, document.prompt)})
        tools = calls.functions(document.facts["tools"]) if task.kind == "tools" else None
        variables = {"date_string": _DATE}
        return tuple(chat.encode_messages(self.tokenizer, messages, tools, variables=variables))

    def _answers(self, task: Task, document: Document) -> list[tuple[int, ...]]:
        """The ids of a prompt with each of two answers, as a reward model is trained on them."""
        pairs = PairTransform(self.tokenizer, 2 * self.max_length, _DATE, ends=True)
        asked, said = document.prompt, list(document.choices)
        if self.as_chat:
            system = [{"role": "system", "content": task.system}] if task.system else []
            asked = [*system, {"role": "user", "content": asked}]
            said = [[{"role": "assistant", "content": text}] for text in said]
        try:
            example = pairs.encode((asked, *said, None))
        except RecordError as error:
            raise UserError(f"{task.name}: record {document.number} {error}") from None
        # A target stands behind each text.
        texts = [part[:-1] for part in np.split(example.ids, example.borders)]
        for ids in texts:
            if len(ids) > self.max_length:
                raise UserError(
                    f"{task.name}: record {document.number} has {len(ids)} tokens, more than the "
                    f"{self.max_length} that the model reads"
                )
        return [tuple(ids.tolist()) for ids in texts]

    def _choices(self, task: Task, document: Document):
        """(ids of the context, ids of the continuation) of each choice."""
        context = self._ids(task, document)
        if self.as_chat:
            for choice in document.choices:
                yield context, tuple(self.tokenizer.encode(choice, continuation=True))
            return
        text = self.prompt(task, document) + task.delimiter
        wholes = [
            (*self._first, *self._encode(document, text + choice)) for choice in document.choices
        ]
        border = min(len(os.path.commonprefix([context, whole])) for whole in wholes)
        border = max(border, 1)
        for whole in wholes:
            yield whole[:border], whole[border:]

    def _encode(self, document: Document, text: str) -> list[int]:
        if not document.pictures:
            return self.tokenizer.encode(text)
        place = place_id(self.tokenizer)
        first, *rest = text.split(PLACE)
        ids = self.tokenizer.encode(first) if first else []
        for part in rest:
            ids += [place, *(self.tokenizer.encode(part, continuation=True) if part else [])]
        return ids

    def _shown(self, task: Task, document: Document, ids: tuple[int, ...], seen: tuple[str, ...],
               room: int) -> tuple[tuple[int, ...], int]:  # fmt: skip
        """The ids with those of pictures, which are never cut, or `_fit` without any."""
        if self.pictures is None or not seen:
            return self._fit(ids, room)
        try:
            return self.pictures.expand(ids, seen, room), 0
        except UserError as error:
            raise UserError(f"{task.name}: record {document.number}: {error}") from None

    def _fit(self, ids: tuple[int, ...], room: int) -> tuple[tuple[int, ...], int]:
        """The ids without what has no room, taken out behind what begins every text."""
        if len(ids) <= room:
            return ids, 0
        keep = 0 if self.as_chat else len(self._first)
        keep = min(keep, room - 1)
        return (*ids[:keep], *ids[len(ids) - (room - keep) :]), len(ids) - room

    def _windows(self, task: Task, document: Document, make) -> Iterator[Request]:
        """A text in windows: each token once, after as much as has room before it."""
        first = self._first
        ids = (*first, *self.tokenizer.encode(document.prompt))
        if not first:
            raise UserError(f"{task.name}: the tokenizer has neither a BOS nor an EOS")
        stride = task.stride or self.max_length // 2
        if stride > self.max_length:
            raise UserError(
                f"{task.name}: stride={stride} must be at most the {self.max_length} tokens that "
                "the model reads"
            )
        # The last id of a window is predicted and not read.
        start, stop, index = len(first), self.max_length + 1, 0
        while start < len(ids):
            stop = min(stop, len(ids))
            before = ids[max(0, stop - self.max_length - 1) : start]
            size = len(document.prompt.encode()) if not index else 0
            yield make(index, "logprob", before, ids[start:stop], size)
            start, stop, index = stop, stop + stride, index + 1


def _content(document: Document, text: str):
    """The content of a message: a text, or its parts around the places of pictures."""
    if not document.pictures:
        return text
    first, *rest = text.split(PLACE)
    parts = [{"type": "text", "text": first}]
    for part in rest:
        parts += [{"type": "image"}, {"type": "text", "text": part}]
    return [part for part in parts if part.get("text") != ""]


class Asker:
    """Asks a model; what is answered already is not asked again.

    Args:
      model, params, tokenizer, mesh: as `puna.load` gives them.
      batch_size: rows at a time.
      answers: where answers are kept.
      identity: what answers depend on besides a request: weights, config, tokenizer.
      pictures: those that requests name.
    """

    def __init__(self, model, params, tokenizer, mesh, batch_size: int, answers: Answers,
                 identity: str, pictures: Pictures | None = None):  # fmt: skip
        self.model, self.params, self.tokenizer, self.mesh = model, params, tokenizer, mesh
        self.batch_size, self.answers, self.identity = batch_size, answers, identity
        self.pictures = pictures

    def ask(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """Answer requests, a line of `requests.jsonl` for each.

        Batches are the same whatever is answered already, so an evaluation that was interrupted
        gives the numbers of one that was not.
        """
        keys = [
            hashlib.sha256(f"{self.identity} {r.asked}".encode()).hexdigest()[:32] for r in requests
        ]
        unique = dict(zip(keys, requests, strict=True))
        counts = collections.Counter(keys)
        lines = {key: _line(r, key) for r, key in zip(requests, keys, strict=True)}
        done = sum(counts[key] for key in unique if key in self.answers)
        bar = tqdm(total=len(requests), initial=done, desc="requests", smoothing=0.05,
                   disable=not processes.is_first() or None)  # fmt: skip
        with bar, jax.set_mesh(self.mesh):
            for key, answer in self._answered(unique):
                if key not in self.answers:
                    self.answers.add(lines[key] | {"answer": answer})
                    bar.update(counts[key])
        return [
            _line(r, key) | {"answer": self.answers[key]}
            for r, key in zip(requests, keys, strict=True)
        ]

    def _answered(self, unique: dict[str, Request]) -> Iterator[tuple[str, Any]]:
        scored = [key for key, r in unique.items() if r.kind == "logprob"]
        pairs = [(self._context(unique[key]), unique[key].continuation) for key in scored]
        known = {n for n, key in enumerate(scored) if key in self.answers}
        features = self.pictures.features(self.params) if self.pictures else None
        for n, found in score(self.model, self.params, pairs, self.batch_size, known, features):
            yield scored[n], list(found)
        valued = [key for key, r in unique.items() if r.kind == "reward"]
        texts = [unique[key].context for key in valued]
        known = {n for n, key in enumerate(valued) if key in self.answers}
        for n, value in rewards(self.model, self.params, texts, self.batch_size, known):
            yield valued[n], [value]
        groups: dict[tuple, list[str]] = collections.defaultdict(list)
        for key, r in unique.items():
            if r.kind in ("text", "call"):
                how = (r.kind, r.max_tokens, r.stop, r.temperature, bool(r.pictures))
                groups[how].append(key)
        for (*kind, sees), written in groups.items():
            write = self._write_of_pictures if sees else self._write
            # The longest first: what memory is needed shows at once.
            written.sort(key=lambda key: (-len(unique[key].context), key))
            for first in range(0, len(written), self.batch_size):
                batch = written[first : first + self.batch_size]
                if not all(key in self.answers for key in batch):
                    asked = [unique[key] for key in batch]
                    yield from zip(batch, write(asked, *kind), strict=True)

    def _write(self, asked: Sequence[Request], kind: str, max_tokens: int, stop,
               temperature: float) -> list[dict]:  # fmt: skip
        prompts = [r.context for r in asked]
        # Filled up, so that a last batch compiles nothing new.
        empty = self.batch_size - len(prompts)
        seeds = np.array([r.document * 1000 + r.index for r in asked] + [0] * empty) % 2**31
        made = complete(
            self.model, self.params, self.tokenizer, [*prompts, *[prompts[0][:1]] * empty],
            np.array([max_tokens] * len(prompts) + [1] * empty), temperature=temperature, top_k=0,
            top_p=1.0, min_p=0.0, stop=stop, seed=seeds if temperature else 0,
        )  # fmt: skip
        texts = [m.text if kind == "text" else self._marked(m.ids) for m in made]
        return [
            {"text": text, "ids": m.ids, "finish": m.finish_reason}
            for text, m in zip(texts, made[: len(prompts)], strict=False)
        ]

    def _context(self, request: Request) -> tuple[int, ...]:
        """The ids that `score` takes: pictures are told apart."""
        if any(i < 0 for i in request.context):
            raise UserError(f"{request.task}: a request has an id below 0: its record is damaged")
        if not request.pictures:
            return request.context
        assert self.pictures is not None
        return self.pictures.keyed(request.context, request.pictures)

    def _write_of_pictures(self, asked: Sequence[Request], kind: str, max_tokens: int, stop,
                           temperature: float) -> list[dict]:  # fmt: skip
        """As `_write`, by an engine of its own: no batch depends on what was asked before it."""
        assert kind == "text" and self.pictures is not None
        # The first is the longest; few lengths compile little.
        room = padded(len(asked[0].context) + max_tokens)
        most = max(len(r.pictures) for r in asked)
        engine = Engine(
            self.model, self.params, self.tokenizer, self.batch_size, room, max_images=most
        )
        slots = []
        for r in asked:
            sampling = Sampling(temperature, seed=(r.document * 1000 + r.index) % 2**31)
            tiles = self.pictures.tiles(r.pictures)
            slots.append(engine.insert(r.context, sampling, max_tokens, stop, tiles=tiles))
        made: dict[int, list] = {slot: [] for slot in slots}
        while engine.requests:
            for slot, token in engine.step():
                made[slot].append(token)
        return [
            {"text": "".join(t.text for t in made[slot]), "ids": [t.id for t in made[slot]],
             "finish": made[slot][-1].finish_reason}
            for slot in slots
        ]  # fmt: skip

    def _marked(self, ids) -> str:
        """The text with its control tokens, which tell of calls, but without what ends it."""
        t = self.tokenizer
        ends = {*t.stop_ids, t.eos_id}
        return t.decode([i for i in ids if i not in ends], show_special=True)


def _line(request: Request, key: str) -> dict:
    told = {k: v for k, v in request._asdict().items() if v not in ((), 0) or k in _ALWAYS}
    return told | {"key": key}


_ALWAYS = ("document", "index")
