"""Answers in the form of OpenAI's API, whole and in pieces."""

import json
import os
import time

from ..slots import Token
from ..tools import MARKS, Calls
from .protocol import Ask, finite


class Choice:
    """One text of an answer as its tokens come, and the calls of functions in it."""

    def __init__(self, index: int, calls: Calls | None, marks: dict[int, str], several: bool):
        """Begin with nothing.

        Args:
          calls: finds calls, None where there are no functions.
          marks: names of the control tokens that tell of calls, by id.
          several: whether more calls than the first count.
        """
        self.index, self._calls, self._marks, self._several = index, calls, marks, several
        self.finish_reason: str | None = None
        self.made = 0  # tokens
        self.content, self.calls = "", []
        self._size = 0  # characters of the text, calls included
        self._taken = [0, 0]  # of content and of calls
        self._pending: list[Token] = []

    def add(self, token: Token) -> None:
        """Take the next token."""
        self._size += len(token.text)
        self.finish_reason = token.finish_reason
        self.made += 1
        self._pending.append(token)
        if self._calls is None:
            self.content += token.text
            return
        text = token.text + self._marks.get(token.id, "")
        for part in self._calls.add(text, final=token.finish_reason is not None):
            if isinstance(part, str):
                self.content += part
            elif self._several or not self.calls:
                function = {"name": part.name, "arguments": part.arguments}
                name = f"call_{os.urandom(12).hex()}"
                self.calls.append({"id": name, "type": "function", "function": function})

    def withhold(self, made: int) -> None:
        """End without the last `made` tokens, and with what has not been taken."""
        said, called = self._taken
        self.content, self.calls = self.content[:said], self.calls[:called]
        self.made += made
        self.finish_reason, self._pending = "content_filter", []

    def take(self) -> tuple[str, list[dict], list[Token]]:
        """What is new and certain: content, calls, and the tokens that have begun in the text.

        A stop string and an end token are in none of them.
        """
        said, called = self._taken
        self._taken = [len(self.content), len(self.calls)]
        kept = [token for token in self._pending if token.start < self._size]
        if self.finish_reason == "length":
            kept = self._pending
        elif self.finish_reason and self._pending and self._pending[-1].start == self._size:
            # An end token, perhaps after bytes of a character that never became whole.
            kept = self._pending[:-1]
        self._pending = [] if self.finish_reason else self._pending[len(kept) :]
        return self.content[said:], self.calls[called:], kept


class Answer:
    """All texts of one request, and what is said about them."""

    def __init__(self, ask: Ask, tokenizer, prompt_tokens: int, num_choices: int):
        self.ask, self.tokenizer, self.prompt_tokens = ask, tokenizer, prompt_tokens
        names = [tool["name"] for tool in ask.tools]
        marks = {tokenizer.special[mark]: mark for mark in MARKS if mark in tokenizer.special}
        several = ask.several and not ask.only
        self.choices = [
            Choice(i, Calls(names) if names else None, marks, several) for i in range(num_choices)
        ]
        name = "chat.completion" if ask.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{os.urandom(12).hex()}",
            "object": name + (".chunk" if ask.chat and ask.stream else ""),
            "created": int(time.time()),
            "model": ask.model,
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
            text, calls, tokens = choice.take()
            message = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message |= {"content": text if text.strip() else None, "tool_calls": calls}
            said = {"message": message} if self.ask.chat else {"text": text}
            choices.append(self._choice(choice, said, tokens))
        return {**self._head, "choices": choices, "usage": self.usage()}

    def begin(self) -> list[dict]:
        """The first chunks of a stream: a chat's say who speaks."""
        if not self.ask.chat:
            return []
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(self._choice(choice, said, [])) for choice in self.choices]

    def add(self, index: int, news: list[Token]) -> list[dict]:
        """Take tokens of one choice and give the chunks that they make certain."""
        choice = self.choices[index]
        for token in news:
            choice.add(token)
        text, calls, tokens = choice.take()
        chunks = []
        if text or (tokens and self.ask.top is not None):
            said = {"delta": {"content": text}} if self.ask.chat else {"text": text}
            chunks.append({**self._choice(choice, said, tokens), "finish_reason": None})
        for i, call in enumerate(calls, len(choice.calls) - len(calls)):
            # Whole calls, in two pieces as clients join them.
            function = call["function"]
            head = {**call, "function": {**function, "arguments": ""}}
            for piece in (head, {"function": {"arguments": function["arguments"]}}):
                said = {"delta": {"tool_calls": [{"index": i, **piece}]}}
                chunks.append({**self._choice(choice, said, []), "finish_reason": None})
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
        reason = choice.finish_reason
        if reason == "stop" and choice.calls and not self.ask.only:
            reason = "tool_calls"  # OpenAI says stop where the call was named beforehand
        return {
            "index": choice.index,
            **said,
            "logprobs": logprobs,
            "finish_reason": reason,
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
