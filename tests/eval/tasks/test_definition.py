"""Packaged tasks: a perfect answer scores 100 %, a wrong one 0 %, a guess what guessing scores."""

import dataclasses
import json
import math
import random

import pytest

from puna.configs.errors import UserError
from puna.eval.judging import judge
from puna.eval.tasks import definition, documents, grade
from puna.eval.tasks.requests import Request
from puna.models.text.tokenizer import byte_tokenizer

# A record as each public data set has it, at the place where its task looks.
PUBLIC = {
    "mmlu": ("mmlu/all/test-0.parquet", {
        "question": " What eats grass? ", "subject": "high_school_biology", "answer": 1,
        "choices": ["a stone", "a llama", "a cloud", "a spoon"]}),
    "arc_easy": ("ai2_arc/ARC-Easy/test-0.parquet", {
        "question": "What eats grass?", "answerKey": "B",
        "choices": {"text": ["a stone", "a llama", "a cloud"], "label": ["A", "B", "C"]}}),
    "arc_challenge": ("ai2_arc/ARC-Challenge/test-0.parquet", {
        "question": "What eats grass?", "answerKey": "2",
        "choices": {"text": ["a stone", "a llama"], "label": ["1", "2"]}}),
    "hellaswag": ("hellaswag/data/validation-0.parquet", {
        "activity_label": "Walking", "ctx_a": "[header] A llama [title] It walks.", "label": "3",
        "ctx_b": "then it", "endings": ["flies.", "sinks.", "reads.", "eats [title] grass."]}),
    "gsm8k": ("gsm8k/main/test-0.parquet", {
        "question": "How many?", "answer": "600 * 2 = <<600*2=1200>>1200\n#### 1,200"}),
    "mgsm": ("mgsm/de.jsonl", {"question": "Frage: Wie viele?\nAntwort:", "answer_number": 1200}),
    "math": ("math/test.jsonl", {"problem": "Half?", "solution": r"So $\boxed{\frac{1}{2}}$."}),
    "ifeval": ("ifeval/ifeval_input_data.jsonl", {
        "key": 1, "prompt": "Describe.", "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"num_words": None}]}),
    "humaneval": ("openai_humaneval/openai_humaneval/test-0.parquet", {
        "prompt": 'def add(a, b):\n    """Add."""\n', "entry_point": "add",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        "canonical_solution": "    return a + b\n"}),
    "ruler": ("ruler/4096/niah.jsonl", {
        "index": 0, "input": "One of the numbers is 1234567. What is it?", "outputs": ["1234567"]}),
    "mmmu": ("mmmu/validation.jsonl", {
        "question": "What does the llama in <image 2> eat?", "answer": "B",
        "image_1": "data:image/png;base64,AAAA", "image_2": "data:image/png;base64,AAAB",
        "image_3": None, "options": ["a stone", "<image 1>", "a cloud"]}),
}  # fmt: skip
SHOTS = {"mmlu": "mmlu/all/dev-0.parquet", "gsm8k": "gsm8k/main/train-0.parquet"}
PERFECT = {
    "gsm8k": "It is 1200.\n#### 1,200", "mgsm": "Die Antwort ist 1.2e3.", "math": r"$0.5$",
    "ifeval": "All is well.", "humaneval": "    return a + b\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    for name, (place, record) in PUBLIC.items():
        for file, count in ((place, 1), (SHOTS.get(name), 8)):
            if file:
                (path / file).parent.mkdir(parents=True, exist_ok=True)
                # What a file is follows from its bytes.
                (path / file).write_text((json.dumps(record) + "\n") * count)
    return str(path)


def opened(name, folder):
    """A packaged task and its documents."""
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym", reason="needs the extra [reasoning]")
    if name == "math":
        pytest.importorskip("math_verify", reason="needs the extra [tasks]")
    task = definition.load_task(name, folder)
    found = documents.documents(task, byte_tokenizer())
    grade.prepare(task, found)
    return task, found


def graded(task, document, answer):
    """Scores of an answer: a text, or one log-probability a choice."""
    if task.kind == "choice":
        made = [
            Request(task.name, 0, i, "logprob", (1,), (2,) * (i + 1)) for i in range(len(answer))
        ]
        return grade.grade(task, document, made, [[x, False] for x in answer]).scores
    made = [Request(task.name, 0, 0, "text", (1,))]
    return grade.grade(task, document, made, [{"text": answer}]).scores


def perfect(name, task, document):
    if task.kind == "choice":
        right = int(document.target)
        return [-1.0 if i == right else -1e4 for i in range(len(document.choices))]
    if name == "instructions":
        return following(document.facts["instruction_id_list"], document.facts["kwargs"])
    return PERFECT.get(name) or document.target.replace("\n", " and ")


def following(names, kwargs):
    text = "it is here"
    for name, given in zip(names, kwargs, strict=True):
        kind = name.split(":")[1]
        if kind == "existence":
            text += " " + given["keywords"][0]
        elif kind == "number_bullet_lists":
            text += "".join(f"\n* {i}" for i in range(given["num_bullets"]))
        elif kind == "end_checker":
            text += " That is all."
        elif kind == "quotation":
            text = f'"{text}"'
    return text


def broken(task, document):
    if task.kind == "choice":
        return [-x for x in perfect("", task, document)]
    return "" if task.kind != "code" else "    return a - b\n"


@pytest.mark.parametrize("name", [n for n in definition.names() if n != "python_source"])
def test_perfect_and_broken_answers(name, folder):
    if name == "humaneval":
        isolated()
    task, found = opened(name, folder)
    assert found and set(task.metrics) <= set(definition.METRICS[task.kind])
    for document in found[:40]:
        assert len(document.shots) == task.shots
        good, bad = (graded(task, document, a) for a in
                     (perfect(name, task, document), broken(task, document)))  # fmt: skip
        assert set(good.values()) == {1.0} and set(bad.values()) == {0.0}, document
        assert set(good) == set(task.metrics)


def isolated():
    try:
        judge.check_isolation()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", [
    "lookup", "colours", "mmlu", "mmmu", "arc_easy", "arc_challenge", "hellaswag",
])  # fmt: skip
def test_guesses_score_what_guessing_scores(name, folder):
    task, found = opened(name, folder)
    choices, rng, n = len(found[0].choices), random.Random(0), 400
    scores = [
        graded(task, found[i % len(found)], [rng.random() - 1 for _ in range(choices)])["accuracy"]
        for i in range(n)
    ]
    chance = 1 / choices
    assert abs(sum(scores) / n - chance) < 4 * math.sqrt(chance * (1 - chance) / n)
    # A model that cannot tell is at chance, wherever the right ones stand.
    assert graded(task, found[0], [-1.0] * choices)["accuracy"] == pytest.approx(chance)


def test_likelihood_of_a_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "llama"}\n')
    (tmp_path / "t.toml").write_text('kind = "text"\ndata = "a.jsonl"\nprompt = "{{ text }}"\n')
    task = definition.load_task(str(tmp_path / "t.toml"))
    [document] = documents.documents(task, None)
    made = [Request("t", 0, i, "logprob", (1,), (2,), size=5 * (not i)) for i in range(2)]
    for nats, wanted in ((0.0, 0.0), (-20 * math.log(2), 8.0)):
        found = grade.grade(task, document, made, [[nats, False], [nats, False]])
        assert found.scores["bits_per_byte"] == pytest.approx(wanted) and found.weight == 5


