"""Contamination: which documents of a benchmark stand in a corpus, by overlap of word n-grams.

Words are runs of letters and digits in lower case, as GPT-3's filter had them (arXiv 2005.14165,
13 words). The benchmark's n-grams are 64-bit hashes in one sorted array; the corpus, of any size,
is read once, document by document, and a hit is compared word by word, so that no collision counts.
Memory is that of the benchmark and of one piece of a document. Left out: paraphrases, translations.
"""

import collections
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from ...configs.display import Results
from ...configs.errors import UserError
from ...models.parallel import processes
from ...train.data import sources
from ..tasks.definition import load_task
from ..tasks.documents import documents, right

_WORD = re.compile(r"[^\W_]+")
_PIECE = 1 << 20  # characters of a document that are hashed at one time
_MOST_WORDS = 1 << 20  # whose hashes are kept
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing
_KEPT_PLACES = 3  # of a document, in the results


def audit_contamination(tasks: Sequence[str], benchmark: str, corpus: str, *, ngram: int = 13,
                        share: float = 0.5, data_dir: str | None = None) -> Results:  # fmt: skip
    """Look for a benchmark in a corpus.

    Args:
      tasks: names or files of tasks, whose prompts and right answers are looked for.
      benchmark: a source besides, or instead, all texts of whose records are looked for.
      corpus: the source to look in; all texts of a record count.
      ngram: words of a run.
      share: a document of whose n-grams at least this share is found is contaminated.
      data_dir: what paths of tasks are relative to.

    Returns:
      by task or source: documents, contaminated, touched (any n-gram is found), too_short (fewer
      words than an n-gram), and of each touched document its share and where it was found first.

    Raises:
      UserError: there is nothing to look for or in.
    """
    if ngram < 1 or not 0 < share <= 1:
        raise UserError(f"--ngram={ngram} must be 1 or more and --share={share} above 0, at most 1")
    texts: dict[str, list[str]] = {}
    for name in tasks:
        task = load_task(name, data_dir)
        if task.made:
            raise UserError(f"--tasks={name}: its documents are made, and stand in no corpus")
        texts[task.name] = [f"{d.prompt} {right(task, d)}" for d in documents(task, None)]
    if benchmark:
        texts[benchmark] = [" ".join(_texts(r)) for r in sources.iter_records(benchmark)]
    if not texts:
        raise UserError("--tasks or --benchmark says what to look for")
    index = Index([text for found in texts.values() for text in found], ngram)
    bar = tqdm(desc="corpus", unit=" documents", disable=not processes.is_first() or None)
    count = 0
    with bar:
        for count, record in enumerate(sources.iter_records(corpus), 1):
            for text in _texts(record):
                index.look(text, count - 1)
            bar.update()
    found, first = {}, 0
    for name, all_of_it in texts.items():
        numbers = range(first, first + len(all_of_it))
        first += len(all_of_it)
        shares = {n: index.share(n) for n in numbers}
        hits = [n for n in numbers if shares[n]]
        found[name] = {
            "documents": len(all_of_it),
            "contaminated": sum(shares[n] >= share for n in numbers),
            "touched": len(hits),
            "too_short": sum(not index.sizes[n] for n in numbers),
            "found": [
                {"document": n - numbers.start, "share": shares[n], "corpus": index.places[n]}
                for n in sorted(hits, key=lambda n: -shares[n])
            ],
        }
    return Results(corpus=corpus, corpus_documents=count, ngram=ngram, share=share, tasks=found)


