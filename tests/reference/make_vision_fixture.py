"""Regenerate `vision.npz` and `pictures.npz`: Hugging Face's image encoder and image processor.

    pip install torch==2.13.0 torchvision==0.28.0 transformers==5.23.0 pillow
    python tests/reference/make_vision_fixture.py

`vision.npz` is a tiny `Llama4ForConditionalGeneration` in float64 with eager attention, stored in
float32: its config.json, state dict (`weight/NAME`), tokens of rows with none, one and several
images, tiles in row order, output of the tower, projected features, logits, next-token loss and the
gradient of every tensor (`gradient/NAME`). Logits of one evaluation in float32, by torch or XLA,
are 3e-6 to 8e-6 of the largest from these. The script switches features of the tower off in turn
and prints how far the logits move. `pictures.npz` holds what `Llama4ImageProcessor` makes of
pictures, and the log-mel frames that `WhisperFeatureExtractor` makes of a clip.
"""

import pathlib

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.llama4 import image_processing_llama4, modeling_llama4

FIXTURES = pathlib.Path(__file__).parent / "media"
MAX_BYTES = 300_000

VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,  # the adapter reads this many, so it is four times the width
    "image_size": 12,
    "patch_size": 2,
    "projector_input_dim": 20,
    "projector_output_dim": 20,
    "vision_output_dim": 20,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
PATCH = 37
TEXT = {
    "vocab_size": 41,
    "hidden_size": 12,
    "intermediate_size": 8,
    "intermediate_size_mlp": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 16,
    "use_qk_norm": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 200.0},
}
# Tiles of each row; the text of a row is cut into as many runs of patches and one more piece.
TILES = (2, 0, 1, 3)
LENGTH = 40


