"""A model's config as a table of (field, text), in the terms of papers and other trainers."""

from research.models.config import (
    AttentionConfig,
    ExpertsConfig,
    HeadConfig,
    LatentConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
    RopeScalingConfig,
)

_STRUCTURES = {
    "decoder": "decoder-only",
    "encoder": "encoder-only",
    "prefix": "prefix language model",
    "encoder_decoder": "encoder-decoder",
}
_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
_PLACEMENTS = {
    "pre": "before each sublayer",
    "post": "after each residual addition",
    "sandwich": "before and after each sublayer",
    "output": "after each sublayer, before the residual addition",
    "parallel": "one before attention and MLP, which run in parallel",
    "parallel_pair": "one each before attention and MLP, which run in parallel",
}
_ACTIVATIONS = {
    "gelu": "GELU",
    "gelu_tanh": "GELU (tanh approximation)",
    "gelu_sigmoid": "GELU (sigmoid approximation)",
    "relu": "ReLU",
    "silu": "SiLU",
}
_ROPE_SCALINGS = {
    "linear": "linear scaling",
    "dynamic": "dynamic NTK scaling",
    "yarn": "YaRN scaling",
    "llama3": "LLaMA 3 scaling",
    "longrope": "LongRoPE scaling",
}
_QK_NORMS = {
    "none": "",
    "head": "RMSNorm of each head's queries and keys",
    "all": "RMSNorm over all heads' queries, and over all heads' keys",
}
_ATTENTION_BIASES = {
    (True, True): "query, key, value and output projections",
    (True, False): "query, key and value projections",
    (False, True): "output projection",
    (False, False): "",
}
_MASKS = {
    "decoder": "causal attention",
    "encoder": "bidirectional attention",
    "prefix": "attention bidirectional in the prefix, causal after it",
    "encoder_decoder": "causal attention",
}

Table = dict[str, str]


def model_table(config: ModelConfig) -> Table:
    """Returns the fields of the whole model; a field that it does not use is left out."""
    rows = {
        "structure": _STRUCTURES[config.structure],
        "layers": _layer_count(config),
        "width": f"{config.embed_dim:,}",
        **_attention_rows(config.attention),
        "positions": positions(config.position),
        "MLP width": _if(_has_dense_mlp(config), f"{config.mlp.hidden_dim:,}"),
        **_mlp_rows(config.mlp),
        **_expert_rows(config.experts),
        "norm": _norm(config.norm),
        "context": f"{config.max_length:,} tokens",
        "vocabulary": f"{config.vocab_size:,}",
        **_embedding_rows(config),
        **_head_rows(config.head),
        "dropout": _number(config.dropout),
    }
    return {field: text for field, text in rows.items() if text}


def _layer_count(config: ModelConfig) -> str:
    if config.structure == "encoder_decoder":
        return f"{config.encoder_layers} in the encoder, {config.num_layers} in the decoder"
    return f"{config.num_layers}"


def _attention_rows(attention: AttentionConfig) -> Table:
    biases = _ATTENTION_BIASES[attention.qkv_bias, attention.out_bias]
    rows = {
        "query heads": f"{attention.num_heads}",
        "KV heads": f"{attention.num_kv_heads}",
        "head dim": f"{attention.head_dim}",
        "attention scale": _number(attention.scale),
        "attention softcap": _number(attention.softcap),
        "QK norm": _QK_NORMS[attention.qk_norm],
        "attention sinks": _if(attention.sinks, "a learned logit for each head"),
        "attention biases": biases,
    }
    if attention.latent is not None:
        rows |= _mla_rows(attention.head_dim, attention.latent)
    return rows


def _mla_rows(head_dim: int, latent: LatentConfig) -> Table:
    """Returns the rows of multi-head latent attention, whose heads have a part without RoPE."""
    query_latent = "none, queries are projected directly"
    if latent.q_dim is not None:
        query_latent = f"width {latent.q_dim:,}"

    return {
        "KV heads": "",
        "head dim": f"{head_dim} without RoPE + {latent.rope_dim} with RoPE",
        "value head dim": f"{latent.value_dim}",
        "KV latent": f"width {latent.kv_dim:,} (multi-head latent attention)",
        "query latent": query_latent,
    }


def positions(position: PositionConfig) -> str:
    """Returns the kind of positions of a model or a layer."""
    if position.kind == "rotary":
        return _rope(position)
    order = _if(position.halves, ", all sines before all cosines")
    texts = {
        "none": "none",
        "learned": "learned, added to the embeddings",
        "sinusoidal": f"sinusoidal{order}, added to the embeddings",
        "alibi": "ALiBi",
        "alibi_bfloat16": "ALiBi, biases rounded to bfloat16",
        "buckets": f"relative bias, {position.num_buckets} buckets up to a distance of "
        f"{position.max_distance} (T5)",
        "relative": "relative, projected distances times queries (Transformer-XL)",
    }
    return texts[position.kind]


