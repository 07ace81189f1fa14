"""Training steps of every family beside those of a plain decoder: how much of its speed each keeps,
by model FLOPs.
"""

import argparse
import dataclasses
import pathlib

import research
from research.bench import report
from research.bench.sides import interleave_workers
from research.core import config as configs
from research.core.errors import UserError, nearest
from research.models.config import (
    AttentionConfig,
    ExpertsConfig,
    LayerConfig,
    ModelConfig,
    PositionConfig,
)
from research.models.flops import train_flops_per_token

PRESETS = pathlib.Path(research.__file__).parent.parent / "configs" / "model"
# The family that the others are measured beside.
DECODER = "gpt2"
# The sizes to which all are shrunk: the smallest width of the decoder, and few layers.
LENGTH = 256
BATCH = 16
WIDTH = 768
HEADS = 12
HEAD_WIDTH = WIDTH // HEADS
ROPE_WIDTH = 32
LAYERS = 3
VOCABULARY = 4096
WINDOW = 64
EXPERTS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument(
        "--only", help="presets, separated by commas: files of configs/model, as gemma.py:3-1b"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the products"
    )
    # Single steps: some allocate new memory and take several times as long; the median leaves them
    # out.
    report.add_arguments(parser, rounds=7)
    parser.add_argument("--steps", type=int, default=1, help="training steps a round (default 1)")


def main(arguments: argparse.Namespace) -> None:
    """Measures each family interleaved with the decoder, and prints the ratios of their FLOPs a
    second.
    """
    report.check_arguments(arguments, "steps")
    names = {path.stem for path in PRESETS.glob("*.py")}
    known = sorted(names - {"__init__"})
    wanted = [name for name in known if name != DECODER]
    if arguments.only:
        wanted = arguments.only.split(",")
    for spec in wanted:
        if spec == DECODER:
            raise UserError("--only", spec, "is what all others are measured beside.")
        if spec.partition(":")[0].removesuffix(".py") not in known:
            raise UserError("--only", spec, f"is not a preset. {nearest(spec, known)}")
        _check_size(spec)
    report.publish("families", arguments, ((spec, measure(spec, arguments)) for spec in wanted))


def _check_size(spec: str) -> None:
    """Raises UserError for an unknown size, before anything is measured."""
    try:
        load(spec, "float32")
    except UserError as error:
        raise UserError("--only", spec, error.constraint) from error


def measure(spec: str, arguments: argparse.Namespace) -> report.Figure:
    """Returns the FLOPs a second of a preset beside the decoder's, each with its own FLOPs."""
    sides = (spec, DECODER)
    commands = {side: ["research.bench.families_side", side, arguments.dtype] for side in sides}
    seconds = interleave_workers(commands, arguments.rounds, arguments.steps)
    # Each model's own FLOPs: 2 steps of 30 GFLOP in 0.5 s are 120 GFLOP/s.
    rates = {}
    for side, values in seconds.items():
        gigaflops = arguments.steps * flops(load(side, arguments.dtype)) / 1e9
        rates[side] = [gigaflops / taken for taken in values]
    return report.Figure("GFLOP/s", True, rates)


def flops(model: ModelConfig) -> float:
    """Returns the FLOPs of a step."""
    return BATCH * LENGTH * train_flops_per_token(model, LENGTH, LENGTH)


def load(spec: str, dtype: str) -> ModelConfig:
    """Returns a preset, `NAME` or `NAME.py:SIZE`, shrunk to the sizes of this bench."""
    name, colon, size = spec.partition(":")
    path = PRESETS / f"{name.removesuffix('.py')}.py"
    model = configs.bind(ModelConfig, configs.load_file(f"{path}{colon}{size}"))
    return dataclasses.replace(shrunk(model), dtype=dtype)


def shrunk(model: ModelConfig) -> ModelConfig:
    """Returns a model of the same build and proportions, and small sizes."""
    # One of the layers before the pattern, and the pattern at least once.
    first = tuple(_shrunk_layer(layer) for layer in model.first_layers[:1])
    pattern = tuple(_shrunk_layer(layer) for layer in model.pattern)
    scale = WIDTH / model.embed_dim
    return dataclasses.replace(
        model,
        vocab_size=VOCABULARY,
        num_layers=len(first) + max(LAYERS, len(pattern)),
        encoder_layers=model.encoder_layers and LAYERS,
        embed_dim=WIDTH,
        max_length=LENGTH,
        attention=_shrunk_attention(model.attention),
        mlp=dataclasses.replace(model.mlp, hidden_dim=_wide(scale * model.mlp.hidden_dim)),
        position=_shrunk_position(model.position),
        first_layers=first,
        pattern=pattern,
        experts=model.experts and _shrunk_experts(model.experts, scale),
        decoder_start_id=0,
        dropout=0.0,
    )


def _shrunk_attention(attention: AttentionConfig) -> AttentionConfig:
    # The number of key/value heads nearest to the same proportion: 8 of 32 -> 3 of 12.
    proportion = attention.num_kv_heads / attention.num_heads
    divisors = [heads for heads in range(1, HEADS + 1) if HEADS % heads == 0]

    def difference(kv_heads: int) -> float:
        return abs(kv_heads / HEADS - proportion)

    kv_heads = min(divisors, key=difference)

    latent = attention.latent
    head_width = HEAD_WIDTH
    if latent:
        # Its heads have the columns that rotate beside the others.
        head_width = HEAD_WIDTH - ROPE_WIDTH
        latent = dataclasses.replace(
            latent,
            kv_dim=128,
            q_dim=latent.q_dim and 192,
            rope_dim=ROPE_WIDTH,
            value_dim=HEAD_WIDTH,
        )
    return dataclasses.replace(
        attention, num_heads=HEADS, num_kv_heads=kv_heads, head_dim=head_width, latent=latent
    )


def _shrunk_experts(experts: ExpertsConfig, scale: float) -> ExpertsConfig:
    return dataclasses.replace(
        experts,
        num_experts=EXPERTS,
        experts_per_token=min(experts.experts_per_token, 2),
        hidden_dim=max(128, _wide(scale * experts.hidden_dim)),
        shared_dim=experts.shared_dim and _wide(scale * experts.shared_dim),
        num_groups=1,
        groups_per_token=1,
    )


def _wide(width: float) -> int:
    """Returns a width rounded to a multiple of 32."""
    return max(32, round(width / 32) * 32)


def _shrunk_layer(layer: LayerConfig) -> LayerConfig:
    window = layer.window and min(layer.window, WINDOW)
    position = layer.position and _shrunk_position(layer.position)
    return dataclasses.replace(layer, window=window, position=position)


def _shrunk_position(position: PositionConfig) -> PositionConfig:
    """Returns positions without the rules for long contexts and wide heads."""
    rotary_dim = None if position.rotary_dim is None else HEAD_WIDTH // 2
    return dataclasses.replace(position, scaling=None, rotary_dim=rotary_dim)
