"""How many FLOPs training takes, counted from the model's sizes.

One multiplication and one addition are two FLOPs. Only matrix products are counted, as is usual for
model FLOPs utilization: not norms, activations, softmax, the optimizer or rematerialization; nor
the projected sinusoids of Transformer-XL's relative positions, which all sequences share.
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
    layer_weights = [_layer_weights(model, layer) for layer in layers]
    head_weights = _head_weights(model)
    # An MTP module has a layer, a projection of two concatenated states (2D -> D), and the head.
    mtp_projection = 2 * model.embed_dim**2
    mtp_weights = layer_weights[-1] + mtp_projection + head_weights
    return sum(layer_weights) + head_weights + model.head.mtp_depth * mtp_weights


def _head_weights(model: ModelConfig) -> int:
    weights = model.embed_dim * model.vocab_size
    if model.head.transform:
        weights += model.embed_dim**2
    return weights


def _layer_weights(model: ModelConfig, layer: LayerConfig) -> int:
    c = model.attention
    weights = _attention_weights(model) + _mlp_weights(model, layer)
    if model.structure == "encoder_decoder":
        # Queries and output of cross-attention; its keys and values are counted with the encoder.
        weights += 2 * model.embed_dim * c.num_heads * c.head_dim
    return weights


def _attention_weights(model: ModelConfig) -> int:
    """Returns the weights of the projections of self-attention."""
    c = model.attention
    width = model.embed_dim
    if c.latent is None:
        num_projected = 2 * c.num_heads + 2 * c.num_kv_heads
        return width * c.head_dim * num_projected

    latent = c.latent
    query_width = c.num_heads * (c.head_dim + latent.rope_dim)
    weights = width * query_width
    if latent.q_dim is not None:
        weights = latent.q_dim * (width + query_width)
    # To the latent and the rotary key, from the latent to keys and values, and the output.
    weights += width * (latent.kv_dim + latent.rope_dim)
    up_width = c.num_heads * (c.head_dim + latent.value_dim)
    weights += latent.kv_dim * up_width
    weights += c.num_heads * latent.value_dim * width
    return weights


def _mlp_weights(model: ModelConfig, layer: LayerConfig) -> int:
    """Returns the weights of the MLP, or of the router and the experts that a token goes to."""
    width = model.embed_dim
    num_matrices = 3 if model.mlp.gated else 2
    experts = model.experts
    if experts is None or not layer.experts:
        return num_matrices * width * model.mlp.hidden_dim

    router_width = experts.num_experts
    if experts.shared_gate:
        router_width += 1
    hidden_dim = experts.experts_per_token * experts.hidden_dim + experts.shared_dim
    return width * router_width + num_matrices * width * hidden_dim


def visible_keys(model: ModelConfig, layer: LayerConfig, length: int) -> float:
    """Returns how many keys a token of a sequence of `length` attends to on average, to about a
    key.

    With causal attention it is half of T; in an encoder a window counts on both sides of a token.
    The length p of a prefix is uniform, as in the objective `prefix`: bidirectional attention
    within it adds p²/2 pairs, on average T²/6, which makes 2/3 of T.
    """
    if model.structure == "prefix":
        # It has no windows.
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
    backward costs twice that. A token's keys are those that it attends to on average, whether or
    not a kernel skips the others: `visible_keys` of T, all M of the encoder.

    Args:
      model: the model.
      sequence_length: T; a packed row of shorter documents is counted as one sequence.
      encoder_length: M, tokens of the encoder beside T of the decoder.
      visible_only: whether keys that the mask hides are left out.

    Source: Kaplan et al. 2020, arXiv:2001.08361, table 1 (with the head counted); Chowdhery et al.
    2022, arXiv:2204.02311, appendix B (which counts causal attention in full).
    """
    layers = model.layers()
    mtp_layers = [layers[-1]] * model.head.mtp_depth
    flops = 6 * matmul_parameters(model)
    flops += _attention(model, [*layers, *mtp_layers], sequence_length, visible_only)
    if model.structure != "encoder_decoder":
        return float(flops)

    c = model.attention
    encoder = model.encoder()
    encoder_weights = matmul_parameters(encoder) - _head_weights(encoder)
    encoder_flops = 6 * encoder_weights
    encoder_flops += _attention(encoder, encoder.layers(), encoder_length, visible_only)
    # Every decoder layer projects each encoder token to a key and a value.
    kv_weights = 2 * model.embed_dim * c.num_kv_heads * c.head_dim
    encoder_flops += 6 * model.num_layers * kv_weights

    # A score and a product with a value for each encoder token, in every decoder layer.
    per_key = c.num_heads * 2 * c.head_dim
    cross_attention = 6 * model.num_layers * per_key * encoder_length
    return flops + cross_attention + encoder_flops * encoder_length / sequence_length


def _attention(
    model: ModelConfig, layers: Sequence[LayerConfig], length: int, visible_only: bool
) -> float:
    """Returns the FLOPs per token of a training step for scores and sums of self-attention."""
    c = model.attention
    flops = 0.0
    for layer in layers:
        # Widths of a key and of a value.
        widths = 2 * c.head_dim
        if c.latent is not None:
            widths = c.head_dim + c.latent.rope_dim + c.latent.value_dim
        if model.position_of(layer).kind == "relative":
            # Each key has a second score, by its distance.
            widths += c.head_dim
        per_key = c.num_heads * widths

        num_keys = float(length)
        if visible_only:
            num_keys = visible_keys(model, layer, length)
        flops += 6 * per_key * num_keys
    return flops
