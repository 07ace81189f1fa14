"""The names of the mesh axes, for the mesh itself, the rules, and kernels in a `shard_map`."""

MESH_AXES = ("data", "fsdp", "pipeline", "context", "expert", "tensor")
# That of replicas.
DATA_AXIS = "data"
# Those that shard the batch. Tokens of all of them meet the experts, which `expert` shards.
BATCH_AXES = ("data", "fsdp", "expert")
# That which shards layers.
PIPELINE_AXIS = "pipeline"
# That which shards experts.
EXPERT_AXIS = "expert"
# That which shards the tokens of a row.
CONTEXT_AXIS = "context"
# Those that shard the width of parameters: all devices along them see other tokens, and so each can
# keep a part of the parameters. `expert` does too, but a mixture of experts needs many devices
# along it, and the width of its model has not that many multiples of 128 columns.
WIDTH_AXES = ("fsdp", "context")
# That which shards heads, MLP width and vocabulary.
TENSOR_AXIS = "tensor"
