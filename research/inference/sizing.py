"""How many tokens the cache of an engine may hold: what its arrays take, and what a device has."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Mesh

from research.core.errors import UserError
from research.inference.placement import windows_of
from research.inference.pool_sizes import MOVED_PAGES, EngineBytes, most_windowed
from research.inference.programs import empty_state
from research.inference.serve_config import ServeConfig
from research.inference.slots import empty_slots
from research.inference.speculation.drafter import Drafter
from research.inference.speculation.kinds import drafter_of
from research.kernels.decode_attention import PAGE_SIZE, page_size_fault
from research.models.config import ModelConfig
from research.models.language_model import LanguageModelConfig, compute_dtype
from research.models.paged_cache import PageTable
from research.parallel.mesh_axes import TENSOR_AXIS
from research.parallel.target import platform

# Numbers of pages keep so many leading binary digits: a little more free memory is not another
# program.
KEPT_DIGITS = 5
# Arrays of a tile's rows that are in use at a time, at most: in the width of the model, of its
# heads, of its MLP and of its vocabulary; and those of a draw's.
_WIDTHS_IN_USE = 8
_LOGITS_IN_USE = 2
_DRAW_IN_USE = 12
# Copies of what is gathered for a call of attention: as it lies in pages, in rows, in float32.
_GATHERED_IN_USE = 4
_FLOAT32 = 4


def engine_bytes(
    config: LanguageModelConfig,
    params: Any,
    serve: ServeConfig,
    num_ids: int,
    mesh_sizes: Mapping[str, int] | None = None,
    draft: tuple[ModelConfig, Any] | None = None,
) -> EngineBytes:
    """Returns what an engine takes on one device; no array is made.

    Args:
      config: of the model.
      params: its parameters, or their shapes.
      serve: how it runs.
      num_ids: ids that may be drawn.
      mesh_sizes: of the axes of a mesh, over which `params` say how they are sharded; None is one
        device.
      draft: config and parameters of a smaller model that guesses, or None.

    Raises:
      UserError: guesses of a kind that the model does not have; pages of a size that no kernel of
        this platform takes.
    """
    _check_page_size(config, serve)
    tensor = 1 if mesh_sizes is None else mesh_sizes[TENSOR_AXIS]
    drafter = drafter_of(serve, config, params, draft)
    # What the rest depends on: pages alone follow from `tokens`, and are counted one by one.
    alike = dataclasses.replace(serve, tokens=0, memory=1.0)
    draft_params = None if draft is None else draft[1]
    draft_stacked = draft is not None and "layers" in draft_params
    cache_dtype = None if serve.cache_dtype == "auto" else serve.cache_dtype
    forms = Forms(drafter, "layers" in params, draft_stacked, cache_dtype)
    state = _state_bytes(config, alike, num_ids, forms, tensor, platform())
    weights, casts = _weight_bytes(config, params)
    if draft is not None:
        of_draft = _weight_bytes(*draft)
        weights += of_draft[0]
        casts += of_draft[1]
    return dataclasses.replace(state, weights=weights, temporaries=state.temporaries + casts)


def _check_page_size(config: LanguageModelConfig, serve: ServeConfig) -> None:
    # Pages of the usual size are gathered where no kernel takes them.
    if serve.page_size == PAGE_SIZE or not isinstance(config, ModelConfig):
        return
    dtype = config.dtype if serve.cache_dtype == "auto" else serve.cache_dtype
    fault = page_size_fault(serve.page_size, dtype)
    if fault is not None:
        raise UserError("page_size", serve.page_size, f"is not taken {fault}.")


def _weight_bytes(config: LanguageModelConfig, params: Any) -> tuple[int, int]:
    """Returns the bytes of weights on one device, and of the copies that a step makes of them."""
    compute = compute_dtype(config)
    weights = 0
    elements = 0
    casts = 0
    for leaf in jax.tree.leaves(params):
        shape = leaf.shape
        # NumPy's arrays are on no device, and shapes alone may say nothing of devices.
        if not isinstance(leaf, np.ndarray) and leaf.sharding is not None:
            shape = leaf.sharding.shard_shape(leaf.shape)
        size = math.prod(shape)
        weights += size * leaf.dtype.itemsize
        elements += size
        if leaf.dtype != compute:
            casts += size * compute.itemsize
    # On CPU a step also has them in float32 where it computes in another type, and once more where
    # layers are scanned.
    if platform() == "cpu":
        copies = (compute.itemsize < _FLOAT32) + ("layers" in params)
        casts += copies * elements * _FLOAT32
    return weights, casts


class Forms(NamedTuple):
    """What decides which pages there are.

    Attributes:
      drafter: who guesses on the device; None for nobody.
      stacked: whether the layers of the model are.
      draft_stacked: whether those of a smaller model that guesses are.
      cache_dtype: as of `LanguageModel.empty_cache`.
    """

    drafter: Drafter | None
    stacked: bool
    draft_stacked: bool
    cache_dtype: str | None


@functools.lru_cache(maxsize=16)
def _state_bytes(
    config: LanguageModelConfig,
    serve: ServeConfig,
    num_ids: int,
    forms: Forms,
    tensor: int,
    platform_name: str,
) -> EngineBytes:
    """Returns all but what the weights take."""
    width = serve.padded_rows()
    windows = _windows(config, forms)
    pages, memory, rest = _state_parts(config, serve, forms)

    def make_slots() -> list[Any]:
        slots = empty_slots(serve.slots, num_ids, serve.drafts)
        return jax.tree.leaves(slots)

    slots = jax.eval_shape(make_slots)
    fixed = memory + rest + _bytes(slots)

    # Pages that are moved, as they come and as they lie; they may come from no shard.
    moved = serve.transfers * 2 * MOVED_PAGES * sum(pages)

    # Keys and values are sharded by head where `tensor` divides the heads; latents never are.
    if isinstance(config, ModelConfig):
        has_latents = config.attention.latent is not None
        if not has_latents and config.attention.num_kv_heads % tensor == 0:
            pages = [page // tensor for page in pages]
    draw_rows = 1 if platform_name == "cpu" else width
    temporaries = moved + _DRAW_IN_USE * draw_rows * config.vocab_size * _FLOAT32
    if isinstance(config, ModelConfig):
        temporaries += _tile_bytes(config, serve.row_tiles()[-1], memory // serve.slots)
        temporaries += _piece_bytes(config)
    sizes = EngineBytes(0, pages[0], fixed, temporaries)
    if len(windows) == 1:
        return sizes
    most = most_windowed(serve, windows[1], config.max_length)
    return dataclasses.replace(sizes, windowed_page=pages[1], most_windowed=most)


def _windows(config: LanguageModelConfig, forms: Forms) -> tuple[int, ...]:
    keeps_all = forms.drafter is not None and forms.drafter.has_layers
    return windows_of(config, keeps_all=keeps_all)


def _state_parts(
    config: LanguageModelConfig, serve: ServeConfig, forms: Forms
) -> tuple[list[int], int, int]:
    """Returns the bytes of a page of each kind, of what an encoder read for all slots, and of the
    rest.
    """
    # Of the parameters it counts only whether layers are stacked.
    params = {"layers": ()} if forms.stacked else {}
    draft_params = {"layers": ()} if forms.draft_stacked else {}

    kinds = range(len(_windows(config, forms)))

    def make() -> tuple[list[list[Any]], list[Any], list[Any]]:
        ids = jnp.zeros((serve.slots, serve.pages_of(config.max_length)), jnp.int32)
        table = PageTable.of_kinds([ids for _ in kinds], [1 for _ in kinds], serve.page_size)
        state = empty_state(
            params,
            draft_params,
            table,
            config=config,
            rows=serve.padded_rows(),
            drafter=forms.drafter,
            cache_dtype=forms.cache_dtype,
        )
        layers = (*state.layers, *state.draft_layers)
        pages = []
        for kind in kinds:
            own = [layer.tokens for layer in layers if layer.tokens.kind == kind]
            pages.append(jax.tree.leaves(own))
        memory = jax.tree.leaves([layer.memory for layer in layers])
        rest = (state.logits, state.memory_segments, state.hidden)
        return pages, memory, jax.tree.leaves(rest)

    pages, memory, rest = jax.eval_shape(make)
    return [_bytes(each) for each in pages], _bytes(memory), _bytes(rest)


def _tile_bytes(config: ModelConfig, tile: int, memory: int) -> int:
    """Returns what reading a tile takes beside its pages; `memory` is what an encoder read for a
    row.
    """
    c = config.attention
    hidden = config.mlp.hidden_dim
    if config.experts is not None:
        # Each row has the experts that it chose, and goes into each of them.
        chosen = config.experts.experts_per_token
        hidden += chosen * (config.experts.hidden_dim + config.embed_dim)
        hidden += config.experts.shared_dim
    width = config.embed_dim + c.num_heads * c.head_dim + hidden
    row = (_WIDTHS_IN_USE * width + _LOGITS_IN_USE * config.vocab_size) * _FLOAT32
    kinds = {config.position_of(layer).kind for layer in config.layers()}
    gathers = c.latent is not None or config.structure == "prefix"
    if gathers or kinds & {"buckets", "relative", "alibi_bfloat16"}:
        per_token = c.num_heads + 2 * c.num_kv_heads * c.head_dim
        if c.latent is not None:
            per_token = c.num_heads + c.latent.kv_dim + c.latent.rope_dim
        if "relative" in kinds:
            per_token += c.num_heads * c.head_dim
        row += _GATHERED_IN_USE * per_token * config.max_length * _FLOAT32
    return tile * (row + 2 * memory)


def _piece_bytes(config: ModelConfig) -> int:
    """Returns what is taken by what is read in one piece of the model's length."""
    if config.structure not in ("encoder_decoder", "prefix"):
        return 0
    c = config.attention
    width = config.embed_dim + c.num_heads * c.head_dim + config.mlp.hidden_dim
    scores = c.num_heads * config.max_length
    return _WIDTHS_IN_USE * (width + scores) * config.max_length * _FLOAT32


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def fit_tokens(serve: ServeConfig, sizes: EngineBytes, room: int, max_length: int) -> int:
    """Returns the tokens of the cache: those that fit, but no more than are of use.

    Args:
      serve: how the engine runs: `tokens`, or 0 and the share `memory` of the room.
      sizes: what it takes.
      room: bytes of a device beside the weights.
      max_length: of the model.

    Raises:
      UserError: `tokens` do not fit, or where they are 0 not even a sequence of `max_length`.
    """
    share = 1.0 if serve.tokens else serve.memory
    pages = sizes.pages_in(int(share * room) - sizes.fixed - sizes.temporaries)
    needed = serve.pages_of(serve.tokens or max_length)
    if pages < needed:
        raise _too_small(serve, sizes, room, pages, needed, max_length)
    if serve.tokens:
        return serve.tokens

    # What all slots can fill, and as much again for prompts that have ended, where they are shared.
    most = serve.slots * serve.pages_of(max_length) * (1 + bool(serve.prefix_cache))
    pages = min(_rounded(pages), most)
    return max(pages, needed) * serve.page_size


