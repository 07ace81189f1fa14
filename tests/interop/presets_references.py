"""The cases once more, of parts of transformers, as functions of Tessera's parameters that torch
can differentiate.
"""

import types
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers as hf
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

from research.core.trees import path_name
from research.models.config import ModelConfig
from research.models.initialization import init_params
from research.parallel.rules import is_box
from tests.interop.registry import Named

Tensors = dict[str, torch.Tensor]
Reference = Callable[[ModelConfig, Tensors, Tensors], torch.Tensor]


def measured(
    reference: Reference, config: ModelConfig, named: Named, given: Named
) -> tuple[np.ndarray, Named]:
    """Returns the logits of a batch, and the gradients of its mean cross-entropy by name."""
    torch.manual_seed(0)  # of parts that nothing reads
    leaves = {name: torch.from_numpy(value).requires_grad_() for name, value in named.items()}
    batch = {name: torch.from_numpy(value).to(torch.int64) for name, value in given.items()}
    logits = reference(config, leaves, batch)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).backward()
    return logits.detach().numpy(), {name: leaf.grad.numpy() for name, leaf in leaves.items()}


def _call(model: torch.nn.Module, tensors: Tensors, **inputs: torch.Tensor) -> torch.Tensor:
    """Returns what a model with these tensors in the place of its own makes of its inputs."""
    unknown = (
        tensors.keys()
        - dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()]).keys()
    )
    assert not unknown, unknown
    model.set_attn_implementation("eager")
    found = torch.func.functional_call(model.eval(), tensors, kwargs={**inputs, "use_cache": False})
    return found.last_hidden_state if "last_hidden_state" in found else found.logits


def _linear(
    theirs: str, leaves: Tensors, ours: str, num_inputs: int = 1, scale: float = 1.0
) -> Tensors:
    """Returns the tensors of a torch `Linear`."""
    kernel = leaves[f"{ours}/kernel"].flatten(num_inputs).flatten(0, num_inputs - 1)
    bias = {f"{theirs}.bias": leaves[f"{ours}/bias"].flatten()} if f"{ours}/bias" in leaves else {}
    return {name: scale * value for name, value in ({f"{theirs}.weight": kernel.T} | bias).items()}


def _norm(theirs: str, leaves: Tensors, ours: str) -> Tensors:
    bias = {f"{theirs}.bias": leaves[f"{ours}/bias"]} if f"{ours}/bias" in leaves else {}
    return {f"{theirs}.weight": leaves[f"{ours}/scale"]} | bias


def _attention(theirs: str, leaves: Tensors, ours: str, names: str, scale: float = 1.0) -> Tensors:
    """Returns the tensors of the four `Linear`s with these names; those of the queries times
    `scale`.
    """
    query, key, value, out = (f"{theirs}.{name}" for name in names.split())
    return {
        **_linear(query, leaves, f"{ours}/query", scale=scale),
        **_linear(key, leaves, f"{ours}/key"),
        **_linear(value, leaves, f"{ours}/value"),
        **_linear(out, leaves, f"{ours}/out", num_inputs=2),
    }


def _sines_first(config: ModelConfig, leaves: Tensors) -> Tensors:
    """Returns the parameters of the same model whose width has its even columns first, then its odd
    ones.

    Where each sine has its cosine beside it, those of Marian and XLNet come first, and nothing else
    has an order.
    """
    order = torch.cat([torch.arange(start, config.embed_dim, 2) for start in (0, 1)])
    boxed = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    found = {}
    for path, box in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box):
        value = leaves[path_name(path)]
        for axis, name in enumerate(box.names):
            value = value.index_select(axis, order) if name == "embed" else value
        found[path_name(path)] = value
    return found


