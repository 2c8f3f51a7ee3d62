"""Which pages of a cache hold what, so that texts which begin alike share them.

A page holds keys and values of a fixed number of tokens that follow each other. Pages whose tokens
are known form trees, one for each adapter: a page is the child of the one with the tokens before. A
full page is never written again and may be in the tables of many texts; one that is not full is
written by one text, others copy what it has. What no text uses is kept until the room is needed,
and then the longest unused goes first, children before their parents.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from ...configs.errors import UserError

# Tokens of a page; blocks of the attention's keys are whole pages.
PAGE = 32


def counts(rows: int, max_length: int, parts: int, cache_tokens: int = 0) -> tuple[int, int]:
    """How many pages a row has at most, and how many each part of the mesh, see `slots.Engine`.

    Raises:
      UserError: there would not be room for one text of `max_length` in each part.
    """
    of_row = -(-max_length // PAGE)
    # One is spare, see `Pages.begin`.
    count = cache_tokens // PAGE // parts if cache_tokens else of_row * rows // parts + 1
    if count <= of_row:
        raise UserError(
            f"cache_tokens={cache_tokens} must be at least {(of_row + 1) * PAGE * parts}: for one "
            f"request of max_length={max_length} and a page of {PAGE}, in each of {parts} parts of "
            "the mesh"
        )
    return of_row, count


class Found(NamedTuple):
    """What is there of a text: full pages, one that begins as the rest does or -1, and tokens."""

    pages: list[int]
    partial: int
    count: int


@dataclasses.dataclass
class _Text:
    """most: pages that it may need. pages: as many, those still to fill too; none before it begins.

    size: tokens that are written.
    """

    adapter: int
    most: int
    pages: list[int]
    size: int = 0


class Pages:
    """The pages of one part of a mesh, by number; texts are told apart by any number, as slots are.

    A text that is admitted has all the pages that it may need, so that none ever waits for another.
    What it shares it needs no pages for, but that is known only when it begins.
    """

    def __init__(self, count: int, size: int):
        """Begin with `count` empty pages of `size` tokens, one of them spare, see `begin`."""
        self.count, self.size = count, size
        self.forget()

    def forget(self) -> None:
        """Empty all pages; no text may use any."""
        self._tokens = np.zeros((self.count, self.size), np.int64)
        self._filled, self._uses, self._used_at, self._num_children = np.zeros(
            (4, self.count), np.int64
        )
        self._parents: dict[int, int] = {}  # of pages that are in a tree
        self._children: dict[int, list[int]] = {}
        self._free = list(range(self.count))[::-1]
        self._texts: dict[int, _Text] = {}
        self._clock = 0

    @property
    def room(self) -> int:
        """Pages that a new text can have."""
        waiting = sum(text.most for text in self._texts.values() if not text.pages)
        return int((self._uses == 0).sum()) - waiting - 1

    def match(self, keys: np.ndarray, adapter: int) -> Found:
        """The longest beginning of a text, read with an adapter, that is there."""
        pages, node = [], self._root(adapter)
        while len(rest := keys[len(pages) * self.size :]):
            children = self._children.get(node, [])
            width = min(self.size, len(rest))
            same = self._tokens[children, :width] == rest[:width]
            same &= np.arange(width) < self._filled[children, None]
            counts = np.cumprod(same, 1).sum(1)
            best = int(np.argmax(counts)) if len(counts) else -1
            if best < 0 or not counts[best]:
                break
            node, count = children[best], int(counts[best])
            if count < self.size:
                return Found(pages, node, len(pages) * self.size + count)
            pages.append(node)
        return Found(pages, -1, len(pages) * self.size)

    def admit(self, text: int, adapter: int, most: int) -> bool:
        """Set pages aside for a text of at most that many tokens; False where there are too few."""
        need = -(-most // self.size)
        if need > self.room:
            return False
        self._texts[text] = _Text(adapter, need, [])
        return True

    def begin(self, text: int, found: Found, count: int) -> tuple[int, int]:
        """Give a text its pages, which begin with `count` of the tokens that were found.

        Returns:
          the page of which another, the second, must become a copy; twice that where none must.
        """
        held = self._texts[text]
        full, rest = divmod(count, self.size)
        source = -1
        if rest:
            source = found.pages[full] if full < len(found.pages) else found.partial
        self._use([*found.pages[:full], *([source] if rest else [])])
        held.pages, held.size = found.pages[:full], full * self.size
        # What is copied must not give way to the copy: hence a spare page.
        held.pages += [self._new() for _ in range(held.most - full)]
        self._drop([source] if rest else [])
        if not rest:
            return held.pages[0], held.pages[0]
        self.add(text, np.copy(self._tokens[source, :rest]))
        return source, held.pages[full]

    def add(self, text: int, keys: np.ndarray) -> None:
        """Append tokens whose keys and values have been written to the pages of a text."""
        held = self._texts[text]
        while len(keys):
            i, start = divmod(held.size, self.size)
            page, part = held.pages[i], keys[: self.size - start]
            parent = held.pages[i - 1] if i else self._root(held.adapter)
            self._tokens[page, start : start + len(part)] = part
            self._filled[page] = start + len(part)
            if page not in self._parents:
                self._plant(page, parent)
            if self._filled[page] == self.size:
                held.pages[i] = self._only(page, parent)
            held.size += len(part)
            keys = keys[len(part) :]

    def remove(self, text: int) -> None:
        """A text is at its end, or not wanted any more."""
        self._drop(self._texts.pop(text).pages)

    def table(self, text: int) -> list[int]:
        """The pages of a text, in order; none before it has begun."""
        return self._texts[text].pages

    def tables(self) -> list[tuple[int, list[int]]]:
        """All texts and their pages."""
        return [(text, held.pages) for text, held in self._texts.items()]

    def _root(self, adapter: int) -> int:
        return -2 - adapter

    def _use(self, pages):
        for page in pages:
            self._uses[page] += 1

    def _drop(self, pages):
        self._clock += 1
        for page in pages:
            self._uses[page] -= 1
            self._used_at[page] = self._clock
            if not self._uses[page] and page not in self._parents:
                self._free.append(page)

    def _new(self) -> int:
        """A page for a text that has been admitted, in its use."""
        if not self._free:
            # A text uses the pages before each of its own, so what is unused has no used children.
            unused = np.flatnonzero((self._uses == 0) & (self._num_children == 0))
            self._uproot(int(unused[np.argmin(self._used_at[unused])]))
        page = self._free.pop()
        self._uses[page], self._filled[page] = 1, 0
        return page

    def _plant(self, page, parent):
        self._parents[page] = parent
        self._children.setdefault(parent, []).append(page)
        if parent >= 0:
            self._num_children[parent] += 1

    def _uproot(self, page):
        """Out of its tree; free where no text uses it."""
        parent = self._parents.pop(page)
        self._children[parent].remove(page)
        if not self._children[parent]:
            del self._children[parent]
        if parent >= 0:
            self._num_children[parent] -= 1
        if not self._uses[page]:
            self._free.append(page)

    def _only(self, page, parent) -> int:
        """A page that has just become full, or the one that was full of the same before."""
        others = [other for other in self._children[parent] if other != page]
        same = (self._tokens[others] == self._tokens[page]).all(1)
        same &= self._filled[others] == self.size
        if not same.any():
            return page
        twin = others[int(np.argmax(same))]
        self._use([twin])
        self._uproot(page)
        self._drop([page])
        return twin


class Pools:
    """The pages of all parts of a mesh, for texts that are rows of a cache.

    Attributes:
      shape: how many pages there are, and tokens of each.
    """

    def __init__(self, rows: int, max_length: int, parts: int, cache_tokens: int = 0):
        """Begin with empty pages; see `counts`."""
        self._of_row, count = counts(rows, max_length, parts, cache_tokens)
        self._rows, self.shape = rows, (count * parts, PAGE)
        self.parts = [Pages(count, PAGE) for _ in range(parts)]

    def of(self, row: int) -> Pages:
        """The part that a row's pages are of."""
        return self.parts[row * len(self.parts) // self._rows]

    def table(self) -> np.ndarray:
        """The pages of each row, see `PagedCache`, int32 [rows, pages of a row]."""
        table_BN = np.full((self._rows, self._of_row), self.parts[0].count, np.int32)
        for part in self.parts:
            for row, found in part.tables():
                table_BN[row, : len(found)] = found
        return table_BN

    def forget(self) -> None:
        """Empty all pages; no row may use any."""
        for part in self.parts:
            part.forget()
