"""What a model's config says, in words."""

from research.models.config import (
    AttentionConfig,
    ExpertsConfig,
    HeadConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
    RopeScalingConfig,
)

_STRUCTURES = {
    "decoder": "decoder",
    "encoder": "encoder",
    "prefix": "prefix decoder",
    "encoder_decoder": "encoder-decoder",
}
_SIGHT = {
    "decoder": "sees all that came before",
    "encoder": "sees all",
    "prefix": "sees the prefix and all that came before",
    "encoder_decoder": "sees all that came before",
}
_NORMS = {"layernorm": "layer norm", "rmsnorm": "RMS norm"}
_PLACEMENTS = {
    "pre": "before each sublayer",
    "post": "after each sublayer is added",
    "sandwich": "before and after each sublayer",
    "output": "after each sublayer, before it is added",
    "parallel": "one before both sublayers, which run side by side",
    "parallel_pair": "one before each of two sublayers, which run side by side",
}
_ACTIVATIONS = {
    "gelu": "GELU",
    "gelu_tanh": "GELU (tanh)",
    "gelu_sigmoid": "GELU (sigmoid)",
    "relu": "ReLU",
    "silu": "SiLU",
}
_SCALINGS = {
    "linear": "linear",
    "dynamic": "dynamic NTK",
    "yarn": "YaRN",
    "llama3": "LLaMA 3",
    "longrope": "LongRoPE",
}
_QK_NORMS = {
    "none": "",
    "head": "RMS norm of each head's queries and keys",
    "all": "RMS norm of queries and of keys",
}


def sentence(config: ModelConfig, parameters: int) -> str:
    """Returns the structure in one sentence.

    Args:
      config: the model.
      parameters: how many it has.
    """
    layers = _many(config.num_layers, "layer")
    if config.structure == "encoder_decoder":
        layers = f"{config.encoder_layers} and {layers}"
    return (
        f"{_STRUCTURES[config.structure]}, {layers}, width {config.embed_dim:,}, "
        f"{heads(config.attention)}, "
        f"vocabulary {config.vocab_size:,}, {parameters:,} parameters"
    )


def facts(config: ModelConfig) -> dict[str, str]:
    """Returns what the sentence leaves out, by what it is about."""
    said = {
        "context": f"{config.max_length:,} tokens",
        "attention": _attention(config.attention),
        "positions": positions(config.position),
        "MLP": _mlp(config.mlp),
        "experts": "" if config.experts is None else _experts(config.experts),
        "norm": _norm(config.norm),
        "embedding": _listed(
            "also the output projection"
            if config.tied_embeddings
            else "apart from the output projection",
            f"times √{config.embed_dim:,}" if config.scale_embeddings else "",
            "normalized" if config.embedding.norm else "",
            f"{config.embedding.num_types} types of segments" if config.embedding.num_types else "",
        ),
        "head": _head(config.head),
        "dropout": f"{config.dropout:g}" if config.dropout else "",
    }
    return {about: words for about, words in said.items() if words}


def heads(attention: AttentionConfig) -> str:
    """Returns the heads of the attention."""
    n, k, latent = attention.num_heads, attention.num_kv_heads, attention.latent
    if latent is not None:
        return (
            f"{_many(n, 'head')} of {attention.head_dim} + {latent.rope_dim} on latents of "
            f"{latent.kv_dim:,}"
        )
    if n == k:
        return f"{_many(n, 'head')} of {attention.head_dim}"
    return f"{n} query heads sharing {_many(k, 'key/value head')} of {attention.head_dim}"


def positions(position: PositionConfig) -> str:
    """Returns how a model or a layer knows where a token stands."""
    if position.kind == "rotary":
        return _listed(
            f"rotary, theta {position.theta:,.10g}",
            f"{position.rotary_dim} columns of a head" if position.rotary_dim is not None else "",
            _scaling(position.scaling) if position.scaling is not None else "",
        )
    return {
        "none": "none",
        "learned": "learned, added to the embeddings",
        "sinusoidal": f"sinusoidal{', sines before cosines' if position.halves else ''}, added to "
        "the embeddings",
        "alibi": "ALiBi, a bias by distance",
        "alibi_bfloat16": "ALiBi, a bias by distance, as bfloat16 rounds it",
        "buckets": f"a learned bias for {position.num_buckets} buckets of distances up to "
        f"{position.max_distance}",
        "relative": "relative, a product of queries and projected distances",
    }[position.kind]


