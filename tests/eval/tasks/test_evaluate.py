"""A whole evaluation: its record, interruptions, replay, comparison, report."""

import dataclasses
import json
import math
import random

import jax
import pytest

from puna import __main__ as cli
from puna.configs import schema
from puna.configs.errors import UserError
from puna.eval import answers as answers_module
from puna.eval.tasks import evaluate
from puna.eval.tasks.definition import load_task
from puna.eval.tasks.documents import Document
from puna.eval.tasks.requests import Asking
from puna.models.parallel import sharding
from puna.models.text.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from puna.models.transformer import Transformer, init_params

CONFIG = schema.ModelConfig(
    vocab_size=264, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16,
    max_positions=64,
)  # fmt: skip
NAMES = "choice,write,text"
TASKS = {
    "choice": 'kind = "choice"\ndata = "d.jsonl"\nprompt = "{{ q }}"\nchoices = "c"\n'
              'target = "{{ t }}"\nshots = 1\nshots_data = "d.jsonl"',
    "write": 'kind = "generate"\ndata = "d.jsonl"\nprompt = "{{ q }}"\ntarget = "{{ c[t] }}"\n'
             "max_tokens = 5\nstop = ['e']",
    "text": 'kind = "text"\ndata = "d.jsonl"\nprompt = "{{ (q ~ \' \') * 12 }}"',
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rng = random.Random(0)
    lines = [
        {"q": f"does {rng.randrange(9**i)} eat", "c": ["grass", "the wind"], "t": i % 2}
        for i in range(1, 8)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.toml").write_text(text + "\n")
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda path: byte_tokenizer())

    def load(path, mesh, quantize, adapter):
        params = init_params(CONFIG, jax.random.key(int(str(path)[-1])), mesh)
        return Transformer(CONFIG), jax.tree.map(lambda x: 3 * x, params)

    monkeypatch.setattr(evaluate, "load", load)
    return tmp_path


def run(folder, out, *more, model="model0", names=NAMES):
    tasks = ",".join(f"{folder}/{name}.toml" for name in names.split(","))
    cli._run(["eval", f"--checkpoint={model}", f"--tasks={tasks}", f"--workdir={folder}/{out}",
              "--batch_size=4", *more])  # fmt: skip
    return folder / out


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_that_replays(folder, capsys):
    out = run(folder, "a")
    assert "choice  accuracy" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())["tasks"]
    assert results["choice"]["metric"] == "accuracy" and results["write"]["exact"]["documents"] == 7
    assert 4 < results["text"]["bits_per_byte"]["value"] < 60
    requests, samples = read(out / "requests.jsonl"), read(out / "samples.jsonl")
    assert {line["task"] for line in samples} == {"choice", "write", "text"}
    text = [line for line in requests if line["task"] == "text" and line["document"] == 6]
    # Windows of 64 ids: each byte of the document once, in order.
    joined = bytes(i for line in text for i in line["continuation"]).decode()
    assert len(text) > 2 and joined == samples[-1]["prompt"]
    assert all(len(line["context"]) + len(line.get("continuation", "")) <= 65 for line in requests)
    record = json.loads((out / "record.json").read_text())
    assert record["begin_ids"] == [256] and record["versions"]["jax"] == jax.__version__
    assert record["tasks"]["choice"]["prompt"] == "{{ q }}"
    assert len(record["tasks"]["choice"]["data_hash"]) == 32

    cli._run(["eval", "--checkpoint=model0", f"--replay={out}"])
    again = json.loads((out / "replay.json").read_text())
    assert again["equal"] == again["requests"] == len(requests) and again["same_weights"]
    cli._run(["eval", "--checkpoint=model1", f"--replay={out}"])
    other = json.loads((out / "replay.json").read_text())
    assert not other["same_weights"] and other["equal"] < len(requests) / 2
    assert other["largest_difference"] > 0.1


def test_batches_and_devices_change_no_answer(folder, monkeypatch):
    make_mesh = sharding.make_mesh
    alone = run(folder, "alone", "--batch_size=1")
    with monkeypatch.context() as m:
        m.setattr(sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()))
        spread = run(folder, "spread", "--batch_size=32")
    meshes = [json.loads((out / "record.json").read_text())["mesh"] for out in (spread, alone)]
    assert [math.prod(mesh.values()) for mesh in meshes] == [8, 1]
    same_answers(spread, alone)


