"""Make trl.json: what TRL 1.16 computes for the pairs and the tiny Llama of the tests.

    pip install 'puna[reference]' accelerate datasets && pip install --no-deps trl==1.16.0
    python tests/reference/make_trl_fixture.py

TRL's own trainers tokenize, batch and compute; this file gives them a tokenizer of 59 words, the
weights of fixtures/llama3_2.npz moved by seeded noise, and as the reference those weights
themselves. Each example goes through alone, since TRL reports means. Of every gradient tensor the
norm and two projections on seeded directions are kept, which the tests compute likewise. The
inputs are made, and only numbers are stored.
"""

import json
import os
import pathlib
import tempfile

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

FOLDER = pathlib.Path(__file__).parent
# Ids of the prompt, the chosen and the rejected answer; 2 ends a text, 0 is padding.
PAIRS = [([5, 9], [7, 3, 2], [11, 2]), ([4], [6, 2], [8, 13, 9, 2]), ([3, 3, 8], [10, 2], [12, 2])]
DPO = {
    "sigmoid": {"loss_type": ["sigmoid"], "beta": 0.7},
    "label_smoothing": {"loss_type": ["sigmoid"], "beta": 0.7, "label_smoothing": 0.2},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"], "beta": 2.0},
    "robust": {"loss_type": ["robust"], "beta": 0.7, "label_smoothing": 0.1},
    "ipo": {"loss_type": ["ipo"], "beta": 0.4},
    "hinge": {"loss_type": ["hinge"], "beta": 0.7},
}
DISTILL = {  # beta and temperature of the generalized Jensen-Shannon divergence
    "forward": (0.0, 1.0),
    "reverse": (1.0, 1.0),
    "jensen-shannon": (0.3, 2.0),
}


def stored(name):
    """The parsed config.json and the weights in float64 of a stored tiny model."""
    with np.load(FOLDER / "fixtures" / f"{name}.npz", allow_pickle=False) as file:
        weights = {k[7:]: file[k].astype(np.float64) for k in file.files if k[:6] == "weight"}
        return json.loads(str(file["config"])), weights


def moved(weights, seed):
    """Other weights, near these."""
    rng = np.random.default_rng(seed)
    return {n: w + 0.05 * rng.standard_normal(w.shape) for n, w in weights.items()}


def model_of(config, weights, cls=transformers.LlamaForCausalLM, **extra):
    """A model of transformers with these weights, in float64; its norms compute in float32."""
    known = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
    made = transformers.LlamaConfig(**known | {"pad_token_id": 0, "eos_token_id": 2} | extra)
    model = cls(made).double()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.from_numpy(weights[name]))
    return model


def tokenizer():
    """Words `t3` are ids; `<end>` is 2 and `<pad>` is 0."""
    words = {f"t{i}": i for i in range(59)} | {"<pad>": 0, "<end>": 2}
    del words["t0"], words["t2"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t1"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>"
    )


def text(ids):
    """Ids as words, without the end, which trainers add."""
    return " ".join(f"t{i}" for i in ids if i != 2)


def pair_records():
    """What the trainers of preferences read."""
    return [{"prompt": text(p) + " ", "chosen": text(c), "rejected": text(r)} for p, c, r in PAIRS]


def digest(model):
    """Norm and two projections of every gradient tensor, in the order of the names."""
    found = []
    for _, tensor in sorted(model.named_parameters()):
        gradient = tensor.grad.double().numpy()
        directions = np.random.default_rng(7).standard_normal((2, *gradient.shape))
        projections = (directions * gradient).reshape(2, -1).sum(axis=1)
        found.append([float(np.linalg.norm(gradient)), *map(float, projections)])
    return found


def computed(trainer):
    """The mean loss of the examples each alone, its gradient, and what TRL reports of each."""
    trainer.model.zero_grad()
    found = {"loss": 0.0, "each": []}
    for example in trainer.train_dataset:
        loss, numbers = one(trainer, [example])
        (loss / len(PAIRS)).backward()
        found["loss"] += float(loss.detach()) / len(PAIRS)
        found["each"].append(numbers)
    found["gradient"] = digest(trainer.model)
    batch, _ = one(trainer, list(trainer.train_dataset))
    found["loss_of_a_batch"] = float(batch.detach())
    return found