def transformer(config: ModelConfig, leaves: Tensors, batch: Tensors) -> torch.Tensor:
    """Marian with no biases in attention, and the norms' epsilon of the preset."""
    shape = {"encoder_layers": config.encoder_layers, "decoder_layers": config.num_layers}
    for stack in ("encoder", "decoder"):
        shape |= {
            f"{stack}_attention_heads": config.attention.num_heads,
            f"{stack}_ffn_dim": config.mlp.hidden_dim,
        }
    ids = {"pad_token_id": None, "eos_token_id": 0, "decoder_start_token_id": 0}
    model = hf.MarianMTModel(
        hf.MarianConfig(
            vocab_size=config.vocab_size,
            d_model=config.embed_dim,
            max_position_embeddings=config.max_length,
            activation_function="relu",
            scale_embedding=True,
            **shape,
            **ids,
        )
    )
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = config.norm.epsilon
    leaves = _sines_first(config, leaves)
    tensors = {
        name: torch.zeros_like(value)
        for name, value in model.named_parameters()
        if name.endswith("bias")
    }
    tensors["model.shared.weight"] = leaves["embed/embedding"]
    attentions = {"self_attn": "attention", "encoder_attn": "cross_attention"}
    for stack, count, before in (
        ("encoder", config.encoder_layers, "encoder/"),
        ("decoder", config.num_layers, ""),
    ):
        for i in range(count):
            theirs, ours = f"model.{stack}.layers.{i}", f"{before}layers_{i}"
            for name, attention in list(attentions.items())[: 1 if before else 2]:
                tensors |= _attention(
                    f"{theirs}.{name}",
                    leaves,
                    f"{ours}/{attention}",
                    "q_proj k_proj v_proj out_proj",
                )
                tensors |= _norm(f"{theirs}.{name}_layer_norm", leaves, f"{ours}/{attention}_norm")
            tensors |= _linear(f"{theirs}.fc1", leaves, f"{ours}/mlp/up")
            tensors |= _linear(f"{theirs}.fc2", leaves, f"{ours}/mlp/down")
            tensors |= _norm(f"{theirs}.final_layer_norm", leaves, f"{ours}/mlp_norm")
    inputs = {"input_ids": batch["encoder_tokens"], "attention_mask": batch["encoder_segments"]}
    return _call(model, tensors, **inputs, decoder_input_ids=batch["tokens"])


def _gpt(config: ModelConfig, leaves: Tensors) -> Tensors:
    """Returns the embeddings and norms of GPT-2 and of those after it."""
    tensors = {
        "transformer.wte.weight": leaves["embed/embedding"],
        "transformer.wpe.weight": leaves["position_embed/embedding"],
        **_norm("transformer.ln_f", leaves, "final_norm"),
    }
    for i in range(config.num_layers):
        tensors |= _norm(f"transformer.h.{i}.ln_1", leaves, f"layers_{i}/attention_norm")
        tensors |= _norm(f"transformer.h.{i}.ln_2", leaves, f"layers_{i}/mlp_norm")
    return tensors


def gpt3(config: ModelConfig, leaves: Tensors, batch: Tensors) -> torch.Tensor:
    """GPT-Neo with biases of queries, keys and values, and with queries divided by the root of a
    head's width.
    """
    kinds = ["global" if layer.window is None else "local" for layer in config.layers()]
    model = hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            num_layers=config.num_layers,
            num_heads=config.attention.num_heads,
            intermediate_size=config.mlp.hidden_dim,
            max_position_embeddings=config.max_length,
            attention_types=[[kinds, 1]],
            window_size=config.layers()[1].window,
        )
    )
    tensors, scale = _gpt(config, leaves), config.attention.head_dim**-0.5
    for i, block in enumerate(model.transformer.h):
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(block.attn.attention, name, torch.nn.Linear(config.embed_dim, config.embed_dim))
        theirs, ours = f"transformer.h.{i}", f"layers_{i}"
        names = "q_proj k_proj v_proj out_proj"
        tensors |= _attention(f"{theirs}.attn.attention", leaves, f"{ours}/attention", names, scale)
        tensors |= _linear(f"{theirs}.mlp.c_fc", leaves, f"{ours}/mlp/up")
        tensors |= _linear(f"{theirs}.mlp.c_proj", leaves, f"{ours}/mlp/down")
    return _call(model, tensors, input_ids=batch["tokens"])


