"""The default experiment as a ConfigDict, straight from the schema."""

import ml_collections

from .schema import Config, to_dict


def get_config() -> ml_collections.ConfigDict:
    """Return every key at its default; experiments start from this and change some."""
    return ml_collections.ConfigDict(to_dict(Config()))
