"""Every Llama text model in plain NumPy, float64: an oracle that shares nothing with puna.

Written from the published formulas, one loop for every idea, on the names and layouts of Hugging
Face's tensors and config.json. `gradients` differentiates it with HIPS autograd, which knows
nothing of JAX. It is slow and meant for tiny models.

Keys of the config beyond Hugging Face's: `router` = "sigmoid" (Llama 4, the default) or
"softmax" (Mixtral, arXiv 2401.04088: softmax over the logits of the chosen experts, which equals
a softmax over all of them renormalised over the chosen; it weighs the experts' outputs).
"""

import math

import autograd
import autograd.numpy as np
import numpy

DEFAULT_THETA = {"llama": 10000.0, "llama4_text": 500000.0}


def forward(config, weights, tokens, positions=None, segments=None):
    """Return the logits [B][T, V] of every row.

    Args:
      config: a parsed config.json of model type llama or llama4_text.
      weights: float64 arrays by Hugging Face name.
      tokens: [B, T] integers.
      positions: [B, T], of each token in its document; counted from 0 when left out.
      segments: [B, T], document of each token, 0 = padding; one document a row when left out.
    """
    tokens = numpy.asarray(tokens)
    if positions is None:
        positions = numpy.tile(numpy.arange(tokens.shape[1]), (tokens.shape[0], 1))
    if segments is None:
        segments = numpy.ones_like(tokens)
    return [_row(config, weights, *row) for row in zip(tokens, positions, segments, strict=True)]


def loss(config, weights, tokens, positions=None, segments=None):
    """Return the mean cross-entropy of the next token, over the pairs inside a document."""
    logits = forward(config, weights, tokens, positions, segments)
    total, count = 0.0, 0
    for b, row in enumerate(tokens):
        for t in range(len(row) - 1):
            if segments is not None and not (segments[b][t] == segments[b][t + 1] != 0):
                continue
            total = total - _log_softmax(logits[b][t])[row[t + 1]]
            count += 1
    return total / count


def gradients(config, weights, tokens, positions=None, segments=None):
    """Return the loss and its gradient with respect to every weight, by name."""

    def of(weights):
        return loss(config, weights, tokens, positions, segments)

    return autograd.value_and_grad(of)(weights)


def _row(config, weights, tokens, positions, segments):
    eps = config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        w = _layer_weights(weights, i)
        h = _rms_norm(x, eps) * w["input_layernorm.weight"]
        x = x + _attention(config, w, i, h, positions, segments)
        h = _rms_norm(x, eps) * w["post_attention_layernorm.weight"]
        x = x + _feed_forward(config, w, i, h)
    x = _rms_norm(x, eps) * weights["model.norm.weight"]
    tied = config.get("tie_word_embeddings", False)
    return x @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def _layer_weights(weights, i):
    start = f"model.layers.{i}."
    return {name[len(start) :]: weights[name] for name in weights if name.startswith(start)}


