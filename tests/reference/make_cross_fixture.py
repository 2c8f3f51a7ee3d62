"""Regenerate `cross.npz`: Hugging Face's Llama 3.2 Vision, and Meta's rule for what sees no image.

    pip install torch==2.13.0 transformers==5.23.0 safetensors pillow
    python tests/reference/make_cross_fixture.py

A tiny `MllamaForConditionalGeneration` in float32 with eager attention: its config.json, state
dict by the names of its files (`weight/NAME`), tokens of rows with none, one and several images of
one to four tiles, features, and logits, next-token loss and the gradient of every tensor by the
rule of `transformers` (`gradient/NAME`) and by Meta's (`meta_gradient/NAME`): a token that sees no
image gets nothing from attention to images either. In all of them the tower takes the outputs of
the layers that `intermediate_layers_indices` names, as this version does; Meta's code and older
versions take their inputs. The script switches features off in turn and
prints how far the logits move. `pictures_together.npz` is what `MllamaImageProcessorPil` makes of
pictures, and the canvas and size that it chooses for many more.
"""

import pathlib
import tempfile

import numpy as np
import safetensors
import torch
import transformers
from make_vision_fixture import picture
from transformers.models.mllama import image_processing_pil_mllama as pictures
from transformers.models.mllama import modeling_mllama as hf
from transformers.models.mllama import processing_mllama as processing

