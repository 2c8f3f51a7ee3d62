"""The one Transformer behind every Llama.

    model = Transformer(config)
    out = model.apply({"params": params}, tokens_BT)
    out.logits_BTV

Layers are scanned in blocks of one period of the NoPE and MoE pattern, so compile time does not
grow with depth; layers that do not fill a period follow unscanned. What differs between Llamas
is data in `ModelConfig`.
"""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from ..configs.schema import ModelConfig
from . import bits, cross, tiled_vision, vision
from .attention import Attention
from .audio import Audio, AudioEncoder, no_audio
from .cache import Cache
from .cross import CrossAttention
from .fusion import Features, fuse
from .layers import Embed, RMSNorm, SwiGLU, Unembed, contract, gate, zeros
from .leaf import settle
from .masks import Tokens, default_tokens
from .moe import MoE, RouterSums, router_stats
from .parallel import context, pipeline, sharding
from .parallel.sharding import constrain
from .remat import rematerialized, stage_policy
from .summary import Summary, summarize
from .tiled_vision import TiledImages
from .vision import Images


class States(flax.struct.PyTreeNode):
    """What the layers give.

    hidden_BTD: the normed states that logits come from. cache: the new cache, if one went in.
    router: `RouterStats` of the MoE layers by scanned "blocks" (with a leading axis) and "tail",
    then by layer.
    """

    hidden_BTD: jax.Array
    cache: Cache | None
    router: dict