def _rms_norm(x, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def _log_softmax(x):
    shifted = x - np.max(x)
    return shifted - np.log(np.sum(np.exp(shifted)))


def _silu(x):
    return x / (1.0 + np.exp(-x))


def _swiglu(w, name, x):
    gate, up, down = (w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (_silu(x @ gate.T) * (x @ up.T)) @ down.T


def has_rope(config, i):
    """Say whether layer i rotates its queries and keys."""
    if config["model_type"] == "llama":
        return True
    listed = config.get("no_rope_layers")
    return bool(listed[i]) if listed else (i + 1) % config["no_rope_layer_interval"] != 0


def is_moe(config, i):
    """Say whether the feed-forward of layer i is a mixture of experts."""
    return config["model_type"] == "llama4_text" and i in config["moe_layers"]


def frequencies(config):
    """Return the angle per position of every pair, with the Llama 3.1 scaling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", DEFAULT_THETA[config["model_type"]]))
    size = config["head_dim"]
    found = []
    for j in range(size // 2):
        f = theta ** (-2.0 * j / size)
        if rope.get("rope_type", "default") == "llama3":
            old = rope["original_max_position_embeddings"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            wavelength = 2.0 * math.pi / f
            if wavelength > old / low:
                f = f / rope["factor"]
            elif wavelength >= old / high:
                s = (old / wavelength - low) / (high - low)
                f = (1.0 - s) * f / rope["factor"] + s * f
        found.append(f)
    return numpy.array(found)


def _rotate(config, x, positions):
    """Rotate one head [T, H]: pairs half a head apart (Llama 1-3) or side by side (Llama 4)."""
    size = config["head_dim"]
    angle = positions[:, None] * frequencies(config)[None, :]
    cos, sin = numpy.cos(angle), numpy.sin(angle)
    if config["model_type"] == "llama":
        first, second = x[:, : size // 2], x[:, size // 2 :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
    first, second = x[:, 0::2], x[:, 1::2]
    turned = np.stack([first * cos - second * sin, second * cos + first * sin], axis=2)
    return np.reshape(turned, x.shape)


def visible(config, i, positions, segments):
    """Return which key each query of layer i may see, [T, T]."""
    length = len(positions)
    chunk = config.get("attention_chunk_size") if config["model_type"] == "llama4_text" else None
    types = config.get("layer_types")
    if not has_rope(config, i) or (types and types[i] == "full_attention"):
        chunk = None
    seen = numpy.zeros((length, length), bool)
    for q in range(length):
        for k in range(length):
            same = segments[q] == segments[k] != 0 and positions[k] <= positions[q]
            seen[q, k] = same and (not chunk or positions[q] // chunk == positions[k] // chunk)
    return seen


def _attention(config, w, i, x, positions, segments):
    size, heads = config["head_dim"], config["num_attention_heads"]
    group = heads // config["num_key_value_heads"]
    seen = visible(config, i, positions, segments)
    somewhere = numpy.any(seen, axis=1, keepdims=True)
    keys, values, outs = [], [], []
    for n in range(config["num_key_value_heads"]):
        rows = slice(n * size, (n + 1) * size)
        keys.append(_query_or_key(config, i, x @ w["self_attn.k_proj.weight"][rows].T, positions))
        values.append(x @ w["self_attn.v_proj.weight"][rows].T)
    for n in range(heads):
        rows = slice(n * size, (n + 1) * size)
        q = _query_or_key(config, i, x @ w["self_attn.q_proj.weight"][rows].T, positions)
        if not has_rope(config, i) and config.get("attn_temperature_tuning"):
            steps = numpy.floor((positions + 1.0) / config["floor_scale"])
            q = q * (1.0 + config["attn_scale"] * numpy.log(1.0 + steps))[:, None]
        scores = q @ keys[n // group].T / math.sqrt(size)
        # A query of padding sees nothing: its output is 0 rather than a mean over nothing.
        scores = np.where(seen, scores, numpy.where(somewhere, -numpy.inf, 0.0))
        weight = np.exp(scores - np.max(scores, axis=1, keepdims=True))
        weight = weight / np.sum(weight, axis=1, keepdims=True) * somewhere
        outs.append(weight @ values[n // group])
    return np.concatenate(outs, axis=1) @ w["self_attn.o_proj.weight"].T


def _query_or_key(config, i, x, positions):
    if not has_rope(config, i):
        return x
    x = _rotate(config, x, positions)
    return _rms_norm(x, config["rms_norm_eps"]) if config.get("use_qk_norm") else x


def _feed_forward(config, w, i, x):
    if config["model_type"] == "llama":
        return _swiglu(w, "mlp", x)
    if not is_moe(config, i):
        return _swiglu(w, "feed_forward", x)
    out = []
    for t in range(len(x)):
        routed = 0.0
        for e, score in _chosen(config, x[t] @ w["feed_forward.router.weight"].T):
            if config.get("router", "sigmoid") == "sigmoid":
                routed = routed + _expert(w, e, score * x[t])
            else:
                routed = routed + score * _expert(w, e, x[t])
        out.append(routed)
    out = np.stack(out)
    shared = "feed_forward.shared_expert.gate_proj.weight" in w
    return out + _swiglu(w, "feed_forward.shared_expert", x) if shared else out


def _chosen(config, logits):
    """Return the experts of one token, by the largest logits, each with its score."""
    experts = [int(e) for e in numpy.argsort(-_value(logits), kind="stable")]
    experts = experts[: config["num_experts_per_tok"]]
    if config.get("router", "sigmoid") == "sigmoid":
        return [(e, 1.0 / (1.0 + np.exp(-logits[e]))) for e in experts]
    total = sum(np.exp(logits[e]) for e in experts)
    return [(e, np.exp(logits[e]) / total) for e in experts]


def _value(x):
    """Return the plain number behind a traced one: which expert is chosen has no gradient."""
    return autograd.tracer.getval(x)


def _expert(w, e, x):
    gate_up = x @ w["feed_forward.experts.gate_up_proj"][e]
    width = gate_up.shape[0] // 2
    return (_silu(gate_up[:width]) * gate_up[width:]) @ w["feed_forward.experts.down_proj"][e]
