"""How many FLOPs training takes, counted from the model's sizes.

One multiplication and one addition are two FLOPs. Only matrix products are counted, as is usual for
model FLOPs
utilization: not norms, activations, softmax or the optimizer, and not what rematerialization
computes again; nor the projected waves of Transformer-XL's relative positions, which are the same
for all sequences.
"""

from collections.abc import Sequence

from research.models.config import LayerConfig, ModelConfig


def matmul_parameters(model: ModelConfig) -> int:
    """Returns the number of weights that every token is multiplied with, in a decoder or an
    encoder.

        Σ_layers (D·H·(2N + 2K) + (3 if gated else 2)·D·F) + D·V

    Of experts, those that a token goes to are counted, and the router. The embedding table is not
    counted, for it is looked up; the head is, tied to that table or not. Of an encoder-decoder this
    is the decoder.
    """
    layers = model.layers()
    total = sum(_layer_weights(model, layer) for layer in layers) + _head_weights(model)
    further = _layer_weights(model, layers[-1]) + 2 * model.embed_dim**2 + _head_weights(model)
    return total + model.head.mtp_depth * further


def _head_weights(model: ModelConfig) -> int:
    return model.embed_dim * model.vocab_size + (model.embed_dim**2 if model.head.transform else 0)


def _layer_weights(model: ModelConfig, layer: LayerConfig) -> int:
    c, width = model.attention, model.embed_dim
    if c.latent is None:
        weights = width * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    else:
        queries = c.num_heads * (c.head_dim + c.latent.rope_dim)
        weights = width * queries if c.latent.q_dim is None else c.latent.q_dim * (width + queries)
        weights += width * (c.latent.kv_dim + c.latent.rope_dim)
        weights += c.latent.kv_dim * c.num_heads * (c.head_dim + c.latent.value_dim)
        weights += c.num_heads * c.latent.value_dim * width
    if model.structure == "encoder_decoder":
        weights += (
            2 * width * c.num_heads * c.head_dim
        )  # keys and values are the encoder's, which pays for them
    matrices = 3 if model.mlp.gated else 2
    if model.experts is None or not layer.experts:
        return weights + matrices * width * model.mlp.hidden_dim
    e = model.experts
    per_token = e.experts_per_token * e.hidden_dim + e.shared_dim
    return (
        weights
        + width * (e.num_experts + (1 if e.shared_gate else 0))
        + matrices * width * per_token
    )


def visible_keys(model: ModelConfig, layer: LayerConfig, length: int) -> float:
    """Returns how many keys a token of a sequence of `length` sees on average, to about a key.

    Causal attention sees half of T; a window counts on both sides of an encoder's token. A prefix
    is as the objective `prefix` draws it, of any length alike: its p tokens see p²/2 pairs more,
    T²/6 on average, so 2/3 of T are seen.
    """
    if model.structure == "prefix":  # which has no windows
        return length / 2 + length / 6
    window = length if layer.window is None else min(layer.window, length)
    one_side = window - window**2 / (2 * length)
    return 2 * one_side if model.structure == "encoder" else one_side


def train_flops_per_token(
    model: ModelConfig, sequence_length: int, encoder_length: int = 0, visible_only: bool = True
) -> float:
    """Returns the FLOPs of one training step, per token of the decoder (or of the only stack).

        6 · matmul_parameters + 6 · Σ_layers N · (H_k + H_v) · keys

    Forward, each weight costs a token 2 FLOPs, and each key costs it 2·N·H_k for its score and
    2·N·H_v for its part of the sum, with relative positions 2·N·H_k more for its score by distance;
    backward costs twice that. A token's keys are those that it sees on average, whether or not a
    kernel skips the others: `visible_keys` of T, all M of the encoder.

    Args:
      model: the model.
      sequence_length: T; a packed row of shorter documents is counted as one sequence.
      encoder_length: M, tokens of the encoder beside T of the decoder.
      visible_only: whether keys that the mask hides are left out.

    Source: Kaplan et al. 2020, arXiv:2001.08361, table 1 (with the head counted); Chowdhery et al.
    2022, arXiv:2204.02311, appendix B (which counts causal attention in full).
    """
    future = [model.layers()[-1]] * model.head.mtp_depth
    flops = 6 * matmul_parameters(model) + _attention(
        model, [*model.layers(), *future], sequence_length, visible_only
    )
    if model.structure != "encoder_decoder":
        return float(flops)
    encoder, c = model.encoder(), model.attention
    of_encoder = 6 * (matmul_parameters(encoder) - _head_weights(encoder))
    of_encoder += _attention(encoder, encoder.layers(), encoder_length, visible_only)
    of_encoder += 6 * model.num_layers * 2 * model.embed_dim * c.num_kv_heads * c.head_dim
    across = 6 * model.num_layers * c.num_heads * 2 * c.head_dim * encoder_length
    return flops + across + of_encoder * encoder_length / sequence_length


def _attention(
    model: ModelConfig, layers: Sequence[LayerConfig], length: int, visible_only: bool
) -> float:
    """Returns the FLOPs a token of a training step for scores and sums of self-attention."""
    c, flops = model.attention, 0.0
    for layer in layers:
        per_key = c.num_heads * 2 * c.head_dim
        if c.latent is not None:
            per_key = c.num_heads * (c.head_dim + c.latent.rope_dim + c.latent.value_dim)
        if (
            model.position_of(layer).kind == "relative"
        ):  # each key has a second score, by its distance
            per_key += c.num_heads * c.head_dim
        flops += 6 * per_key * (visible_keys(model, layer, length) if visible_only else length)
    return flops
