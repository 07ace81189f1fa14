"""The engine moves numbers and changes none: claims about `interop.mapping` and `interop.tensor`,
on made-up models.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.interop import mapping
from research.interop.gpt2 import GPT2
from research.interop.tensor import TensorSpec, contiguous
from research.models.config import AttentionConfig, MlpConfig, ModelConfig, PositionConfig

CONFIG = ModelConfig(
    vocab_size=11,
    num_layers=3,
    embed_dim=6,
    max_length=8,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=5),
    mlp=MlpConfig(hidden_dim=7),
    position=PositionConfig(kind="none"),
)
EXPERTS, HIDDEN = 5, 7


def layer(name, dense):
    attention = {
        f"{name}/attention/{part}/kernel": (6, n, 5)
        for part, n in (("query", 4), ("key", 2), ("value", 2))
    }
    attention |= {
        f"{name}/attention/out/kernel": (4, 5, 6),
        f"{name}/attention/query_norm/scale": (5,),
    }
    if dense:
        return attention | {f"{name}/mlp/up/kernel": (6, 9), f"{name}/mlp/up/bias": (9,)}
    experts = {f"{name}/mlp/experts/{part}/kernel": (EXPERTS, 6, HIDDEN) for part in ("up", "gate")}
    biases = {f"{name}/mlp/experts/{part}/bias": (EXPERTS, HIDDEN) for part in ("up", "gate")}
    return attention | experts | biases | {f"{name}/mlp/experts/down/kernel": (EXPERTS, HIDDEN, 6)}


# A leading dense layer, layers of experts, and an encoder beside them with a count of its own.
SHAPES = {
    "embed/embedding": (11, 6),
    "logits_bias": (11,),
    **layer("first_layers_0", dense=True),
    **layer("layers_0", dense=False),
    **layer("layers_1", dense=False),
    **{f"encoder/layers_{i}/mlp/up/kernel": (6, 9) for i in range(12)},
}


def by_group(config):
    """Falcon's: the query heads of a key/value head, then its key, then its value."""
    heads = np.arange(8 * 5).reshape(8, 5)
    query, key, value = heads[:4].reshape(2, 2, 5), heads[4:6, None], heads[6:, None]
    assert config.attention.num_kv_heads == 2
    return np.concatenate([query, key, value], axis=1).reshape(-1)


def interleaved(config):
    return np.arange(2 * HIDDEN).reshape(2, HIDDEN).T.reshape(-1)


def qkv(part):
    return tuple("{layer}/attention/%s/%s" % (each, part) for each in ("query", "key", "value"))  # noqa: UP031


MADE_UP = dataclasses.replace(
    GPT2,
    tensors=(
        TensorSpec("shared.weight", ("embed/embedding",), num_inputs=1),
        TensorSpec("final_logits_bias", ("logits_bias",), unsqueezed=True),
        TensorSpec(
            "h.{layer}.qkv.weight", qkv("kernel"), num_inputs=1, transposed=True, order=by_group
        ),
        TensorSpec(
            "h.{layer}.out.weight", ("{layer}/attention/out/kernel",), num_inputs=2, transposed=True
        ),
        TensorSpec("h.{layer}.q_norm.weight", ("{layer}/attention/query_norm/scale",)),
        TensorSpec(
            "h.{layer}.dense.weight", ("{layer}/mlp/up/kernel",), num_inputs=1, transposed=True
        ),
        TensorSpec("h.{layer}.dense.bias", ("{layer}/mlp/up/bias",)),
        TensorSpec(
            "h.{layer}.experts.gate_up",
            ("{layer}/mlp/experts/gate/kernel", "{layer}/mlp/experts/up/kernel"),
            num_inputs=1,
            experts=True,
            order=interleaved,
        ),
        TensorSpec(
            "h.{layer}.experts.gate_up_bias",
            ("{layer}/mlp/experts/gate/bias", "{layer}/mlp/experts/up/bias"),
            experts=True,
            order=interleaved,
        ),
        TensorSpec(
            "h.{layer}.experts.{expert}.down.weight",
            ("{layer}/mlp/experts/down/kernel",),
            num_inputs=1,
            transposed=True,
        ),
        TensorSpec("encoder.{layer}.up.weight", ("encoder/{layer}/mlp/up/kernel",), num_inputs=1),
    ),
    prefixes=("model.", "wrapper."),
    spellings=((r"\.gamma$", ".weight"),),
    copies={"encoder.embed_tokens.weight": "shared.weight", "lm_head.weight": "shared.weight"},
    ignored={r".*\.inv_freq": "frequencies"},
)