def same_answers(first, second):
    """Two evaluations ask the same and are answered the same, texts and greedy flags exactly."""
    a, b = read(first / "requests.jsonl"), read(second / "requests.jsonl")
    assert len(a) == len(b) > 10
    for x, y in zip(a, b, strict=True):
        assert {**x, "answer": 0, "key": 0} == {**y, "answer": 0, "key": 0}
        if isinstance(x["answer"], dict):
            assert x["answer"] == y["answer"]
        else:
            assert x["answer"][0] == pytest.approx(y["answer"][0], abs=1e-3)
            assert x["answer"][1] == y["answer"][1]
    # Scores, and with them results, are those of the answers.
    for x, y in zip(read(first / "samples.jsonl"), read(second / "samples.jsonl"), strict=True):
        assert x["scores"] == pytest.approx(y["scores"], rel=1e-5)


def test_an_evaluation_killed_ten_times_gives_the_numbers_of_one_left_alone(folder, monkeypatch):
    whole = run(folder, "whole")
    add, rng, made = answers_module.Answers.add, random.Random(0), []

    def killed(self, line):
        add(self, line)
        made.append(line["key"])
        if rng.random() < 0.4:
            # A line that is cut in two by the end.
            with open(self.path, "a") as file:
                file.write('{"key": "x", "ans')
            raise KeyboardInterrupt

    monkeypatch.setattr(answers_module.Answers, "add", killed)
    kills = 0
    while kills < 10:
        try:
            run(folder, "parts")
            pytest.fail(f"done after {kills} kills: make more requests")
        except KeyboardInterrupt:
            kills += 1
    monkeypatch.setattr(answers_module.Answers, "add", add)
    parts = run(folder, "parts")
    assert len(made) == len(set(made)) > 10  # no request was answered twice
    for name in ("results.json", "requests.jsonl", "samples.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def test_two_models_are_compared_on_the_same_documents(folder, capsys):
    first, second = run(folder, "a"), run(folder, "b", model="model1")
    cli._run(["eval", f"--compare={first},{second}"])
    found = json.loads((second / "comparison.json").read_text())["tasks"]
    a, b = (json.loads((x / "results.json").read_text())["tasks"] for x in (first, second))
    for task, metric in [("choice", "accuracy"), ("write", "exact")]:
        difference = b[task][metric]["value"] - a[task][metric]["value"]
        assert found[task][metric]["value"] == pytest.approx(difference)
    page = (second / "comparison.html").read_text()
    assert page.startswith("<!doctype html>") and "<h2>text</h2>" in page
    run(folder, "b", "--limit=3", model="model1")
    with pytest.raises(UserError, match="choice was asked with other documents"):
        evaluate.compare(first, second)
    run(folder, "b", "--num_fewshot=0", model="model1", names="choice,text")
    with pytest.raises(UserError, match="document 0 of choice is not the same"):
        evaluate.compare(first, second)
    with pytest.raises(UserError, match="samples.jsonl: no such file"):
        evaluate.compare(first, folder)
    with pytest.raises(UserError, match="must be two workdirs"):
        cli._run(["eval", f"--compare={first}"])


def test_the_report_holds_the_worst_first_and_nothing_from_outside(folder):
    (folder / "d.jsonl").write_text(
        '{"q": "<script>x</script>", "c": ["a", "b"], "t": 0}\n'
        '{"q": "plain", "c": ["a", "b"], "t": 1}\n'
    )
    out = run(folder, "a", names="choice")
    results = evaluate.TaskResults(json.loads((out / "results.json").read_text()))
    assert results._repr_html_() in (out / "report.html").read_text()
    page = (out / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http" not in page and "data:image/png;base64" in page
    scores = {line["document"]: line["scores"]["accuracy"] for line in read(out / "samples.jsonl")}
    order = sorted(scores, key=lambda document: scores[document])
    assert page.index(f"document {order[0]}:") < page.index(f"document {order[1]}:")


def test_a_heat_map_of_needles(folder):
    (folder / "n.toml").write_text(
        'kind = "generate"\nmetric = "contains"\nmax_tokens = 4\n[made]\nmaker = "needle"\n'
        "lengths = [220]\ndepths = [0, 1.0]\n"
    )
    out = run(folder, "a", names="n")
    assert (out / "report.html").read_text().count("data:image/png") == 2
    results = json.loads((out / "results.json").read_text())["tasks"]["n"]
    assert results["cut"] == 2  # the model reads 64 tokens


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--tasks="], "--tasks is empty"),
        (["--tasks=sums,sums"], "--tasks names sums twice"),
        (["--tasks=nothing"], "neither a packaged task"),
        (["--tasks=sums", "--limit=0"], "--limit=0 and --batch_size=8 must be at least 1"),
        (["--tasks=sums", "--max_length=65"], "--max_length=65 must be 2 to the model's"),
        (["--tasks=instructions"], "max_tokens=128 must be less than the 64"),
        (["--tasks=ifeval", "--num_fewshot=1"], "ifeval has no shots_data"),
        (["--replay=none"], "record.json: no such file"),
    ],
)
def test_mistakes_are_one_line(folder, flags, reason):
    with pytest.raises(UserError, match=reason):
        cli._run(["eval", "--checkpoint=model0", f"--workdir={folder}/x", *flags])


