"""Planted copies of a benchmark are found in a corpus, all of them and nothing else."""

import json
import random

import numpy as np
import pytest

from puna import __main__ as cli
from puna.configs.errors import UserError
from puna.eval.audits import contamination

WORDS = [f"{a}{b}{c}" for a in "klmprst" for b in "aeiou" for c in ("n", "rd", "st", "x")]


def text(rng, words=40):
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.mark.parametrize("template", ["", "The following is a question about llamas of the puna. "])
def test_fifty_planted_of_fifty_and_no_innocent(tmp_path, template):
    rng = random.Random(0)
    questions = [text(rng) for _ in range(100)]
    lines = [json.dumps({"question": template + q, "answer": rng.choice(WORDS)}) for q in questions]
    (tmp_path / "bench.jsonl").write_text("\n".join(lines))
    corpus = [text(rng, 300) for _ in range(200)]
    # Innocents share the template, and half an n-gram, with the corpus.
    corpus += [template * 2 + text(rng) + " " + " ".join(q.split()[3:9]) for q in questions[50:]]
    for q in questions[:50]:
        # In other case and punctuation, in the middle of another document.
        copy = ", ".join(q.upper().split(" "))
        corpus.append(f"{text(rng)}\n{copy}!\n{text(rng)}")
    rng.shuffle(corpus)
    with open(tmp_path / "corpus.jsonl", "w") as file:
        for i, document in enumerate(corpus):
            chat = {"messages": [{"role": "user", "content": document}]}
            file.write(json.dumps(chat if i % 2 else {"text": document}) + "\n")
    cli._run(["audit", f"--benchmark={tmp_path}/bench.jsonl", f"--corpus={tmp_path}/corpus.jsonl",
              f"--workdir={tmp_path}/out"])  # fmt: skip
    found = json.loads((tmp_path / "out" / "contamination.json").read_text())
    [found] = found["tasks"].values()
    assert (found["documents"], found["contaminated"], found["touched"]) == (100, 50, 50)
    assert {hit["document"] for hit in found["found"]} == set(range(50))
    for hit in found["found"]:
        [place] = hit["corpus"]
        assert questions[hit["document"]].split()[20].upper() in corpus[place]


def test_a_task_is_looked_for_with_its_answers(tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text(
        '{"q": "which animal walks over the high dry grass of the puna all day", '
        '"a": "the llama"}\n'
        '{"q": "too short", "a": "x"}\n'
    )
    (tmp_path / "t.toml").write_text(
        'kind = "generate"\ndata = "d.jsonl"\nprompt = "Q: {{ q }}?"\ntarget = "{{ a }}"\n'
    )
    (tmp_path / "corpus.txt").write_text(
        "Walks over the high dry grass of the puna all day? The LLAMA."
    )
    flags = ["audit", f"--tasks={tmp_path}/t.toml", f"--corpus={tmp_path}/corpus.txt",
             f"--workdir={tmp_path}"]  # fmt: skip
    cli._run([*flags, "--ngram=8"])
    found = json.loads((tmp_path / "contamination.json").read_text())["tasks"]["t"]
    # 16 words, 9 runs of 8, of which the last 6 stand in the corpus.
    assert found["found"] == [{"document": 0, "share": pytest.approx(6 / 9), "corpus": [0]}]
    assert found["contaminated"] == 1 and found["too_short"] == 1
    assert "contaminated: at least 50% of its 8-grams" in capsys.readouterr().out
    for more, reason in [(["--ngram=0"], "--ngram=0 must be 1 or more"),
                         (["--tasks=lookup"], "its documents are made"),
                         (["--tasks="], "--tasks or --benchmark says what")]:  # fmt: skip
        with pytest.raises(UserError, match=reason):
            cli._run([*flags, *more])


@pytest.mark.parametrize("ngram", [1, 2, 5])
def test_pieces_of_a_long_document_lose_no_run(monkeypatch, ngram):
    rng = random.Random(ngram)
    long = text(rng, 400)
    words = contamination._words(long)
    monkeypatch.setattr(contamination, "_PIECE", 37)
    found = [
        tuple(piece[i : i + ngram])
        for piece in contamination._pieces(long, ngram)
        for i in range(len(piece) - ngram + 1)
    ]
    assert found == [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    index = contamination.Index([long], ngram)
    index.look(long, 0)
    assert index.share(0) == 1.0


def test_hashes_that_collide_do_not_count(monkeypatch):
    monkeypatch.setattr(
        contamination._WordHashes, "__call__", lambda self, words: np.ones(len(words), np.uint64)
    )
    index = contamination.Index(["a b c d"], 2)
    index.look("e f g", 0)
    assert index.share(0) == 0.0
    index.look("x b c", 1)
    assert index.places[0] == [1]


def test_copies_in_a_benchmark_are_found_too():
    index = contamination.Index(["a b c d", "a b c d", "a b x y"], 2)
    index.look("a b c d", 7)
    assert [index.share(n) for n in range(3)] == [1.0, 1.0, 0.0]