def one(trainer, examples):
    """The loss of a batch, and TRL's own numbers of it that puna has, too."""
    if store := getattr(trainer, "_metrics", None):
        store["train"].clear()
    trainer.model.train()
    loss = trainer.compute_loss(
        trainer.model, trainer._prepare_inputs(trainer.data_collator(examples))
    )
    metrics = (store or trainer._stored_metrics)["train"]
    names = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
    numbers = {name: float(metrics[name][-1]) for name in names if name in metrics}
    if "mean_reward" in metrics:  # of a reward model
        middle, half = metrics["mean_reward"][-1], metrics["margin"][-1] / 2
        numbers |= {"rewards/chosen": middle + half, "rewards/rejected": middle - half}
    return loss, numbers


def short(x):
    """The same without the digits that float32 does not have."""
    if isinstance(x, dict):
        return {key: short(value) for key, value in x.items()}
    if isinstance(x, list):
        return [short(value) for value in x]
    return float(f"{x:.9g}") if isinstance(x, float) else x


def main():
    """Run every trainer and write trl.json."""
    config, start = stored("llama3_2")
    weights = moved(start, 1)
    common = {
        "use_cpu": True, "report_to": "none", "bf16": False, "gradient_checkpointing": False,
        "per_device_train_batch_size": 3, "max_length": 64,
    }  # fmt: skip
    pairs = datasets.Dataset.from_list(pair_records())
    facts = {"trl": trl.__version__, "pairs": PAIRS}
    with tempfile.TemporaryDirectory() as folder:
        where = common | {"output_dir": folder}
        for name, settings in DPO.items():
            trainer = trl.DPOTrainer(
                model_of(config, weights), model_of(config, start),
                trl.DPOConfig(**where, **settings), train_dataset=pairs,
                processing_class=tokenizer(),
            )  # fmt: skip
            facts[name] = computed(trainer)
        simpo = CPOConfig(**where, loss_type="simpo", beta=2.5, simpo_gamma=0.8, cpo_alpha=0.0)
        trainer = CPOTrainer(
            model_of(config, weights), simpo, train_dataset=pairs, processing_class=tokenizer()
        )
        facts["simpo"] = computed(trainer)
        trainer = ORPOTrainer(
            model_of(config, weights), ORPOConfig(**where, beta=0.3), train_dataset=pairs,
            processing_class=tokenizer(),
        )  # fmt: skip
        facts["orpo"] = computed(trainer)
        value = np.random.default_rng(0).standard_normal((1, config["hidden_size"])) * 0.3
        trainer = trl.RewardTrainer(
            model_of(
                config, weights | {"score.weight": value},
                transformers.LlamaForSequenceClassification, num_labels=1,
            ),
            trl.RewardConfig(**where, center_rewards_coefficient=0.1),
            train_dataset=pairs, processing_class=tokenizer(),
        )  # fmt: skip
        facts["reward"] = computed(trainer)
        chats = [{"prompt": text(p) + " ", "completion": text(c)} for p, c, _ in PAIRS]
        trainer = trl.SFTTrainer(
            model_of(config, weights), trl.SFTConfig(**where, loss_type="nll"),
            train_dataset=datasets.Dataset.from_list(chats), processing_class=tokenizer(),
        )  # fmt: skip
        loss, _ = one(trainer, list(trainer.train_dataset))
        loss.backward()
        facts["sft"] = {"loss": float(loss.detach()), "gradient": digest(trainer.model)}
        facts |= distilled(config, weights)
    lines = [f"{json.dumps(name)}: {json.dumps(short(fact))}" for name, fact in facts.items()]
    (FOLDER / "trl.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def distilled(config, weights):
    """The divergence of the GKD trainer, of a student and a teacher of another architecture."""
    teacher = model_of(*stored("llama1"))
    whole = [[*p, *c] for p, c, _ in PAIRS]
    ids = torch.tensor([row + [0] * (8 - len(row)) for row in whole])
    labels = torch.tensor(
        [[-100] * len(p) + c + [-100] * (8 - len(p) - len(c)) for p, c, _ in PAIRS]
    )
    found = {}
    for name, (beta, temperature) in DISTILL.items():
        student = model_of(config, weights)
        logits = student(ids).logits[:, :-1]
        with torch.no_grad():
            theirs = teacher(ids).logits[:, :-1]
        loss = GKDTrainer.generalized_jsd_loss(
            logits, theirs, labels[:, 1:], beta=beta, temperature=temperature
        )
        loss.backward()
        found[f"distill, {name}"] = {"loss": float(loss.detach()), "gradient": digest(student)}
    return found


if __name__ == "__main__":
    main()
