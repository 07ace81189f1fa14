"""The forms that an array must not have on a device."""

from jax.sharding import AbstractMesh, PartitionSpec

from research.scaling.array_forms import TableArray, accidental_forms

MESH = AbstractMesh((4,), ("fsdp",))


def test_a_loop_that_keeps_activations_of_all_layers_is_told_by_their_number():
    x = TableArray("x", ("batch", "embed"), (16, 64), PartitionSpec("fsdp"))
    # Eight layers, with all rows or with a device's own.
    assert (8, 16, 64) in accidental_forms([x], MESH, [8])
    assert (4, 8, 64) not in accidental_forms([x], MESH, [8])


def test_the_parameters_of_all_layers_are_not_stacked_again():
    spec = PartitionSpec(None, "fsdp")
    scale = TableArray("scale", ("layers", "embed"), (8, 64), spec, ("embed",))
    forms = accidental_forms([scale], MESH, [8])
    assert (8, 64) in forms
    # [64, 64] is any matrix, and not 8 layers of 8.
    assert (64, 64) not in forms
