"""`puna eval`: load a model, measure it on held-out text, give the numbers."""

import dataclasses
import math
from collections.abc import Mapping

from ..configs import paths, schema
from ..configs.display import Results
from ..configs.errors import ConfigError, UserError
from ..models.parallel import sharding
from ..models.text.tokenizer import load_tokenizer
from ..models.transformer import Transformer, count_params
from ..models.weights.load import load
from ..train import objectives
from ..train.data.tokenizer import with_ends
from ..train.validation import HeldOut


def evaluate(config: Mapping, path, quantize: str = "", adapter: str = "") -> Results:
    """Evaluate a run, or any model that `puna.load` reads, on `data.validation`.

    Args:
      config: a `ConfigDict`; its data, eval and mesh sections and `model.compute_dtype` count.
        The architecture is the checkpoint's own.
      path: run, checkpoint or model.
      quantize, adapter: as of `puna.load`.

    Returns:
      The dict that `results.json` holds; a notebook shows it as a table.

    Raises:
      UserError: the config, the data or the checkpoint will not do, or a number is not finite.
    """
    c = schema.from_dict(config)
    if not c.data.validation:
        raise ConfigError("data.validation='' must name what to evaluate on")
    path = paths.local(path, "checkpoint")
    mesh = sharding.make_mesh(c.mesh)
    # The data before the weights, which may take minutes to load.
    tokenizer = with_ends(c.data, load_tokenizer(path))
    held_out = HeldOut(c, objectives.make(c, tokenizer.token_bytes), tokenizer, mesh)
    model, params = load(path, mesh=mesh, quantize=quantize, adapter=adapter)
    model = Transformer(dataclasses.replace(model.config, compute_dtype=c.model.compute_dtype))
    numbers = held_out(model, params, {})
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise UserError(
                f"{path}: {name} is {number} on data.validation={c.data.validation}: the "
                "parameters are damaged or have diverged"
            )
    return Results(
        checkpoint=str(path),
        data=c.data.validation,
        begin_ids=list(tokenizer.begin_ids),
        end_ids=list(tokenizer.end_ids),
        parameters=count_params(model.config),
        **numbers,
    )
