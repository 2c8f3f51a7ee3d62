"""Steps whose gradient is not finite or spikes: found, recorded, and skipped or rewound.

The optimizer has already left such a step without effect (`optimizer.guarded`). Each goes to
bad_steps.jsonl with where its rows stand in the data, so that they can be looked at.
"""

import json

import numpy as np

from ...configs.errors import UserError
from ...configs.schema import Config
from ...models.parallel import processes
from .mirror import Mirror

FILE = "bad_steps.jsonl"
# A run that comes back to one checkpoint so often is not hindered by some odd batch.
_MOST_REWINDS = 5


class Watch:
    """Looks at each step once the next one is under way, so that the device need not wait.

    Args:
      config: reads `train.bad_step`.
      mirror: of the run's folder, which gets the list of bad steps.
      known: bad steps until now, as the state counts them.
    """

    def __init__(self, config: Config, mirror: Mirror, known: int):
        self._policy, self._path, self._known = config.train.bad_step, mirror.folder / FILE, known
        self._shown = mirror.home / FILE
        self._pending: tuple[int, dict, dict] | None = None
        self._rewinds: dict[int, int] = {}

    def look(self, step: int, values: dict, position: dict) -> bool:
        """Take a step just dispatched, and judge the one before it.

        Args:
          step, values: its number and metrics.
          position: of the loader before the step's batch.

        Returns:
          Whether to go back to a checkpoint and on with the data at `position`.

        Raises:
          UserError: the step before was bad and the policy is to stop.
        """
        before, self._pending = self._pending, (step, values, position)
        return self._judge(before)

    def last(self) -> bool:
        """Judge the step just taken, since it is to be saved."""
        before, self._pending = self._pending, None
        return self._judge(before)

    def rewound(self, step: int, known: int) -> None:
        """The run is back at the checkpoint of a step."""
        self._pending, self._known = None, known
        self._rewinds[step] = self._rewinds.get(step, 0) + 1
        if self._rewinds[step] > _MOST_REWINDS:
            raise UserError(
                f"train.bad_step=rewind: {_MOST_REWINDS} rewinds to step {step} met a bad step "
                f"each; {self._shown} lists them; resume with train.bad_step=skip, or start "
                "another --workdir with a lower learning rate"
            )

    def _judge(self, pending) -> bool:
        if pending is None:
            return False
        step, values, position = pending
        bad = int(values["bad_steps"])
        if bad == self._known:
            return False
        self._known = bad
        norm, loss = (float(np.asarray(values[n])) for n in ("grad_norm", "loss"))
        rows = processes.merge(position)
        if processes.is_first():
            entry = {"step": step, "grad_norm": str(norm), "loss": str(loss), "rows": rows}
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        if self._policy == "stop":
            raise UserError(
                f"train.bad_step=stop: step {step} has a gradient norm of {norm:.4g} and a loss of "
                f"{loss:.4g}; {self._shown} says which data; resume with train.bad_step=skip "
                "or rewind"
            )
        return self._policy == "rewind"
