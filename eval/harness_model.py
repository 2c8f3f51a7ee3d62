"""A model as lm-eval (EleutherAI's lm-evaluation-harness) asks it: log-likelihoods and texts.

The reference is lm-eval's `HFLM`: each request is answered as `HFLM` over `transformers` answers it
when it is asked that one alone. So its habits are kept, the doubtful ones too:

- Names of control tokens in a text are read as those tokens.
- A context is encoded by itself; a continuation's ids are what the joint encoding has beyond their
  *number*. A word cut by the border may lose a part, which the model then never reads.
- Rolling log-likelihood encodes by the tokenizer's own rule. Where that puts a BOS, log p(BOS|BOS)
  is in the sum; later windows have one token of context, and only the last one is filled up.
- A text too long loses its beginning, BOS included.
- A sampled text is cut to the 50 likeliest tokens unless something else is said.

What depends on the neighbours of a request in `HFLM` does not here: whether a BOS is added is
decided for each text, not by the first one of a batch; a generation ends at its own stop string,
not with its batch; texts that share their tokens but not the border between context and
continuation get their own log-probabilities (`HFLM` reads those of the longest continuation).
Generation also ends at the tokenizer's other stop ids, such as <|eot_id|>. Left out: tokens that a
tokenizer puts after a prompt (`add_eos_token`), beam search and penalties, which are refused.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ..configs.errors import UserError
from ..models.decode.engine import decode
from ..models.decode.sampling import Sampling
from ..models.parallel import processes
from ..models.text import chat
from ..models.transformer import count_params
from ..models.weights.checksum import checksums
from .answers import Answers
from .scoring import score

_MAX_GEN_TOKENS = 256  # of lm-eval, where a task does not say
_TOP_K = 50  # of transformers, where neither the task nor the model says
# Settings of transformers' generate() with the values that ask for nothing.
_NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0,
}  # fmt: skip
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "


def harness_model(model, params, tokenizer, mesh, batch_size: int = 8,
                  max_length: int | None = None, answers: Answers | None = None,
                  name: str = "puna"):  # fmt: skip
    """A model as `lm_eval.simple_evaluate(model=...)` takes it: a subclass of `lm_eval`'s `LM`.

    Args:
      model, params, tokenizer: as `puna.load` and `puna.load_tokenizer` give them.
      mesh: of the parameters.
      answers: where answers are kept, if anywhere.

    Raises:
      UserError: see `evaluate_harness`; a model or tokenizer that cannot be asked.
    """
    from lm_eval.api.model import LM

    made = type("PunaLM", (HarnessModel, LM), {})
    return made(model, params, tokenizer, mesh, batch_size, max_length, answers, name)


class HarnessModel:
    """All of an `LM` that lm-eval has no default for; see `harness_model`.

    Attributes:
      lines: a dict for each request answered so far, in the order of lm-eval.
    """

    def __init__(self, model, params, tokenizer, mesh, batch_size, max_length, answers, name):
        super().__init__()
        config = model.config
        if config.moe_interval and config.router == "expert_choice":
            raise UserError(
                "model.router=expert_choice has no log-likelihood: its experts choose among later "
                "tokens too; train with sigmoid or softmax"
            )
        # As `transformers` has them, which asks the tokenizer's own files only.
        named = {n: tokenizer.special.get(t) for n, t in tokenizer.special_names.items()}
        self.bos_id = named.get("bos_token")
        self.eos_id = named.get("eos_token", tokenizer.eos_id)
        self.prefix_id = self.eos_id if self.bos_id is None else self.bos_id
        if self.prefix_id is None:
            raise UserError("--harness needs a tokenizer with a bos_token or an eos_token")
        if batch_size < 1:
            raise UserError(f"--batch_size={batch_size} must be at least 1")
        self.max_length = max_length or config.max_positions
        if not 1 < self.max_length <= config.max_positions:
            raise UserError(
                f"--max_length={max_length} must be 2 to the model's max_positions="
                f"{config.max_positions}"
            )
        # Room for the tokens of an expert would let a text depend on the others of its batch.
        self.model = model.clone(config=dataclasses.replace(config, capacity_factor=0.0))
        self.params, self.codec, self.mesh = params, tokenizer, mesh
        self.batch_size, self.answers, self.name = batch_size, answers, name
        self.lines: list[dict] = []
        identity = (checksums(params), config, self.max_length, tokenizer.fingerprint)
        self._identity = hashlib.sha256(repr(identity).encode()).hexdigest()

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells tokenizers with chat templates apart by."""
        return self.codec.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The source of the template, for lm-eval's records."""
        source = self.codec.chat_template
        return source if isinstance(source, str) else json.dumps(source)

    def get_model_info(self) -> dict:
        """What lm-eval's results say of the model."""
        config = self.model.config
        return {
            "model": self.name,
            "model_num_parameters": count_params(config),
            "model_dtype": config.compute_dtype,
            "max_length": self.max_length,
            "tokenizer": self.codec.fingerprint,
        }

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt=True) -> str:
        """The conversation as one text; as in `HFLM` without a system message where the template
        has none, and cut off after the last message where that is to be continued."""
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except UserError:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history) or not without:
                raise
            return self._rendered(without, add_generation_prompt)

    def _rendered(self, messages, add_generation_prompt) -> str:
        if add_generation_prompt:
            return chat.render(self.codec, messages).text
        *before, last = messages
        last = {**last, "content": last["content"] + _CONTINUE}
        text = chat.render(self.codec, [*before, last], add_generation_prompt=False).text
        text, _, after = text.rpartition(_CONTINUE.strip())
        # A template that strips messages strips this one, too.
        return text if after.startswith(" ") else text.rstrip()

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Ids as `HFLM.tok_encode` gives them.

        Args:
          special: put what the tokenizer puts before a text; None for its own rule, unless the
            text begins with the prefix token already.
        """
        prefix = self.codec.decode([self.prefix_id], show_special=True)
        if special is None and text.startswith(prefix):
            special = False
        ids = self.codec.encode(text, allow_special=True)
        return ids if special is False else [*self.codec.begin_ids, *ids]

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Context and continuation as ids, as `TemplateLM.loglikelihood` splits them."""
        if not context:
            ids = self.encode(continuation, special=False)
            if ids and ids[0] == self.prefix_id:
                return ids[:1], ids[1:]
            return [self.prefix_id], ids
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self.encode(stripped)
        return before, self.encode(stripped + continuation)[len(before) :]

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats and whether it is greedy, for each request."""

        def answered(pending):
            pairs = [self._pair(*args) for args, _ in pending]
            for number, found in self._scores(pairs):
                yield number, list(found)

        return [tuple(a) for a in self._answer(requests, "loglikelihood", answered)]

    def _pair(self, context: str, continuation: str):
        """The ids of a request, without the beginning of what is too long."""
        before, after = self.split(context, continuation)
        if not before or not after or len(after) > self.max_length:
            raise UserError(
                f"the continuation {continuation[:80]!r} after {context[-80:]!r} is {len(after)} "
                f"tokens after {len(before)}: it must be 1 to {self.max_length} after 1 or more"
            )
        return before[-(self.max_length + 1 - len(after)) :], after

    def loglikelihood_rolling(self, requests) -> list[float]:
        """log p of whole texts in nats, a token at a time after the window before it."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        def answered(pending):
            pairs, owners = [], []
            for number, ((text,), _) in enumerate(pending):
                ids = self.encode(text)
                windows = get_rolling_token_windows(ids, self.prefix_id, self.max_length, 1)
                found = [make_disjoint_window(window) for window in windows]
                pairs += found
                owners += [number] * len(found)
                if not found:
                    yield number, 0.0
            left, sums = collections.Counter(owners), collections.defaultdict(list)
            for i, found in self._scores(pairs):
                number = owners[i]
                sums[number].append((i, found.logprob))
                left[number] -= 1
                if not left[number]:
                    yield number, sum(logprob for _, logprob in sorted(sums[number]))

        return self._answer(requests, "loglikelihood_rolling", answered)

    def _scores(self, pairs):
        with jax.set_mesh(self.mesh):
            yield from score(self.model, self.params, pairs, self.batch_size)

    def generate_until(self, requests) -> list[str]:
        """What follows each context, up to a stop string, which is left out."""

        def answered(pending):
            asked = [
                self._prompt(context, settings, f"{settings} {time}")
                for (context, settings), time in pending
            ]
            order = sorted(range(len(asked)), key=lambda i: -len(asked[i].ids))
            for first in range(0, len(order), self.batch_size):
                numbers = order[first : first + self.batch_size]
                texts = self._texts([asked[i] for i in numbers])
                yield from zip(numbers, texts, strict=True)

        return self._answer(requests, "generate_until", answered)

    def _prompt(self, context: str, settings: dict, salt: str) -> "_Prompt":
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        left: dict[str, Any] = dict(normalize_gen_kwargs(settings, _MAX_GEN_TOKENS))
        most, do_sample = left.pop("max_gen_toks"), left.pop("do_sample")
        eos = [] if self.eos_id is None else [self.eos_id]
        name = self.codec.decode(eos, show_special=True)
        until = filter(None, handle_stop_sequences(left.pop("until"), eos=name))
        windows = {s: len(self.codec.encode(s, allow_special=True)) + 2 for s in until}
        if not 1 <= most < self.max_length:
            raise UserError(
                f"max_gen_toks={most} must be at least 1 and less than the {self.max_length} "
                "tokens of the model's context"
            )
        said = {"top_k": _TOP_K, **self.codec.generation} if do_sample else {}
        sampling = {n: said[n] for n in _SAMPLING if n in said}
        sampling |= {n: left.pop(n) for n in _SAMPLING if n in left}
        if do_sample and not sampling.get("temperature"):
            raise UserError("do_sample=true needs a temperature above 0")
        for key, value in left.items():
            if key not in _NEUTRAL or value != _NEUTRAL[key]:
                raise UserError(
                    f"generation_kwargs: {key}={value!r} cannot be done; leave it out of the task"
                )
        # A text that begins with BOS gets no second one; without a BOS nothing is looked for.
        special = True if self.bos_id is None else None
        ids = self.encode(context, special)[-(self.max_length - most) :]
        seed = int.from_bytes(hashlib.sha256(f"{context} {salt}".encode()).digest()[:4]) >> 1
        return _Prompt(ids, most, windows, sampling, seed)

    def _texts(self, prompts: list["_Prompt"]) -> list[str]:
        """Generate a batch; it is filled up with copies of its last prompt that make nothing."""
        rows = [prompts[min(r, len(prompts) - 1)] for r in range(self.batch_size)]
        finished_B = np.arange(len(rows)) >= len(prompts)
        values = {
            name: np.array([p.sampling.get(name, default) for p in rows])
            for name, default in Sampling._field_defaults.items()
        }
        values["seed"] = np.array([p.seed for p in rows])
        made: list[list[int]] = [[] for _ in prompts]
        with jax.set_mesh(self.mesh):
            blocks = decode(
                self.model, self.params, [p.ids for p in rows], np.array([p.most for p in rows]),
                Sampling(**values), stop_ids=self.codec.stop_ids, finished_B=finished_B,
            )  # fmt: skip
            for block in blocks:
                for r, prompt in enumerate(prompts):
                    for i in block.ids_BT[r].tolist():
                        if i < 0 or finished_B[r]:
                            break
                        made[r].append(i)
                        finished_B[r] = self._stops(made[r], prompt.until)
        return [self._cut(ids, p.until) for ids, p in zip(made, prompts, strict=True)]

    def _stops(self, ids: list[int], until: dict[str, int]) -> bool:
        """Whether the last token ends the text."""
        if ids[-1] in self.codec.stop_ids:
            return True
        return any(s in self._decode(ids[-n:], show_special=True) for s, n in until.items())

    def _cut(self, ids: list[int], until: Iterable[str]) -> str:
        text = self._decode(ids)
        for stop in until:
            text = text.split(stop)[0]
        return text

    def _decode(self, ids, show_special: bool = False) -> str:
        # A model may have more ids than its tokenizer.
        known = [i for i in ids if i < self.codec.vocab_size]
        return self.codec.decode(known, show_special=show_special)

    def _answer(self, requests, kind: str, answered: Callable[[list], Iterator]) -> list:
        """Answer requests, each different one once, taking what is there already.

        Args:
          answered: gives (number, answer) for each of a list of (arguments, how many times the same
            was asked before), in any order.
        """
        keys, pending = [], {}
        users: dict[str, list[int]] = collections.defaultdict(list)
        seen: collections.Counter = collections.Counter()
        for number, request in enumerate(requests):
            # Only sampling can answer the same differently.
            sampled = kind == "generate_until" and request.args[1].get("do_sample")
            asked = json.dumps([kind, *request.args], sort_keys=True, default=str)
            time = seen[asked] if sampled else 0
            seen[asked] += 1
            key = hashlib.sha256(f"{self._identity} {asked} {time}".encode()).hexdigest()[:32]
            keys.append(key)
            users[key].append(number)
            pending[key] = (request.args, time)
        found = {}
        if self.answers is not None:
            found = {key: self.answers[key] for key in pending if key in self.answers}
        pending = {key: asked for key, asked in pending.items() if key not in found}
        bar = tqdm(
            total=len(requests), initial=sum(len(users[key]) for key in found), desc=kind,
            disable=not processes.is_first() or None,
        )  # fmt: skip
        order = list(pending)
        with bar:
            for number, answer in answered(list(pending.values())):
                key = order[number]
                found[key] = answer
                if self.answers is not None:
                    self.answers.add(_line(requests[users[key][0]], kind, key, answer))
                bar.update(len(users[key]))
        self.lines += [
            _line(r, kind, key, found[key]) for r, key in zip(requests, keys, strict=True)
        ]
        return [found[key] for key in keys]


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A request to generate.

    ids: of the context. most: new tokens. until: stop string -> how many of the last tokens it is
      looked for in. sampling: fields of `Sampling`.
    """

    ids: list[int]
    most: int
    until: dict[str, int]
    sampling: dict
    seed: int


def _line(request, kind: str, key: str, answer) -> dict:
    return {
        "task": request.task_name, "document": request.doc_id, "index": request.idx, "kind": kind,
        "answer": answer, "key": key,
    }  # fmt: skip