def gopher(config: ModelConfig, leaves: Tensors, batch: Tensors) -> torch.Tensor:
    """A decoder around the scores of XLNet, which are those of Transformer-XL."""
    c, tokens, length = config.attention, batch["tokens"], batch["tokens"].shape[1]
    sizes = {
        "d_model": config.embed_dim,
        "n_head": c.num_heads,
        "n_layer": 1,
        "d_inner": 1,
        "vocab_size": 1,
    }
    waves = hf.XLNetModel(hf.XLNetConfig(**sizes)).relative_positional_encoding(
        length, length, bsz=len(tokens)
    )
    later = torch.ones(length, length).triu(1)[:, :, None, None]
    rows = torch.cat([torch.arange(start, config.embed_dim, 2) for start in (0, 1)])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(
            x, x.shape[-1:], leaves[f"{name}/scale"], config.norm.epsilon
        )

    def linear(x: torch.Tensor, name: str, num_inputs: int = 1) -> torch.Tensor:
        return torch.tensordot(x, leaves[f"{name}/kernel"], num_inputs) + leaves[f"{name}/bias"]

    def attend(x: torch.Tensor, name: str) -> torch.Tensor:
        relative = f"{name}/relative"
        core = types.SimpleNamespace(
            r_w_bias=leaves[f"{relative}/content"],
            r_r_bias=leaves[f"{relative}/distance"],
            scale=c.head_dim**-0.5,
            rel_shift_bnij=XLNetRelativeAttention.rel_shift_bnij,
            dropout=torch.nn.Identity(),
        )
        heads = [linear(x, f"{name}/{part}").transpose(0, 1) for part in ("query", "key", "value")]
        distances = torch.tensordot(waves, leaves[f"{relative}/projection/kernel"][rows], 1)
        seen = XLNetRelativeAttention.rel_attn_core(core, *heads, distances, attn_mask=later)
        return linear(seen.transpose(0, 1), f"{name}/out", num_inputs=2)

    x = leaves["embed/embedding"][tokens]
    for i in range(config.num_layers):
        layer = f"layers_{i}"
        x = x + attend(norm(x, f"{layer}/attention_norm"), f"{layer}/attention")
        hidden = linear(norm(x, f"{layer}/mlp_norm"), f"{layer}/mlp/up")
        x = x + linear(torch.nn.functional.gelu(hidden, approximate="tanh"), f"{layer}/mlp/down")
    return norm(x, "final_norm") @ leaves["embed/embedding"].T


def _prefix_mask(batch: Tensors) -> torch.Tensor:
    """Returns what to add to the scores `[B, 1, T, S]`: a key is seen that came before, or is of
    the prefix.
    """
    length = batch["tokens"].shape[1]
    seen = (
        torch.ones(length, length, dtype=torch.bool).tril()
        | (batch["prefix"] != 0)[:, None, None, :]
    )
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def prefix(config: ModelConfig, leaves: Tensors, batch: Tensors) -> torch.Tensor:
    """The decoder of T5 alone, which sees a prefix."""
    model = T5Stack(
        hf.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.embed_dim,
            d_kv=config.attention.head_dim,
            d_ff=config.mlp.hidden_dim,
            num_layers=config.num_layers,
            num_heads=config.attention.num_heads,
            relative_attention_num_buckets=config.position.num_buckets,
            relative_attention_max_distance=config.position.max_distance,
            layer_norm_epsilon=config.norm.epsilon,
            is_decoder=True,
            is_encoder_decoder=False,
        )
    )
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors = {
        "embed_tokens.weight": leaves["embed/embedding"],
        bias: leaves["position_bias/embedding"],
        **_norm("final_layer_norm", leaves, "final_norm"),
    }
    for i in range(config.num_layers):
        theirs, ours = f"block.{i}.layer", f"layers_{i}"
        tensors |= _attention(f"{theirs}.0.SelfAttention", leaves, f"{ours}/attention", "q k v o")
        tensors |= _norm(f"{theirs}.0.layer_norm", leaves, f"{ours}/attention_norm")
        tensors |= _linear(f"{theirs}.2.DenseReluDense.wi", leaves, f"{ours}/mlp/up")
        tensors |= _linear(f"{theirs}.2.DenseReluDense.wo", leaves, f"{ours}/mlp/down")
        tensors |= _norm(f"{theirs}.2.layer_norm", leaves, f"{ours}/mlp_norm")
    hidden = _call(model, tensors, input_ids=batch["tokens"], attention_mask=_prefix_mask(batch))
    return config.embed_dim**-0.5 * hidden @ leaves["embed/embedding"].T


