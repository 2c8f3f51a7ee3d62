"""The loss on held-out data, the same for any batch size, mesh and number of processes.

Rows are packed without regard to the batch size, each row's sums are made on the device, and the
rows are summed on the host in float64. The data are opened, screened and packed once: a later
evaluation of the same run reads no file as long as its rows fit the memory set aside for them.
"""

import collections
import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from ..configs.errors import UserError
from ..configs.schema import Config
from ..models.parallel import processes, sharding
from . import objectives
from .data import Batch, HeldOutRows
from .data.packing import Room, media_room
from .objectives import Objective

# Batches whose sums are still on the devices: the host is ahead by so many.
_IN_FLIGHT = 4


class HeldOut:
    """`data.validation`, or its first `eval.max_rows` packed rows, ready to be measured.

    Args:
      config: its data, eval and model sections are read.
      objective: the loss.
      tokenizer: of the model.
      mesh: where batches are put; a process reads and keeps the rows of its own devices only.

    Raises:
      UserError: the data cannot be read or hold nothing to predict.
    """

    def __init__(self, config: Config, objective: Objective, tokenizer, mesh):
        self.objective, self.mesh = objective, mesh
        self.sources = config.data.validation
        parts = sharding.parts("batch", mesh)
        self.batch_size = -(-config.eval.batch_size // parts) * parts
        self.local = sharding.local_rows(mesh, self.batch_size)
        self.rows = HeldOutRows(
            config.data, objective.transform(config, tokenizer), self.sources,
            Room(config.data.seq_len + 1, media_room(config)), config.eval.max_rows or None,
        )  # fmt: skip

    def __call__(self, model, params, frozen) -> dict[str, float]:
        """Measure parameters; see `Objective.report` for the numbers.

        Raises:
          UserError: the split holds nothing to predict, or ids that the model lacks.
        """
        pending: collections.deque = collections.deque()
        sums: dict[str, float] = collections.defaultdict(float)
        processes.wait("evaluation")

        def fetch():
            for name, x_B in pending.popleft().items():
                sums[name] += float(np.sum(processes.on_host(x_B), dtype=np.float64))

        with jax.set_mesh(self.mesh):
            for batch in _ahead(self._batches()):
                _check_ids(batch, model.config.embedding_rows)
                device = sharding.put_batch(self.mesh, batch, self.local, self.batch_size)
                pending.append(_row_sums(self.objective, model, params, frozen, device))
                if len(pending) > _IN_FLIGHT:
                    fetch()
            while pending:
                fetch()
        numbers = self.objective.report(sums)
        if not numbers:
            raise UserError(f"data.validation={self.sources} holds nothing to predict")
        return numbers

    def _batches(self) -> Iterator[Batch]:
        """The batches of this process: rows of zeros fill up the last one."""
        for first in itertools.count(0, self.batch_size):
            batch = self.rows.batch(first, [first + row for row in self.local])
            if batch is None:
                return
            yield batch


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, each made in a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def _check_ids(batch: Batch, num_ids: int) -> None:
    """Outside the vocabulary there is no embedding: the loss would be NaN."""
    largest = max(int(x.max()) for name, x in batch.items() if name.startswith(("tok", "targ")))
    if largest >= num_ids:
        raise UserError(
            f"the tokenizer gives id {largest} and the model has ids 0..{num_ids - 1}: it is "
            "that of another model"
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_sums(objective: Objective, model, params, frozen, batch):
    return objective.loss(model, params, frozen, batch).rows_B


def evaluate_loss(config: Config, model, params, tokenizer, mesh) -> dict[str, float]:
    """Measure a model on `data.validation` once.

    Returns:
      For text: `loss` in nats a token, `perplexity` = exp(loss), `bits_per_byte`, and how many
      `tokens` and `bytes` were predicted.

    Raises:
      UserError: the data cannot be read or hold nothing to predict.
    """
    objective = objectives.make(config, tokenizer.token_bytes)
    return HeldOut(config, objective, tokenizer, mesh)(model, params, {})
