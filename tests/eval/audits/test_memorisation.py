"""Extraction by one forward pass is what greedy decoding extracts; counts, intervals, mistakes."""

import json

import jax
import pytest

from puna import __main__ as cli
from puna.configs import schema
from puna.configs.errors import UserError
from puna.eval.audits import memorisation
from puna.models.decode.generate import complete
from puna.models.parallel import sharding
from puna.models.text.tokenizer import byte_tokenizer
from puna.models.transformer import Transformer, init_params

CONFIG = schema.ModelConfig(
    vocab_size=264, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16,
    max_positions=64,
)  # fmt: skip


@pytest.fixture
def model(monkeypatch):
    mesh = sharding.make_mesh(schema.MeshConfig())
    params = init_params(CONFIG, jax.random.key(0), mesh)
    params = jax.tree.map(lambda x: 3 * x, params)
    monkeypatch.setattr(memorisation, "load_tokenizer", lambda path: byte_tokenizer())
    monkeypatch.setattr(memorisation, "load", lambda path, **_: (Transformer(CONFIG), params))
    return mesh, params


def test_it_is_what_greedy_decoding_gives(model, tmp_path):
    """Passages that the model itself writes are extracted, others are not."""
    mesh, params = model
    prompts = [f"p{i:03d}" for i in range(6)]
    with jax.set_mesh(mesh):
        made = complete(
            Transformer(CONFIG), params, byte_tokenizer(),
            [list(p.encode()) for p in prompts], max_tokens=8, temperature=0.0,
        )  # fmt: skip
    ids = [(*p.encode(), *m.ids) for p, m in zip(prompts, made, strict=True)]
    # The ids of a text must be those of its bytes for a record to hold it.
    passages = [memorisation.Passage(i, 4) for i in ids] + [
        memorisation.Passage((*i[:-1], (i[-1] + 1) % 256), 1) for i in ids
    ]
    asked = list(memorisation.questions(passages, [4], 8))
    with jax.set_mesh(mesh):
        found = dict(
            memorisation.score(Transformer(CONFIG), params, [pair for *_, pair in asked], 4)
        )
    assert [found[n].greedy for n in range(12)] == [True] * 6 + [False] * 6


def test_the_command(model, tmp_path, capsys):
    lines = [{"text": "abcdefgh" * 5, "repeats": r} for r in (1, 4, 4)] + [{"text": "short"}]
    (tmp_path / "seen.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "unseen.jsonl").write_text('{"text": "' + "z" * 40 + '"}\n')
    flags = ["audit", "--checkpoint=m", f"--passages={tmp_path}/seen.jsonl",
             f"--unseen={tmp_path}/unseen.jsonl", f"--workdir={tmp_path}/out"]  # fmt: skip
    cli._run([*flags, "--prefix=4,8", "--suffix=8"])
    found = json.loads((tmp_path / "out" / "memorisation.json").read_text())
    rows = {(row["repeats"], row["prefix"]): row for row in found["rows"]}
    assert list(rows) == [(0, 4), (0, 8), (1, 4), (1, 8), (4, 4), (4, 8)]
    assert rows[4, 8]["passages"] == 2 and rows[0, 8]["low"] == 0.0 and found["skipped"] == 1
    assert "1 passages are too short" in capsys.readouterr().out
    for more, reason in [
        (["--prefix=60", "--suffix=8"], "seen.jsonl has no passage of 68 tokens"),
        (["--prefix=x"], "--prefix=x must be like 16,32,64"),
        (["--suffix=0"], "suffix=0 must be 1 or more"),
        (["--corpus=a"], "takes --passages, --corpus or --safety"),
    ]:
        with pytest.raises(UserError, match=reason):
            cli._run([*flags, *more])


def test_each_prefix_is_asked_for_the_same_suffix():
    [(_, a, first), (_, b, second)] = memorisation.questions(
        [memorisation.Passage(tuple(range(20)), 2)], [8, 4], 3
    )
    assert (a, b) == (4, 8) and first == ((4, 5, 6, 7), (8, 9, 10))
    assert second == (tuple(range(8)), (8, 9, 10))