def prefix_llama(config: ModelConfig, leaves: Tensors, batch: Tensors) -> torch.Tensor:
    """LLaMA with a mask for each row."""
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            intermediate_size=config.mlp.hidden_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.attention.num_heads,
            num_key_value_heads=config.attention.num_kv_heads,
            max_position_embeddings=config.max_length,
            rms_norm_eps=config.norm.epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.position.theta},
        )
    )
    tensors = {
        "model.embed_tokens.weight": leaves["embed/embedding"],
        "lm_head.weight": leaves["unembed"].T,
        **_norm("model.norm", leaves, "final_norm"),
    }
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}", f"layers_{i}"
        tensors |= _attention(
            f"{theirs}.self_attn", leaves, f"{ours}/attention", "q_proj k_proj v_proj o_proj"
        )
        tensors |= _norm(f"{theirs}.input_layernorm", leaves, f"{ours}/attention_norm")
        tensors |= _norm(f"{theirs}.post_attention_layernorm", leaves, f"{ours}/mlp_norm")
        for part in ("gate", "up", "down"):
            tensors |= _linear(f"{theirs}.mlp.{part}_proj", leaves, f"{ours}/mlp/{part}")
    return _call(model, tensors, input_ids=batch["tokens"], attention_mask=_prefix_mask(batch))


def prefix_gpt2(config: ModelConfig, leaves: Tensors, batch: Tensors) -> torch.Tensor:
    """GPT-2 with a mask for each row."""
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.embed_dim,
            n_layer=config.num_layers,
            n_head=config.attention.num_heads,
            n_inner=config.mlp.hidden_dim,
            n_positions=config.max_length,
        )
    )
    tensors = _gpt(config, leaves)
    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}", f"layers_{i}"
        plain = _attention("", leaves, f"{ours}/attention", "q k v out")
        plain |= _linear(".fc", leaves, f"{ours}/mlp/up") | _linear(
            ".proj", leaves, f"{ours}/mlp/down"
        )
        # Its weights have their inputs first.
        for name, parts in {
            "attn.c_attn": "qkv",
            "attn.c_proj": ("out",),
            "mlp.c_fc": ("fc",),
        }.items():
            tensors[f"{theirs}.{name}.weight"] = torch.cat(
                [plain[f".{part}.weight"] for part in parts]
            ).T
            tensors[f"{theirs}.{name}.bias"] = torch.cat([plain[f".{part}.bias"] for part in parts])
        tensors[f"{theirs}.mlp.c_proj.weight"] = plain[".proj.weight"].T
        tensors[f"{theirs}.mlp.c_proj.bias"] = plain[".proj.bias"]
    return _call(model, tensors, input_ids=batch["tokens"], attention_mask=_prefix_mask(batch))


REFERENCES: dict[str, Reference] = {
    "transformer": transformer,
    "gpt-3": gpt3,
    "gopher": gopher,
    "prefix": prefix,
    "prefix-llama": prefix_llama,
    "prefix-gpt2": prefix_gpt2,
}
