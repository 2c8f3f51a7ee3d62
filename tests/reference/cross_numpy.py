"""Llama 3.2 Vision by Meta's rule in plain NumPy, float64, one row at a time, by file names.

Written from the published description and not from puna's code: loops over layers, tiles and
tokens, masks written out. `imageless` follows Hugging Face in what a token that sees no image
attends to.
"""

import math

import numpy as np

ERF = np.vectorize(math.erf)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x, w, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def attend(q, k, v, seen):
    """q [T, N, H], k and v [S, K, H], seen [T, S]; a row that sees nothing gives nothing."""
    out = np.zeros_like(q)
    groups = q.shape[1] // k.shape[1]
    for n in range(q.shape[1]):
        scores = q[:, n] @ k[:, n // groups].T / math.sqrt(q.shape[-1])
        for t in np.flatnonzero(seen.any(1)):
            out[t, n] = softmax(scores[t, seen[t]]) @ v[seen[t], n // groups]
    return out


def grid_of(number, most):
    grids = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    return grids[number - 1] if number else (0, 0)


def encode(config, w, tiles, number):
    """Features [tiles, patches + 1, width] of one image: tiles [I, 3, Y, X], number of its grid."""
    v = config["vision_config"]
    D, N, p, most = v["hidden_size"], v["attention_heads"], v["patch_size"], v["max_num_tiles"]
    rows, columns = grid_of(number, most)
    count = max(1, rows * columns)
    side = v["image_size"] // p
    P = side * side + 1
    kernel = w["vision_model.patch_embedding.weight"].reshape(D, -1)
    x = np.zeros((most, P + -P % 8, D))
    g = np.tanh(w["vision_model.gated_positional_embedding.gate"])
    place = w["vision_model.gated_positional_embedding.embedding"]
    table = w["vision_model.gated_positional_embedding.tile_embedding.weight"]
    table = table.reshape(-1, most, P, D)[number]

    def tile_vector(which, i):
        name = f"vision_model.{which}_tile_positional_embedding"
        vectors = w[f"{name}.embedding.weight"].reshape(-1, most, D)
        return np.tanh(w[f"{name}.gate"]) * vectors[number, i]

    for i in range(most):
        patches = [w["vision_model.class_embedding"]]
        for y in range(side):
            for x_ in range(side):
                cut = tiles[i, :, y * p : (y + 1) * p, x_ * p : (x_ + 1) * p]
                patches.append(kernel @ cut.ravel() + tile_vector("pre", i))
        patches = np.stack(patches) + (1 - g) * place + g * table[i]
        x[i, :P] = layer_norm(patches, w, "vision_model.layernorm_pre")
    there = np.zeros(x.shape[:2], bool)
    there[:count, :P] = True
    there = there.ravel()
    seen = there[:, None] | there[None]  # hidden only where both are not there
    x = x.reshape(-1, D)

    def run(x, name, gates):
        h = layer_norm(x, w, f"{name}.input_layernorm")
        q, k, v_ = (
            (h @ w[f"{name}.self_attn.{n}_proj.weight"].T).reshape(len(h), N, -1) for n in "qkv"
        )
        a = attend(q, k, v_, seen).reshape(len(h), -1) @ w[f"{name}.self_attn.o_proj.weight"].T
        x = x + (np.tanh(w[f"{name}.gate_attn"]) if gates else 1) * a
        h = layer_norm(x, w, f"{name}.post_attention_layernorm")
        h = h @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"]
        h = h * 0.5 * (1 + ERF(h / math.sqrt(2)))
        h = h @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]
        return x + (np.tanh(w[f"{name}.gate_ffn"]) if gates else 1) * h

    between = []
    for layer in range(v["num_hidden_layers"]):
        if layer in v["intermediate_layers_indices"]:
            between.append(x)
        x = run(x, f"vision_model.transformer.layers.{layer}", False)
    x = layer_norm(x, w, "vision_model.layernorm_post").reshape(most, -1, D)
    x = np.stack([x[i] + tile_vector("post", i) for i in range(most)]).reshape(-1, D)
    for layer in range(v["num_global_layers"]):
        x = run(x, f"vision_model.global_transformer.layers.{layer}", True)
    x = np.concatenate([x, np.stack(between, -1).reshape(len(x), -1)], axis=1)
    x = x.reshape(most, -1, x.shape[-1])[:, :P]
    return x @ w["multi_modal_projector.weight"].T + w["multi_modal_projector.bias"]


def sees(tokens, image):
    """For each token the numbers of the images that it sees."""
    places = [t for t, token in enumerate(tokens) if token == image]
    out = []
    for t in range(len(tokens)):
        before = [i for i, place in enumerate(places) if place <= t]
        run = before[-1:]
        while run and run[0] > 0 and places[run[0]] == places[run[0] - 1] + 1:
            run.insert(0, run[0] - 1)
        out.append(run)
    return out


def frequencies(text):
    rope, H = text["rope_parameters"], text["hidden_size"] // text["num_attention_heads"]
    found = []
    for j in range(0, H, 2):
        f = rope["rope_theta"] ** (-j / H)
        if rope["rope_type"] == "llama3":
            old, low, high = (
                rope[key] for key in
                ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
            )  # fmt: skip
            turns = old * f / (2 * math.pi)
            s = min(1, max(0, (turns - low) / (high - low)))
            f = (1 - s) * f / rope["factor"] + s * f
        found.append(f)
    return np.array(found)


def logits(config, w, tokens, images=(), imageless=False):
    """Logits [T, V] of one row; images: (tiles, number of the grid), one for each image token."""
    text = config["text_config"]
    N, K = text["num_attention_heads"], text["num_key_value_heads"]
    H, eps = text["hidden_size"] // N, text["rms_norm_eps"]
    most = config["vision_config"]["max_num_tiles"]
    w = {name: np.asarray(value, np.float64) for name, value in w.items()}
    T = len(tokens)
    features, owner = [], []
    for i, (tiles, number) in enumerate(images):
        rows, columns = grid_of(number, most)
        found = encode(config, w, np.asarray(tiles, np.float64), number)
        features += list(found.reshape(-1, found.shape[-1]))
        valid = np.repeat(np.arange(most) < rows * columns, found.shape[1])
        owner += list(np.where(valid, i, -1))
    mask = np.zeros((T, len(features)), bool)
    for t, numbers in enumerate(sees(tokens, config["image_token_index"])):
        for i in numbers:
            mask[t] |= np.array(owner) == i
    row = mask.any(1)
    if imageless and len(features):
        mask[~row] = True
    angles = np.outer(np.arange(T), frequencies(text))
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def turn(x):
        a, b = x[..., : H // 2], x[..., H // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["language_model.model.embed_tokens.weight"][tokens]
    for layer in range(text["num_hidden_layers"]):
        name = f"language_model.model.layers.{layer}"
        h = rms_norm(x, w[f"{name}.input_layernorm.weight"], eps)
        cross = layer in text["cross_attention_layers"]
        kind = f"{name}.{'cross_attn' if cross else 'self_attn'}"
        if cross and not len(features):
            continue
        source = np.stack(features) if cross else h
        q = (h @ w[f"{kind}.q_proj.weight"].T).reshape(T, N, H)
        k = (source @ w[f"{kind}.k_proj.weight"].T).reshape(-1, K, H)
        v = (source @ w[f"{kind}.v_proj.weight"].T).reshape(-1, K, H)
        if cross:
            q = rms_norm(q, w[f"{kind}.q_norm.weight"], eps)
            k = rms_norm(k, w[f"{kind}.k_norm.weight"], eps)
        else:
            q, k = turn(q), turn(k)
        seen = mask if cross else np.tril(np.ones((T, T), bool))
        a = attend(q, k, v, seen).reshape(T, -1) @ w[f"{kind}.o_proj.weight"].T
        x = x + (np.tanh(w[f"{name}.cross_attn_attn_gate"]) if cross else 1) * a
        h = rms_norm(x, w[f"{name}.post_attention_layernorm.weight"], eps)
        gate = h @ w[f"{name}.mlp.gate_proj.weight"].T
        up = h @ w[f"{name}.mlp.up_proj.weight"].T
        h = (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.mlp.down_proj.weight"].T
        if cross:
            h = np.where(row[:, None], np.tanh(w[f"{name}.cross_attn_mlp_gate"]) * h, 0)
        x = x + h
    x = rms_norm(x, w["language_model.model.norm.weight"], eps)
    return x @ w["language_model.lm_head.weight"].T
