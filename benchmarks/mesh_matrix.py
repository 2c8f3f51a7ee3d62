"""Every mesh against one device: loss, gradients, router statistics, parameters after three steps.

    python benchmarks/mesh_matrix.py [--models=dense,scout] [--meshes=fsdp4.tensor2] [--json=FILE]

Runs tiny models in float32 on eight simulated CPU devices and prints a Markdown table: the
largest difference from the run on one device, relative to the largest value of the tensor (of
each expert's part where there are experts). Batches are packed, with padding; meshes take turns
at 1, 2 and 4 microbatches.
"""

import argparse
import dataclasses
import json
import os
import sys

from puna.models import hardware

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = " ".join(
        (
            os.environ.get("XLA_FLAGS", ""),
            "--xla_force_host_platform_device_count=8",
            # Compiling is all of the time. The sums stay the same.
            "--xla_backend_optimization_level=0",
            *hardware.known_xla_flags("--xla_cpu_use_fusion_emitters=false"),
        )
    )

import jax
import numpy as np

from puna.configs import architecture, schema
from puna.models.kernels import blockwise
from puna.models.parallel import sharding
from puna.models.transformer import Transformer, abstract_params
from puna.train import objectives
from puna.train.optimizer import make_optimizer
from puna.train.state import TrainState, abstract_state, init_state
from puna.train.step import make_train_step

TOLERANCE = 1e-5
B, T, V, STEPS = 32, 32, 64, 3

DENSE = schema.ModelConfig(
    vocab_size=V, embed_dim=64, num_layers=8, num_heads=16, num_kv_heads=8, head_dim=4, mlp_dim=128,
    max_positions=T, compute_dtype="float32",
)  # fmt: skip
# Chunks, NoPE, temperature, QK norm; experts in every layer, or in every second one.
SCOUT = dataclasses.replace(
    DENSE, nope_interval=2, chunk_size=8, temperature_scale=0.1, temperature_floor=8, qk_norm=True,
    moe_interval=1, num_experts=8, expert_dim=64, load_balance_weight=0.01, router_z_weight=0.001,
)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "scout": SCOUT,
    "scout, capacity": dataclasses.replace(SCOUT, capacity_factor=1.0, experts_per_token=2),
    "maverick": dataclasses.replace(SCOUT, moe_interval=2, bias_update_rate=0.01, remat="full"),
    "vision": dataclasses.replace(
        SCOUT, moe_interval=2, load_balance_weight=0.0, vision=architecture.VisionConfig(
            num_layers=2, embed_dim=64, num_heads=8, mlp_dim=128, image_size=8, patch_size=2,
            adapter_dim=64, max_tiles=1, token_id=V - 1,
        ),
    ),
}  # fmt: skip

# Axes that are not named are 1, and the devices as many as the product says.
MESHES = """
slices8 data8 fsdp8 expert8 context8 tensor8 pipeline4
slices2.fsdp4 data2.fsdp4 data2.expert4 fsdp4.tensor2 fsdp2.tensor4 fsdp2.expert4 fsdp2.context4
expert4.tensor2 expert2.context4 context2.tensor4 pipeline2.fsdp4 pipeline2.tensor4
pipeline2.context4 pipeline2.expert4
data2.fsdp2.tensor2 fsdp2.expert2.tensor2 fsdp2.context2.tensor2 expert2.context2.tensor2
slices2.fsdp2.tensor2 slices2.expert2.context2 pipeline2.data2.expert2 pipeline2.fsdp2.tensor2
pipeline2.fsdp2.context2 pipeline2.expert2.context2 pipeline4.expert2
""".split()


def axes(mesh: str) -> dict[str, int]:
    """`fsdp4.tensor2` -> {"fsdp": 4, "tensor": 2}."""
    return {part.rstrip("0123456789"): int(part.lstrip("abcdefghijklmnopqrstuvwxyz"))
            for part in mesh.split(".")}  # fmt: skip


def microbatches(mesh: str) -> int:
    """Of a mesh of the table: 1, 2 and 4 in turn."""
    return (1, 2, 4)[MESHES.index(mesh) % 3]


