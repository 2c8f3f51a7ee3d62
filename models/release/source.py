"""What a conversion reads, leaf by leaf: weights of others, with adapters or without, and runs."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import numpy as np

from ...configs import architecture, schema
from ...configs.errors import UserError
from ..adapters import Adapted
from ..leaf import dense
from ..weights import (
    adapter_sum,
    huggingface,
    licences,
    peft,
    run,
    tiled_vision_table,
    vision_table,
)
from ..weights import config as hf_config
from ..weights.load import open_weights
from ..weights.tensors import Weights, cast
from . import card

# Small leaves of a run are read together up to this.
_READ_BYTES = 2**28


class OthersModel:
    """What others wrote, leaf by leaf."""

    def __init__(self, path: pathlib.Path, to: np.dtype | None):
        self.path = path
        self.weights: Weights = dataclasses.replace(open_weights(path), to=to)
        self.config = self.weights.config
        self.origin = self.weights.origin
        self.facts: dict[str, Any] = {}
        names = ("tokenizer.json", "tokenizer.model", "puna_tokenizer.json")
        self.has_tokenizer = path.is_file() or any(
            (path / name).exists() for name in names
        ) or any(path.glob("*.gguf"))  # fmt: skip

    def table(self) -> tuple[dict[str, huggingface.Leaf], dict[str, Any]]:
        """Its tensors and its config.json on Hugging Face."""
        return hf_table(self.config)

    def dtype(self, path: str, layer: int) -> np.dtype:
        source = self.weights.table[path].sources[layer]
        return self.weights.to or self.weights.tensors[source.name].dtype

    def read(self, path: str, leaf: huggingface.Leaf, layer: int) -> np.ndarray:
        """One layer of a leaf (0 where it is not stacked)."""
        return self.weights.read(self.weights.table[path].sources[layer])

    def finish(self) -> None:
        self.weights.warn_of_nonfinite(self.path)


class AdaptedModel(OthersModel):
    """What others wrote with an adapter in it, leaf by leaf."""

    def __init__(self, path: pathlib.Path, to: np.dtype | None, adapter: str):
        super().__init__(path, to)
        self.adapter = adapter_sum.read(adapter, path, self.config)
        self.config = self.adapter.config
        self.facts = {"init_from": f"{path} and the adapter {adapter}"}

    def _held(self, path: str) -> str:
        """Where the weights of a parameter lie: an output that was tied is the embedding."""
        return path if path in self.weights.table else "embed/table_VD"

    def dtype(self, path: str, layer: int) -> np.dtype:
        return super().dtype(self._held(path), layer)

    def read(self, path: str, leaf: huggingface.Leaf, layer: int) -> np.ndarray:
        held, dtype = self._held(path), self.dtype(path, layer)
        x = super().read(held, leaf, layer)
        if held != path:
            x = x.T
        new = self.adapter.replaced.get(path, {}).get(layer)
        x = x if new is None else cast(new, dtype, f"parameter {path}")
        factors = self.adapter.factors.get(path)
        if factors is None:
            return x
        a, b = (f[layer] if leaf.stacked else f for f in factors)
        m = self.adapter.magnitudes.get(path, {}).get(layer)
        if m is None and path in self.adapter.magnitudes:  # of another layer alone
            return x
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            whole = dense(Adapted(np.float32(x), a, b, 1.0, m))
        return cast(np.asarray(whole), dtype, f"parameter {path}")


class RunModel:
    """A checkpoint of ours, leaf by leaf, in the dtypes that it has on disk or in one for all."""

    def __init__(self, path: pathlib.Path, to: np.dtype | None):
        self.path, self.to = path, to
        self.folder = run.find(path)
        meta = run.read_meta(self.folder)
        config = schema.build(meta["config"])
        self.config, self.new_tokens = config.model, config.data.new_tokens
        self.rewards = config.train.objective == "reward"
        self.has_tokenizer = bool(meta["tokenizer"])
        unknown = {"base_model": licences.UNKNOWN, "licence": licences.UNKNOWN, "files": {}}
        self.origin = unknown | (meta.get("origin") or {})
        home = path if (path / run.CHECKPOINTS).is_dir() else self.folder.parent.parent
        self.facts = card.facts_of_run(home, meta) | {"rewards": self.rewards}
        self._held: dict[str, np.ndarray] = {}
        self._stored = run.Parameters(self.folder)
        self._paths = list(self.table()[0])

    def table(self) -> tuple[dict[str, huggingface.Leaf], dict[str, Any]]:
        """Its tensors and its config.json on Hugging Face."""
        return reward_table(self.config) if self.rewards else hf_table(self.config)

    def dtype(self, path: str, layer: int) -> np.dtype:
        return self.to or self._stored.dtype(path)

    def read(self, path: str, leaf: huggingface.Leaf, layer: int) -> np.ndarray:
        if path not in self._held:
            self._held = self._stored.read(self._batch(path))
        value = self._held[path]
        if value.shape != leaf.shape:
            raise UserError(
                f"{self.folder}: parameter {path} has shape {value.shape}, "
                f"its config says {leaf.shape}"
            )
        return cast(value[layer] if leaf.stacked else value, self.to, f"parameter {path}")

    def write_adapters(self, folder: pathlib.Path) -> None:
        """Write the adapters alone, in PEFT's format."""
        if self.new_tokens:
            raise UserError(
                f"{self.path}: its base has rows of data.new_tokens={self.new_tokens}, which no "
                "base has that PEFT could load: convert the merged model with --to=hf"
            )
        peft.write(folder, self.table()[0], self._stored, self.origin["base_model"])

    def _batch(self, first: str) -> list[str]:
        """A leaf and those that follow it while they are small: their checksums are one program."""
        paths, size = [], 0
        for path in self._paths[self._paths.index(first) :]:
            size += math.prod(self._stored.shape(path)) * self._stored.dtype(path).itemsize
            if paths and size > _READ_BYTES:
                break
            paths.append(path)
        return paths

    def finish(self) -> None:
        pass