FIXTURE = pathlib.Path(__file__).parent / "media" / "cross.npz"
MAX_BYTES = 300_000
IMAGE, VOCAB = 43, 41
VISION = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "attention_heads": 2,
    "intermediate_size": 12,
    "vision_output_dim": 24,
    "image_size": 8,
    "patch_size": 4,
    "max_num_tiles": 4,
    "intermediate_layers_indices": [0, 1],
}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 12,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 14,
    "cross_attention_layers": [1, 3],
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
# Of each row: where its images are, and the numbers of their grids.
IMAGES = ([(3, 1)], [(1, 6), (2, 2), (14, 5)], [], [(4, 4), (9, 3)])
LENGTH = 22
TILES = [0, *(rows * columns for rows in range(1, 5) for columns in range(1, 4 // rows + 1))]


def build(seed):
    """Build the model with random weights large enough for each feature to matter."""
    config = transformers.MllamaConfig(
        vision_config=dict(VISION), text_config=dict(TEXT), image_token_index=IMAGE
    )
    config._attn_implementation = "eager"
    model = transformers.MllamaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        draw = torch.randn(tensor.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            tensor.copy_(1.0 + 0.2 * draw)
        elif "gate" in name and "proj" not in name:
            tensor.copy_(0.7 + 0.3 * draw)
        elif name.endswith("bias"):
            tensor.copy_(0.3 * draw)
        elif "embed" in name and "patch" not in name:
            tensor.copy_(0.7 * draw)
        else:
            sharp = 1.8 if "q_proj" in name or "k_proj" in name else 1.2
            tensor.copy_(sharp * tensor[0].numel() ** -0.5 * draw)
    return model


def file_name(name):
    """The name that a tensor has in the files."""
    for memory, file in (
        ("model.language_model.", "language_model.model."),
        ("model.", ""),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(memory):
            return file + name[len(memory) :]
    raise ValueError(name)


def inputs(seed):
    """Tokens, images, and the mask that the processor makes for them."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(VOCAB, size=(len(IMAGES), LENGTH))
    most, side = max(map(len, IMAGES)), VISION["image_size"]
    tiles = np.zeros((len(IMAGES), most, 4, 3, side, side), np.float32)
    grids = np.zeros((len(IMAGES), most), np.int64)
    there = np.zeros((len(IMAGES), most, 4), np.int64)
    there[..., 0] = 1  # of an image that is not there too
    for row, images in enumerate(IMAGES):
        for i, (place, grid) in enumerate(images):
            tokens[row, place] = IMAGE
            grids[row, i] = grid
            there[row, i, : TILES[grid]] = 1
            shape = (TILES[grid], 3, side, side)
            tiles[row, i, : TILES[grid]] = generator.normal(size=shape)
    sparse = [processing.get_cross_attention_token_mask(row.tolist(), IMAGE) for row in tokens]
    mask = processing.convert_sparse_cross_attention_mask_to_dense(
        sparse, [[TILES[grid] for _, grid in images] for images in IMAGES], 4, LENGTH
    )
    return {
        "input_ids": torch.tensor(tokens),
        "pixel_values": torch.tensor(tiles),
        "aspect_ratio_ids": torch.tensor(grids),
        "aspect_ratio_mask": torch.tensor(there),
        "cross_attention_mask": torch.tensor(mask),
    }


def by_metas_rule(model):
    """Let the attention of tokens that see no image give nothing."""
    for layer in model.model.language_model.layers:
        if isinstance(layer, hf.MllamaCrossAttentionDecoderLayer):
            attention, forward = layer.cross_attn, layer.forward

            def attend(*args, _attention=attention.forward, _layer=layer, **rest):
                out, weights = _attention(*args, **rest)
                return out * _layer.sees, weights

            def run(*args, _forward=forward, _layer=layer, **rest):
                _layer.sees = rest["full_text_row_masked_out_mask"][:, 0]
                return _forward(*args, **rest)

            attention.forward, layer.forward = attend, run


def run(model, given):
    """Logits, next-token loss over text and its gradients."""
    model.zero_grad()
    logits = model(**given, use_cache=False).logits
    targets = given["input_ids"][:, 1:].clone()
    targets[targets == IMAGE] = -100
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    loss.backward()
    grads = {file_name(n): p.grad.numpy().copy() for n, p in model.named_parameters()}
    return logits.detach().numpy(), loss.detach().numpy(), grads


def switches(model):
    """Features to switch off: what they are -> a function that does it."""
    tower, text = model.model.vision_model, model.model.language_model

    def constant(tensor, value=0.0):
        def apply():
            with torch.no_grad():
                tensor.fill_(value)

        return apply

    def layer_after_layer():
        width = VISION["hidden_size"]
        with torch.no_grad():
            weight = model.model.multi_modal_projector.weight
            part = weight[:, width:].reshape(len(weight), -1, width).transpose(1, 2)
            weight[:, width:] = part.reshape(len(weight), -1)

    layer = text.layers[1]
    return {
        "class token": constant(tower.class_embedding),
        "place in the grid, before": constant(tower.pre_tile_positional_embedding.gate),
        "place in the grid, after": constant(tower.post_tile_positional_embedding.gate),
        "place in tile and grid": constant(tower.gated_positional_embedding.gate),
        "gate of a global layer": constant(tower.global_transformer.layers[0].gate_ffn),
        "order of the layers' outputs": layer_after_layer,
        "bias of the projector": constant(model.model.multi_modal_projector.bias),
        "q_norm": constant(layer.cross_attn.q_norm.weight, 1.0),
        "k_norm": constant(layer.cross_attn.k_norm.weight, 1.0),
        "gate of attention": constant(layer.cross_attn_attn_gate, 5.0),
        "gate of the MLP": constant(layer.cross_attn_mlp_gate, 5.0),
    }


def main():
    """Write the file."""
    model, given = build(seed=0), inputs(seed=0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safetensors.safe_open(f"{folder}/model.safetensors", "pt") as file:
            assert set(file.keys()) == {file_name(name) for name in model.state_dict()}
        config = (pathlib.Path(folder) / "config.json").read_text(encoding="utf-8")
    with torch.no_grad():
        tower = model.model.vision_model(
            given["pixel_values"], given["aspect_ratio_ids"], given["aspect_ratio_mask"]
        ).last_hidden_state
        features = model.model.multi_modal_projector(tower)
    logits, loss, grads = run(model, given)
    other = build(seed=0)
    by_metas_rule(other)
    meta_logits, meta_loss, meta_grads = run(other, given)
    print(f"Meta's rule: logits move by {np.abs(meta_logits - logits).max():.2f}")
    arrays = {
        "config": np.array(config),
        "tokens": given["input_ids"].numpy().astype(np.int32),
        "tiles": given["pixel_values"].numpy(),
        "grids": given["aspect_ratio_ids"].numpy().astype(np.int32),
        "features": features.numpy(),
        "logits": logits,
        "loss": loss,
        "meta_logits": meta_logits,
        "meta_loss": meta_loss,
    }
    for name, tensor in model.named_parameters():
        arrays[f"weight/{file_name(name)}"] = tensor.detach().numpy()
    arrays |= {f"gradient/{name}": grad for name, grad in grads.items()}
    arrays |= {f"meta_gradient/{name}": grad for name, grad in meta_grads.items()}
    np.savez_compressed(FIXTURE, allow_pickle=False, **arrays)
    print(f"{FIXTURE.name}: {FIXTURE.stat().st_size} bytes")
    if FIXTURE.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{FIXTURE} is larger than {MAX_BYTES} bytes")
    for feature in switches(model):
        changed = build(seed=0)
        switches(changed)[feature]()
        with torch.no_grad():
            moved = changed(**given, use_cache=False).logits.numpy() - logits
        print(f"  without {feature}: logits move by {np.abs(moved).max():.4f}")


def make_pictures():
    """Write `pictures_together.npz`."""
    side, arrays = 16, {}
    processor = pictures.MllamaImageProcessorPil(
        size={"height": side, "width": side}, max_image_tiles=4,
        image_mean=transformers.image_utils.OPENAI_CLIP_MEAN,
        image_std=transformers.image_utils.OPENAI_CLIP_STD,
    )  # fmt: skip
    for height, width in [(16, 16), (7, 5), (40, 33), (16, 49), (100, 20), (30, 9), (12, 40)]:
        out = processor(picture(height, width), return_tensors="np")
        tiles = out["pixel_values"][0, 0].transpose(0, 2, 3, 1)
        arrays[f"tiles/{height}x{width}"] = tiles.astype(np.float16)
        arrays[f"number/{height}x{width}"] = out["aspect_ratio_ids"][0, 0]
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.uniform(0, np.log(5000), (300, 2))).astype(np.int64)
    sizes = np.concatenate([sizes, 560 * generator.integers(1, 6, (40, 2))])
    found = []
    for height, width in sizes.tolist():
        canvas = pictures.get_optimal_tiled_canvas(height, width, 4, 560)
        fitted = pictures.get_image_size_fit_to_canvas(height, width, *canvas, 560)
        found.append([height, width, *(int(side) // 560 for side in canvas), *map(int, fitted)])
    arrays["fits"] = np.array(found, np.int32)
    path = FIXTURE.parent / "pictures_together.npz"
    np.savez_compressed(path, allow_pickle=False, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    main()
    make_pictures()
