"""`puna data`: what the model will see of a run's data, and what bears loss.

The commonest mistakes of fine-tuning show here before any training: a prompt that is learnt, an end
of turn that is not, conversations that are cut or dropped.
"""

import collections
import itertools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...configs import schema
from .. import init_from, objectives
from ..resilience.mirror import Mirror
from .examples import Example
from .quarantine import Quarantine
from .sources import open_source, parse_sources
from .tokenizer import prepare_tokenizer

_LEARNT, _PLAIN = "\x1b[32m", "\x1b[0m"  # green
_MARKS = ("[[", "]]")


class Preview:
    """The examples of `data.train`, in the order of the files.

    Args:
      config: a `ConfigDict`; where `data.tokenizer` names none, it is that of `train.init_from`.

    Raises:
      UserError: the configuration, the tokenizer or the data will not do.
    """

    def __init__(self, config: Mapping):
        with tempfile.TemporaryDirectory() as folder:
            c = init_from.resolve(schema.build(config), Path(folder))
            self._tokenizer = prepare_tokenizer(c, Mirror(Path(folder)))
        self._config = c
        self._objective = objectives.make(c, self._tokenizer.token_bytes)
        self._quarantine = _Counting()

    def examples(self) -> Iterator[Example]:
        """Yield each example that has ids."""
        data = self._config.data
        transform = self._objective.transform(self._config, self._tokenizer)
        for part in parse_sources(data.train):
            source = open_source(part.name, data, transform, self._quarantine)
            for i in range(len(source)):
                example = source[i]
                if len(example.ids):
                    yield example

    def shown(self, example: Example, colour: bool) -> str:
        """The text of an example, control tokens by name, its learnt parts green or in [[ ]]."""
        begin, end = (_LEARNT, _PLAIN) if colour else _MARKS
        parts = []
        learnt = example.weights > 0
        start = 0
        for weighs, group in itertools.groupby(learnt):
            stop = start + len(list(group))
            ids = example.ids[start:stop]
            text = self._tokenizer.decode(ids, continuation=start > 0, show_special=True)
            parts.append(f"{begin}{text}{end}" if weighs else text)
            start = stop
        return "".join(parts)

    def summary(self, most: int) -> dict[str, Any]:
        """Count over the first `most` examples.

        Returns:
          `examples`, `tokens`, `learnt` (tokens that bear loss), `shortest`, `median`, `longest`
          in tokens, how many examples were `cut` and by how many tokens (`tokens_cut`), and how
          many records were `dropped`, for which reasons.
        """
        lengths, learnt, cut = [], 0, []
        for example in itertools.islice(self.examples(), most):
            lengths.append(len(example.ids))
            learnt += int(np.sum(example.weights > 0))
            if example.cut:
                cut.append(example.cut)
        reasons = self._quarantine.reasons
        return {
            "examples": len(lengths),
            "tokens": sum(lengths),
            "learnt": learnt,
            "shortest": min(lengths, default=0),
            "median": float(np.median(lengths)) if lengths else 0.0,
            "longest": max(lengths, default=0),
            "cut": len(cut),
            "tokens_cut": sum(cut),
            "dropped": sum(reasons.values()),
            "reasons": dict(reasons.most_common(8)),
        }


class _Counting(Quarantine):
    """Counts bad records by their reasons."""

    def __init__(self):
        super().__init__()
        self.reasons: collections.Counter = collections.Counter()

    def add(self, bad) -> None:
        """Count a record once."""
        before = self.count()
        super().add(bad)
        self.reasons[bad.reason[:200]] += self.count() - before
