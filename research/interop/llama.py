"""LLaMA 1, 2 and 3 in Hugging Face's form, and what the many decoders have that are built like
it.
"""

from collections.abc import Mapping
from typing import Any

from research.interop.activations import THEIRS, to_tessera
from research.interop.architecture import Architecture
from research.interop.modules import UNEMBED, linear, norm, projections, table, within
from research.interop.parts import Part, architecture, fixed, named
from research.interop.rotary import rotary
from research.interop.tensor import TensorSpec

# The tensors of a layer, by names within it.
ATTENTION = (
    *projections("self_attn.{qkv}_proj", "attention", "qkv"),
    *linear("self_attn.o_proj", "attention/out", num_inputs=2),
)
QK_NORM = (
    *norm("self_attn.q_norm", "attention/query_norm"),
    *norm("self_attn.k_norm", "attention/key_norm"),
)
MLP = (
    *linear("mlp.gate_proj", "mlp/gate"),
    *linear("mlp.up_proj", "mlp/up"),
    *linear("mlp.down_proj", "mlp/down"),
)
PRE_NORMS = (
    *norm("input_layernorm", "attention_norm"),
    *norm("post_attention_layernorm", "mlp_norm"),
)

SIZES = named(
    {
        "vocab_size": "vocab_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "embed_dim",
        "max_position_embeddings": "max_length",
        "num_attention_heads": "attention.num_heads",
        "rms_norm_eps": "norm.epsilon",
        "tie_word_embeddings": "tied_embeddings",
        "initializer_range": "init_stddev",
    },
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    initializer_range=0.02,
)
RMS = fixed(
    {"norm.kind": "rmsnorm", "norm.placement": "pre", "norm.bias": False, "mlp.gated": True}
)


def _read_heads(fields: Mapping[str, Any]) -> dict[str, Any]:
    num_heads = fields["num_attention_heads"]
    kv_heads = fields["num_key_value_heads"]
    head_dim = fields["head_dim"]
    return {
        "attention.num_kv_heads": num_heads if kv_heads is None else kv_heads,
        "attention.head_dim": fields["hidden_size"] // num_heads if head_dim is None else head_dim,
    }


HEADS = Part(
    read=_read_heads,
    write=lambda config: {
        "num_key_value_heads": config.attention.num_kv_heads,
        "head_dim": config.attention.head_dim,
    },
    defaults={"num_key_value_heads": None, "head_dim": None},
)
DENSE = named({"intermediate_size": "mlp.hidden_dim"})


def activation(
    field: str = "hidden_act", default: str = "silu", gelu_tanh: str = "gelu_new"
) -> Part:
    """Returns the part of the activation.

    Args:
      field: its field.
      default: where that is missing.
      gelu_tanh: which of its names that one is written with.
    """
    theirs = THEIRS | {"gelu_tanh": gelu_tanh}
    return Part(
        read=lambda fields: {"mlp.activation": to_tessera(fields[field], field)},
        write=lambda config: {field: theirs[config.mlp.activation]},
        defaults={field: default},
    )


def biases(default: bool, out: bool = False, field: str = "attention_bias") -> Part:
    """Returns the part of the biases of attention.

    Args:
      default: whether there are any where the field is missing.
      out: whether the output projection has one, too.
      field: the field.
    """

    def read(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"attention.qkv_bias": fields[field], "attention.out_bias": out and fields[field]}

    return Part(
        read=read,
        write=lambda config: {field: config.attention.qkv_bias},
        defaults={field: default},
    )


CORE = (SIZES, RMS, HEADS)


def decoder(
    model_type: str,
    model_class: str,
    layer: tuple[TensorSpec, ...],
    *parts: Part,
    further: tuple[TensorSpec, ...] = (),
    **rest: Any,
) -> Architecture:
    """Returns an architecture built as LLaMA is: an embedding, layers, a last norm, an output
    projection.

    Args:
      model_type, model_class, rest: see `Architecture`.
      layer: the tensors of a layer, by names within it.
      further: tensors behind the layers.
      parts: of its config.json.
    """
    options = {
        "prefixes": ("model.",),
        "copies": {"lm_head.weight": "model.embed_tokens.weight"},
        "ignored": {
            r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "frequencies that the config "
            "gives"
        },
    }
    tensors = (
        table("model.embed_tokens", "embed"),
        *within("model.layers.{layer}", "{layer}", layer),
        *further,
        *norm("model.norm", "final_norm"),
        UNEMBED,
    )
    return architecture(model_type, model_class, tensors, parts, **{**options, **rest})


LLAMA = decoder(
    "llama",
    "LlamaForCausalLM",
    (*PRE_NORMS, *ATTENTION, *MLP),
    *CORE,
    DENSE,
    activation(),
    biases(default=False, out=True),
    named({"mlp_bias": "mlp.bias"}, mlp_bias=False),
    rotary(),
)
