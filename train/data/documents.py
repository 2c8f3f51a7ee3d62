"""Documents as token ids: what packing reads."""

import weakref
from collections.abc import Sequence

import numpy as np

from ...models.text.tokenizer import Tokenizer


class TokenizedDocuments(Sequence[np.ndarray]):
    """The ids of documents, int32: bos, text, eos; empty where the text has no ids.

    A tokenizer without bos or eos leaves that one out.
    """

    def __init__(self, documents: Sequence[str], tokenizer: Tokenizer):
        self._documents = documents
        self._tokenizer = tokenizer
        # Where documents are few, many rows read the same one at once: a book in one file is
        # tokenized and held once, and not once a row.
        self._in_use: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> np.ndarray:
        ids = self._in_use.get(index)
        if ids is None:
            ids = self._in_use[index] = self._tokenize(self._documents[index])
        return ids

    def __getstate__(self) -> dict:
        return {"documents": self._documents, "tokenizer": self._tokenizer}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def _tokenize(self, text: str) -> np.ndarray:
        ids = self._tokenizer.encode(text)
        if ids:
            bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
            ids = [bos] * (bos is not None) + ids + [eos] * (eos is not None)
        return np.asarray(ids, np.int32)
