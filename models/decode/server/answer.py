"""Answers in the form of OpenAI's API, whole and in pieces."""

import dataclasses
import json
import os
import time

from ..slots import Token
from .protocol import Ask, finite


@dataclasses.dataclass
class Choice:
    """One text of an answer as its tokens come."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    made: int = 0
    taken: int = 0  # characters
    pending: list[Token] = dataclasses.field(default_factory=list)

    def add(self, token: Token) -> None:
        """Take the next token."""
        self.text += token.text
        self.finish_reason = token.finish_reason
        self.made += 1
        self.pending.append(token)

    def take(self) -> tuple[str, list[Token]]:
        """What is new and certain: text, and the tokens that have begun in it.

        A stop string and an end token are in neither.
        """
        text = self.text[self.taken :]
        self.taken = len(self.text)
        kept = [token for token in self.pending if token.start < self.taken]
        if self.finish_reason == "length":
            kept = self.pending
        elif self.finish_reason and self.pending[-1].start == self.taken:
            # An end token, perhaps after bytes of a character that never became whole.
            kept = self.pending[:-1]
        self.pending = [] if self.finish_reason else self.pending[len(kept) :]
        return text, kept


class Answer:
    """All texts of one request, and what is said about them."""

    def __init__(self, ask: Ask, model: str, tokenizer, prompt_tokens: int, num_choices: int):
        self.ask, self.tokenizer, self.prompt_tokens = ask, tokenizer, prompt_tokens
        self.choices = [Choice(i) for i in range(num_choices)]
        name = "chat.completion" if ask.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{os.urandom(12).hex()}",
            "object": name + (".chunk" if ask.chat and ask.stream else ""),
            "created": int(time.time()),
            "model": model,
        }

    def usage(self) -> dict:
        """Tokens of the prompts and of the answers, end tokens included."""
        made = sum(choice.made for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    def whole(self) -> dict:
        """The answer, once all choices have finished."""
        choices = []
        for choice in self.choices:
            text, tokens = choice.take()
            message = {"role": "assistant", "content": text, "refusal": None}
            said = {"message": message} if self.ask.chat else {"text": text}
            choices.append(self._choice(choice, said, tokens))
        return {**self._head, "choices": choices, "usage": self.usage()}

    def begin(self) -> list[dict]:
        """The first chunks of a stream: a chat's say who speaks."""
        if not self.ask.chat:
            return []
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(self._choice(choice, said, [])) for choice in self.choices]

    def add(self, index: int, token: Token) -> list[dict]:
        """Take a token of one choice and give the chunks that it makes certain."""
        choice = self.choices[index]
        choice.add(token)
        text, tokens = choice.take()
        chunks = []
        if text or (tokens and self.ask.top is not None):
            said = {"delta": {"content": text}} if self.ask.chat else {"text": text}
            chunks.append({**self._choice(choice, said, tokens), "finish_reason": None})
        if choice.finish_reason:
            said = {"delta": {}} if self.ask.chat else {"text": ""}
            chunks.append(self._choice(choice, said, []))
        return [self._chunk(chunk) for chunk in chunks]

    def end(self) -> list[dict]:
        """The last chunks of a stream."""
        return [{**self._head, "choices": [], "usage": self.usage()}] if self.ask.usage else []

    def _chunk(self, choice) -> dict:
        return {**self._head, "choices": [choice]}

    def _choice(self, choice, said, tokens) -> dict:
        logprobs = None
        if self.ask.top is not None and tokens:
            logprobs = self._chat_logprobs(tokens) if self.ask.chat else self._logprobs(tokens)
        return {
            "index": choice.index,
            **said,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _name(self, i: int) -> str:
        return self.tokenizer.decode([i], continuation=True, show_special=True)

    def _chat_logprobs(self, tokens) -> dict:
        def entry(i, logprob):
            data = self.tokenizer.decode_bytes([i], continuation=True, show_special=True)
            return {"token": self._name(i), "logprob": finite(logprob), "bytes": list(data)}

        return {
            "content": [
                {**entry(t.id, t.logprob), "top_logprobs": [entry(*pair) for pair in t.top]}
                for t in tokens
            ],
            "refusal": None,
        }

    def _logprobs(self, tokens) -> dict:
        def named(token):
            pairs = [*token.top, (token.id, token.logprob)]
            return {self._name(i): finite(logprob) for i, logprob in pairs}

        return {
            "tokens": [self._name(t.id) for t in tokens],
            "token_logprobs": [finite(t.logprob) for t in tokens],
            "top_logprobs": [named(t) for t in tokens],
            "text_offset": [t.start for t in tokens],
        }


def event(data: dict) -> str:
    """One event of a stream (server-sent events)."""
    return f"data: {json.dumps(data, allow_nan=False)}\n\n"