def batch(config: schema.ModelConfig, seed: int = 0):
    """Rows of packed documents with padding at the end, and images for a model that sees."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, V - 1, (B, T)).astype(np.int32)
    positions, segments = np.zeros((2, B, T), np.int32)
    for b in range(B):
        start = 0
        for i in range(rng.integers(1, 4)):
            length = min(int(rng.integers(3, T)), T - start)
            positions[b, start : start + length] = np.arange(length)
            segments[b, start : start + length] = i + 1
            start += length
    weights = (segments != 0).astype(np.float32)
    out = {
        "tokens_BT": tokens, "targets_BT": np.roll(tokens, -1, 1), "positions_BT": positions,
        "segment_ids_BT": segments, "weights_BT": weights,
    }  # fmt: skip
    if config.vision.num_layers:
        tokens[::2, 1:5] = config.vision.token_id  # one tile is four features
        shape = (B, 1, config.vision.image_size, config.vision.image_size, 3)
        tiles = rng.uniform(-1, 1, shape).astype(np.float32)
        out |= {"tiles_BIYXC": tiles, "num_tiles_B": (np.arange(B) % 2 == 0).astype(np.int32)}
    return out


def run(name: str, mesh_axes: dict[str, int], parts: int) -> dict:
    """Three training steps.

    Returns:
      loss, grad_norm and router statistics of each step, the gradient of the first one, and the
      parameters after the last; host arrays, trees by path.
    """
    c = schema.Config(
        model=MODELS[name],
        data=schema.DataConfig(seq_len=T),
        # The first moment after one step is the gradient, scaled and clipped. With Adam's usual
        # epsilon a gradient that is zero but for rounding moves its parameter by a whole step, up
        # or down; with this one, near the size of the gradients, an update is as exact as they are.
        optimizer=schema.OptimizerConfig(
            learning_rate=1e-3, schedule="constant", warmup_steps=0, eps=1e-3
        ),
        train=schema.TrainConfig(steps=STEPS, batch_size=B, microbatches=parts),
        mesh=schema.MeshConfig(**({"data": 1} | mesh_axes)),
    )
    schema.check(c)
    mesh = sharding.make_mesh(c.mesh, jax.devices()[: int(np.prod(list(mesh_axes.values())))])
    tx = make_optimizer(c, abstract_params(c.model))
    places = abstract_state(c, tx, mesh)
    with jax.set_mesh(mesh):
        state = _initial(c, name, places)
        step = make_train_step(c, Transformer(c.model), tx, objectives.make(c, np.ones(V)), places)
        out, gradient = [], None
        for i in range(STEPS):
            data = sharding.put_batch(mesh, batch(c.model, i), list(range(B)), B)
            state, metrics = step(state, data)
            out.append(jax.tree.map(np.asarray, metrics))
            if gradient is None:
                gradient = _by_path(_first_moment(state.opt_state))
    return {
        "metrics": {k: np.array([m[k] for m in out]) for k in out[0]},
        "gradient": gradient,
        "params": _by_path(state.params),
    }


_STATES: dict[str, TrainState] = {}


def _initial(c, name, places):
    if name not in _STATES:
        one = sharding.make_mesh(schema.MeshConfig(data=1), jax.devices()[:1])
        with jax.set_mesh(one):
            state = init_state(c, make_optimizer(c, abstract_params(c.model)), one)
        _STATES[name] = jax.tree.map(np.asarray, state)
    return jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), _STATES[name], places)


def _first_moment(opt_state):
    return next(s.mu for s in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu"))
                if hasattr(s, "mu"))  # fmt: skip


def _by_path(tree) -> dict[str, np.ndarray]:
    return {sharding.path_name(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}


def difference(path: str, got, want) -> float:
    """Largest difference, relative to the tensor's largest value, expert by expert."""
    assert got.shape == want.shape and np.all(np.isfinite(got)), path
    if "_EDF" in path or "_EFD" in path:
        got, want = (x.reshape(-1, *x.shape[-2:]) for x in (got, want))
    else:
        got, want = got[None], want[None]
    dims = tuple(range(1, got.ndim))
    size = np.max(np.abs(want), axis=dims)
    # An expert without tokens has no gradient at all.
    assert np.all(got[size == 0] == 0), path
    return float(np.max(np.max(np.abs(got - want), axis=dims) / np.where(size == 0, 1, size)))


def compare(got: dict, want: dict) -> dict[str, float]:
    """The largest difference of each kind; `worst` names its tensor."""
    kinds = {
        "loss": ["loss"],
        "gradient norm": ["grad_norm"],
        "router": [n for n in want["metrics"] if n.startswith("router")],
    }
    out: dict = {
        kind: max((difference(n, got["metrics"][n], want["metrics"][n]) for n in names), default=0)
        for kind, names in kinds.items()
    }
    for kind in ("gradient", "params"):
        each = {p: difference(p, got[kind][p], want[kind][p]) for p in want[kind]}
        out[f"worst {kind}"] = max(each, key=lambda p: each[p])
        out[kind] = max(each.values())
    return out


_REFERENCES: dict[tuple[str, int], dict] = {}


def case(name: str, mesh: str) -> dict[str, float]:
    """One cell of the matrix: a model on a mesh against the same on one device."""
    key = name, microbatches(mesh)
    if key not in _REFERENCES:
        _REFERENCES[key] = run(name, {"data": 1}, key[1])
    return compare(run(name, axes(mesh), key[1]), _REFERENCES[key])


def small_blocks() -> None:
    """Cut attention as finely as a long row would be: several blocks, and some passed over."""
    blockwise._ONE_BLOCK, blockwise._BLOCK = 0, 8


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS).replace("scout, ", "scout+"))
    parser.add_argument("--meshes", default=",".join(MESHES))
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    small_blocks()
    names = [n.replace("+", ", ") for n in args.models.split(",")]
    print("| mesh | microbatches | " + " | ".join(names) + " |")
    print("|---" * (2 + len(names)) + "|", flush=True)
    results, kinds = {}, ("loss", "gradient norm", "router", "gradient", "params")
    for mesh in args.meshes.split(","):
        print(f"| {mesh.replace('.', ' ')} | {microbatches(mesh)} |", end="", flush=True)
        for name in names:
            found = results[f"{name} {mesh}"] = case(name, mesh)
            print(f" {max(found[k] for k in kinds):.1e} |", end="", flush=True)
        print()
    worst = {k: max(r[k] for r in results.values()) for k in kinds}
    print("\nlargest:", ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)
    sys.exit(max(worst.values()) > TOLERANCE)


if __name__ == "__main__":
    main()