def build(seed):
    """Build the model with random weights large enough for each feature to matter."""
    config = transformers.Llama4Config(
        vision_config=dict(VISION), text_config=dict(TEXT), image_token_index=PATCH
    )
    config._attn_implementation = "eager"
    model = transformers.Llama4ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        draw = torch.randn(tensor.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            tensor.copy_(1.0 + 0.2 * draw)
        elif name.endswith("bias"):
            tensor.copy_(0.3 * draw)
        elif "embedding_vlm" in name or "class_embedding" in name or "embed_tokens" in name:
            tensor.copy_(0.7 * draw)
        else:
            sharp = 1.6 if "q_proj" in name or "k_proj" in name else 1.2
            tensor.copy_(sharp * tensor.shape[1] ** -0.5 * draw)
    return model


def in_float64(model):
    """The same model, computing in float64; its rotations are complex numbers."""
    rope = model.vision_model.rotary_embedding
    rotations = rope.freqs_ci
    model = model.double()
    rope.freqs_ci = rotations.to(torch.complex128)
    return model


def rows(per_tile, seed):
    """Draw rows of text with runs of patch tokens between, several images in some."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(PATCH, size=(len(TILES), LENGTH)).astype(np.int64)
    for row, tiles in enumerate(TILES):
        gap = (LENGTH - tiles * per_tile) // (tiles + 1)
        for i in range(tiles):
            start = (i + 1) * gap + i * per_tile
            tokens[row, start : start + per_tile] = PATCH
    return torch.tensor(tokens)


def switches(model):
    """Features of the tower to switch off: what they are -> a function that does it."""
    tower = model.vision_model
    rope = tower.rotary_embedding

    def angles(change):
        def apply():
            rope.freqs_ci = change(rope.freqs_ci.clone())

        return apply

    def from_zero(freqs):  # all patches one step back, the class token stays
        freqs[:-1] *= freqs[:1].conj()
        return freqs

    def swapped(freqs):
        half = freqs.shape[-1] // 2
        return torch.cat([freqs[..., half:], freqs[..., :half]], dim=-1)

    def class_first():
        original = tower.model.forward

        def forward(hidden_states, freqs_ci, **rest):
            # The last patch is then dropped in the place of the class token.
            states = torch.roll(hidden_states, 1, dims=1)
            return original(states, freqs_ci=torch.roll(freqs_ci, 1, dims=0), **rest)

        tower.model.forward = forward

    def constant(tensor, value):
        def apply():
            with torch.no_grad():
                tensor.fill_(value)

        return apply

    def order():
        original = modeling_llama4.pixel_shuffle

        def columns_first(x, ratio):
            side = int(x.shape[1] ** 0.5)
            x = x.reshape(len(x), side, side, -1).transpose(1, 2).reshape(x.shape)
            x = original(x, ratio)
            return x.reshape(len(x), side // 2, side // 2, -1).transpose(1, 2).reshape(x.shape)

        modeling_llama4.pixel_shuffle = columns_first

    def tanh():
        for module in model.modules():
            if isinstance(module, torch.nn.GELU):
                module.approximate = "tanh"

    return {
        "positions counted from 1": angles(from_zero),
        "columns before rows": angles(swapped),
        "rope": angles(torch.ones_like),
        "class token last": class_first,
        "class token": constant(tower.class_embedding, 0.0),
        "learned positions": constant(tower.positional_embedding_vlm, 0.0),
        "key bias": constant(tower.model.layers[0].self_attn.q_proj.bias, 0.0),
        "layernorm_pre bias": constant(tower.layernorm_pre.bias, 0.0),
        "layernorm_post scale": constant(tower.layernorm_post.weight, 1.0),
        "(dy, dx, c) order of the shuffle": order,
        "erf in GELU": tanh,
    }


def make_model(seed):
    """Write `vision.npz`."""
    model = in_float64(build(seed))
    per_tile = (VISION["image_size"] // VISION["patch_size"] // 2) ** 2
    tokens = rows(per_tile, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    side = VISION["image_size"]
    tiles = 2.0 * torch.rand((sum(TILES), 3, side, side), generator=generator) - 1.0
    tiles = tiles.double()
    tower = model.vision_model(tiles).last_hidden_state
    projected = model.multi_modal_projector(tower)
    out = model(input_ids=tokens, pixel_values=tiles, use_cache=False)
    logits = out.logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    arrays = {
        "config": np.array(model.config.to_json_string()),
        "tokens": tokens.numpy().astype(np.int32),
        "num_tiles": np.array(TILES, np.int32),
    }
    found = {"tiles": tiles, "tower": tower, "projected": projected, "logits": logits, "loss": loss}
    for name, tensor in model.named_parameters():
        found |= {f"weight/{name}": tensor, f"gradient/{name}": tensor.grad}
    arrays |= {name: x.detach().float().numpy() for name, x in found.items()}
    save("vision", arrays)
    shuffle = modeling_llama4.pixel_shuffle
    for feature in switches(model):
        other = in_float64(build(seed))
        switches(other)[feature]()
        with torch.no_grad():
            moved = other(input_ids=tokens, pixel_values=tiles, use_cache=False).logits
        modeling_llama4.pixel_shuffle = shuffle
        moved = (moved - logits).detach().abs()
        print(
            f"  without {feature}: logits move by {moved.max():.4f}, {moved.mean():.4f} on average"
        )


def picture(height, width):
    """Draw a picture of smooth waves and hard edges from a formula that the tests repeat."""
    y, x = np.mgrid[:height, :width]
    waves = [127.5 + 100 * np.sin(x / (5 + 3 * c) + y / (9 - 2 * c)) for c in range(3)]
    edges = 27.0 * (((x // 11) + (y // 7)) % 2)[..., None]
    return Image.fromarray(np.clip(np.stack(waves, axis=-1) + edges, 0, 255).astype(np.uint8))


def make_pictures():
    """Write `pictures.npz`."""
    arrays = {}
    side, most = 16, 5
    processor = image_processing_llama4.Llama4ImageProcessor(
        size={"height": side, "width": side}, max_patches=most
    )
    for height, width in [(16, 16), (7, 5), (40, 33), (16, 49), (100, 20), (1, 30), (200, 210)]:
        out = processor(picture(height, width), return_tensors="pt")
        levels = torch.round((out["pixel_values"].float() + 1) * 127.5)
        arrays[f"tiles/{height}x{width}"] = levels.numpy().astype(np.uint8).transpose(0, 2, 3, 1)
        arrays[f"grid/{height}x{width}"] = out["aspect_ratios"][0].numpy()
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.uniform(0, np.log(5000), (400, 2))).astype(np.int64)
    sizes = np.concatenate([sizes, 336 * generator.integers(1, 6, (60, 2))])
    canvases = torch.tensor(
        image_processing_llama4.find_supported_resolutions(
            16, transformers.image_utils.SizeDict(height=336, width=336)
        )
    )
    found = []
    for height, width in sizes.tolist():
        canvas = image_processing_llama4.get_best_fit((height, width), canvases).tolist()
        target = [min(max(s, 336), c) for s, c in zip((height, width), canvas, strict=True)]
        fitted = image_processing_llama4.get_max_res_without_distortion((height, width), target)
        grid = [side // 336 for side in canvas]
        found.append([height, width, *grid, *(max(f, 1) for f in fitted)])
    arrays["fits"] = np.array(found, np.int32)

    time = np.arange(9000) / 16000
    clip = 0.3 * np.sin(2 * np.pi * (200 + 3000 * time) * time) + 0.01 * generator.normal(size=9000)
    clip = clip.astype(np.float32)
    whisper = transformers.WhisperFeatureExtractor(feature_size=80)
    arrays["clip"] = clip
    arrays["log_mel"] = whisper(clip, sampling_rate=16000, padding=False)["input_features"][0].T
    save("pictures", arrays)


def save(name, arrays):
    FIXTURES.mkdir(exist_ok=True)
    path = FIXTURES / f"{name}.npz"
    np.savez_compressed(path, allow_pickle=False, **arrays)
    print(f"{name}: {path.stat().st_size} bytes")
    if path.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{path} is larger than {MAX_BYTES} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    make_model(seed=0)
    make_pictures()
