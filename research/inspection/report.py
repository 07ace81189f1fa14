"""The report of a model that `describe` prints: lines for people, JSON for programs."""

import dataclasses
from typing import Any

from research.core.config import plain
from research.inspection.description import Table, layer_text, model_table
from research.inspection.mask_pictures import layer_masks
from research.inspection.parameter_summary import (
    ParameterNode,
    active_parameters,
    cache_numbers,
    layer_kinds,
    layers_name,
    parameter_tree,
    tree_lines,
)
from research.models.config import ModelConfig
from research.models.flops import train_flops_per_token

_BYTES = {"float32": 4, "bfloat16": 2}
_PREFIXES = ("k", "M", "G", "T")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Parameters, work and memory of a model.

    Attributes:
      parameters: of the model.
      embedding_parameters: those of the embedding, and of the output projection where it is not
        tied.
      active_parameters: those that one token uses.
      forward_flops: of a token of a sequence of `max_length`, with as many in the encoder.
      cache_bytes: of the KV cache in bfloat16, for a token; 0 for an encoder.
      encoder_cache_bytes: the same for a token of the encoder.
    """

    parameters: int
    embedding_parameters: int
    active_parameters: int
    forward_flops: int
    cache_bytes: int
    encoder_cache_bytes: int


def model_costs(config: ModelConfig, model: ParameterNode) -> Costs:
    """Returns the parameters, the work and the memory of a model."""
    embedding = [node.count for node in model.children if node.name in ("embed", "unembed")]
    # Multi-token prediction runs in training only.
    head = dataclasses.replace(config.head, mtp_depth=0)
    without_mtp = dataclasses.replace(config, head=head)
    encoder_length = config.max_length if config.structure == "encoder_decoder" else 0
    train_flops = train_flops_per_token(without_mtp, config.max_length, encoder_length)

    cache = 0
    encoder_cache = 0
    if config.structure != "encoder":
        cache, encoder_cache = cache_numbers(config)
    return Costs(
        parameters=model.count,
        embedding_parameters=sum(embedding),
        active_parameters=active_parameters(config, model),
        # The backward pass takes twice the work of the forward pass.
        forward_flops=round(train_flops / 3),
        cache_bytes=_BYTES["bfloat16"] * cache,
        encoder_cache_bytes=_BYTES["bfloat16"] * encoder_cache,
    )


def report_lines(config: ModelConfig) -> list[str]:
    """Returns all that is printed: the config, its layers, the tree of parameters, the costs."""
    model = parameter_tree(config)
    sizes = model_table(config) | _layer_rows(config)
    costs = model_costs(config, model)
    cost_rows = _cost_rows(config, costs)
    return [*aligned(sizes), "", *tree_lines(model), "", *aligned(cost_rows)]


def report_json(config: ModelConfig) -> dict[str, Any]:
    """Returns the same for programs.

    The object has `config` (all fields), `summary` (field -> text), `costs`, `parameters` (the
    tree; each node has its name and count) and `masks` (each with its layers).
    """
    model = parameter_tree(config)
    return {
        "config": plain(config),
        "summary": model_table(config) | _layer_rows(config),
        "costs": dataclasses.asdict(model_costs(config, model)),
        "parameters": model.to_json(),
        "masks": [dataclasses.asdict(mask) for mask in layer_masks(config)],
    }


def _layer_rows(config: ModelConfig) -> Table:
    if config.structure != "encoder_decoder":
        return _stack_rows(config, "")
    encoder = _stack_rows(config.encoder(), "encoder, ")
    return encoder | _stack_rows(config, "decoder, ")


def _stack_rows(config: ModelConfig, prefix: str) -> Table:
    return {
        prefix + layers_name(indices): layer_text(config, layer)
        for layer, indices in layer_kinds(config).items()
    }


def _cost_rows(config: ModelConfig, costs: Costs) -> Table:
    total = costs.parameters
    share = costs.embedding_parameters / total
    embedding = f"{costs.embedding_parameters:,} ({share:.1%})"
    if not config.tied_embeddings:
        embedding += ", output projection included"

    # The parameters alone: activations, gradients and optimizer states depend on the run.
    memory = []
    for dtype, size in _BYTES.items():
        memory.append(f"{short(size * total)}B in {dtype}")
    flops = f"{short(costs.forward_flops)}FLOP per token at {config.max_length:,} tokens"
    if config.structure == "encoder_decoder":
        flops += ", and as many in the encoder"

    rows = {"parameters": f"{total:,}", "embedding": embedding}
    if config.experts is not None:
        share = costs.active_parameters / total
        rows["active"] = f"{costs.active_parameters:,} per token ({share:.1%})"
    rows["memory"] = ", ".join(memory)
    rows["forward pass"] = flops
    if config.structure != "encoder":
        rows["KV cache"] = _cache_text(costs)
    return rows


def _cache_text(costs: Costs) -> str:
    text = f"{costs.cache_bytes:,} bytes per token"
    if costs.encoder_cache_bytes:
        text += f", {costs.encoder_cache_bytes:,} per token of the encoder"
    return f"{text}, in bfloat16"


def aligned(rows: Table) -> list[str]:
    width = max(map(len, rows))
    return [f"{name:{width}}  {text}" for name, text in rows.items()]


def short(number: int) -> str:
    """Returns a number with the prefix of its thousands: 16_100_000_000 -> `16.1 G`."""
    if number < 1000:
        return f"{number:,} "
    # Eleven digits are three thousands: 16_100_000_000 -> 16.1 · 1000³.
    power = (len(str(number)) - 1) // 3
    power = min(power, len(_PREFIXES))
    prefix = _PREFIXES[power - 1]
    return f"{number / 1000**power:,.1f} {prefix}"
