"""Names and counts of nested arrays."""

import jax
import jax.numpy as jnp

from research.core.trees import count, named_leaves, nested

TREE = {
    "a": {"kernel": jnp.zeros((2, 3))},
    "b": (jnp.zeros(4, jnp.bfloat16), jnp.zeros((), jnp.int32)),
}


def test_leaves_have_slash_separated_names():
    assert list(named_leaves(TREE)) == ["a/kernel", "b/0", "b/1"]


def test_nested_dicts_come_back_from_the_names_of_their_leaves():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert nested(named_leaves(tree)) == tree
    assert nested({"a.b": 1, "a.c/d": 2, "e": 3}, ".") == {"a": {"b": 1, "c/d": 2}, "e": 3}


def test_count_is_of_the_elements_of_arrays_and_shapes():
    for tree in (TREE, jax.eval_shape(lambda: TREE)):
        assert count(tree) == 6 + 4 + 1