@pytest.fixture(autouse=True)
def made_up_shapes(monkeypatch):
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    monkeypatch.setattr(mapping, "unrolled_shapes", lambda config: shapes)


@pytest.fixture
def params():
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()
    }


def written(params, limit=mapping.SLICE_BYTES, dtype=np.float32):
    """The tensors of parameters, and how often each of their numbers was asked for."""
    mappings, parts, asked = mapping.map_tensors(MADE_UP, CONFIG), {}, dict.fromkeys(params, 0)

    def get_slice(name, slices):
        asked[name] += params[name][slices].size
        return params[name][slices]

    for name, rows in mapping.tensor_rows(mappings, get_slice, dtype, limit):
        parts.setdefault(name, []).append(rows.reshape(-1))
    assert asked == {name: value.size for name, value in params.items()}
    shapes = mapping.shapes_of(mappings)
    assert list(parts) == list(shapes)
    return {name: np.concatenate(rows).reshape(shapes[name]) for name, rows in parts.items()}


def read_back(tensors, limit=mapping.SLICE_BYTES):
    found = {name: np.full(shape, np.nan, np.float32) for name, shape in SHAPES.items()}
    for name, slices, values in mapping.match_tensors(MADE_UP, CONFIG, tensors).slices(limit):
        assert np.isnan(found[name][slices]).all(), "each number comes once"
        found[name][slices] = values
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_tensors_hold_what_their_description_says(params):
    tensors = written(params)
    np.testing.assert_array_equal(tensors["final_logits_bias"], params["logits_bias"][None])
    # The first layer of the whole stack is the dense one; that of number 1 is `layers_0`.
    np.testing.assert_array_equal(
        tensors["h.0.dense.weight"], params["first_layers_0/mlp/up/kernel"].T
    )
    assert "h.1.dense.weight" not in tensors
    np.testing.assert_array_equal(
        tensors["h.2.experts.3.down.weight"], params["layers_1/mlp/experts/down/kernel"][3].T
    )
    np.testing.assert_array_equal(
        tensors["encoder.10.up.weight"], params["encoder/layers_10/mlp/up/kernel"]
    )
    gate_up = tensors["h.1.experts.gate_up"]
    np.testing.assert_array_equal(gate_up[..., 0::2], params["layers_0/mlp/experts/gate/kernel"])
    np.testing.assert_array_equal(gate_up[..., 1::2], params["layers_0/mlp/experts/up/kernel"])
    np.testing.assert_array_equal(
        tensors["h.1.experts.gate_up_bias"][:, 1::2], params["layers_0/mlp/experts/up/bias"]
    )
    rows = tensors["h.1.qkv.weight"].reshape(
        2, 4, 5, 6
    )  # groups of two query heads, a key and a value
    query, key = params["layers_0/attention/query/kernel"], params["layers_0/attention/key/kernel"]
    np.testing.assert_array_equal(rows[1, 0], query[:, 2].T)
    np.testing.assert_array_equal(rows[1, 2], key[:, 1].T)


@pytest.mark.parametrize("limit", [1, 100, 200, 400, mapping.SLICE_BYTES])
def test_round_trip_is_bitwise_whatever_the_slices(limit, params):
    tensors = written(params, limit)
    assert_same(tensors, written(params))
    assert_same(read_back(tensors, limit), params)


