"""Random access to a shuffled order of any length, without holding it in memory.

A Feistel network permutes the numbers of 2h bits; walking its cycles until one is below the length
makes that a permutation of the indices (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002). Grain's own shuffle does the same over at least 65,536 numbers, so that in a corpus of four
documents each one costs it 16 ms; here it is microseconds at any length.
"""

import functools

import grain
import numpy as np

_ROUNDS = 8  # with fewer, some orders of four or five documents are visibly more likely
_WORD = (1 << 64) - 1


def permute(index: int, length: int, keys: tuple[int, ...]) -> int:
    """Return where a permutation of range(length) sends an index.

    Args:
        index: 0 to length - 1.
        length: the number of indices.
        keys: which permutation: one number below 2**64 a round.
    """
    half = ((length - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            # The finalizer of splitmix64 (Steele, Lea and Flood, 2014) as the round function.
            mixed = (right + key) & _WORD
            mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _WORD
            left, right = right, left ^ ((mixed >> 31) & mask)
        index = left << half | right
        if index < length:
            return index


class ShuffledMapDataset(grain.MapDataset):
    """The elements of a data set in random order, another one in each epoch of `.repeat()`.

    Args:
        parent: a finite data set.
        seed: of the order.
    """

    def __init__(self, parent: grain.MapDataset, seed: tuple[int, ...]):
        super().__init__(parent)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int):
        epoch, place = divmod(index, len(self))
        return self._parent[permute(place, len(self), _keys((*self._seed, epoch)))]


@functools.lru_cache(maxsize=64)  # rows are in a few epochs at a time
def _keys(seed: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64).tolist())