def _rope(position: PositionConfig) -> str:
    parts = [f"RoPE, theta {position.theta:,.10g}"]
    if position.rotary_dim is not None:
        parts.append(f"{position.rotary_dim} columns of a head")
    if position.scaling is not None:
        parts.append(_rope_scaling(position.scaling))
    return ", ".join(parts)


def _rope_scaling(scaling: RopeScalingConfig) -> str:
    text = _ROPE_SCALINGS[scaling.kind]
    if scaling.factor > 1:
        text += f" × {scaling.factor:g}"
    if scaling.original_length:
        text += f" from {scaling.original_length:,} tokens"
    return text


def _has_dense_mlp(config: ModelConfig) -> bool:
    """Whether a layer has the MLP and not experts in its place."""
    return config.experts is None or not all(layer.experts for layer in config.layers())


def _mlp_rows(mlp: MlpConfig) -> Table:
    """Returns the rows of what an MLP shares with experts."""
    activation = _ACTIVATIONS[mlp.activation]
    return {
        "activation": f"{activation}, gated" if mlp.gated else activation,
        "MLP clamp": _number(mlp.clamp),
        "MLP up offset": _number(mlp.up_offset),
        "MLP biases": _if(mlp.bias, "yes"),
    }


def _expert_rows(experts: ExpertsConfig | None) -> Table:
    if experts is None:
        return {}

    router = [experts.score]
    if experts.num_groups > 1:
        router.append(f"from {experts.groups_per_token} of {experts.num_groups} groups")
    if experts.selection_bias:
        router.append("chosen with a selection bias")
    if experts.renormalize:
        router.append("weights of the chosen renormalized")
    if experts.scale != 1:
        router.append(f"weights × {experts.scale:.4g}")

    shared = ""
    if experts.shared_dim:
        shared = f"width {experts.shared_dim:,}"
        shared += _if(experts.shared_gate, ", sigmoid gate")

    return {
        "experts": _expert_count(experts),
        "expert width": f"{experts.hidden_dim:,}",
        "shared expert": shared,
        "router": ", ".join(router),
    }


def _expert_count(experts: ExpertsConfig) -> str:
    return f"{experts.num_experts}, {experts.experts_per_token} per token"


def _norm(norm: NormConfig) -> str:
    kind = _NORMS[norm.kind]
    placement = _PLACEMENTS[norm.placement]
    biases = _if(norm.bias, ", biases")
    return f"{kind} {placement}, epsilon {norm.epsilon:g}{biases}"


def _embedding_rows(config: ModelConfig) -> Table:
    types = config.embedding.num_types
    return {
        "output projection": "tied to the embedding" if config.tied_embeddings else "not tied",
        "embedding scale": _if(config.scale_embeddings, f"√{config.embed_dim:,}"),
        "embedding norm": _if(config.embedding.norm, "yes"),
        "segment types": _if(types, f"{types}"),
    }


def _head_rows(head: HeadConfig) -> Table:
    return {
        "head transform": _if(head.transform, "projection, activation, norm before the logits"),
        "logit bias": _if(head.bias, "yes"),
        "hidden state scale": _if(head.scale != 1, f"{head.scale:.4g}"),
        "logit softcap": _number(head.softcap),
        "pooler": _if(head.pooler, "yes"),
        "classes": _if(head.num_classes, f"{head.num_classes}"),
        "MTP depth": _if(head.mtp_depth, f"{head.mtp_depth} (multi-token prediction, training)"),
    }


def layer_text(config: ModelConfig, layer: LayerConfig) -> str:
    """Returns the attention mask of a kind of layer, and how it differs from the other kinds."""
    parts = [mask_text(config, layer.window)]
    # What all layers share is a row of the model.
    positions_of_layers = {config.position_of(other) for other in config.layers()}
    if len(positions_of_layers) > 1:
        parts.append(positions(config.position_of(layer)))
    if config.experts is not None:
        experts = f"experts: {_expert_count(config.experts)}"
        sublayer = experts if layer.experts else "dense MLP"
        parts.append(sublayer)
    if config.norm.reads_normalized and not layer.attention_norm:
        parts.append("no norm before attention")
    return ", ".join(parts)


def mask_text(config: ModelConfig, window: int | None) -> str:
    """Returns the self-attention mask of layers with this window, None for all tokens."""
    mask = _MASKS[config.structure]
    if window is None:
        return mask
    if config.structure == "encoder":
        # A window hides tokens at its own distance.
        return f"{mask}, sliding window of {window - 1:,} tokens to each side"
    return f"{mask}, sliding window of {window:,} tokens (itself included)"


def _number(value: float | None) -> str:
    """Returns a number; nothing for None and for 0, which are the values of what is off."""
    return f"{value:.4g}" if value else ""


def _if(condition: object, text: str) -> str:
    return text if condition else ""
