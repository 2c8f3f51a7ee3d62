"""Text out of ids that arrive one by one: whole characters, stop ids and stop strings."""

import codecs


class Row:
    """The text of one row as its ids arrive, up to a stop id or stop string."""

    def __init__(self, tokenizer, stop, stop_ids, follows_text):
        self.tokenizer, self.stop, self.stop_ids = tokenizer, stop, stop_ids
        self.follows_text = follows_text
        self.characters = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""
        self.ids, self.logprobs = [], []
        self.done = False

    def push(self, ids, logprobs):
        """Add ids; a character whose bytes have not all come yet stays out of the text."""
        for i, logprob in zip(ids, logprobs, strict=True):
            if self.done or i < 0:
                return
            self.ids.append(i)
            self.logprobs.append(logprob)
            if i in self.stop_ids:
                self.done = True
                return
            data = self.tokenizer.decode_bytes([i], continuation=self.follows_text)
            self.follows_text = True
            old = len(self.text)
            self.text += self.characters.decode(data)
            self._cut(old)

    def _cut(self, old):
        """Cut before the stop string that ends first, then starts first."""
        found = []
        for s in self.stop:
            at = self.text.find(s, max(0, old - len(s) + 1))
            if at >= 0:
                found.append((at + len(s), at))
        if found:
            self.text = self.text[: min(found)[1]]
            self.done = True

    def certain(self) -> str:
        """The text without an end that may turn out to begin a stop string."""
        if self.done:
            return self.text
        begun = (n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n]))
        return self.text[: len(self.text) - max(begun, default=0)]
