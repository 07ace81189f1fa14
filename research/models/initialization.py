"""The initial parameters of a transformer."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from research.kernels.attention import AttentionMask
from research.models.block import Block
from research.models.config import LayerConfig, ModelConfig
from research.models.context import Context
from research.models.stack import layer_name
from research.models.transformer import Transformer
from research.parallel.parameter import Parameter, is_box


def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Returns the initial parameters, each boxed with its logical axis names.

    They are a function of the key, and those of a layer of its index too, whether layers are
    scanned or not. Layers are stacked where `layer_loop` is `scan`; `auto` has to be resolved
    before (`stack.resolve_layer_loop`), and counts as `unroll`.
    """
    # Attention has no parameters. cuDNN's can neither be mapped over layers, as stacked ones are
    # made, nor traced where there is no GPU.
    attention = dataclasses.replace(config.attention, implementation="reference")
    config = dataclasses.replace(config, attention=attention)
    tokens = jnp.zeros((1, 1), jnp.int32)
    inputs = {"tokens": tokens, "positions": tokens, "targets": tokens}
    if config.structure == "encoder_decoder":
        inputs["encoder_tokens"] = tokens

    def call_all(module: Transformer) -> None:
        """Calls every method that has parameters, since Flax makes them when they are read."""
        hidden = module(inputs).hidden
        if config.head.pooler:
            module.pooled(hidden)
        module.logits(hidden)

    model = Transformer(config, without_layers=True)
    params = dict(nn.init(call_all, model)(key)["params"])
    params |= _init_layers(config, key)
    if config.structure == "encoder_decoder":
        encoder_key = jax.random.fold_in(key, 2**31)
        encoder_layers = _init_layers(config.encoder(), encoder_key)
        # Without positions of its own and a final norm, an encoder has its layers only.
        others = params.pop("encoder", {})
        params["encoder"] = {**others, **encoder_layers}
    return params


def _init_layers(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Returns the parameters of a stack's layers by name."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    hidden = jnp.zeros((1, 1, config.embed_dim), config.dtype)
    memory = {}
    if config.structure == "encoder_decoder":
        memory = {"memory": hidden, "memory_mask": AttentionMask()}
    context = Context(tokens, AttentionMask(causal=True), lengths=tokens, **memory)

    # Layers that are alike are traced once.
    @functools.partial(jax.jit, static_argnums=1)
    def init_layer(index: Int[Array, ""] | int, layer_config: LayerConfig) -> Any:
        layer_key = jax.random.fold_in(key, index)
        return Block(config, layer_config).init(layer_key, hidden, None, context)["params"]

    layer_configs = config.layers()
    num_unrolled = config.num_layers
    if config.layer_loop == "scan":
        num_unrolled = len(config.first_layers)
    params = {layer_name(config, i): init_layer(i, layer_configs[i]) for i in range(num_unrolled)}

    if num_unrolled < config.num_layers:
        # Layers of the pattern have parameters of one shape: vmap over their indices stacks them.
        init_stacked = jax.vmap(lambda index: init_layer(index, config.pattern[0]))
        stacked = init_stacked(jnp.arange(num_unrolled, config.num_layers))
        params["layers"] = jax.tree.map(_name_layer_axis, stacked, is_leaf=is_box)
    return params


def _name_layer_axis(box: Parameter) -> Parameter:
    """Returns a stacked parameter with a name for its new leading axis."""
    return box.replace(names=("layers", *box.names))
