"""FP8 weights of Hugging Face directories, read as the numbers that they stand for.

A tensor of float8_e4m3fn times the scale beside it: one for all, for each output or for each block.
Read are `compressed-tensors` of format float-quantized (Llama 4 Maverick FP8), `fbgemm_fp8` (Llama
3.1 405B FP8) and `fp8`. Only weights are: what these formats say of rounding activations is left
out, so that the numbers are those of the weights and not of one kernel. Experts that were taken
apart for it are put together again.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ...configs.errors import UserError
from . import keys
from .tensors import Tensor

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_SCALES = ("_scale", "_scale_inv")  # after the name of the tensor; both multiply it
_ACTIVATIONS = re.compile(r".*(input_scale|input_activation_scale|input_scale_ub|activation_scale)")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_TO_DO = "load the unquantized model, or a GGUF file of it"


def is_fp8(quantization: Any) -> bool:
    """Whether a `quantization_config` is one that is read.

    Raises:
      UserError: it is of a kind that is read, but holds weights of another form.
    """
    if not isinstance(quantization, Mapping):
        return False
    method = quantization.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return True
    if method != "compressed-tensors":
        return False
    if quantization.get("format") not in ("float-quantized", "naive-quantized"):
        return False
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or (
            weights.get("type"), weights.get("num_bits"), weights.get("symmetric", True)
        ) != ("float", 8, True):  # fmt: skip
            raise UserError(
                f"config.json: quantization_config.config_groups: weights={keys.short(weights)} "
                f"must be symmetric floats of 8 bits; {_TO_DO}"
            )
    return True


def dequantized(
    where, quantization: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a model without its scales, each as the numbers that it stands for.

    Raises:
      UserError: a scale is missing or has a shape that fits no rule, experts are not whole.
    """
    block = quantization.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and block and all(type(b) is int and b > 0 for b in block)
    ):
        raise UserError(
            f"{where}: quantization_config.weight_block_size={keys.short(block)} must be numbers"
        )
    made: dict[str, Tensor] = {}
    used = {name for name in tensors if _ACTIVATIONS.fullmatch(name)}
    for name, tensor in tensors.items():
        if tensor.dtype != FLOAT8:
            continue
        found = [name + end for end in _SCALES if name + end in tensors]
        if len(found) != 1:
            raise UserError(f"{where}: tensor {name} is in FP8 and has {len(found)} scales, not 1")
        used.add(found[0])
        made[name] = Scaled(where, name, tensor, tensors[found[0]], block)
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    return _whole_experts(where, rest | made)


class Scaled:
    """A tensor of FP8 numbers times its scale, in float32; only what is asked for is read."""

    dtype = np.dtype(np.float32)

    def __init__(self, where, name, values: Tensor, scale: Tensor, block: list[int] | None):
        self.values, self.shape = values, tuple(values.shape)
        shape = tuple(scale.shape)
        numbers = np.asarray(scale[(slice(None),) * len(shape)], np.float32)
        if len(shape) == 1 and len(self.shape) == 2 and shape[0] == self.shape[0]:
            shape = (shape[0], 1)  # one for each output
        elif math.prod(shape) == 1:
            shape = (1,) * len(self.shape)
        blocks = (block or [0])[-len(self.shape) :]
        blocks = [0] * (len(self.shape) - len(blocks)) + blocks
        self.blocks = []
        for size, count, each in zip(self.shape, shape, blocks, strict=False):
            if count in (1, size):
                self.blocks.append(size if count == 1 else 1)
            elif each and -(-size // each) == count:
                self.blocks.append(each)
        if len(self.blocks) != len(self.shape) or len(shape) != len(self.shape):
            raise UserError(
                f"{where}: the scale of tensor {name} has shape {tuple(scale.shape)}, which fits "
                f"{self.shape} in no way that puna knows"
            )
        self.scale = numbers.reshape(shape)

    def __getitem__(self, index):
        found = np.asarray(self.values[index]).astype(np.float32)
        scale = self.scale
        for axis, (part, each) in enumerate(zip(index, self.blocks, strict=True)):
            if scale.shape[axis] > 1:
                start, stop, _ = part.indices(self.shape[axis])
                scale = np.take(scale, np.arange(start, stop) // each, axis)
        return found * scale


class Expert:
    """Experts that lie one by one, as the tensor [E, in, out] that Llama 4 has of all of them.

    halves: for each expert the tensors [out, in] that stand side by side along its outputs.
    """

    def __init__(self, halves: list[list[Tensor]]):
        self.halves = halves
        first = halves[0]
        self.dtype = np.result_type(*{part.dtype for parts in halves for part in parts})
        self.each = first[0].shape[0]
        self.shape = (len(halves), first[0].shape[1], self.each * len(first))

    def __getitem__(self, index):
        experts, inputs, outputs = index
        start, stop, _ = outputs.indices(self.shape[2])
        found = []
        for parts in self.halves[experts]:
            columns = [
                part[(slice(max(start - low, 0), min(stop - low, self.each)), inputs)]
                for low, part in zip((0, self.each), parts, strict=False)
                if start < low + self.each and stop > low
            ]
            found.append(np.concatenate(columns, 0).T)
        return np.stack(found).astype(self.dtype)


def _whole_experts(where, tensors):
    """The same tensors, with Llama 4's experts as two tensors a layer."""
    layers: dict[str, dict[int, dict[str, Tensor]]] = {}
    made = dict(tensors)
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            layers.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
            del made[name]
    for layer, experts in layers.items():
        shapes = {
            tuple((n, tuple(t.shape)) for n, t in sorted(e.items())) for e in experts.values()
        }
        if sorted(experts) != list(range(len(experts))) or len(shapes) != 1 or any(
            len(e) != 3 or any(len(t.shape) != 2 for t in e.values())
            or e["gate_proj"].shape != e["up_proj"].shape for e in experts.values()
        ):  # fmt: skip
            raise UserError(f"{where}: the experts of {layer} are not whole, or not of one shape")
        order = [experts[i] for i in range(len(experts))]
        made[f"{layer}.gate_up_proj"] = Expert([[e["gate_proj"], e["up_proj"]] for e in order])
        made[f"{layer}.down_proj"] = Expert([[e["down_proj"]] for e in order])
    return made