def test_prompts_as_they_are_asked(folder):
    task, [document] = opened("mmlu", folder)
    assert document.prompt.startswith(
        "The following is a multiple choice question about high school"
    )
    assert document.prompt.endswith("\nD. a spoon\nAnswer:") and document.target == "1"
    assert document.shots[0] == (document.prompt, "B")
    _, [document] = opened("hellaswag", folder)
    assert document.prompt == "Walking: A llama. It walks. Then it"
    assert document.choices[3] == "eats. grass."
    _, [document] = opened("mmmu", folder)
    assert document.prompt == (
        "<image 1>: <|image|>\n<image 2>: <|image|>\nWhat does the llama in <image 2> eat?\n"
        "A. a stone\nB. <image 1>\nC. a cloud\nAnswer:"
    )
    assert document.pictures == (b"\0\0\0", b"\0\0\1") and document.choices == ("A", "B", "C")
    _, [document] = opened("humaneval", folder)
    program = grade.program(document, "Here:\n```python\ndef add(a, b):\n    return 3\n```\nDone.")
    assert "Here" not in program and program.endswith("check(add)\n")


GOOD = {"kind": "choice", "data": "a.jsonl", "prompt": "{{ q }}", "choices": ["a", "b"],
        "target": "{{ t }}"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"promt": "x"}, "promt is not a key of a task"),
        ({"kind": "quiz"}, "kind='quiz' must be one of choice"),
        ({"metric": "exact"}, "metric='exact' must be one of accuracy"),
        ({"shots": 2}, "shots needs shots_data"),
        ({"shots": -1}, "shots=-1 must be a number of 0 or more"),
        ({"stop": "x"}, "stop='x' must be a list of texts"),
        ({"data": ""}, "either data or made"),
        ({"target": ""}, "target is needed with kind=choice"),
        ({"prompt": "{{ question }}"}, "record 0 has no 'question', which a template"),
        ({"prompt": "{% if %}"}, "a template is not Jinja"),
        ({"target": "{{ q }}"}, "target='what' must be the number of the right choice"),
        ({"choices": ["a"]}, "has 1 choices"),
        ({"data": "b.jsonl"}, "b.jsonl: no such file.*--data_dir"),
        ({"made": {"maker": "x"}, "data": ""}, "made.maker='x' must be one of needle"),
        ({"images": []}, "images=.. must be a list of names of fields"),
        ({"images": ["image"]}, "record 0 has none of the fields of images=image"),
        ({"images": ["q"]}, "record 0: q: .*what: there is no such file"),
        ({"images": ["image"], "kind": "text", "metric": ""}, "needs data, and kind=choice"),
        ({"samples": 2, "temperature": 1.0}, "samples=2 needs written answers"),
        ({"at": [2]}, r"at=\[2\] needs kind=code"),
        ({"kind": "tools", "tools": "{{ q }}", "metric": ""}, "tools='what' must be JSON"),
        ({"made": {"maker": "sums", "n": 1}, "data": ""}, "made: got an unexpected keyword"),
        ({"made": {"maker": "sums", "count": "x"}, "data": ""}, "made: 'str' object cannot be"),
        ({"made": {"maker": "sums", "digits": 0}, "data": ""}, "digits=0 must be 1 to 1000"),
        ({"made": {"maker": "sums", "count": 0}, "data": ""}, "made gives no document"),
        ({"made": {"maker": "sums"}, "data": ""}, "maker='sums' makes nothing for kind=choice"),
        ({"made": {"maker": ["sums"]}, "data": ""}, "made.maker=.'sums'. must be one of"),
        ({"made": {"maker": "lookup", "people": 99}, "data": ""}, "people=99 must be 2 to 11"),
        ({"made": {"maker": "tools", "offered": 9}, "data": ""}, "offered=9 must be 1 to 5"),
        (
            {"made": {"maker": "lookup"}, "data": "", "kind": "generate", "metric": ""},
            "maker='lookup' makes nothing for kind=generate",
        ),
        ({"kind": "generate", "metric": "reasoning_gym"}, "needs made, with maker"),
        ({"filter": "("}, "filter='.' is not a regular expression"),
        ({"prompt": "{{ q | nothing }}"}, "No filter named 'nothing'"),
    ],
)
def test_mistakes_in_a_definition_are_one_line(tmp_path, change, reason):
    (tmp_path / "a.jsonl").write_text('{"q": "what", "t": 0}\n')
    told = {k: v for k, v in (GOOD | change).items() if v != ""}
    (tmp_path / "t.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=reason):
        documents.documents(definition.load_task(str(tmp_path / "t.json")), byte_tokenizer())


def test_what_is_no_task(tmp_path):
    (tmp_path / "t.toml").write_text("kind =")
    for name, reason in [("nothing", "neither a packaged task .arc_challenge"),
                         (f"{tmp_path}/no.toml", "no such file"),
                         (f"{tmp_path}/t.toml", "cannot be read")]:  # fmt: skip
        with pytest.raises(UserError, match=reason):
            definition.load_task(name)


def test_a_limit_takes_the_same_random_documents():
    task = definition.load_task("lookup")
    found = documents.documents(task, None, 4)
    numbers = [d.number for d in found]
    assert len(set(numbers)) == 4 and numbers == sorted(numbers) and numbers[-1] > 50
    assert documents.documents(task, None, 4) == found
    whole = documents.documents(task, None)
    assert found == [whole[d.number] for d in found]
    assert documents.fingerprint(found) != documents.fingerprint(found[:3])


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_stands_where_it_should_in_a_prompt_of_its_length(depth):
    made = {"maker": "needle", "lengths": [900], "depths": [depth], "needles": 3}
    task = dataclasses.replace(definition.load_task("needle"), made=made)
    tokenizer = byte_tokenizer()
    [document] = documents.documents(task, tokenizer)
    size = len(tokenizer.encode(document.prompt))
    assert 800 < size <= 900
    values = document.target.split("\n")
    hay = document.prompt.partition("\n\nQuestion")[0]
    assert len(set(values)) == 3 and all(hay.count(value) == 1 for value in values)
    assert abs(hay.index(values[0]) / len(hay) - depth) < 0.15
    assert [document] == documents.documents(task, tokenizer)


def test_a_negative_number_of_examples_is_refused():
    with pytest.raises(UserError, match="--num_fewshot=-1 must be at least 0"):
        definition.load_tasks(["sums"], shots=-1)
