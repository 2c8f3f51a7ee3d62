"""The table of a model's parameters."""

import jax
import numpy as np

from puna.configs import schema
from puna.configs.display import Results, html_table
from puna.models.parallel import sharding
from puna.models.summary import Summary
from puna.models.transformer import Transformer, abstract_params, count_params

CONFIG = schema.ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=32,
    max_positions=32, moe_interval=2, num_experts=4, expert_dim=8,
)  # fmt: skip


def test_it_counts_what_is_there():
    summary = Transformer(CONFIG).summary()
    assert isinstance(summary, Summary)
    assert summary.parameters == count_params(CONFIG)
    leaves = jax.tree.leaves(sharding.unbox(abstract_params(CONFIG)))
    assert summary.bytes_per_device == sum(x.size * x.dtype.itemsize for x in leaves)
    assert len(str(summary).splitlines()) == len(leaves) + 2
    assert "4 experts" in str(summary) and "one device" in str(summary)


def test_a_mesh_divides_the_memory():
    mesh = sharding.make_mesh(schema.MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    one, four = Transformer(CONFIG).summary(), Transformer(CONFIG).summary(mesh)
    assert four.parameters == one.parameters
    for row in four.rows:
        parts = np.prod([mesh.shape[a] for axes in row.axes if axes != "-"
                         for a in axes.strip("()").replace("'", "").split(", ") if a])  # fmt: skip
        assert row.bytes_per_device * parts == row.count * 4
    assert "fsdp=2, tensor=2" in str(four)


def test_a_notebook_gets_tables():
    page = Transformer(CONFIG).summary()._repr_html_()
    assert page.count("<tr>") == len(Transformer(CONFIG).summary().rows) + 1
    results = Results(checkpoint="<run>", loss=1.23456789, tokens=12345)
    shown = results._repr_html_()
    assert "&lt;run&gt;" in shown and "1.2346" in shown and "12,345" in shown
    assert results == {"checkpoint": "<run>", "loss": 1.23456789, "tokens": 12345}
    assert html_table([(1,)], ["a"]).startswith("<table><tr><th>a</th></tr>")