class Output(States):
    """What the model gives: `States`, and their logits_BTV in float32."""

    logits_BTV: jax.Array


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and a residual connection.

    Of a layer that attends to images both have gates, and change no token that sees none.
    """

    config: ModelConfig
    index: int

    @nn.compact
    def __call__(self, x_BTD, tokens, sight, cache):
        c, cross = self.config, self.config.is_cross(self.index)
        if cross and sight is None:  # nothing to see
            return x_BTD, cache, None
        h_BTD = RMSNorm(c, name="attention_norm")(x_BTD)
        h_BTD = constrain(h_BTD, "batch", "length", "act_embed")
        if cross:
            a_BTD, cache = CrossAttention(c, name="cross_attention")(h_BTD, sight, cache)
        else:
            attention = Attention(c, c.uses_rope(self.index), name="attention")
            a_BTD, cache = attention(h_BTD, tokens, cache)
        x_BTD = x_BTD + a_BTD
        h_BTD = RMSNorm(c, name="mlp_norm")(x_BTD)
        h_BTD = constrain(h_BTD, "batch", "length", "act_embed")
        if c.is_moe(self.index):
            y_BTD, sums = MoE(c, name="moe")(h_BTD, tokens)
        else:
            y_BTD, sums = SwiGLU(c, c.mlp_dim, name="mlp")(h_BTD), None
        if cross:
            y_BTD = gate(self, "mlp_gate_1", y_BTD, zeros, c)
            y_BTD = jnp.where(sight.sees_BT[..., None], y_BTD, 0)
        return x_BTD + y_BTD, cache, sums


class Block(nn.Module):
    """The first `num_layers` layers of one period; caches pass through, changed in place."""

    config: ModelConfig
    num_layers: int

    @nn.compact
    def __call__(self, carry, index, tokens, sight):
        x_BTD, caches = carry
        # One layer at a time is computed again, not a whole period.
        layer = rematerialized(Layer, self.config)
        new, router = {}, {}
        for j in range(self.num_layers):
            name = f"layer_{j}"
            cache = None if caches is None else caches[name]
            cache = None if cache is None else cache.replace(layer=index)
            x_BTD, cache, sums = layer(self.config, j, name=name)(x_BTD, tokens, sight, cache)
            new[name] = None if cache is None else cache.replace(layer=None)
            if sums is not None:
                router[name] = sums
        return (x_BTD, None if caches is None else new), router


class Transformer(nn.Module):
    """Every Llama; see the module's docstring."""

    config: ModelConfig

    def __call__(self, tokens_BT, positions_BT=None, segment_ids_BT=None, cache=None,
                 images: Images | TiledImages | Features | None = None,
                 audio: Audio | Features | None = None) -> Output:  # fmt: skip
        """Predict the token after each of `tokens_BT`.

        Args:
          tokens_BT: int ids; one outside the vocabulary gives NaN logits.
          positions_BT: positions in their document; counted from 0, or on from the cache.
          segment_ids_BT: document of each token, 0 for padding; no attention across. All 1 when
            left out. With a cache each row is one document and only 0 matters.
          cache: from `init_cache` or an earlier call; the new one is in the output.
          images: tiles, whose features take the place of the tokens `vision.token_id` of their row
            in order, or those features from `vision.encode_images`. With `model.cross` those of
            `tiled_vision`, one token an image; a cache keeps what layers need of them, so only
            the first call has them.
          audio: likewise for `audio.token_id`.
        """
        states = self.states(tokens_BT, positions_BT, segment_ids_BT, cache, images, audio)
        logits_BTV = self.logits(states.hidden_BTD)
        return Output(states.hidden_BTD, states.cache, states.router, logits_BTV)

    @nn.nowrap
    def summary(self, mesh=None) -> Summary:
        """Return a table of the parameters: shape, place on the mesh, count and memory."""
        return summarize(self.config, abstract_params(self.config), mesh)

    def logits(self, hidden_BTD):
        """`unembed` with the parameters of this model."""
        return unembed(self.config, nn.meta.unbox(self.variables["params"]), hidden_BTD)

    @nn.compact
    def states(self, tokens_BT, positions_BT=None, segment_ids_BT=None, cache=None,
               images: Images | TiledImages | Features | None = None,
               audio: Audio | Features | None = None) -> States:  # fmt: skip
        """All but the logits, with the arguments of `__call__`.

        Training and the prefill of a prompt need no logits, or few of them at a time (`unembed`).
        """
        c = self.config
        tokens_BT = jnp.asarray(tokens_BT)
        default = default_tokens(tokens_BT.shape)
        segments_BT = default.segments_BT if segment_ids_BT is None else segment_ids_BT
        if cache is not None:
            segments_BT = (segments_BT != 0).astype(jnp.int32)
        if positions_BT is None:
            positions_BT = default.positions_BT
            if cache is not None:
                positions_BT = positions_BT + cache.lengths_B[:, None]
        tokens = Tokens(positions_BT, segments_BT)
        caches = {} if cache is None else cache.layers
        new, router = {}, {}

        x_BTD = Embed(c, name="embed")(tokens_BT)
        if self.is_initializing():  # all parameters, used here or not
            if not c.tie_embeddings:
                Unembed(c, name="unembed")()
            if c.vision.num_layers and images is None:
                empty = tiled_vision.no_images if c.cross.interval else vision.no_images
                images = empty(c.vision, len(tokens_BT))
            if c.audio.num_layers and audio is None:
                audio = no_audio(c.audio, len(tokens_BT))
        tower = tiled_vision.TileEncoder if c.cross.interval else vision.VisionEncoder
        sight, seen = None, None if cache is None else cache.seen
        for name, encoder, token_id, media in (
            ("vision", tower, c.vision.token_id, images),
            ("audio", AudioEncoder, c.audio.token_id, audio),
        ):
            features = media
            if media is not None and not isinstance(media, Features):
                features = encoder(c, name=name)(media)
            if name == "vision" and c.cross.interval:
                if features is not None or seen is not None:
                    sight, seen = cross.look(c, tokens_BT, segments_BT, features, seen)
            elif features is not None:
                x_BTD = fuse(x_BTD, tokens_BT, token_id, features)
        if cache is None:
            # Attention to a cache looks tokens up by position; without one, order is of use.
            x_BTD = context.to_zigzag(x_BTD)
            tokens = jax.tree.map(context.to_zigzag, tokens).replace(
                zigzag=context.devices(x_BTD.shape[1]) > 1
            )
            sight = None if sight is None else cross.to_zigzag(sight)
        x_BTD = constrain(x_BTD, "batch", "residual_length", "act_embed")
        blocks, rest = divmod(c.num_layers, c.period)
        stages = sharding.parts("layers")
        if blocks and stages > 1 and cache is None and not self.is_initializing():
            x_BTD, router["blocks"] = pipeline.run(
                self._block, self.variables["params"]["blocks"], x_BTD, (tokens, sight),
                c.pipeline_microbatches, stage_policy(c),
            )  # fmt: skip
        elif blocks:
            scan = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=blocks,
                metadata_params={nn.meta.PARTITION_NAME: "layers"},
            )
            index = None if cache is None else jnp.arange(blocks)
            (x_BTD, new["blocks"]), router["blocks"] = scan(c, c.period, name="blocks")(
                (x_BTD, caches.get("blocks")), index, tokens, sight
            )
        if rest:
            tail = Block(c, rest, name="tail")
            (x_BTD, new["tail"]), router["tail"] = tail(
                (x_BTD, caches.get("tail")), None, tokens, sight
            )

        if tokens.zigzag:
            x_BTD = context.from_zigzag(x_BTD)
        hidden_BTD = RMSNorm(c, name="norm")(x_BTD)
        if cache is not None:
            lengths_B = cache.lengths_B + jnp.sum(segments_BT != 0, axis=1, dtype=jnp.int32)
            cache = Cache(new, lengths_B, seen)
        router = jax.tree.map(
            lambda sums: router_stats(sums, c), router, is_leaf=lambda x: isinstance(x, RouterSums)
        )
        return States(hidden_BTD, cache, router)

    def _block(self, params, x_BTD, inputs):
        """One block on its own, for the pipeline, which has a policy for whole ticks."""
        config = dataclasses.replace(self.config, remat="none")
        block = Block(config, config.period, parent=None)
        (x_BTD, _), sums = block.apply({"params": params}, (x_BTD, None), None, *inputs)
        return x_BTD, sums