def _rounded(count: int) -> int:
    """Returns a count with its leading binary digits alone."""
    # 0b1011_0111 -> 0b1011_0000
    low = max(count.bit_length() - KEPT_DIGITS, 0)
    return count >> low << low


def _too_small(
    serve: ServeConfig,
    sizes: EngineBytes,
    room: int,
    pages: int,
    needed: int,
    max_length: int,
) -> UserError:
    field = "tokens"
    value: float = serve.tokens
    fault = "is too much"
    wanted = "their pages"
    if not serve.tokens:
        field = "memory"
        value = serve.memory
        fault = "is too little"
        wanted = f"the pages of one sequence of max_length = {max_length:,}"
    advice = "Take fewer slots or rows, weights in 16 bits, or more devices."
    if pages:
        fits = pages * serve.page_size
        advice = f"What would fit: tokens = {fits:,}, prompt and answer of a request together."
    takes = (
        f"slots take {gigabytes(sizes.fixed)}, temporaries {gigabytes(sizes.temporaries)} and "
        f"{wanted} {gigabytes(sizes.of_pages(needed))}"
    )
    return UserError(
        field,
        value,
        f"{fault}: beside the weights, {gigabytes(sizes.weights)}, a device has {gigabytes(room)}; "
        f"{takes}. {advice}",
    )


