"""Settings of every test: eight CPU devices, a compile cache, one Hypothesis profile.

JAX reads its environment when it is first imported, so this file sets it and imports no JAX.
"""

import contextlib
import gc
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

from puna.models.hardware import known_xla_flags

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
SLOW = pytest.StashKey[bool]()  # whether the test that runs is a slow one

assert "jax" not in sys.modules, "a pytest plugin imported jax before the tests could set it up"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        *known_xla_flags(
            "--xla_force_host_platform_device_count=8",
            # Tests compile far more than they compute: twice as fast, and still the same
            # arithmetic. The slow tests that run `puna` in a process of its own take the usual
            # optimizations.
            "--xla_backend_optimization_level=0",
            "--xla_cpu_use_fusion_emitters=false",
            # One LLVM module a program; several only let more cores compile it.
            "--xla_cpu_parallel_codegen_split_count=1",
            # Eight simulated devices take turns on few cores: a late one is slow, not stuck.
            "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
            "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        ),
    )
).strip()
# Compiling is most of what the suite does. Workers, subprocesses and later runs share the results.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ["XDG_CACHE_HOME"] = str(CACHE)  # what is known of data files, and fonts
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Read when gcsfs is imported, which else asks the real service of what type a bucket is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

# No deadline: the first example of each shape compiles. In CI the examples are always the same.
set_hypothesis_home_dir(str(CACHE / "hypothesis"))
settings.register_profile("puna", max_examples=20, deadline=None)
settings.register_profile("ci", settings.get_profile("puna"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "puna")

# Traces are many small objects that live long: Python would look through them again and again.
gc.set_threshold(50_000, 10, 10)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drop compiled programs before a process has as many memory maps as Linux allows (65,530)."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.config.stash[SLOW] = item.get_closest_marker("slow") is not None


@pytest.fixture(scope="session", autouse=True)
def one_device(request):
    """A mesh of which nothing is said has one device in fast tests: those of meshes say theirs.

    A program for eight devices takes half as long again to compile, and eight turns to run.
    """
    from puna.models.parallel import sharding

    make_mesh = sharding.make_mesh

    def make(config, devices=None):
        if devices is None and config == type(config)() and not request.config.stash[SLOW]:
            devices = sys.modules["jax"].devices()[:1]
        return make_mesh(config, devices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", make)
        yield


@pytest.fixture(scope="session")
def one_line():
    """Context in which a user's mistake may be found, if one line says what it is."""
    from puna.configs.errors import UserError

    @contextlib.contextmanager
    def mistake():
        try:
            yield
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 2000

    return mistake


class RootIsNoTestPackage:
    """Keep pytest from importing the root's `__init__.py` under the name of the clone's folder.

    In a clone called `tree`, say, `import tree` would then give puna to whoever wants dm-tree.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config):
    # As a plugin, since pytest does not ask a conftest.py about the folders above it.
    config.pluginmanager.register(RootIsNoTestPackage())
