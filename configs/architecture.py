"""The keys of the architecture: `ModelConfig` and its encoders. `schema.py` has the others."""

import dataclasses
import math

from .fields import Only, key, section
from .patterns import are_rising
from .rules import POSITIVE, Rule, at_least, more_than, one_of

EVEN = Rule("be an even number of at least 2", lambda v: v >= 2 and v % 2 == 0)
RISING = Rule("be rising numbers, comma separated", are_rising)
DTYPE = one_of("float32", "bfloat16")
EIGHT_BITS = ("float8", "int8")
COMPUTE = one_of("float32", "bfloat16", *EIGHT_BITS)
MOE = Only("model.moe_interval")
CROSS = Only("model.cross.interval")


def activation_dtype(compute_dtype: str) -> str:
    """What activations are in where products are in `compute_dtype`."""
    return "bfloat16" if compute_dtype in EIGHT_BITS else compute_dtype


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The image encoder of Llama 4 or, with `model.cross`, 3.2; `num_layers=0` leaves it out."""

    num_layers: int = key(0, "layers of the encoder; 0 = text only", at_least(0))
    embed_dim: int = key(1408, "width of the encoder", POSITIVE)
    num_heads: int = key(16, "attention heads", POSITIVE)
    mlp_dim: int = key(5632, "hidden width of the encoder's MLP", POSITIVE)
    image_size: int = key(336, "side of a square tile, pixels", POSITIVE)
    patch_size: int = key(14, "side of a square patch, pixels", POSITIVE)
    adapter_dim: int = key(4096, "width of the adapter after the pixel shuffle", POSITIVE)
    max_tiles: int = key(16, "most tiles an image is cut into, the global tile apart", POSITIVE)
    token_id: int = key(
        200092, "id of the token that a patch embedding replaces, or of an image", at_least(0)
    )
    global_layers: int = key(0, "gated layers after those, at least 1", at_least(0), CROSS)
    intermediate_layers: str = key(
        "", "layers whose inputs are features too, counted from 0, comma separated", RISING, CROSS
    )
    extra_rows: int = key(0, "rows of the embedding after vocab_size, never predicted",
                          at_least(0), CROSS)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CrossConfig:
    """Layers that attend to images and not to the text (Llama 3.2 Vision); `interval=0`: none."""

    interval: int = key(0, "every n-th layer attends to images; 0 = none", at_least(0))
    first: int = key(0, "the first of these layers, counted from 0", at_least(0), CROSS)
    imageless: bool = key(
        False, "a token that sees no image attends to all of its row, as in transformers", None,
        CROSS,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """The log-mel encoder, our own: no public Llama has one. `num_layers=0` leaves it out."""

    num_layers: int = key(0, "layers of the encoder; 0 = no audio", at_least(0))
    embed_dim: int = key(512, "width of the encoder", POSITIVE)
    num_heads: int = key(8, "attention heads", POSITIVE)
    mlp_dim: int = key(2048, "hidden width of the encoder's MLP", POSITIVE)
    num_mels: int = key(80, "mel bands of a frame; frames are 10 ms apart", POSITIVE)
    frames_per_token: int = key(8, "log-mel frames stacked into one token", POSITIVE)
    max_tokens: int = key(375, "most audio tokens of one clip", POSITIVE)
    token_id: int = key(200093, "id of the token that an audio embedding replaces", at_least(0))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture. A difference between Llamas is data here, never another class."""

    vocab_size: int = key(8192, "rows of the embedding", POSITIVE)
    embed_dim: int = key(256, "width of the residual stream", POSITIVE)
    num_layers: int = key(6, "decoder layers", POSITIVE)
    num_heads: int = key(8, "query heads", POSITIVE)
    num_kv_heads: int = key(4, "key and value heads; divides num_heads", POSITIVE)
    head_dim: int = key(32, "width of a head", EVEN)
    mlp_dim: int = key(704, "hidden width of a dense SwiGLU", POSITIVE)
    norm_eps: float = key(1e-5, "epsilon of every RMSNorm", more_than(0))
    tie_embeddings: bool = key(False, "output projection = embedding")
    attention_bias: str = key("none", "biases of attention: of q, k and v, or of the output too",
                              one_of("none", "qkv", "all"))  # fmt: skip
    mlp_bias: bool = key(False, "biases of the dense SwiGLU")
    max_positions: int = key(8192, "longest context the model is meant for, tokens", POSITIVE)

    rope_theta: float = key(500000.0, "base of the rotary frequencies", more_than(0))
    rope_scaling_factor: float = key(1.0, "Llama 3.1 frequency scaling; 1 = none", at_least(1.0))
    rope_low_freq_factor: float = key(1.0, "start of the scaled band", more_than(0))
    rope_high_freq_factor: float = key(4.0, "end of the scaled band", more_than(0))
    rope_ramp: str = key("periods", "the band is crossed by periods (Llama 3.1), dims or rounded "
                         "dims (YaRN)", one_of("periods", "dims", "rounded_dims"))  # fmt: skip
    rope_attention_factor: float = key(1.0, "YaRN's factor on q and on k", more_than(0))
    rope_original_positions: int = key(8192, "context before scaling, tokens", POSITIVE)
    nope_interval: int = key(0, "every n-th layer has no RoPE and sees all; 0 = none", at_least(0))
    chunk_size: int = key(0, "RoPE layers attend within chunks of n; 0 = all", at_least(0))
    temperature_scale: float = key(0.0, "query temperature of NoPE layers; 0 = off", at_least(0))
    temperature_floor: int = key(8192, "positions per temperature step", POSITIVE)
    qk_norm: bool = key(False, "weightless RMSNorm of q and k after RoPE")

    moe_interval: int = key(0, "every n-th layer is mixture-of-experts; 0 = dense", at_least(0))
    num_experts: int = key(0, "routed experts of an MoE layer", at_least(0))
    experts_per_token: int = key(1, "routed experts a token goes to", POSITIVE)
    expert_dim: int = key(0, "hidden width of an expert, routed or shared", at_least(0))
    shared_expert: bool = key(True, "one more expert that every token goes to")
    router: str = key("sigmoid", "score", one_of("sigmoid", "softmax", "expert_choice"), MOE)
    capacity_factor: float = key(
        0.0, "rows an expert takes / even share; 0 = all", at_least(0), MOE
    )
    load_balance_weight: float = key(0.0, "weight of the load-balancing loss", at_least(0), MOE)
    router_z_weight: float = key(0.0, "weight of the router z-loss", at_least(0), MOE)
    bias_update_rate: float = key(
        0.0, "step of loss-free bias balancing; 0 = off", at_least(0), MOE
    )

    compute_dtype: str = key(
        "bfloat16", "matmul operands and activations; 8 bits: layers' matmuls alone", COMPUTE
    )
    param_dtype: str = key(
        "float32", "stored parameters; beside bfloat16 the optimizer keeps float32 ones", DTYPE
    )
    remat: str = key("none", "what the backward pass recomputes", one_of("none", "dots", "full"))
    pipeline_microbatches: int = key(0, "parts of a batch in the pipeline; 0 = one a stage",
                                     at_least(0))  # fmt: skip

    vision: VisionConfig = section(VisionConfig)
    cross: CrossConfig = section(CrossConfig)
    audio: AudioConfig = section(AudioConfig)

    @property
    def period(self) -> int:
        """Layers after which the pattern of unlike layers repeats: one scan body."""
        return math.lcm(
            self.nope_interval or 1, self.moe_interval or 1, self.cross.interval or 1
        )  # fmt: skip

    @property
    def activation_dtype(self) -> str:
        """Of activations, and of all products but the large ones of the layers."""
        return activation_dtype(self.compute_dtype)

    @property
    def embedding_rows(self) -> int:
        """Ids that the model reads; it predicts the first `vocab_size` of them."""
        return self.vocab_size + self.vision.extra_rows

    def uses_rope(self, layer: int) -> bool:
        return not self.nope_interval or (layer + 1) % self.nope_interval != 0

    def is_moe(self, layer: int) -> bool:
        return bool(self.moe_interval) and (layer + 1) % self.moe_interval == 0

    def is_cross(self, layer: int) -> bool:
        interval = self.cross.interval
        return bool(interval) and layer % interval == self.cross.first
