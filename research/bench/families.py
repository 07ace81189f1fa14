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
from research.models.config import LayerConfig, ModelConfig, PositionConfig
from research.models.flops import train_flops_per_token

PRESETS = pathlib.Path(research.__file__).parent.parent / "configs" / "model"
# What all are measured against, and the sizes to which all are shrunk: its smallest width, and few
# layers.
DECODER = "gpt2"
LENGTH, BATCH, WIDTH, HEADS, LAYERS, VOCABULARY, WINDOW, EXPERTS = 256, 16, 768, 12, 3, 4096, 64, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument(
        "--only", help="presets, separated by commas: files of configs/model, as gemma.py:3-1b"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the products"
    )
    # Single steps: now and then one takes new memory, and takes several times as long; the median
    # leaves it out.
    report.add_arguments(parser, rounds=7)
    parser.add_argument("--steps", type=int, default=1, help="training steps a round (default 1)")


def main(arguments: argparse.Namespace) -> None:
    """Measures each family interleaved with the decoder, and prints the ratios of their FLOPs a
    second.
    """
    report.check_arguments(arguments, "steps")
    known = sorted(path.stem for path in PRESETS.glob("*.py") if path.stem != "__init__")
    wanted = (
        arguments.only.split(",") if arguments.only else [name for name in known if name != DECODER]
    )
    for spec in wanted:
        if spec == DECODER:
            raise UserError("--only", spec, "is what all others are measured beside.")
        if spec.partition(":")[0].removesuffix(".py") not in known:
            raise UserError("--only", spec, f"is not a preset. {nearest(spec, known)}")
    report.publish("families", arguments, ((spec, measure(spec, arguments)) for spec in wanted))


def measure(spec: str, arguments: argparse.Namespace) -> report.Figure:
    """Returns the FLOPs a second of a preset, each model's counted for itself, beside the
    decoder's.
    """
    sides = (spec, DECODER)
    commands = {side: ["research.bench.families_side", side, arguments.dtype] for side in sides}
    seconds = interleave_workers(commands, arguments.rounds, arguments.steps)
    work = {side: arguments.steps * flops(load(side, arguments.dtype)) / 1e9 for side in sides}
    rates = {side: [work[side] / taken for taken in values] for side, values in seconds.items()}
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
    c, scale = model.attention, WIDTH / model.embed_dim
    heads = [fitting for fitting in range(1, HEADS + 1) if HEADS % fitting == 0]
    kv_heads = min(heads, key=lambda n: abs(n / HEADS - c.num_kv_heads / c.num_heads))
    latent = c.latent and dataclasses.replace(
        c.latent, kv_dim=128, q_dim=c.latent.q_dim and 192, rope_dim=32, value_dim=WIDTH // HEADS
    )
    attention = dataclasses.replace(
        c,
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        head_dim=WIDTH // HEADS - (32 if latent else 0),
        latent=latent,
    )
    first = tuple(_shrunk_layer(layer) for layer in model.first_layers[:1])
    pattern = tuple(_shrunk_layer(layer) for layer in model.pattern)
    experts = model.experts and dataclasses.replace(
        model.experts,
        num_experts=EXPERTS,
        experts_per_token=min(model.experts.experts_per_token, 2),
        hidden_dim=max(128, _wide(scale * model.experts.hidden_dim)),
        shared_dim=model.experts.shared_dim and _wide(scale * model.experts.shared_dim),
        num_groups=1,
        groups_per_token=1,
    )
    return dataclasses.replace(
        model,
        vocab_size=VOCABULARY,
        num_layers=len(first) + max(LAYERS, len(pattern)),
        encoder_layers=model.encoder_layers and LAYERS,
        embed_dim=WIDTH,
        max_length=LENGTH,
        attention=attention,
        mlp=dataclasses.replace(model.mlp, hidden_dim=_wide(scale * model.mlp.hidden_dim)),
        position=_shrunk_position(model.position),
        first_layers=first,
        pattern=pattern,
        experts=experts,
        decoder_start_id=0,
        dropout=0.0,
    )


def _wide(width: float) -> int:
    return max(32, round(width / 32) * 32)


def _shrunk_layer(layer: LayerConfig) -> LayerConfig:
    position = layer.position and _shrunk_position(layer.position)
    return dataclasses.replace(
        layer, window=layer.window and min(layer.window, WINDOW), position=position
    )


def _shrunk_position(position: PositionConfig) -> PositionConfig:
    """Returns positions without what belongs to long contexts and wide heads."""
    rotary_dim = None if position.rotary_dim is None else WIDTH // HEADS // 2
    return dataclasses.replace(position, scaling=None, rotary_dim=rotary_dim)