def test_wrong_order_is_seen_by_the_round_trip(params, monkeypatch):
    tensors = written(params)
    plain = tuple(dataclasses.replace(tensor, order=None) for tensor in MADE_UP.tensors)
    monkeypatch.setattr(f"{__name__}.MADE_UP", dataclasses.replace(MADE_UP, tensors=plain))
    with pytest.raises(AssertionError, match="attention/query"):
        assert_same(read_back(tensors), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_types_are_widened_exactly(dtype, params):
    tensors = {name: value.astype(dtype) for name, value in written(params).items()}
    wanted = {name: value.astype(dtype).astype(np.float32) for name, value in params.items()}
    assert_same(read_back(tensors), wanted)
    assert_same(written(wanted, dtype=np.dtype(dtype)), tensors)


def test_prefixes_spellings_and_ignored_tensors_are_understood(params):
    tensors = written(params)
    names = {name: f"wrapper.{name}" for name in tensors}
    names["h.0.q_norm.weight"] = "wrapper.h.0.q_norm.gamma"
    found = {names[name]: value for name, value in tensors.items()} | {
        "model.h.0.inv_freq": np.zeros(3)
    }
    assert_same(read_back(found), params)


def test_copies_must_repeat_their_original_and_may_stand_in_for_it(params):
    tensors = written(params)
    copy = {
        "lm_head.weight": tensors["shared.weight"],
        "encoder.embed_tokens.weight": tensors["shared.weight"],
    }
    assert_same(read_back(tensors | copy), params)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from shared\.weight"):
        read_back(tensors | copy | {"lm_head.weight": copy["lm_head.weight"] + 1})
    alone = {name: value for name, value in (tensors | copy).items() if name != "shared.weight"}
    assert_same(read_back(alone), params)


def test_copies_are_compared_by_bits(params):
    tensors = written(params)
    tensors["shared.weight"][0, 0] = np.nan
    assert np.isnan(
        read_back(tensors | {"lm_head.weight": tensors["shared.weight"].copy()})["embed/embedding"][
            0, 0
        ]
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_copy_in_a_type_of_its_own_is_one_where_its_numbers_are_the_same(dtype, params):
    params["embed/embedding"] = params["embed/embedding"].astype("bfloat16").astype(np.float32)
    params["embed/embedding"][0, 0] = np.nan
    tensors = written(params)
    copy = tensors["shared.weight"].astype(dtype)
    assert_same(read_back(tensors | {"lm_head.weight": copy}), params)
    copy[-1, -1] *= 2
    for other in (copy, np.zeros(copy.shape, np.int64)):
        with pytest.raises(UserError, match=r"lm_head\.weight differs from shared\.weight"):
            read_back(tensors | {"lm_head.weight": other})


def test_all_faults_are_in_one_error(params):
    tensors = written(params)
    tensors["h.1.experts.4.down.weight"] = tensors.pop("h.1.experts.4.down.weight")[:3]
    tensors["h.1.experts.5.down.weight"] = tensors["h.1.experts.0.down.weight"]
    tensors["model.h.0.dense.bias"] = tensors["h.0.dense.bias"]
    del tensors["final_logits_bias"]
    with pytest.raises(UserError) as error:
        mapping.match_tensors(MADE_UP, CONFIG, tensors)
    for fault in (
        "h.1.experts.4.down.weight has the shape [3, 7], not [6, 7]",
        "h.1.experts.5.down.weight is not known",
        "model.h.0.dense.bias and h.0.dense.bias are the same tensor",
        "final_logits_bias is missing",
    ):
        assert fault in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"h.0.dense.weight_scale_inv": np.ones(2)},
        {"h.0.dense.weight": np.zeros((9, 6), jnp.float8_e4m3fn)},
    ],
)
def test_quantized_weights_are_named_as_such(extra, params):
    with pytest.raises(UserError, match=r"h\.0\.dense\.weight.* is quantized"):
        mapping.match_tensors(MADE_UP, CONFIG, written(params) | extra)


def test_parameters_without_a_tensor_are_named():
    with pytest.raises(UserError, match="no tensor for logits_bias"):
        mapping.map_tensors(
            dataclasses.replace(MADE_UP, tensors=MADE_UP.tensors[:1] + MADE_UP.tensors[2:]), CONFIG
        )


def test_slices_are_no_larger_than_asked():
    for tensor in mapping.map_tensors(MADE_UP, CONFIG):
        for cut in tensor.cuts(400):
            if cut is not None:
                assert cut.stop - cut.start in (1, 2, 4, 8, 16) or cut.stop == max(tensor.shapes[0])


@pytest.mark.parametrize("shape", [(3,), (300, 7), (513, 600)])
def test_tiles_make_the_transpose(shape):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    made = contiguous(x.T, np.float64)
    assert made.flags.c_contiguous
    np.testing.assert_array_equal(made, x.T)
    assert contiguous(x, np.float32) is x
