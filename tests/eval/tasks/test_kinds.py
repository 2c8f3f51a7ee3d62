"""Kinds of tasks beside choices and single answers: calls, preferences, several samples."""

import dataclasses
import json

import jax
import pytest

import puna
from puna import __main__ as cli
from puna.configs import schema
from puna.configs.errors import UserError
from puna.eval.answers import Answers
from puna.eval.judging import judge
from puna.eval.tasks import grade
from puna.eval.tasks.definition import load_task
from puna.eval.tasks.documents import Document, documents
from puna.eval.tasks.requests import Asker, Asking
from puna.models.parallel import sharding
from puna.models.text.tokenizer import Tokenizer, byte_tokenizer
from puna.models.transformer import Transformer, init_params

CONFIG = schema.ModelConfig(
    vocab_size=264, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16,
    max_positions=512,
)  # fmt: skip


def test_functions_are_told_by_the_template_or_before_the_question():
    task = load_task("tools")
    document = documents(task, byte_tokenizer())[0]
    name = json.loads(document.target)["name"]
    [request] = Asking(byte_tokenizer(), 4096, False).requests(task, document)
    text = byte_tokenizer().decode(request.context)
    assert request.kind == "call" and text.startswith("Call one of these functions")
    assert f'"name": "{name}"' in text and text.endswith(document.prompt + "\n")
    template = "{% for t in tools %}{{ t.function.name }},{% endfor %}|{{ messages[0].content }}"
    tokenizer = Tokenizer(byte_tokenizer()._kind, chat_template=template)
    [request] = Asking(tokenizer, 4096, True).requests(task, document)
    told, asked = tokenizer.decode(request.context).split("|")
    assert name in told.split(",") and told.count(",") == 3 and asked == document.prompt


def test_several_samples_of_a_program(monkeypatch):
    task = dataclasses.replace(
        load_task("humaneval"), samples=4, temperature=0.8, at=(1, 2), max_tokens=4
    )
    assert task.metrics == ("passes", "pass_at_1", "pass_at_2")
    document = Document(3, "def f():", "", (), (), "def f():", "f()", {})
    made = Asking(byte_tokenizer(), 100, False).requests(task, document)
    assert [r.index for r in made] == [0, 1, 2, 3] and len({r.asked for r in made}) == 4
    passes = iter([True, False, False, False])
    monkeypatch.setattr(judge, "run", lambda _: judge.Verdict(next(passes), ""))
    found = grade.grade(task, document, made, [{"text": "x"}] * 4)
    assert found.scores == pytest.approx({"passes": 0.25, "pass_at_1": 0.25, "pass_at_2": 0.5})

    mesh = sharding.make_mesh(schema.MeshConfig())
    params = jax.tree.map(lambda x: 3 * x, init_params(CONFIG, jax.random.key(0), mesh))

    def ask(requests):
        asker = Asker(Transformer(CONFIG), params, byte_tokenizer(), mesh, 8, Answers(None), "")
        return [line["answer"]["ids"] for line in asker.ask(requests)]

    drawn = ask(made)
    assert len(set(map(tuple, drawn))) > 1 and ask(made) == drawn
    greedy = [r._replace(temperature=0.0) for r in made]
    assert len({r.asked for r in greedy}) == 1 and len(set(map(tuple, ask(greedy)))) == 1


PAIRS = [("Say yes.", "yes", "no"), ("Say no.", "no", "yes, of course"), ("Who?", "llama", "x")]
TASK = """kind = "preference"
data = "pairs.jsonl"
prompt = "{{ prompt }}"
chosen = "{{ chosen }}"
rejected = "{{ rejected }}"
"""
SETTINGS = (
    "model.vocab_size=264 model.embed_dim=16 model.num_layers=1 model.num_heads=2 "
    "model.num_kv_heads=2 model.head_dim=8 model.mlp_dim=16 model.compute_dtype=float32 "
    "data.tokenizer=bytes data.seq_len=64 train.steps=4 train.batch_size=8 "
    "train.microbatches=1 "
    "optimizer.warmup_steps=1 optimizer.learning_rate=0.01 train.init_from="
).split()  # fmt: skip


@pytest.mark.slow
def test_a_reward_model_is_scored_as_its_training_scores_it(tmp_path):
    lines = [dict(zip(("prompt", "chosen", "rejected"), p, strict=True)) for p in PAIRS]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "p.toml").write_text(TASK)
    keys = [*SETTINGS, f"data.train={data}", f"data.validation={data}",
            f"eval.tasks={tmp_path}/p.toml"]  # fmt: skip
    flags = [f"--config.{key}" for key in keys]
    cli._run(["train", "--config=reward", *flags, f"--workdir={tmp_path}/run"])
    trained = json.loads((tmp_path / "run/results.json").read_text())
    cli._run(["eval", f"--checkpoint={tmp_path}/run", f"--tasks={tmp_path}/p.toml",
              f"--workdir={tmp_path}/e"])  # fmt: skip
    found = json.loads((tmp_path / "e/results.json").read_text())["tasks"]["p"]
    assert found["accuracy"]["value"] == trained["validation_reward_accuracy"]
    assert found["accuracy"]["value"] == trained["tasks_p_accuracy"]
    cli._run(["eval", f"--checkpoint={tmp_path}/run", f"--replay={tmp_path}/e"])
    again = json.loads((tmp_path / "e/replay.json").read_text())
    assert again["equal"] == again["requests"] == 6
    # The worse answers as the better ones: what was right is wrong.
    (tmp_path / "p.toml").write_text(TASK.replace("{{ chosen", "{{ x").replace(
        "{{ rejected", "{{ chosen").replace("{{ x", "{{ rejected"))  # fmt: skip
    cli._run(["eval", f"--checkpoint={tmp_path}/run", f"--tasks={tmp_path}/p.toml",
              f"--workdir={tmp_path}/f"])  # fmt: skip
    turned = json.loads((tmp_path / "f/results.json").read_text())["tasks"]["p"]
    assert turned["accuracy"]["value"] == pytest.approx(1 - found["accuracy"]["value"])


def test_preferences_need_a_reward_model(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "p.toml").write_text(TASK)
    byte_tokenizer().save(tmp_path / "model")
    flags = ["eval", f"--checkpoint={tmp_path}/model", f"--tasks={tmp_path}/p.toml"]
    with pytest.raises(UserError, match="p asks a reward model: leave --quantize"):
        cli._run([*flags, "--quantize=int8"])
    config = puna.get_config("tiny", [f"eval.tasks={tmp_path}/p.toml"])
    from puna.eval.tasks.during import During

    with pytest.raises(UserError, match="p needs train.objective=reward, not next_token"):
        During(schema.from_dict(config), byte_tokenizer(), None)
