"""What the runs of `configs/pods` have in common."""

from typing import Any

import ml_collections

# What makes collectives run beside matrix products, by generation: the sparse cores of v5p and v6e
# do them; a v4 spreads gathers over what computes, and cuts scatters into steps; a tpu7x needs none
# for that. The names are libtpu's own, which documents none.
_SPARSE_CORES = (
    "xla_tpu_enable_sparse_core_collective_offload_all_gather=true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter=true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
    "xla_tpu_use_tc_device_shape_on_sc=true",
    "xla_sc_disable_megacore_partitioning=true",
)
_SPREAD = (
    "xla_tpu_enable_async_collective_fusion=true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "xla_tpu_overlap_compute_collective_tc=true",
    "xla_enable_async_all_gather=true",
    "xla_tpu_decompose_einsum_reduce_scatter=true",
)
# Gradients of a few megabytes are summed each alone: of several together, which it prefers, the
# compiler does not scatter the sums.
_NOT_COMBINED = ("xla_tpu_ars_combiner_threshold_in_bytes=0",)
# GPUs schedule around collectives, and start those of the next layer before it.
_PIPELINED = (
    "xla_gpu_enable_latency_hiding_scheduler=true",
    "xla_gpu_enable_pipelined_all_gather=true",
    "xla_gpu_enable_pipelined_reduce_scatter=true",
    "xla_gpu_enable_pipelined_all_reduce=true",
)
COMPILER_OPTIONS = {
    "v4": (*_SPREAD, *_NOT_COMBINED),
    "v5p": (*_SPARSE_CORES, *_NOT_COMBINED),
    "v6e": (*_SPARSE_CORES, *_NOT_COMBINED),
    "tpu7x": _NOT_COMBINED,
    "h100": _PIPELINED,
    "h200": _PIPELINED,
}


def build(
    model: ml_collections.ConfigDict,
    mesh: dict[str, Any],
    batch: tuple[int, int, int],
    learning_rate: float,
    tokens: float,
    warmup_steps: int = 2000,
) -> ml_collections.ConfigDict:
    """Returns the values of a run.

    Args:
      model: of `configs/model`; it gets bfloat16 activations and float32 parameters.
      mesh: sizes of its axes and `devices`.
      batch: rows, their tokens, and microbatches.
      learning_rate: the peak, of AdamW.
      tokens: of the whole run.
      warmup_steps: of the learning rate, which then falls to a tenth along a cosine.
    """
    rows, length, microbatches = batch
    # v5p:4x8x8 -> v5p
    generation, _, _ = mesh["devices"].partition(":")
    options = COMPILER_OPTIONS.get(generation, ())
    model.update({"dtype": "bfloat16", "layer_loop": "scan", "remat": "full"})
    return ml_collections.ConfigDict(
        {
            "model": model,
            "data": {
                "sources": [
                    {"kind": "jsonl", "path": "text/*.jsonl.gz", "heldout_fraction": 0.001}
                ],
                "tokenizer": {"kind": "bpe", "vocab_size": model.vocab_size},
            },
            "train": {
                "steps": round(tokens / (rows * length)),
                "batch_size": rows,
                "sequence_length": length,
                "accumulation": microbatches,
            },
            "optim": {
                "learning_rate": learning_rate,
                "schedule": {
                    "name": "cosine",
                    "warmup_steps": warmup_steps,
                    "final_fraction": 0.1,
                },
            },
            "mesh": {"data": 1, "compiler_options": options, **mesh},
            "checkpoint": {"every": 1000, "keep": 2},
        }
    )
