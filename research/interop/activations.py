"""Hugging Face's names of activations; some have two."""

from research.core.errors import UserError, nearest

_TESSERA = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# The name to write.
THEIRS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "gelu_sigmoid": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


def to_tessera(name: str, field: str) -> str:
    """Returns Tessera's name of the activation that `field` of config.json names; raises UserError
    for others.
    """
    if name not in _TESSERA:
        hint = nearest(str(name), _TESSERA)
        raise UserError(field, name, f"is not supported. {hint}")
    return _TESSERA[name]
