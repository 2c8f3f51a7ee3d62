"""Compile a step in a process of its own, whose time is limited, and remember what came of it.

What a compiler says of the same source, configuration, topology and versions is read from the
disk the second time (`~/.cache/puna/plans`, or below XDG_CACHE_HOME).
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

from ...configs import schema
from ...configs.errors import UserError
from ...configs.files import write_json
from ...models.parallel import sharding
from .. import ahead
from . import step
from .figures import Figure, plain

Compiled = dict[str, dict[str, Figure]]
# Host memory of one compile: the largest seen, of Maverick, took 4.6 GB.
_MOST = 6 * 10**9


def confirm(config: schema.Config, topology: str, seconds: float | None = None) -> Compiled | None:
    """`step.compiled`, from the disk or from another process; None where the time was too short.

    Raises:
      UserError: the compiler is not installed, or failed for another reason than memory.
    """
    order = {"config": schema.to_dict(config), "topology": topology}
    file = _folder() / f"{_key(order)}.json"
    if not file.exists():
        ahead.require(topology)
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, str(file)], input=json.dumps(order), text=True,
                capture_output=True, timeout=seconds, check=False, env=_environment(topology),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
        if not file.exists():
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise UserError(f"--topology={topology}: the compiler failed: {lines[-1][:300]}")
    told = json.loads(file.read_text(encoding="utf-8"))
    return {
        section: {name: Figure(**figure) for name, figure in figures.items()}
        for section, figures in told.items()
    }


def at_a_time() -> int:
    """Compiles that this machine has the memory and the processors for at one time."""
    try:
        text = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:  # no Linux
        return 1
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    free = int(found[1]) * 1024 if found else 0
    return max(1, min(free // _MOST, (os.cpu_count() or 1) // 2))


def _folder():
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "puna" / "plans"


def _environment(topology):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if ahead.parse(topology)[1] == "cpu":
        environment.pop("XLA_FLAGS", None)  # another number of devices
    return environment


def _key(order):
    versions = [importlib.metadata.version("jax")]
    for name in ("libtpu", "jax-cuda12-plugin"):
        try:
            versions.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            versions.append("")
    text = json.dumps([order, versions, _source()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _source():
    """A digest of the code that makes the step and reads what the compiler says."""
    root = pathlib.Path(__file__).parents[2]
    digest = hashlib.sha256()
    for folder in ("models", "train", "configs"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def main(file: str) -> None:
    """Compile what standard input says; write what came of it."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    order = json.loads(sys.stdin.read())
    config, topology = schema.from_dict(order["config"]), order["topology"]
    ahead.devices(topology)  # simulated ones have to be there before anything else
    mesh = sharding.abstract_mesh(config.mesh, ahead.count(topology))
    state = sum(map(sharding.bytes_per_device, ahead.abstract_inputs(config, mesh)))
    found = step.compiled(config, topology, state)
    pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_json(file, plain(found))


if __name__ == "__main__":
    main(sys.argv[1])
