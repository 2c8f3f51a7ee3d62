"""What the gradient of a scanned layer finds saved, and what it computes again."""

import jax
from flax import linen as nn

from ..configs.schema import ModelConfig
from .parallel import pipeline

# What `layers.contract` calls its results: JAX's own policies do not see products that have a
# gradient rule of their own.
PRODUCT = "product"

# Results of products with weights only, or layer inputs only.
REMAT = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stage_policy(config: ModelConfig):
    """The same for a tick of the pipeline, which never saves the weights it uses."""
    if config.remat == "none":
        return pipeline.save_all_but_slices
    return REMAT[config.remat]


def rematerialized(layer: type[nn.Module], config: ModelConfig) -> type[nn.Module]:
    """The module class `layer`, to be scanned, under the policy of `config.remat`."""
    if config.remat == "none":
        return layer
    return nn.remat(layer, policy=REMAT[config.remat], prevent_cse=False)
