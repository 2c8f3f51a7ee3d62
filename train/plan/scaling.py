"""Compute-optimal size and tokens: by published laws, and by a law fitted to runs of one's own.

The form is that of Hoffmann et al. (arXiv 2203.15556): loss = floor + a / N^alpha + b / D^beta, N
parameters that multiply a token, D tokens, and 6 N D FLOPs. Left out on purpose: the FLOPs of
attention, data of which there is not enough, and the cost of serving the model afterwards.
"""

import glob
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ...configs import schema
from ...configs.errors import UserError
from .. import metrics
from . import budget
from .figures import Figure

LEAST_RUNS = 6  # a law has five coefficients


class Law(NamedTuple):
    """loss = floor + a / N^alpha + b / D^beta, in nats a token."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, parameters, tokens):
        """Of a model of so many parameters after so many tokens."""
        return self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens of the least loss at 6 N D = `flops`."""
        ratio = self.alpha * self.a / (self.beta * self.b)
        ratio **= 1 / (self.alpha + self.beta)
        parameters = ratio * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, flops / 6 / parameters


class Run(NamedTuple):
    """What one run adds to a fit."""

    parameters: float
    tokens: float
    loss: float


def published(facts: Mapping, experts: int = 0) -> dict[str, Law]:
    """The laws of the facts by name; with experts that of mixtures alone."""
    laws = facts["scaling"]
    if not experts:
        names = ("floor", "a", "alpha", "b", "beta")
        return {
            name: Law(*(law[key] for key in names))
            for name, law in laws.items()
            if "delta" not in law
        }
    law = laws["experts"]
    first = 1 / (1 / law["start"] - 1 / law["most"])
    e = 1 / (1 / (experts - 1 + first) + 1 / law["most"])
    found = Law(
        law["floor"], law["a"] / e ** law["delta"], law["alpha"] + law["gamma"] * math.log(e),
        law["b"] / e ** law["omega"], law["beta"] + law["zeta"] * math.log(e),
    )  # fmt: skip
    return {"experts": found}


def figures(laws: Mapping[str, Law], flops: float, facts: Mapping) -> dict[str, Figure]:
    """The best size, tokens and loss at so many FLOPs, by each law."""
    found = {"training_flops": Figure(flops, "FLOPs", "given", "6 * parameters * tokens")}
    for name, law in laws.items():
        parameters, tokens = law.optimum(flops)
        source = facts["scaling"].get(name, {}).get("source", "fitted to the runs")
        found[f"{name}_parameters"] = Figure(parameters, "", "modelled", source)
        found[f"{name}_tokens"] = Figure(tokens, "", "modelled")
        found[f"{name}_loss"] = Figure(law.loss(parameters, tokens), "nats", "modelled")
    return found


def answer(
    patterns: Iterable[str], flops: float, config: Mapping | None = None,
    file: str | pathlib.Path | None = None,
) -> dict:  # fmt: skip
    """Sections of figures: a law fitted to runs, or what published laws say.

    Args:
      patterns: of the folders of runs; none = published laws.
      flops: of training; 0 = the fitted law alone.
      config: a `ConfigDict` whose experts count; None = dense.
      file: of published numbers, as `budget.FACTS`, the default.

    Raises:
      UserError: a value that cannot be, or runs that allow no fit.
    """
    if not 0 <= flops < math.inf:
        raise UserError(f"--flops={flops:g} must be more than 0")
    if patterns:
        found = {pattern: glob.glob(pattern) for pattern in patterns}
        for pattern, of_it in found.items():
            if not of_it:
                raise UserError(f"--fit={pattern} names no folder that is here")
        # A run that two patterns name is one run.
        folders = sorted({path for of_it in found.values() for path in of_it})
        return {"fit": fitted(read_runs(folders), flops)}
    facts = budget.read_facts(pathlib.Path(file or budget.FACTS))
    experts = 0 if config is None else schema.from_dict(config).model.num_experts
    return {"compute_optimal": figures(published(facts, experts), flops, facts)}


