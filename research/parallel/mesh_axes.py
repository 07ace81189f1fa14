"""The names of the mesh axes, for the mesh itself, the rules, and kernels in a `shard_map`."""

MESH_AXES = ("data", "fsdp", "pipeline", "context", "expert", "tensor")
# Those that shard the batch.
BATCH_AXES = ("data", "fsdp")
# That which shards heads, MLP width and vocabulary.
TENSOR_AXIS = "tensor"
