"""Pages of a cache: what texts share stays as it is, and what one writes no other has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.models.decode.pages import Pages

COUNT, SIZE = 8, 3


class Pool:
    """An oracle: pages with what was written to them, read as the engine reads."""

    def __init__(self):
        self.pages, self.wrote = Pages(COUNT, SIZE), np.full((COUNT, SIZE), -1)
        self.texts = {}  # (keys, adapter, tokens so far, most); tokens None before it begins

    def mark(self, keys, adapter):
        """What the cache has for each token: it depends on all before it."""
        made, state = [], adapter + 2
        for key in keys:
            state = (state * 31 + int(key)) % 1_000_003
            made.append(state)
        return made

    def write(self, text, stop):
        keys, adapter, start, most = self.texts[text]
        table, marks = self.pages.table(text), self.mark(keys, adapter)
        for t in range(start, stop):
            self.wrote[table[t // SIZE], t % SIZE] = marks[t]
        self.pages.add(text, keys[start:stop])
        self.texts[text] = keys, adapter, stop, most

    def check(self):
        p, uses = self.pages, np.zeros(COUNT, int)
        for text, (keys, adapter, start, most) in self.texts.items():
            held = p._texts[text]
            for page in held.pages:
                uses[page] += 1
            if start is None:
                continue
            table = p.table(text)
            assert len(table) == -(-most // SIZE) and len(set(table)) == len(table)
            marks = self.mark(keys, adapter)
            assert [self.wrote[table[t // SIZE], t % SIZE] for t in range(start)] == marks[:start]
            # What may still be written is in one table only.
            for page in table[start // SIZE :]:
                assert p._uses[page] == 1
        assert list(uses) == list(p._uses)
        assert len(set(p._free)) == len(p._free)
        kept = {page for page in p._parents if not uses[page]}
        assert not kept & set(p._free)
        # None is lost: a page is free, kept or in use.
        assert len(p._free) + len(kept) + (uses > 0).sum() == COUNT
        assert p.room >= 0
        for page, parent in p._parents.items():
            assert page in p._children[parent] and p._filled[page] > 0
            assert parent < 0 or p._filled[parent] == SIZE
            assert parent < 0 or p._uses[parent] or not p._uses[page]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_page_is_read_after_it_is_another_text_s(data):
    pool = Pool()
    for number in range(data.draw(st.integers(1, 30))):
        kind = data.draw(st.sampled_from(["admit", "admit", "step", "step", "step", "remove"]))
        if kind == "admit" or not pool.texts:
            # Few ids, so that texts begin alike.
            keys = np.array(data.draw(st.lists(st.sampled_from([5, 5, 5, 7]), max_size=14)), int)
            adapter, most = data.draw(st.sampled_from([-1, -1, 0])), len(keys) + 1
            room = pool.pages.room
            if pool.pages.admit(number, adapter, most):
                pool.texts[number] = keys, adapter, None, most
            else:
                assert room < -(-most // SIZE)
        else:
            text = data.draw(st.sampled_from(sorted(pool.texts)))
            keys, adapter, start, most = pool.texts[text]
            if kind == "remove":
                pool.pages.remove(text)
                del pool.texts[text]
            elif start is None:
                found = pool.pages.match(keys, adapter)
                count = data.draw(st.integers(0, found.count))
                source, target = pool.pages.begin(text, found, count)
                pool.wrote[target] = pool.wrote[source]
                pool.texts[text] = keys, adapter, count, most
            else:
                pool.write(text, data.draw(st.integers(start, len(keys))))
        pool.check()
    # Whatever there was, all pages can be had again.
    for text in list(pool.texts):
        pool.pages.remove(text)
    assert pool.pages.room == COUNT - 1
    assert pool.pages.admit(-1, -1, (COUNT - 1) * SIZE)


def hold(pages, text, keys, most=None):
    """Admit a text and write all of it; how many of its tokens were there."""
    keys = np.array(keys)
    if not pages.admit(text, -1, most or len(keys)):
        return None
    found = pages.match(keys, -1)
    pages.begin(text, found, found.count)
    pages.add(text, keys[found.count :])
    return found.count


def test_what_is_used_least_lately_goes_first():
    pages = Pages(5, 2)
    for text, keys in enumerate([[1, 2, 3, 4], [5, 6], [7, 8], [9, 8]]):
        assert hold(pages, text, keys) == 0
        pages.remove(text)
    assert hold(pages, 4, [5, 6]) == 2  # used again
    pages.remove(4)
    assert hold(pages, 5, [2, 2]) == 0  # in the place of 3, 4: the end before the beginning
    assert pages.match(np.array([1, 2, 3, 4]), -1).count == 2
    assert pages.match(np.array([5, 6]), -1).count == 2


def test_many_texts_share_one_beginning():
    pages = Pages(9, 2)
    begin = [1, 2, 3, 4, 5, 6]
    assert hold(pages, 0, [*begin, 7]) == 0
    # Four pages each, three of them the same.
    assert hold(pages, 1, [*begin, 8]) == 6 and pages.room == 3
    assert pages.table(0)[:3] == pages.table(1)[:3]
    # What a text will share is known when it begins, not before.
    assert hold(pages, 2, [*begin, 9]) is None
    pages.remove(1)
    assert hold(pages, 2, [*begin, 9]) == 6


@pytest.mark.parametrize("adapter, count", [(-1, 3), (0, 0)])
def test_an_adapter_has_its_own(adapter, count):
    pages = Pages(5, 2)
    hold(pages, 0, [1, 2, 3])
    assert pages.match(np.array([1, 2, 3, 4]), adapter).count == count
