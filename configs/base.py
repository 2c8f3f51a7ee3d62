"""The default experiment as a ConfigDict, straight from the schema."""

from typing import Any

import ml_collections

from .schema import Config, to_dict


# A ConfigDict, but its stubs say that a section could be None.
def get_config() -> Any:
    """Return every key at its default, as a `ConfigDict`; experiments change some."""
    return ml_collections.ConfigDict(to_dict(Config()))
