"""Places of pictures and clips in a prompt; what pieces of it need of them."""

import numpy as np
import pytest

from puna.configs.errors import UserError
from puna.models.decode.fused import Reader, with_places
from puna.models.text.tokenizer import train_bpe

TOKENIZER = train_bpe(["the llama walks over the puna"] * 9, 280)
IMAGE, AUDIO = 7001, 7002


def places(images, clips):
    return {"<|image|>": (IMAGE, images), "<|audio|>": (AUDIO, clips)}


def test_each_takes_the_next_place_of_its_kind_and_the_others_come_first():
    the, puna, begin = TOKENIZER.encode("the"), TOKENIZER.encode("puna"), [*TOKENIZER.begin_ids]
    found = with_places(TOKENIZER, "<|audio|>the<|image|>puna", places(2, 2))
    assert found == [*begin, IMAGE, AUDIO, AUDIO, *the, IMAGE, *puna]
    assert with_places(TOKENIZER, "", places(0, 1)) == [*begin, AUDIO]
    with pytest.raises(UserError, match="has 1 <|image|>, which is more than the 0 given"):
        with_places(TOKENIZER, "the<|image|>puna", places(0, 0))


def test_pieces_have_the_features_of_their_tokens():
    """Units of any number of features, cut anywhere."""
    units = [np.full((n, 2), n, np.float32) for n in (3, 1, 2)]
    sizes = [len(unit) for unit in units]
    ids = [1, 9, 9, 9, 2, 9, 9, 9, 3]

    def encode(unit):
        return unit + np.arange(len(unit) + 1)[:, None][: len(unit)] / 10  # each one another

    made = Reader("clips", "key", 9, ids, units, sizes, encode, rows=2)
    want = np.concatenate([encode(unit) for unit in units])
    for cuts in ([0, 9], [0, 2, 5, 6, 9], [0, 4, 5, 9]):
        found = []
        for start, stop in zip(cuts, cuts[1:], strict=False):
            piece = made.piece(start, stop, 8)
            if piece is None:
                assert 9 not in ids[start:stop]
                continue
            assert piece.values_BUD.shape == (2, 8, 2) and not piece.valid_BU[1].any()
            found.append(piece.values_BUD[0][piece.valid_BU[0]])
        np.testing.assert_array_equal(np.concatenate(found), want)
    keys = np.array(ids, np.int64)
    made.mark(keys)
    assert [keys[t] for t in (0, 4, 8)] == [1, 2, 3]
    assert np.all(keys[np.array(ids) == 9] < 0) and len(np.unique(keys)) == len(ids)


def test_what_does_not_fit_is_refused():
    units = [np.zeros((2, 2), np.float32)]
    for ids, wrong in (
        ([1, 9, 3], "1 tokens of key=9"),
        ([1, 9, 9], "must not end within a picture or a clip"),
    ):
        with pytest.raises(UserError, match=wrong):
            Reader("clips", "key", 9, ids, units, [2], lambda unit: unit, 1)
