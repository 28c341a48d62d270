"""The model once more, dense, slow and in float64 NumPy, sharing no code with `moejax`: what its answers should be.

(Stretched rotary frequencies are left to the comparison with `transformers`, `tests.parity`.)
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from moejax.config.model_config import ModelConfig
from moejax.config.moe_config import MoEConfig
from moejax.config.params import FeedForward, Latent, Layer, MoE, Params


def forward(params: Params, cfg: ModelConfig, tokens: list[int], *, masked: Collection[int] = ()) -> np.ndarray:
    """Logits [T, V] of the next token at each position, with `masked` experts out of every MoE layer."""
    return _head(hidden(params, cfg, tokens, masked=masked), params)


def hidden(params: Params, cfg: ModelConfig, tokens: list[int], *, masked: Collection[int] = ()) -> np.ndarray:
    """The rows that the head takes [T, D]."""
    assert cfg.rope_scaling is None or cfg.rope_scaling.kind == "proportional"
    x = _f64(params.embed)[np.array(tokens)] * cfg.embed_scale
    layers = iter(range(cfg.n_layers))
    for (pattern, repeats), segment in zip(cfg.main_segments, params.segments, strict=False):
        for repeat in range(repeats):
            for j, _ in enumerate(pattern):
                index = next(layers)
                x = _layer(x, segment[j], repeat, cfg.of_layer(index), masked, index)
    return _norm(x, params.final_norm, params.final_norm_bias, cfg.norm_eps) * cfg.logit_scale


def drafts(params: Params, cfg: ModelConfig, tokens: list[int], after: int, count: int) -> list[np.ndarray]:
    """Logits [V] of the `count` tokens after `tokens` and the token `after` them, by multi-token prediction:
    DeepSeek-V3, arXiv 2412.19437, equations 21 to 23, with the embedding before the hidden state, as eh_proj of the
    checkpoints has them (vLLM, vllm/model_executor/models/deepseek_mtp.py: torch.cat([inputs_embeds,
    previous_hidden_states])). Later tokens take the normed output of the layer for the hidden state (SGLang,
    deepseek_nextn.py)."""
    mtp, states, follow, found = params.mtp, hidden(params, cfg, tokens), [*tokens[1:], after], []
    for _ in range(count):
        embedded = _norm(_f64(params.embed)[np.array(follow)] * cfg.embed_scale, mtp.token_norm, None, cfg.norm_eps)
        own = _norm(states, mtp.hidden_norm, None, cfg.norm_eps)
        x = np.concatenate([embedded, own], axis=-1) @ _f64(mtp.project).T
        x = _norm(_layer(x, params.segments[-1][0], 0, cfg, (), cfg.n_layers), mtp.norm, None, cfg.norm_eps)
        found.append(_head(x[-1:], params)[0])
        states, follow = np.concatenate([states, x[-1:]]), [*follow, int(np.argmax(found[-1]))]
    return found


def _head(rows: np.ndarray, params: Params) -> np.ndarray:
    head = params.embed if params.head is None else params.head
    logits = rows @ _f64(head).T
    logits = logits if params.head_bias is None else logits + _f64(params.head_bias)
    return logits if params.logit_cap is None else params.logit_cap * np.tanh(logits / params.logit_cap)


def _layer(
    x: np.ndarray, layer: Layer, repeat: int, cfg: ModelConfig, masked: Collection[int], index: int
) -> np.ndarray:
    h = _norm(x, layer.attention_norm[repeat], _at(layer.attention_norm_bias, repeat), cfg.norm_eps)
    attended = mix_states(h, layer, repeat, cfg) if layer.has_state else _attention(h, layer, repeat, cfg, index)
    if cfg.post_norms:
        attended = _norm(attended, layer.attention_post_norm[repeat], None, cfg.norm_eps)
    x = x + cfg.residual_scale * attended
    if layer.ffn_norm is None:
        return x
    own = cfg.moe is not None and cfg.moe.own_norms
    h = _norm(x, layer.ffn_norm[repeat], _at(layer.ffn_norm_bias, repeat), cfg.norm_eps)
    if layer.moe is None:
        limit = cfg.moe.dense_limit if cfg.moe else None
        y = _feed_forward(h, layer.ffn, (repeat,), limit=limit, activation=cfg.activation)
    elif layer.moe.router is None:  # a sharded dense layer: the sum of its shards
        shards = range(layer.moe.experts.down.shape[1])
        y = sum(_feed_forward(h, layer.moe.experts, (repeat, shard)) for shard in shards)
    elif own:  # two parts between norms of their own, and a router with a third (Gemma 4)
        y = _parts_with_norms(x, h, layer.moe, repeat, cfg, masked)
    else:
        y = np.stack([_mixture(row, layer.moe, repeat, cfg.moe, masked) for row in h])
    if cfg.post_norms:
        y = _norm(y, layer.ffn_post_norm[repeat], None, cfg.norm_eps)
    x = x + cfg.residual_scale * y
    return x * _f64(layer.scale[repeat]) if cfg.layer_scales else x


def _parts_with_norms(
    x: np.ndarray, h: np.ndarray, weights: MoE, repeat: int, cfg: ModelConfig, masked: Collection[int]
) -> np.ndarray:
    moe, routed = cfg.moe, np.zeros_like(x)
    seen = _norm(x, weights.router_norm[repeat], None, cfg.norm_eps) / np.sqrt(cfg.d_model)
    for t, row in enumerate(seen):
        for expert, gate in _route(row, weights, repeat, moe, masked):
            gate = gate * _f64(weights.expert_scale[repeat])[expert]
            routed[t] += gate * _feed_forward(h[t], weights.experts, (repeat, expert), moe, activation=moe.activation)
    before = _norm(x, weights.shared_norm[repeat], None, cfg.norm_eps)
    shared = _feed_forward(before, weights.shared, (repeat,), activation=moe.activation)
    after = _norm(shared, weights.shared_post_norm[repeat], None, cfg.norm_eps)
    return after + _norm(routed, weights.post_norm[repeat], None, cfg.norm_eps)


def _attention(h: np.ndarray, layer: Layer, repeat: int, cfg: ModelConfig, index: int) -> np.ndarray:
    window = cfg.windows[index]
    if cfg.latent is None:
        q, k, v = _grouped_heads(h, layer, repeat, cfg, index)
    else:
        q, k, v = _latent_heads(h, layer.latent, repeat, cfg)
    T, N, _ = q.shape
    distance = np.arange(T)[:, None] - np.arange(T)
    unseen = (distance < 0) | (distance >= (window or T))
    if cfg.chunked:
        chunk = np.arange(T) // (window or T)
        unseen = (distance < 0) | (chunk[:, None] != chunk)
    if cfg.indexer is not None:
        unseen = unseen | ~_chosen(h, layer, repeat, cfg)
    out = []
    for n in range(N):
        scores = q[:, n] @ k[:, n].T * (cfg.attention_scale or cfg.d_head**-0.5)
        scores[unseen] = -np.inf
        if layer.sinks is not None:
            scores = np.concatenate([scores, np.full((T, 1), _f64(layer.sinks[repeat])[n])], axis=1)
        out.append(_softmax(scores)[:, :T] @ v[:, n])
    mixed = np.concatenate(out, axis=1)
    if cfg.attention_gate:
        gates = h @ _f64(layer.attention_gate[repeat]).T
        gates = _sigmoid(gates) if cfg.gate_function == "sigmoid" else np.log1p(np.exp(gates))
        mixed = mixed * np.repeat(gates, mixed.shape[1] // gates.shape[1], axis=1)
    mixed = mixed @ _f64(layer.out[repeat]).T
    return mixed if layer.out_bias is None else mixed + _f64(layer.out_bias[repeat])


def _grouped_heads(h: np.ndarray, layer: Layer, repeat: int, cfg: ModelConfig, index: int) -> tuple[np.ndarray, ...]:
    """Queries, keys and values, one of each per query head: [T, N, H] each."""
    T, N, K, H = len(h), cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    qkv = h @ _f64(layer.qkv[repeat]).T
    if layer.qkv_bias is not None:
        qkv = qkv + _f64(layer.qkv_bias[repeat])
    q, k, v = qkv[:, : N * H], qkv[:, N * H : (N + K) * H], qkv[:, (N + K) * H :]
    if cfg.qk_norm == "all":
        q, k = (_norm(x, s[repeat], None, cfg.norm_eps) for x, s in ((q, layer.query_norm), (k, layer.key_norm)))
    if cfg.clip_qkv is not None:
        q, k, v = (np.clip(x, -cfg.clip_qkv, cfg.clip_qkv) for x in (q, k, v))
    v = k if cfg.keys_as_values else v
    q, k, v = q.reshape(T, N, H), k.reshape(T, K, H), v.reshape(T, K, -1) * cfg.value_scale
    if cfg.value_norm:
        v = _norm(v, np.ones(v.shape[-1]), None, cfg.norm_eps)
    norms = layer.query_norm, layer.key_norm
    if cfg.qk_norm == "head" and not cfg.norm_after_rope:
        q, k = (_norm(x, s[repeat], None, cfg.norm_eps) for x, s in zip((q, k), norms, strict=True))
    if index not in cfg.unrotated_layers:
        q, k = _rotate(q, cfg), _rotate(k, cfg)
        if cfg.qk_norm == "l2":
            q, k = (_norm(x, np.ones(H), None, cfg.norm_eps) for x in (q, k))
    growth = cfg.score_growth
    if growth is not None and (growth.all_layers or index in cfg.unrotated_layers):
        q = q * (1 + growth.scale * np.log1p((np.arange(T) + growth.first) // growth.every))[:, None, None]
    if cfg.norm_after_rope:
        q, k = (_norm(x, s[repeat], None, cfg.norm_eps) for x, s in zip((q, k), norms, strict=True))
    return q, np.repeat(k, N // K, axis=1), np.repeat(v, N // K, axis=1)


def mix_states(h: np.ndarray, layer: Layer, repeat: int, cfg: ModelConfig) -> np.ndarray:
    """The output of a layer with a state for a whole sequence of normed rows [T, D]."""
    kinds = {"delta": _delta_net, "convolution": _short_convolution, "mamba": _mamba, "kimi_delta": _kimi_delta}
    return next(mix for leaf, mix in kinds.items() if getattr(layer, leaf) is not None)(h, layer, repeat, cfg)


def _delta_net(h: np.ndarray, layer: Layer, repeat: int, cfg: ModelConfig) -> np.ndarray:
    delta, w = cfg.delta_net, layer.delta
    T, share = len(h), delta.value_heads // delta.key_heads
    projected = h @ _f64(w.project[repeat]).T
    x, gate = projected[:, : delta.channels], projected[:, delta.channels :]
    write, speed = np.split(h @ _f64(w.rates[repeat]).T, 2, axis=1)
    kernel = _f64(w.convolution[repeat])
    padded = np.concatenate([np.zeros((delta.kernel - 1, delta.channels)), x])
    x = np.stack([(padded[t : t + delta.kernel].T * kernel).sum(1) for t in range(T)])
    q, k, v = np.split(x * _sigmoid(x), [delta.keys, 2 * delta.keys], axis=1)
    q, k = (each.reshape(T, delta.key_heads, delta.d_key) for each in (q, k))
    q, k = (np.repeat(each / np.sqrt((each**2).sum(-1, keepdims=True) + 1e-6), share, axis=1) for each in (q, k))
    v = v.reshape(T, delta.value_heads, delta.d_value)
    decay = np.exp(-np.exp(_f64(w.decay[repeat])) * np.log1p(np.exp(speed + _f64(w.rate_bias[repeat]))))
    out = np.zeros((T, delta.value_heads, delta.d_value))
    for n in range(delta.value_heads):
        state = np.zeros((delta.d_key, delta.d_value))
        for t in range(T):
            state = decay[t, n] * state
            state = state + np.outer(k[t, n], _sigmoid(write[t, n]) * (v[t, n] - k[t, n] @ state))
            out[t, n] = delta.d_key**-0.5 * q[t, n] @ state
    mixed = _norm(out, w.norm[repeat], None, cfg.norm_eps).reshape(T, -1) * gate * _sigmoid(gate)
    return mixed @ _f64(w.out[repeat]).T


def _short_convolution(h: np.ndarray, layer: Layer, repeat: int, cfg: ModelConfig) -> np.ndarray:
    """LFM2 technical report, arXiv 2511.23404, section 2.2, with the biases of `conv_bias`."""
    w, width = layer.convolution, cfg.short_convolution.kernel

    def bias(leaf: Any) -> Any:
        return 0 if leaf is None else _f64(leaf[repeat])

    before, after, values = np.split(h @ _f64(w.project[repeat]).T + bias(w.project_bias), 3, axis=1)
    padded = np.concatenate([np.zeros((width - 1, cfg.d_model)), before * values])
    kernel = _f64(w.kernel[repeat]).T
    mixed = np.stack([(padded[t : t + width] * kernel).sum(0) for t in range(len(h))]) + bias(w.kernel_bias)
    return (after * mixed) @ _f64(w.out[repeat]).T + bias(w.out_bias)


def _mamba(h: np.ndarray, layer: Layer, repeat: int, cfg: ModelConfig) -> np.ndarray:
    """Mamba-2, arXiv 2405.21060, as the recurrence of its section 2.1, with the gate before the norm of each group."""
    sizes, w, T = cfg.mamba, layer.mamba, len(h)
    gate, channels = np.split(h @ _f64(w.project[repeat]).T, [sizes.values], axis=1)
    kernel = _f64(w.kernel[repeat]).T
    padded = np.concatenate([np.zeros((sizes.kernel - 1, sizes.channels)), channels])
    mixed = np.stack([(padded[t : t + sizes.kernel] * kernel).sum(0) for t in range(T)])
    mixed = mixed + (0 if w.kernel_bias is None else _f64(w.kernel_bias[repeat]))
    x, B, C = np.split(mixed * _sigmoid(mixed), [sizes.values, sizes.values + sizes.keys], axis=1)
    x, B, C = x.reshape(T, sizes.heads, -1), B.reshape(T, sizes.groups, -1), C.reshape(T, sizes.groups, -1)
    steps = np.log1p(np.exp(h @ _f64(w.rates[repeat]).T + _f64(w.rate_bias[repeat])))
    out = np.zeros(x.shape)
    for n in range(sizes.heads):
        group, state = n // (sizes.heads // sizes.groups), np.zeros((sizes.d_head, sizes.d_state))
        for t in range(T):
            decay = np.exp(-np.exp(_f64(w.decay[repeat])[n]) * steps[t, n])
            state = decay * state + steps[t, n] * np.outer(x[t, n], B[t, group])
            out[t, n] = state @ C[t, group] + _f64(w.skip[repeat])[n] * x[t, n]
    gated = (out.reshape(T, -1) * gate * _sigmoid(gate)).reshape(T, sizes.groups, -1)
    mixed = _norm(gated, np.ones(gated.shape[-1]), None, cfg.norm_eps).reshape(T, -1) * _f64(w.norm[repeat])
    return mixed @ _f64(w.out[repeat]).T


def _kimi_delta(h: np.ndarray, layer: Layer, repeat: int, cfg: ModelConfig) -> np.ndarray:
    """Kimi delta attention, arXiv 2510.26692, equation 1, and the bound of Ling 3's decays."""
    sizes, w, T = cfg.kimi_delta, layer.kimi_delta, len(h)
    padded = np.concatenate([np.zeros((sizes.kernel - 1, sizes.channels)), h @ _f64(w.project[repeat]).T])
    kernel = _f64(w.kernel[repeat]).T
    x = np.stack([(padded[t : t + sizes.kernel] * kernel).sum(0) for t in range(T)])
    q, k, v = (each.reshape(T, sizes.heads, -1) for each in np.split(x * _sigmoid(x), 3, axis=1))
    q, k = (each / np.sqrt((each**2).sum(-1, keepdims=True) + 1e-6) for each in (q, k))
    low, gated = (h if each is None else h @ _f64(each[repeat]).T for each in (w.forget_in, w.gate_in))
    speed = (low @ _f64(w.forget[repeat]).T + _f64(w.rate_bias[repeat])).reshape(q.shape)
    scale, write = np.exp(_f64(w.decay[repeat]))[:, None], _sigmoid(h @ _f64(w.rates[repeat]).T)
    log = -scale * np.log1p(np.exp(speed)) if sizes.least_log is None else sizes.least_log * _sigmoid(scale * speed)
    out = np.zeros(q.shape)
    for n in range(sizes.heads):
        state = np.zeros((sizes.d_head, sizes.d_head))
        for t in range(T):
            state = np.exp(log[t, n])[:, None] * state
            state = state + write[t, n] * np.outer(k[t, n], v[t, n] - k[t, n] @ state)
            out[t, n] = sizes.d_head**-0.5 * q[t, n] @ state
    gate = _sigmoid(gated @ _f64(w.gate[repeat]).T)
    return (_norm(out, w.norm[repeat], None, cfg.norm_eps).reshape(T, -1) * gate) @ _f64(w.out[repeat]).T


