"""A tiny Scout, every Llama 4 feature on, learns one batch of text by heart."""

import jax
import numpy as np

from puna.configs import get_config, schema
from puna.models.parallel import sharding
from puna.models.transformer import Transformer, abstract_params
from puna.train import objectives
from puna.train.optimizer import make_optimizer
from puna.train.state import abstract_state, init_state
from puna.train.step import make_train_step


def test_tiny_scout_memorises_a_batch():
    config = get_config("llama4:scout-tiny")
    config.model.vision.num_layers = 0
    # A layer of each kind: the compiler's time is most of this test.
    config.model.update(num_layers=2, nope_interval=2)
    config.optimizer.update(schedule="constant", warmup_steps=0, learning_rate=1e-2)
    c = schema.from_dict(config)
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
    tx = make_optimizer(c, abstract_params(c.model))
    places = abstract_state(c, tx, mesh)
    tokens = np.random.default_rng(0).integers(0, 512, (4, 49), np.int32)
    shape = (4, 48)
    batch = {
        "tokens_BT": tokens[:, :-1],
        "targets_BT": tokens[:, 1:],
        "positions_BT": np.tile(np.arange(48, dtype=np.int32), (4, 1)),
        "segment_ids_BT": np.ones(shape, np.int32),
        "weights_BT": np.ones(shape, np.float32),
    }
    with jax.set_mesh(mesh):
        state = init_state(c, tx, mesh)
        step = make_train_step(
            c, Transformer(c.model), tx, objectives.make(c, np.ones(512, np.int32)), places
        )
        for _ in range(60):
            state, metrics = step(state, batch)
    assert float(metrics["loss"]) < 0.05