class Index:
    """The n-grams of some texts, and which of them were met.

    An n-gram that several texts share is the template's, and does not count for a text that has
    others.

    Attributes:
      sizes: by text, n-grams that count. places: by text, the first documents it was met in.
    """

    def __init__(self, texts: Sequence[str], ngram: int):
        self.ngram, self._hashes = ngram, _WordHashes()
        self._words = [_words(text) for text in texts]
        made = [np.unique(self._hashed(words)) for words in self._words]
        total = sum(map(len, made))
        keys = np.concatenate([*made, np.zeros(0, np.uint64)])
        owners = np.repeat(np.arange(len(made), dtype=np.int64), [len(x) for x in made])
        order = np.argsort(keys, kind="stable")
        keys, owners = keys[order], owners[order]
        alone = np.ones(total, bool)
        same = keys[1:] == keys[:-1]
        alone[1:] &= ~same
        alone[:-1] &= ~same
        # Copies of one document have nothing but what they share.
        has_own = np.zeros(len(made), bool)
        has_own[owners[alone]] = True
        kept = alone | ~has_own[owners]
        self._keys, self._owners = keys[kept], owners[kept]
        self._met = np.zeros(len(self._keys), bool)
        self.sizes = np.bincount(self._owners, minlength=len(made))
        self.places: dict[int, list[int]] = collections.defaultdict(list)

    def look(self, text: str, place: int) -> None:
        """Note what of the texts stands in this one, which is document `place` of the corpus."""
        for words in _pieces(text, self.ngram):
            hashes = self._hashed(words)
            at = np.searchsorted(self._keys, hashes)
            inside = np.flatnonzero(at < len(self._keys))
            hit = inside[self._keys[at[inside]] == hashes[inside]]
            for i in hit.tolist():
                self._note(int(at[i]), words[i : i + self.ngram], hashes[i], place)

    def _note(self, at: int, words: list[str], key, place: int) -> None:
        while at < len(self._keys) and self._keys[at] == key:
            owner = int(self._owners[at])
            places = self.places[owner]
            if (not self._met[at] or place not in places) and self._holds(owner, words):
                self._met[at] = True
                if place not in places and len(places) < _KEPT_PLACES:
                    places.append(place)
            at += 1

    def _holds(self, owner: int, words: list[str]) -> bool:
        """Whether the text has this n-gram indeed: two may share a hash."""
        own, n = self._words[owner], self.ngram
        return any(own[i] == words[0] and own[i : i + n] == words for i in range(len(own) - n + 1))

    def share(self, number: int) -> float:
        """The share of a text's n-grams that were met."""
        met = np.bincount(self._owners[self._met], minlength=len(self.sizes))
        return float(met[number] / self.sizes[number]) if self.sizes[number] else 0.0

    def _hashed(self, words: Sequence[str]) -> np.ndarray:
        """A hash of each n-gram, uint64: a polynomial in the hashes of its words."""
        count = len(words) - self.ngram + 1
        if count < 1:
            return np.zeros(0, np.uint64)
        h = self._hashes(words)
        total = np.zeros(count, np.uint64)
        with np.errstate(over="ignore"):
            for j in range(self.ngram):
                total = total * _BASE + h[j : j + count]
        return total


class _WordHashes:
    """64 bits of each word; those of the words that come most are kept."""

    def __init__(self):
        self._known: dict[str, int] = {}

    def __call__(self, words: Sequence[str]) -> np.ndarray:
        known = self._known
        if len(known) > _MOST_WORDS:
            known.clear()
        for word in words:
            if word not in known:
                digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
                known[word] = int.from_bytes(digest)
        return np.fromiter((known[word] for word in words), np.uint64, len(words))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _pieces(text: str, ngram: int) -> Iterator[list[str]]:
    """The words of a text, piece by piece; each begins with the last n - 1 of the one before."""
    before: list[str] = []
    start = 0
    while start < len(text):
        stop = min(start + _PIECE, len(text))
        while stop < len(text) and stop < start + 2 * _PIECE and text[stop].isalnum():
            stop += 1  # not within a word
        words = before + _words(text[start:stop])
        yield words
        before = words[len(words) - ngram + 1 :] if ngram > 1 and len(words) >= ngram else words
        before = before if ngram > 1 else []
        start = stop


def _texts(record) -> Iterator[str]:
    """All texts of a record, however deep."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, Mapping):
        for value in record.values():
            yield from _texts(value)
    elif isinstance(record, Iterable) and not isinstance(record, bytes):
        for value in record:
            yield from _texts(value.decode(errors="replace") if isinstance(value, bytes) else value)


def table(results) -> str:
    """The results as lines of text."""
    names = [name[-40:] for name in results["tasks"]]
    width = max(map(len, ["benchmark", *names]))
    lines = [f"{'benchmark':<{width}}  documents  contaminated  touched  too short"]
    for name, found in zip(names, results["tasks"].values(), strict=True):
        lines.append(
            f"{name:<{width}}  {found['documents']:>9}  {found['contaminated']:>12}  "
            f"{found['touched']:>7}  {found['too_short']:>9}"
        )
    lines.append(
        f"contaminated: at least {results['share']:.0%} of its {results['ngram']}-grams are among "
        f"{results['corpus_documents']:,} documents of {results['corpus']}"
    )
    return "\n".join(lines)
