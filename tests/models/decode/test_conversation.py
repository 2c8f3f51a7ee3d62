"""Conversations with pictures and sound: what has its place, and what has none."""

import pytest

from puna.configs.architecture import ModelConfig
from puna.configs.errors import UserError
from puna.models.decode import conversation
from puna.tests.models.decode.test_clips import CONFIG, TOKENIZER, clip


def test_clips_stand_where_pictures_would():
    parts = [{"type": "image"}, {"type": "text", "text": "the"}, {"type": "image"}]
    ids = TOKENIZER.chat([{"role": "user", "content": parts}])
    place, sound = TOKENIZER.special["<|image|>"], CONFIG.audio.token_id
    media = [("audio", clip(0, 0.3)), ("audio", clip(1, 0.1))]
    found = conversation.with_media(CONFIG, TOKENIZER, ids, media, 99)
    counts, want = iter((8, 3)), []  # a token for each 40 ms
    for i in ids:
        want += [sound] * next(counts) if i == place else [i]
    assert found.ids == want and found.tiles is None and [len(c) for c in found.clips] == [30, 10]
    assert conversation.with_media(CONFIG, TOKENIZER, [1, 2], [], 9) == ([1, 2], None, [])


def test_what_has_no_sound_or_no_place_for_it():
    media = [("audio", b"a file")]
    with pytest.raises(UserError, match="reads no sound: model.audio.num_layers=0"):
        conversation.with_media(ModelConfig(), TOKENIZER, [1], media, 9)
    with pytest.raises(UserError, match="0 places for 1 pictures and clips"):
        conversation.with_media(CONFIG, TOKENIZER, [1, 2], media, 9)
    old = type("Old", (), {"special": {}})
    with pytest.raises(UserError, match="the tokenizer has no <|image|>".replace("|", r"\|")):
        conversation.check_place(CONFIG, old, "audio")
