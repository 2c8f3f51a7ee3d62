"""Options that the compiler of a training step is given, without environment variables.

The table is in models/hardware.py. An option of it that a compiler does not know, or refuses on
these devices, is left out with a note; an option that a user names must be taken.
"""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ..configs.errors import ConfigError
from ..configs.patterns import names
from ..models import hardware

Value = bool | int | str


def options(text: str, mesh) -> dict[str, Value]:
    """What `jax.jit(compiler_options=...)` takes for the devices of a mesh.

    Args:
      text: `train.compiler_options`: NAME=VALUE, comma separated; `auto` stands for those of the
        table. Of a name twice the last counts.

    Raises:
      ConfigError: the compiler does not know a name, or the value will not do for it.
    """
    device = next(  # of several processes one's own, which it can compile for
        (d for d in mesh.devices.flat if d.process_index == jax.process_index()),
        mesh.devices.flat[0],
    )
    found: dict[str, Value] = {}
    for part in names(text):
        name, _, value = part.partition("=")
        if part == "auto":
            found |= _of_table(device)
        else:
            found[name.strip()] = _value(value.strip())
            if trouble := _trouble(device, tuple(found.items())):
                raise ConfigError(f"train.compiler_options={text}: {trouble}")
    return found


def _value(text):
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text


@functools.cache
def _of_table(device) -> dict[str, Value]:
    """Those of the table that the compiler of a device takes."""
    options = hardware.options(device.device_kind)
    table: dict[str, Value] = {option.name: option.value for option in options}
    if not _trouble(device, tuple(table.items())):
        return table
    taken: dict[str, Value] = {}
    for name, value in table.items():
        trouble = _trouble(device, ((name, value), *taken.items()))
        if trouble:
            print(f"the compiler of {device.device_kind} does not take {name}: {trouble}",
                  file=sys.stderr)  # fmt: skip
        else:
            taken[name] = value
    return taken


@functools.cache
def _trouble(device, chosen: tuple[tuple[str, Value], ...]) -> str:
    """What a compiler says against some options; empty where it takes them."""
    if not chosen:
        return ""
    alone = jax.sharding.Mesh(np.array([device]), "device")
    place = jax.NamedSharding(alone, jax.P())
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=place)
    try:
        with jax.set_mesh(alone):  # a training run asks on a mesh of many
            jax.jit(lambda x: x).lower(scalar).compile(compiler_options=dict(chosen))
    except jax.errors.JaxRuntimeError as e:
        return re.sub(r"^[A-Z_]+: ", "", str(e).splitlines()[0])
    return ""