def _latent_heads(h: np.ndarray, weights: Latent, repeat: int, cfg: ModelConfig) -> tuple[np.ndarray, ...]:
    """The same from latents, each head's own keys and values made of them."""
    T, N, C, plain = len(h), cfg.n_heads, cfg.latent.d_latent, cfg.latent.d_plain
    low = h
    if cfg.latent.d_query:
        low = h @ _f64(weights.query_down[repeat]).T
        low = _norm(low, weights.query_norm[repeat], None, cfg.latent.norm_eps)
    q = (low @ _f64(weights.query[repeat]).T).reshape(T, N, cfg.d_head)
    turn = (lambda x: x) if cfg.unrotated_layers else lambda x: _rotate(x, cfg)
    q = np.concatenate([q[..., :plain], turn(q[..., plain:])], axis=-1)
    down = h @ _f64(weights.down[repeat]).T
    latent = _norm(down[:, :C], weights.norm[repeat], None, cfg.latent.norm_eps)
    rotated = np.repeat(turn(down[:, None, C:]), N, axis=1)
    k = np.stack([latent @ _f64(weights.key_up[repeat, n]) for n in range(N)], axis=1)
    v = np.stack([latent @ _f64(weights.value_up[repeat, n]).T for n in range(N)], axis=1)
    if (growth := cfg.score_growth) is not None and growth.all_layers:
        q = q * (1 + growth.scale * np.log1p((np.arange(T) + growth.first) // growth.every))[:, None, None]
    return q, np.concatenate([k, rotated], axis=-1), v


def _chosen(h: np.ndarray, layer: Layer, repeat: int, cfg: ModelConfig) -> np.ndarray:
    """The positions [T, T] that the indexer chooses for each query: for those of few predecessors all."""
    indexer, w = cfg.indexer, layer.indexer
    T, latent = len(h), layer.latent
    low = _norm(h @ _f64(latent.query_down[repeat]).T, latent.query_norm[repeat], None, cfg.latent.norm_eps)
    q = _rotate((low @ _f64(w.query[repeat]).T).reshape(T, indexer.heads, indexer.d_key), cfg)
    key = _norm(h @ _f64(w.key[repeat]).T, w.norm[repeat], w.norm_bias[repeat], indexer.norm_eps)
    key = _rotate(key[:, None], cfg)[:, 0]
    weigh = h @ _f64(w.weigh[repeat]).T
    chosen = np.zeros((T, T), bool)
    for t in range(T):
        scores = weigh[t] @ np.maximum(q[t] @ key[: t + 1].T, 0)
        chosen[t, np.argsort(-scores, kind="stable")[: indexer.chosen]] = True
    return chosen


def _mixture(row: np.ndarray, weights: MoE, repeat: int, moe: MoEConfig, masked: Collection[int]) -> np.ndarray:
    shared = np.zeros_like(row)
    if weights.shared is not None:
        shared = _feed_forward(row, weights.shared, (repeat,), limit=moe.dense_limit, activation=moe.activation)
    if weights.shared_gate is not None:
        shared = shared * _sigmoid(_f64(weights.shared_gate[repeat])[0] @ row)
    seen = row if weights.latent_in is None else _f64(weights.latent_in[repeat]) @ row
    out = np.zeros_like(seen)
    for expert, gate in _route(row, weights, repeat, moe, masked):
        if moe.gate == "input_sigmoid":
            out = out + _feed_forward(gate * seen, weights.experts, (repeat, expert), moe)
        else:
            answer = _feed_forward(seen, weights.experts, (repeat, expert), moe, activation=moe.activation)
            out = out + gate * moe.gate_scale * answer
    return shared + (out if weights.latent_out is None else _f64(weights.latent_out[repeat]) @ out)


def _route(
    row: np.ndarray, weights: MoE, repeat: int, moe: MoEConfig, masked: Collection[int]
) -> list[tuple[int, float]]:
    """Chosen experts and their gates, before `gate_scale`."""
    logits, bias = _f64(weights.router[repeat]) @ row, _f64(weights.bias[repeat])
    if moe.logit_cap is not None:
        logits = moe.logit_cap * np.tanh(logits / moe.logit_cap)
    scores = {"sigmoid": _sigmoid, "biased_share": _softmax}.get(moe.gate, lambda logits: logits)(logits)
    choice = scores + bias
    choice[list(masked)] = -np.inf
    shares = _softmax(choice)
    if moe.gate == "sparsemixer":
        return _sparsemixer(choice, moe)
    if moe.groups > 1:
        by_group = np.sort(choice.reshape(moe.groups, -1), axis=1)
        worth = by_group[:, -2:].sum(1) if moe.gate != "share" else by_group[:, -1]
        used = np.argsort(-worth, kind="stable")[: moe.groups_used]
        choice = np.where(np.isin(np.arange(moe.experts) // by_group.shape[1], used), choice, -np.inf)
    chosen = np.argsort(-choice, kind="stable")[: moe.experts_per_token]
    gates = {
        "softmax": lambda: _softmax(choice[chosen]),
        "share": lambda: shares[chosen],
        "biased_share": lambda: scores[chosen],
        "sigmoid": lambda: scores[chosen],
        "input_sigmoid": lambda: _sigmoid(choice[chosen]),
        "one": lambda: np.ones(len(chosen)),
    }[moe.gate]()
    return list(zip(chosen.tolist(), gates / (gates.sum() + moe.sum_epsilon) if moe.normalised else gates, strict=True))


def _sparsemixer(scores: np.ndarray, moe: MoEConfig) -> list[tuple[int, float]]:
    left, found = scores.copy(), []
    for _ in range(moe.experts_per_token):
        best = int(left.argmax())
        near = (left[best] - scores) / np.maximum(np.abs(scores), left[best]) <= 2 * moe.jitter
        found.append((best, 1 / np.exp(left[near] - left[best]).sum()))
        left[best] = -np.inf
    return found


def _feed_forward(
    h: np.ndarray,
    weights: FeedForward,
    at: tuple[int, ...],
    moe: MoEConfig | None = None,
    limit: float | None = None,
    activation: str = "swiglu",
) -> np.ndarray:
    hidden = h @ _f64(weights.gate_up[at]).T
    if activation == "relu2":
        return np.maximum(hidden, 0) ** 2 @ _f64(weights.down[at]).T
    if moe is None or not moe.expert_bias:
        gate, up = np.split(hidden, 2, axis=-1)
        if activation == "geglu":
            gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            return (gelu * up) @ _f64(weights.down[at]).T
        gate, bound = gate * _sigmoid(gate), limit if moe is None else moe.expert_limit
        if bound is not None:
            gate, up = np.minimum(gate, bound), np.clip(up, -bound, bound)
        return (gate * up) @ _f64(weights.down[at]).T
    gate, up = np.split(hidden + _f64(weights.gate_up_bias[at]), 2, axis=-1)
    gate, up = np.minimum(gate, moe.swiglu_limit), np.clip(up, -moe.swiglu_limit, moe.swiglu_limit)
    mixed = gate * _sigmoid(moe.swiglu_alpha * gate) * (up + 1)
    return mixed @ _f64(weights.down[at]).T + _f64(weights.down_bias[at])


def _norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, eps: float) -> np.ndarray:
    if bias is not None:
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * _f64(scale)
    return x if bias is None else x + _f64(bias)


def _rotate(x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """The first dimensions of [T, heads, H] turned by position."""
    dims = cfg.latent.d_rope if cfg.latent else cfg.rope_dims or cfg.d_head
    half = dims // 2
    speed = cfg.rope_base ** (-np.arange(half) / half)
    if cfg.rope_scaling is not None:  # proportional: the other pairs stay
        speed = np.where(np.arange(half) < cfg.rope_scaling.pairs, speed / cfg.rope_scaling.factor, 0)
    angle = (np.arange(len(x))[:, None] * speed)[:, None]
    a, b = x[..., :half], x[..., half:dims]
    turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    return np.concatenate([*turned, x[..., dims:]], axis=-1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _at(leaf: Any, repeat: int) -> Any:
    return None if leaf is None else leaf[repeat]


def _f64(a: np.ndarray) -> np.ndarray:
    return np.asarray(a, np.float64)
