"""What a run tells: metrics.jsonl, event files, the progress line, results.json, the plot."""

import io
import json
import math
import os
import pathlib
import statistics
import sys

import jax
import numpy as np
from tqdm import tqdm

from ..configs.files import to_json, write_bytes, write_json, write_text
from ..configs.schema import Config, ModelConfig
from ..models import hardware
from ..models.parallel.processes import is_first
from ..models.transformer import abstract_params, count_params
from .resilience.goodput import KINDS, Ledger


def active_params(config: ModelConfig) -> int:
    """Parameters that multiply a token: all but the embedding rows and the experts not chosen.

    Encoders and layers that attend to images, which text passes by, are left out.
    """
    total = 0
    for path, p in jax.tree.leaves_with_path(
        abstract_params(config), is_leaf=lambda x: hasattr(x, "names")
    ):
        size = math.prod(p.value.shape)
        if "experts" in p.names:
            size = size * config.experts_per_token // config.num_experts
        if path[0].key == "embed" and not config.tie_embeddings:
            continue
        if path[0].key not in ("vision", "audio") and not of_cross_layer(config, path):
            total += size
    return total


def of_cross_layer(config: ModelConfig, path) -> bool:
    """Whether the parameter at a path belongs to a layer that attends to images."""
    layer = str(getattr(path[1], "key", "")) if len(path) > 1 else ""
    return layer.startswith("layer_") and config.is_cross(int(layer.removeprefix("layer_")))


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one trained token: forward and backward, nothing recomputed.

    6 a parameter, and attention's two matmuls 12 N H for each key seen (PaLM, arXiv 2204.02311,
    appendix B), with the causal half counted as half: a token sees T/2 keys on average, and half
    a chunk in a layer with chunks. Of a text: images, and layers that attend to them, are left out.
    """
    keys = 0.0
    for layer in filter(lambda i: not config.is_cross(i), range(config.num_layers)):
        chunked = config.chunk_size and config.uses_rope(layer)
        keys += min(seq_len, config.chunk_size if chunked else seq_len) / 2
    attention = 12 * config.num_heads * config.head_dim * keys
    return 6 * active_params(config) + attention


def peak_flops(config: ModelConfig) -> float | None:
    """FLOP/s of all devices together, None where the peak is not known."""
    devices = jax.devices()
    peak = hardware.peak_flops(devices[0].device_kind)
    return peak * len(devices) if peak and config.activation_dtype == "bfloat16" else None


class RunLog:
    """Turns what steps return into `metrics.jsonl`, event files and a progress line.

    Of several processes only the first writes.

    The numbers of a step are fetched only once the next one is under way, so that the device
    never waits for the host.

    Args:
      config: of the run.
      workdir: the run's folder.
      start: steps already done; later records of an interrupted run are cut off, since the run
        that resumes from the checkpoint writes them again.
      ledger: told of the waits for input, and brought up to date with every record.
      init_from: where the run started from (see `init_from.lineage`), for `results.json`.
    """

    def __init__(
        self,
        config: Config,
        workdir: pathlib.Path,
        start: int,
        ledger: Ledger,
        init_from: dict | None = None,
    ):
        self.init_from = init_from
        self.config, self.workdir, self.start, self.ledger = config, workdir, start, ledger
        self.tokens_per_step = config.train.batch_size * config.data.seq_len
        self.flops_per_step = (
            flops_per_token(config.model, config.data.seq_len) * self.tokens_per_step
        )
        self.peak = peak_flops(config.model)

        self.file = self.events = self.bar = None
        if is_first() and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            self.bar = tqdm(total=config.train.steps, initial=start, unit="step", leave=True)
        self._open(start)

    def _open(self, start: int) -> None:
        """Go on writing after a step."""
        from tensorboardX import SummaryWriter

        kept = []
        if is_first():
            path = self.workdir / "metrics.jsonl"
            kept = [m for m in read(path) if m["step"] <= start]
            lines = [to_json(m) + "\n" for m in kept]
            write_text(path, "".join(lines))
            self.file = open(path, "r+b")
            self.last_at = sum(map(len, lines[:-1]))  # of ASCII
            self.events = SummaryWriter(str(self.workdir / "events"), purge_step=start + 1)
        self.last: dict = kept[-1] if kept else {}
        self.pending: tuple[int, dict, dict] | None = None
        self.logged = start
        self.stepping, self.waiting = self._spent()

    def fetch(self, loader):
        """The next batch; the time it takes is the run's input wait."""
        with self.ledger.doing("input_wait"):
            return next(loader)

    def dispatched(self, step: int, values: dict) -> None:
        """Take what a step will give, and write what the one before it gave."""
        self._flush(self._timing)
        self.pending = (step, values, {})

    def wait(self) -> None:
        """Until the step just dispatched is done: what follows is another's time."""
        if self.pending is not None:
            jax.block_until_ready(self.pending[1])

    def flush(self, wanted: bool) -> None:
        """Write what the last step gave: a checkpoint must not be ahead of the metrics.

        Args:
          wanted: whether there must be a record, which `add` joins; else as `log_every` has it.
        """
        self._flush(self._timing, wanted)
        if self.events is not None:
            self.events.flush()

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Join the numbers of an evaluation to the record of a step, the last one there is."""
        if self.pending is not None:
            self.pending[2].update(numbers)
        else:
            self._write(step, {**self.last, **numbers}, numbers)

    def lacks(self, step: int, number: str) -> bool:
        """Whether the last record is of this step and has no such number."""
        return self.last.get("step") == step and number not in self.last

    def _flush(self, timing, wanted: bool = False) -> None:
        if self.pending is None:
            return
        (step, values, extra), self.pending = self.pending, None
        every = self.config.train.log_every
        if step % every and step != self.config.train.steps and not extra and not wanted:
            return
        record = {name: np.asarray(value).tolist() for name, value in values.items()}
        self._write(step, record | timing(step) | extra)

    def _timing(self, step: int) -> dict[str, float]:
        """Per step, since the last record: of steps and their input, and of nothing else."""
        steps, (stepping, waiting) = step - self.logged, self._spent()
        seconds = (stepping - self.stepping) / steps
        wait = (waiting - self.waiting) / steps
        self.logged, self.stepping, self.waiting = step, stepping, waiting
        return self._speed(seconds) | {"input_wait_seconds": wait}

    def _spent(self) -> tuple[float, float]:
        """Seconds of the steps until now, and those of them spent waiting for input."""
        return self.ledger.spent("step", "input_wait"), self.ledger.spent("input_wait")

    def _speed(self, seconds: float) -> dict[str, float]:
        """What a step of so many seconds means."""
        seconds = max(seconds, 1e-9)  # a coarse clock
        speed = {"step_seconds": seconds, "tokens_per_second": self.tokens_per_step / seconds}
        if self.peak:
            speed["model_flops_utilisation"] = self.flops_per_step / seconds / self.peak
        return speed

    def _write(self, step: int, record: dict, new: dict | None = None) -> None:
        """Write a record, over the last one if that is of the same step; `new` is what is in it."""
        scalars = {k: v for k, v in (new or record).items() if not isinstance(v, list)}
        again = self.last.get("step") == step
        self.last = {"step": step, **record}
        self.ledger.write()
        if self.file is None or self.events is None:
            return
        if not again:
            self.last_at = self.file.seek(0, os.SEEK_END)
        # One write, and of no fewer bytes: a kill leaves the one record or the other.
        self.file.seek(self.last_at)
        self.file.write((to_json(self.last) + "\n").encode())
        self.file.truncate()
        for name, value in scalars.items():
            self.events.add_scalar(name, value, step)
        text = ", ".join(f"{k} {v:.4g}" for k, v in scalars.items() if k in SHOWN)
        if self.bar is None:
            print(f"step {step}/{self.config.train.steps}: {text}", flush=True)
        else:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)

    def rewind(self, step: int) -> None:
        """Forget what came after a step; it is done again, with other data."""
        if self.file is not None and self.events is not None:
            self.file.close()
            self.events.close()
        self._open(step)

    def validation_losses(self) -> dict[int, float]:
        """Validation loss by step, of the records so far; a process that writes none has none."""
        records = read(self.workdir / "metrics.jsonl") if self.file is not None else []
        return {m["step"]: m[LOSS] for m in records if m.get(LOSS) is not None}

    def finish(self, step: int, best: int | None = None) -> None:
        """Write the last record, and `results.json` and `loss.png` of a run that ends here.

        Args:
          step: the last one.
          best: the step of the checkpoint with the least validation loss, if one is known.
        """
        # No step follows the last one to be timed against.
        self._flush(lambda step: {})
        if self.file is None or self.events is None:
            return
        self.file.close()
        self.events.close()
        if self.bar is not None:
            self.bar.close()
        records = read(self.workdir / "metrics.jsonl")
        seconds = [m["step_seconds"] for m in records if m["step"] > self.start + 1 and
                   "step_seconds" in m]  # fmt: skip
        results = {
            "parameters": count_params(self.config.model),
            "tokens": self.tokens_per_step * step,
            "wall_seconds": round(self.ledger.spent(*KINDS), 1),
            **self.last,
        }
        if self.init_from:
            results["init_from"] = self.init_from
        if best is not None:
            losses = {m["step"]: m.get(LOSS) for m in records}
            results |= {"best_step": best, f"best_{LOSS}": losses.get(best)}
        if seconds:
            # The median: the first steps of a session load its program, and machines hesitate.
            results |= self._speed(statistics.median(seconds))
        write_json(self.workdir / "results.json", results)
        plot_losses(self.workdir)


LOSS = "validation_loss"
SHOWN = (
    *("loss", "bits_per_byte", "reward_accuracy", "learning_rate", "tokens_per_second"),
    *("validation_bits_per_byte", "validation_reward_accuracy"),
)


def read(path: pathlib.Path) -> list[dict]:
    """The records of a metrics file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def plot_losses(workdir: pathlib.Path) -> None:
    """Draw `loss.png` from the metrics: bits per byte, or the loss, in training and validation."""
    from matplotlib.figure import Figure

    records = read(workdir / "metrics.jsonl")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    loss = "bits_per_byte" if any("bits_per_byte" in m for m in records) else "loss"
    for name, style in ((loss, "-"), (f"validation_{loss}", "o")):
        points = [(m["step"], m[name]) for m in records if m.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), lw=1)
    axes.set(xlabel="step", ylabel=loss.replace("_", " "), title=workdir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_bytes(workdir / "loss.png", picture.getvalue())
