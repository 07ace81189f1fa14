"""Models of the LLaMA family that benches measure, by their sizes."""

from research.models.config import AttentionConfig, MlpConfig, ModelConfig


def llama(
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    hidden_dim: int,
    heads: tuple[int, int, int],
    max_length: int,
    *,
    is_tied: bool = True,
) -> ModelConfig:
    """Returns a LLaMA.

    Args:
      vocab_size: V.
      num_layers: L.
      embed_dim: D.
      hidden_dim: F.
      heads: N, K and H.
      max_length: tokens of a sequence.
      is_tied: whether the output projection is the table of embeddings.
    """
    return ModelConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        max_length=max_length,
        attention=AttentionConfig(*heads),
        mlp=MlpConfig(hidden_dim=hidden_dim),
        tied_embeddings=is_tied,
    )


# The shape of SmolLM-135M.
LLAMA_134M = llama(49_152, 30, 576, 1536, (9, 3, 64), 2048)
LLAMA_145M = llama(16_384, 10, 1024, 2816, (16, 16, 64), 64)
# The shape of Llama 3.2 1B.
LLAMA_1B = llama(128_256, 16, 2048, 8192, (32, 8, 64), 2048)
TINY = llama(1000, 1, 32, 64, (2, 2, 16), 64)