def unembed_table(config: ModelConfig, params):
    """The output projection [D, V] of a parameter tree, a leaf of any kind."""
    if config.tie_embeddings:
        return bits.unpack(params["embed"]["table_VD"]).T
    return settle(bits.unpack(params["unembed"]["table_DV"]))


def unembed(config: ModelConfig, params, hidden_BTD):
    """Logits of normed states, in float32: rounding would cost what accumulating in it has won."""
    table, spec = unembed_table(config, params), "BTD,DV->BTV"
    if config.tie_embeddings and isinstance(table, jax.Array):
        # As it lies: XLA for CPUs would make one product of its gradient in bfloat16 and the
        # transposition, which it then cannot run.
        table, spec = bits.unpack(params["embed"]["table_VD"]), "BTD,VD->BTV"
    one_row = hidden_BTD.shape[:2] == (1, 1) and not sharding.split_axes()
    if one_row and bits.dtype(config.activation_dtype) != config.activation_dtype:
        # XLA of jax 0.12 for CPUs multiplies one row with a float32 copy of the table, which it
        # makes at every token, and two rows with the table itself.
        hidden_BTD = jnp.concatenate([hidden_BTD, hidden_BTD])
    logits_BTV = contract(spec, hidden_BTD, table, config.activation_dtype, "float32")
    logits_BTV = logits_BTV[:1] if one_row else logits_BTV
    return constrain(logits_BTV, "batch", "length", "act_vocab")


def abstract_params(config: ModelConfig):
    """Shapes, dtypes and logical dim names of every parameter, computing nothing.

    Returns:
      The tree of boxed `ShapeDtypeStruct`s: `sharding.unbox` and `sharding.shardings` read it.
    """
    leaves, tree = _abstract(config)
    return jax.tree.unflatten(tree, leaves)


@functools.cache
def _abstract(config: ModelConfig):
    # On no mesh: what is remembered must not be of one. Tracing a model takes a good second.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return jax.tree.flatten(jax.eval_shape(lambda key: _init(config, key), jax.random.key(0)))


def _init(config, key):
    # Any shape would do, were the activations of the current mesh not to be split evenly.
    n = max(1, jax.sharding.get_abstract_mesh().size)
    return Transformer(config).init(key, jnp.zeros((n, n), jnp.int32))["params"]


def init_params(config: ModelConfig, key, mesh):
    """Random parameters, each created where it lies on the mesh; the same on any mesh."""
    return _initializer(config, mesh)(key)


@functools.lru_cache(maxsize=16)
def _initializer(config: ModelConfig, mesh):
    out = sharding.shardings(abstract_params(config), mesh)
    return jax.jit(lambda key: sharding.unbox(_init(config, key)), out_shardings=out)


def count_params(config: ModelConfig) -> int:
    """Exact number of parameters, computing nothing."""
    return sum(x.size for x in jax.tree.leaves(sharding.unbox(abstract_params(config))))