def test_choices_are_scored_from_one_border_and_no_character_is_lost():
    text = "What does the llama eat? It eats the unbelievable grass of the puna. "
    tokenizer = train_bpe([text * 3], 330)
    task = load_task("lookup")
    document = Document(0, "It is un", "0", ("believable", "eats", "grass"), (), "", "", {})
    asking = Asking(tokenizer, 64, False)
    for delimiter in ("", " "):
        task = dataclasses.replace(task, delimiter=delimiter)
        found = asking.requests(task, document)
        assert len({r.context for r in found}) == 1
        for request, choice in zip(found, document.choices, strict=True):
            ids = [*request.context, *request.continuation]
            assert tokenizer.decode(ids) == document.prompt + delimiter + choice
            assert ids == [*tokenizer.begin_ids, *tokenizer.encode("It is un" + delimiter + choice)]
            assert request.size == len(choice)
    # What has no room is cut out behind the BOS.
    [request, *_] = Asking(tokenizer, 6, False).requests(task, document)
    assert request.cut > 0 and request.context[: len(tokenizer.begin_ids)] == tokenizer.begin_ids
    assert len(request.context) + len(request.continuation) == 7
    with pytest.raises(UserError, match="choice 0 of document 0 is .* tokens: it must be 1 to 1"):
        Asking(tokenizer, 2, False).requests(task, document)


def test_a_chat_has_a_system_message_and_shots_as_turns():
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
    kind = byte_tokenizer()._kind
    tokenizer = Tokenizer(kind, chat_template=template)
    task = dataclasses.replace(load_task("sums"), system="Be brief.", max_tokens=4)
    document = Document(0, "2 + 2 =", "4", (), (("1 + 1 =", "2"),), "", "", {})
    [request] = Asking(tokenizer, 500, True).requests(task, document)
    assert tokenizer.decode(request.context) == (
        "system:Be brief.|user:1 + 1 =|assistant:2|user:2 + 2 =|"
    )
    [request] = Asking(tokenizer, 500, False).requests(task, document)
    assert tokenizer.decode(request.context) == "1 + 1 = 2\n2 + 2 ="
    assert request.context[0] == tokenizer.bos_id


def test_records_that_cannot_be_compared_are_one_line(tmp_path):
    line = {"task": "a", "document": 0, "prompt": "p", "target": "t", "scores": {"exact": 1.0}}
    lines = [line, line | {"scores": {"accuracy": 1.0}}, {"task": "a"}, 3]
    for number, found in enumerate(lines):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "samples.jsonl").write_text(json.dumps(found) + "\n")
    for other, reason in [(1, "give both the same metric"), (2, "line 1 lacks"),
                          (3, "line 1 lacks")]:  # fmt: skip
        with pytest.raises(UserError, match=reason):
            evaluate.compare(tmp_path / "0", tmp_path / str(other))
