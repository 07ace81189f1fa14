"""The two sides of `tessera bench train`, each a process: it reads a number of steps, takes them,
and prints the seconds.

Each imports its own framework only, inside its function, so that the threads of two runtimes never
share a process.
"""

import sys
from collections.abc import Callable
from typing import Any

from research.bench.sides import serve
from research.bench.train import BETAS, LEARNING_RATE, SHAPE, WEIGHT_DECAY
from research.core import backend


def tessera_step(dtype: str) -> Callable[[], float]:
    """Returns the step that `tessera train` takes, on one device; it returns the loss."""
    import jax

    from research.optim.optimizers import OptimConfig
    from research.optim.schedules import ScheduleConfig
    from research.parallel.mesh_config import MeshConfig
    from research.training.config import TrainConfig
    from research.training.language_model import language_model_program
    from research.training.step import shard_batch

    # The same optimizer as torch's: AdamW at a constant rate, without clipping.
    optim = OptimConfig(
        learning_rate=LEARNING_RATE,
        schedule=ScheduleConfig(name="constant"),
        weight_decay=WEIGHT_DECAY,
        beta1=BETAS[0],
        beta2=BETAS[1],
        clip_norm=None,
    )
    train = TrainConfig(steps=1_000_000, batch_size=SHAPE.batch, sequence_length=SHAPE.length)
    program = language_model_program(
        gpt2_config(dtype), optim, train, MeshConfig(), jax.devices()[:1]
    )
    step = program.compile_train_step()
    state = program.create(jax.random.key(0))
    batch = shard_batch(random_batch(), program.batch)

    # Reading the loss waits for the step.
    def take() -> float:
        nonlocal state
        state, metrics = step(state, {}, batch)
        return float(metrics["loss"])

    return take


def gpt2_config(dtype: str) -> Any:
    """Returns GPT-2 of SHAPE as a `ModelConfig`."""
    from research.models.config import (
        AttentionConfig,
        MlpConfig,
        ModelConfig,
        NormConfig,
        PositionConfig,
    )

    head_width = SHAPE.width // SHAPE.heads
    return ModelConfig(
        vocab_size=SHAPE.vocabulary,
        num_layers=SHAPE.layers,
        embed_dim=SHAPE.width,
        max_length=SHAPE.length,
        attention=AttentionConfig(
            SHAPE.heads, SHAPE.heads, head_width, qkv_bias=True, out_bias=True
        ),
        mlp=MlpConfig(4 * SHAPE.width, activation="gelu_tanh", gated=False, bias=True),
        norm=NormConfig(kind="layernorm", bias=True),
        position=PositionConfig(kind="learned"),
        tied_embeddings=True,
        dtype=dtype,
    )


def random_batch() -> dict[str, Any]:
    """Returns rows of random tokens, each one document."""
    import numpy as np

    shape = (SHAPE.batch, SHAPE.length)
    # [B, T + 1]: targets are the tokens one position later.
    tokens = np.random.default_rng(0).integers(
        SHAPE.vocabulary, size=(SHAPE.batch, SHAPE.length + 1), dtype=np.int32
    )
    positions = np.arange(SHAPE.length, dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(positions, shape),
        "segments": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }


def torch_step(dtype: str) -> Callable[[], float]:
    """Returns a step of GPT-2 with SDPA attention and the fused AdamW: eager, or in bfloat16
    autocast and compiled.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    # The sizes of `gpt2_config`, without dropout.
    config = GPT2Config(
        vocab_size=SHAPE.vocabulary,
        n_positions=SHAPE.length,
        n_embd=SHAPE.width,
        n_layer=SHAPE.layers,
        n_head=SHAPE.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    tokens = torch.randint(0, SHAPE.vocabulary, (SHAPE.batch, SHAPE.length))
    forward = torch.compile(model) if dtype == "bfloat16" else model

    def take() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return take


def main(side: str, dtype: str, *flags: str) -> None:
    """Serves steps of a side until its input ends."""
    if side == "tessera":
        backend.configure()
        take = tessera_step(dtype)
    else:
        if "--keep_memory" in flags:
            backend.keep_memory()
        take = torch_step(dtype)
    serve(take)


if __name__ == "__main__":
    main(*sys.argv[1:])