def open_model(src: pathlib.Path, to: np.dtype | None) -> OthersModel | RunModel:
    """What lies at a path, to be read in the dtype `to` if it is not None."""
    return RunModel(src, to) if run.is_run(src) else OthersModel(src, to)


def hf_table(config: schema.ModelConfig) -> tuple[dict[str, huggingface.Leaf], dict[str, Any]]:
    """The table and the config.json that a model has on Hugging Face.

    Raises:
      UserError: an architecture that Hugging Face's Llamas cannot express.
    """
    if not config.vision.num_layers:
        return huggingface.leaves(config), hf_config.to_hf(config)
    if config.cross.interval:
        config_json = tiled_vision_table.to_hf(config)
        leaves = huggingface.leaves(config, "language_model.", hf_config.LLAMA)
        return leaves | tiled_vision_table.leaves(config), config_json
    text = dataclasses.replace(config, vision=architecture.VisionConfig())
    if hf_config.family(text) != hf_config.LLAMA4:
        raise UserError("model.vision.num_layers must be 0: only Llama 4 and 3.2 see images")
    text_json = hf_config.to_hf(text)
    del text_json["architectures"]
    config_json = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": text_json,
    } | vision_table.to_hf(config.vision)
    leaves = huggingface.leaves(config, "language_model.", hf_config.LLAMA4)
    return leaves | vision_table.leaves(config), config_json


def reward_table(config: schema.ModelConfig) -> tuple[dict[str, huggingface.Leaf], dict[str, Any]]:
    """The same of a reward model: its vector in place of the output projection.

    Raises:
      UserError: an architecture that `transformers` has no such model of.
    """
    table, config_json = hf_table(config)
    if hf_config.family(config) != hf_config.LLAMA:
        raise UserError(
            "a reward model of this family cannot be written: transformers has none to score texts"
        )
    table.pop("unembed/table_DV", None)
    table[huggingface.REWARD] = huggingface.reward_leaf(config)
    labels = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return table, config_json | labels | {"architectures": ["LlamaForSequenceClassification"]}
