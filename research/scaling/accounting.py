"""How many FLOPs training takes, counted from the model's sizes.

One multiplication and one addition are two FLOPs. Only matrix products are counted, as is usual for model FLOPs
utilization: not norms, activations, softmax or the optimizer, and not what rematerialization computes again.
"""

from research.models.config import ModelConfig


def matmul_parameters(model: ModelConfig) -> int:
    """Returns the number of weights that every token is multiplied with.

        L · (D·H·(2N + 2K) + (3 if gated else 2)·D·F) + D·V

    The embedding table is not counted, for it is looked up; the head is, tied to that table or not.
    """
    attention, mlp = model.attention, model.mlp
    per_layer = model.embed_dim * attention.head_dim * (2 * attention.num_heads + 2 * attention.num_kv_heads)
    per_layer += (3 if mlp.gated else 2) * model.embed_dim * mlp.hidden_dim
    return model.num_layers * per_layer + model.embed_dim * model.vocab_size


def train_flops_per_token(model: ModelConfig, sequence_length: int, causal: bool = True) -> int:
    """Returns the FLOPs of one training step of a decoder, per token.

        6 · matmul_parameters + 12 · L · N · H · T · (1/2 if causal)

    Forward, each weight costs a token 2 FLOPs, and each of the T keys costs it 2·N·H for its score and 2·N·H for its
    part of the sum; backward costs twice that. A causal token sees half of the keys on average, and is counted so,
    whether or not a kernel skips the other half.

    Args:
      model: the decoder.
      sequence_length: T, keys as well as queries; a packed row of shorter documents is counted as one sequence.
      causal: whether a token sees only what comes before it.

    Source: Kaplan et al. 2020, arXiv:2001.08361, table 1 (with the head counted); Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B (which counts causal attention in full).
    """
    attention = 12 * model.num_layers * model.attention.num_heads * model.attention.head_dim * sequence_length
    return 6 * matmul_parameters(model) + (attention // 2 if causal else attention)