def gigabytes(count: int) -> str:
    """Returns bytes as text: `1.25 GB`, `3.1 MB`."""
    if count < 1e8:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:.2f} GB"


def sized(
    config: LanguageModelConfig,
    params: Any,
    serve: ServeConfig,
    num_ids: int,
    mesh: Mesh | None,
    draft: tuple[ModelConfig, Any] | None,
) -> ServeConfig:
    """Returns how an engine runs, with the tokens that fit beside the parameters.

    Args:
      config: of the model.
      params: its parameters, which are on their devices already.
      serve: how it runs.
      num_ids: ids that may be drawn.
      mesh: of one replica; None is one device.
      draft: as of `engine_bytes`.

    Raises:
      UserError: as of `engine_bytes` and `fit_tokens`.
    """
    mesh_sizes = None if mesh is None else mesh.shape
    sizes = engine_bytes(config, params, serve, num_ids, mesh_sizes, draft)
    tokens = fit_tokens(serve, sizes, free_bytes(params), config.max_length)
    return dataclasses.replace(serve, tokens=tokens)


def free_bytes(params: Any) -> int:
    """Returns the free bytes of a device that parameters are on; CPU devices share the host's."""
    leaf = jax.tree.leaves(params)[0]
    devices = jax.local_devices()[:1]
    if isinstance(leaf, jax.Array):
        devices = leaf.sharding.addressable_devices
    free = []
    for device in devices:
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            free.append(stats["bytes_limit"] - stats["bytes_in_use"])
        else:
            free.append(psutil.virtual_memory().available // len(devices))
    return min(free)