def read_runs(folders: Iterable[str | pathlib.Path]) -> list[Run]:
    """Size, tokens and loss of runs: of held-out text if they measured it, else their last tenth.

    Raises:
      UserError: a folder is no finished run.
    """
    found = []
    for folder in map(pathlib.Path, folders):
        try:
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            loss = results.get(metrics.LOSS)
            if loss is None:
                losses = [m["loss"] for m in metrics.read(folder / "metrics.jsonl") if "loss" in m]
                last = losses[-max(1, len(losses) // 10) :]
                loss = sum(last) / len(last)
            run = Run(float(results["parameters"]), float(results["tokens"]), float(loss))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
            raise UserError(
                f"--fit: {folder} is no finished run with results.json and a loss: {e}"
            ) from e
        if not all(0 < x < math.inf for x in run):
            raise UserError(f"--fit: {folder} has {run}: all must be finite and more than 0")
        found.append(run)
    return found


def fit(runs: list[Run], resamples: int = 100, seed: int = 0) -> tuple[Law, list[Law]]:
    """A law for runs, and laws for samples of them with replacement, whose spread is its error.

    Least Huber loss (delta 1e-3) of log loss, as Hoffmann et al. have it, by BFGS.

    Raises:
      UserError: too few runs, or all of one size or of one number of tokens.
    """
    if len(runs) < LEAST_RUNS:
        raise UserError(f"--fit: {len(runs)} runs, at least {LEAST_RUNS} are needed for a law")
    for what in ("parameters", "tokens"):
        if len({getattr(run, what) for run in runs}) < 3:
            raise UserError(f"--fit: the runs need at least 3 different numbers of {what}")
    n, d, loss = np.log(np.array(runs)).T
    middle = n.mean(), d.mean()
    n, d = n - middle[0], d - middle[1]  # with which the coefficients hardly depend on each other
    least = loss.min()
    starts = [
        (least + math.log(share), least - 1, size, least - 1, data)
        for share in (0.3, 0.8)
        for size in (0.15, 0.5)
        for data in (0.15, 0.5)
    ]
    best = min((_solve(start, n, d, loss) for start in starts), key=lambda x: x[1])[0]
    rng, others = np.random.default_rng(seed), []
    while len(others) < resamples:
        pick = rng.integers(len(runs), size=len(runs))
        if len(set(n[pick])) > 1 and len(set(d[pick])) > 1:
            others.append(_law(_solve(best, n[pick], d[pick], loss[pick])[0], middle))
    return _law(best, middle), others


def _law(x, middle):
    floor, size, alpha, data, beta = x
    return Law(
        math.exp(floor), math.exp(size + alpha * middle[0]), alpha,
        math.exp(data + beta * middle[1]), beta,
    )  # fmt: skip


def _solve(start, n, d, loss):
    """Logs of the floor and of both terms at the middle, with their powers; what is left over."""
    from scipy.optimize import minimize

    delta = 1e-3

    def error(x):
        terms = np.stack([np.full_like(n, x[0]), x[1] - x[2] * n, x[3] - x[4] * d])
        top = terms.max(0)
        shares = np.exp(terms - top)
        total = shares.sum(0)
        rest = np.log(total) + top - loss
        huber = np.where(abs(rest) < delta, rest**2 / 2, delta * (abs(rest) - delta / 2))
        slope = np.clip(rest, -delta, delta) * shares / total
        gradient = np.array(
            [slope[0].sum(), slope[1].sum(), -(slope[1] * n).sum(),
             slope[2].sum(), -(slope[2] * d).sum()]
        )  # fmt: skip
        return huber.sum() * 1e6, gradient * 1e6

    bounds = [(-10, 5), (-20, 10), (0.01, 2), (-20, 10), (0.01, 2)]
    found = minimize(error, start, jac=True, method="L-BFGS-B", bounds=bounds,
                     options={"maxiter": 500})  # fmt: skip
    return found.x, found.fun


def fitted(runs: list[Run], flops: float, level: float = 0.9) -> dict[str, Figure]:
    """A law for runs with intervals, and what it says of a budget of FLOPs (0 = none)."""
    law, others = fit(runs)
    low, high = (1 - level) / 2, (1 + level) / 2

    def figure(of, unit=""):
        ends = np.quantile([of(other) for other in others], [low, high])
        return Figure(of(law), unit, "modelled", f"{level:.0%} from {ends[0]:.4g} to {ends[1]:.4g}")

    found = {"runs": Figure(len(runs), "", "given")}
    for name in Law._fields:
        found[name] = figure(lambda x, name=name: getattr(x, name))
    if flops:
        found["training_flops"] = Figure(flops, "FLOPs", "given", "6 * parameters * tokens")
        found["parameters"] = figure(lambda x: x.optimum(flops)[0])
        found["tokens"] = figure(lambda x: x.optimum(flops)[1])
        found["loss"] = figure(lambda x: x.loss(*x.optimum(flops)), "nats")
    return found
