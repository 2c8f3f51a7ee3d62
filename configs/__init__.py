"""What to run: `get_config("llama3:8b")` gives a locked ConfigDict; `schema` holds every key."""

import importlib.util
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from . import paths, schema
from .errors import ConfigError

if TYPE_CHECKING:
    import ml_collections

_FOLDER = pathlib.Path(__file__).parent
_NOT_EXPERIMENTS = {
    "__init__",
    "architecture",
    "base",
    "command_line",
    "display",
    "errors",
    "fields",
    "files",
    "paths",
    "patterns",
    "rules",
    "schema",
    "storage",
}


def names() -> list[str]:
    """The packaged experiments."""
    return sorted(_files())


def _files() -> dict[str, pathlib.Path]:
    paths = [*_FOLDER.glob("*.py"), *(_FOLDER / "recipes").glob("*.py")]
    return {p.stem: p for p in paths if p.stem not in _NOT_EXPERIMENTS}


def find(name: str) -> tuple[pathlib.Path, str | None]:
    """The config file and variant that `NAME_OR_FILE[:VARIANT]` means.

    Raises:
      ConfigError: there is no such packaged experiment or file.
    """
    if paths.is_url(name):  # and not a variant
        paths.local(name, "--config")
    stem, colon, variant = name.partition(":")
    if path := _files().get(stem):
        return path, variant if colon else None
    if stem.endswith(".py") and (path := paths.local(stem, "--config")).is_file():
        return path, variant if colon else None
    raise ConfigError(
        f"--config={name} must be one of {', '.join(names())}, or a config file (.py)"
    )


def get_config(name: str, overrides: Iterable[str] = ()) -> "ml_collections.ConfigDict":
    """Load an experiment, as `--config=NAME` does.

    Args:
      name: a packaged experiment or the path of a config file, with an optional `:variant`.
      overrides: `KEY=VALUE` texts, as `--config.KEY=VALUE` changes values on the command line.

    Returns:
      A locked `ConfigDict`: values can be changed, keys cannot be added.

    Raises:
      ConfigError: the name, the variant, a key or the type of a value is wrong.
    """
    import ml_collections

    path, variant = find(name)
    spec = importlib.util.spec_from_file_location(f"puna_config_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if variant is None else module.get_config(variant)
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(f"--config={name}: {type(e).__name__}: {str(e).splitlines()[0]}") from e
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"--config={name}: get_config() must return a ConfigDict")
    for override in overrides:
        key, equals, text = override.partition("=")
        value = schema.parse(key, text)
        if not equals:
            raise ConfigError(f"{key} must be KEY=VALUE")
        with config.unlocked():
            config.update_from_flattened_dict({key: value})
    return config.lock()