def _scaling(scaling: RopeScalingConfig) -> str:
    return (
        f"scaled by {_SCALINGS[scaling.kind]}"
        + (f" × {scaling.factor:g}" if scaling.factor > 1 else "")
        + (f" from {scaling.original_length:,} tokens" if scaling.original_length else "")
    )


def layer(config: ModelConfig, kind: LayerConfig) -> str:
    """Returns what the layers of a kind do: what they see, and where they differ from the model's
    other kinds.
    """
    kinds = set(config.layers())
    dense = config.experts is not None and not kind.experts
    return _listed(
        sight(config, kind.window),
        positions(config.position_of(kind))
        if len({config.position_of(other) for other in kinds}) > 1
        else "",
        "dense MLP" if dense else "",
        _chosen(config.experts) if config.experts is not None and not dense else "",
        "no norm before attention"
        if not kind.attention_norm and config.norm.reads_normalized
        else "",
    )


def sight(config: ModelConfig, window: int | None) -> str:
    """Returns what a token sees in layers with this window."""
    if window is None:
        return _SIGHT[config.structure]
    if config.structure == "encoder":
        return f"window {window:,}: sees {_many(window - 1, 'token')} to each side"
    return f"window {window:,}: sees itself and {_many(window - 1, 'token')} before"


def _attention(attention: AttentionConfig) -> str:
    latent = attention.latent
    return _listed(
        f"values of {latent.value_dim}" if latent is not None else "",
        f"queries from a latent of {latent.q_dim:,}"
        if latent is not None and latent.q_dim is not None
        else "",
        f"scores times {attention.scale:.4g}" if attention.scale not in (None, 1) else "",
        "scores not scaled" if attention.scale == 1 else "",
        f"scores capped at {attention.softcap:g}" if attention.softcap is not None else "",
        _QK_NORMS[attention.qk_norm],
        "a learned sink for each head" if attention.sinks else "",
        _biases(attention.qkv_bias, attention.out_bias),
    )


def _biases(inward: bool, outward: bool) -> str:
    return {
        (True, True): "biases",
        (True, False): "biases on queries, keys and values",
        (False, True): "a bias on the output",
        (False, False): "",
    }[inward, outward]


def _mlp(mlp: MlpConfig) -> str:
    return _listed(
        f"{'gated ' if mlp.gated else ''}{_ACTIVATIONS[mlp.activation]}, width {mlp.hidden_dim:,}",
        f"clamped at {mlp.clamp:g}" if mlp.clamp is not None else "",
        f"the other factor plus {mlp.up_offset:g}" if mlp.up_offset else "",
        "biases" if mlp.bias else "",
    )


def _experts(experts: ExpertsConfig) -> str:
    groups = (
        f" out of {experts.groups_per_token} of {experts.num_groups} groups"
        if experts.num_groups > 1
        else ""
    )
    gated = ", weighed by a sigmoid" if experts.shared_gate else ""
    return _listed(
        _chosen(experts),
        f"width {experts.hidden_dim:,}",
        f"a shared one of width {experts.shared_dim:,}{gated}" if experts.shared_dim else "",
        f"chosen by {experts.score}{groups}",
    )


def _chosen(experts: ExpertsConfig) -> str:
    return f"{experts.num_experts} experts of which {experts.experts_per_token} a token"


def _norm(norm: NormConfig) -> str:
    bias = ", biases" if norm.bias else ""
    return f"{_NORMS[norm.kind]} {_PLACEMENTS[norm.placement]}, epsilon {norm.epsilon:g}{bias}"


def _head(head: HeadConfig) -> str:
    return _listed(
        "a transform before the output projection" if head.transform else "",
        "a bias of the logits" if head.bias else "",
        f"states times {head.scale:.4g}" if head.scale != 1 else "",
        f"logits capped at {head.softcap:g}" if head.softcap is not None else "",
        "a pooler" if head.pooler else "",
        f"{head.num_classes} classes" if head.num_classes else "",
        f"{_many(head.mtp_depth, 'further token')} predicted in training" if head.mtp_depth else "",
    )


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _listed(*words: str) -> str:
    return ", ".join(word for word in words if word)
