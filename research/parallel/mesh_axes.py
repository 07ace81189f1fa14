"""The names of the mesh axes, for all that shards: the mesh itself, the rules, and kernels that run
once a device.
"""

MESH_AXES = ("data", "fsdp", "pipeline", "context", "expert", "tensor")
# Those that share out the batch.
BATCH_AXES = ("data", "fsdp")
# That which shares out heads, MLP width and vocabulary.
TENSOR_AXIS = "tensor"
