"""Parameters and cache of a published model, counted part by part as in the modelling code of `transformers`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.inputs.cache_formats import SCALED_CACHE_FORMATS
from planner.inputs.latent_attention import LatentAttention
from planner.inputs.published.families import CARDS_WITHOUT_EMBEDDING
from planner.inputs.published.model import PublishedModel
from planner.inputs.published.quantization import BYTES
from planner.inputs.routed_experts import Activation, is_gated


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters by part. `expert` is one routed expert; the others are summed over all layers. `uncounted` is the part
    of `embedding` that the model's card leaves out of the active parameters."""

    expert: int
    shared: int
    dense: int
    attention: int
    router: int
    norms: int
    embedding: int
    head: int
    moe_layers: int
    experts: int
    experts_per_token: int
    uncounted: int = 0

    @property
    def rest(self) -> int:
        """Everything but the routed experts."""
        parts = (self.shared, self.dense, self.attention, self.router, self.norms, self.embedding, self.head)
        return sum(parts)

    @property
    def total(self) -> int:
        """All parameters, without multi-token-prediction layers."""
        return self.rest + self.moe_layers * self.experts * self.expert

    @property
    def active(self) -> int:
        """Parameters that one token touches, as model cards count them: with the input embedding, except gpt-oss's."""
        return self.rest - self.uncounted + self.moe_layers * self.experts_per_token * self.expert


def count_parameters(model: PublishedModel) -> ParameterCounts:
    """Parameter counts of a model."""
    d, layers, experts = model.hidden_size, model.layers, model.experts
    moe = len(model.routed_layers)
    bare = len(model.bare_layers)
    norms = ((4 if model.post_norms else 2) * layers - bare + 1) * d * (2 if model.norm == "layer" else 1)
    norms += layers if model.layer_scales else 0
    embedding = model.vocabulary * d
    head = 0 if model.tied_head else embedding + (model.vocabulary if model.head_bias else 0)
    counts = ParameterCounts(
        expert=0,
        shared=0,
        dense=(layers - moe - bare) * _feed_forward(d, model.dense_width, model.activation, biased=model.mlp_bias),
        attention=sum(n * _attention(kind) for kind, n in model.kinds_of_attention) + _state_layers(model),
        router=0,
        norms=norms,
        embedding=embedding,
        head=head,
        moe_layers=moe,
        experts=0,
        experts_per_token=0,
        uncounted=embedding if model.family in CARDS_WITHOUT_EMBEDDING and not model.tied_head else 0,
    )
    if experts is None or not moe:
        return counts
    kind, latent = experts.activation, experts.d_latent
    of_expert = d + experts.router_bias + experts.expert_scales
    shared = _feed_forward(d, experts.d_shared, kind, biased=model.mlp_bias) if experts.d_shared else 0
    return replace(
        counts,
        expert=_feed_forward(latent or d, experts.d_expert, kind, biased=experts.expert_bias),
        shared=moe * (shared + (d if experts.shared_gate else 0) + 2 * d * latent),
        router=moe * (experts.experts * of_expert + (d if experts.own_norms else 0)),
        norms=norms + (3 * moe * d if experts.own_norms else 0),
        experts=experts.experts,
        experts_per_token=experts.experts_per_token,
    )


def cache_elements(model: PublishedModel) -> tuple[int, int]:
    """Numbers cached per token in layers that see everything, and per request in layers with a window or chunks, once
    the request is as long as those. A model of windows alone counts as if it had none: memory is planned in pages,
    which grow with a request."""
    if model.windowed is not None:
        (full, n), (own, _) = model.kinds_of_attention
        in_windows = sum(window for window in model.windows if window is not None)
        return n * full.cache_elements_per_layer, in_windows * own.cache_elements_per_layer
    each = model.cache_elements_per_layer
    windowed = [window for window in model.windows if window is not None]
    if len(windowed) == model.layers:
        return model.layers * each, 0
    return (model.attention_layers - len(windowed)) * each, sum(windowed) * each


def unwindowed_cache_elements(model: PublishedModel) -> int:
    """Numbers cached per token when layers with a window keep everything too, as `moejax serve` does."""
    return model.attention_layers * model.cache_elements_per_layer


def cache_number_bytes(model: PublishedModel, form: str, *, scales: bool = True) -> float:
    """Bytes of a number in the cache. In int8 and fp8 `moejax serve` has a float32 scale for each key and value of a
    head, of which this is a share; without `scales` it has none, as in engines with one for the whole model."""
    scaled = scales and form in SCALED_CACHE_FORMATS
    return BYTES[form] + (4 * model.cache_parts_per_layer / model.cache_elements_per_layer if scaled else 0)


def _state_layers(model: PublishedModel) -> int:
    """Of all layers whose context is a state."""
    mixer = model.state_mixer
    return len(model.state_layers) * mixer.parameters(model.hidden_size) if mixer else 0


def _feed_forward(d: int, width: int, activation: Activation, *, biased: bool) -> int:
    """Gate, unless there is none, up and down, and their biases."""
    above = 2 if is_gated(activation) else 1
    return (above + 1) * d * width + (above * width + d if biased else 0)


def _attention(model: PublishedModel) -> int:
    d, n, k, h = model.hidden_size, model.heads, model.kv_heads, model.head_size
    if model.latent is not None:
        return _latent_attention(model, model.latent)
    v = model.value_numbers
    count = d * (n + k) * h + d * n * v + (0 if model.keys_as_values else d * k * v)
    count += {"head": 2 * h, "all": (n + k) * h}.get(model.qk_norm, 0)
    count += (n + k) * h + k * v if model.qkv_bias else 0
    count += d if model.out_bias else 0
    count += d * (n if model.gate_by_head else n * v) if model.attention_gate else 0
    return count + (n if model.sinks else 0)


def _latent_attention(model: PublishedModel, latent: LatentAttention) -> int:
    """Projections down to the latents have biases (`qkv_bias`), those out of them none."""
    d, n = model.hidden_size, model.heads
    low, down, query = latent.d_query, latent.d_latent + latent.d_rope, n * model.head_size
    queries = d * low + low + low * query if low else d * query
    count = queries + d * down + latent.d_latent
    count += latent.d_latent * n * (latent.d_plain + latent.d_value) + n * latent.d_value * d
    count += low + down if model.qkv_bias else 0
    count += d * n if model.gate_by_head else 0
    count += model.indexer.parameters(d, low) if model.indexer else 0
    return count + (d if model.out_bias else 0)
