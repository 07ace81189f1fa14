"""What an engine takes is counted before an array is made, and is what its arrays then take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.data.tokenizers import ByteTokenizer
from research.inference import programs
from research.inference.drawing import Allowed, draw_step
from research.inference.engine import Engine
from research.inference.pool_sizes import MOVED_PAGES, EngineBytes, most_windowed, pool_pages
from research.inference.program_names import MOST_PROGRAMS, program_names, step_tiles
from research.inference.serve_config import ServeConfig, bind_serve
from research.inference.sizing import engine_bytes, fit_tokens, free_bytes
from research.inference.slots import StepRows, admit, empty_slots
from research.inference.speculation.propose import propose
from research.kernels.decode_attention import PAGE_SIZE
from research.models.config import HeadConfig, ModelConfig
from research.models.language_model import abstract_params
from research.models.paged_cache import PageTable
from tests.models.variants import VARIANTS
from tests.tiny import random_params, tiny_config

BYTES = ByteTokenizer()
SERVE = ServeConfig(slots=2, tokens=128, rows=8, tiles=(2, 8))
WIDE = tiny_config(
    vocab_size=2000,
    max_length=256,
    embed_dim=128,
    attention={"num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
    mlp={"hidden_dim": 512},
)


def total(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


SMALL = tiny_config(vocab_size=300, num_layers=1)


@pytest.mark.fast_cases("windows-mtp")
@pytest.mark.parametrize(
    ("name", "kind"),
    [("soft caps", "draft"), ("latent", "mtp"), ("encoder-decoder", "none"), ("windows", "mtp")],
)
def test_counted_bytes_are_those_of_the_arrays(name: str, kind: str):
    config = dataclasses.replace(VARIANTS[name], vocab_size=300)
    serve = SERVE
    draft = None
    if kind != "none":
        serve = dataclasses.replace(SERVE, drafts=2, speculate=kind)
    if kind == "draft":
        config = dataclasses.replace(config, dtype="bfloat16")
        serve = dataclasses.replace(serve, cache_dtype="int8")
        draft = (SMALL, jax.tree.map(jnp.asarray, random_params(SMALL)))
    if kind == "mtp":
        config = dataclasses.replace(config, head=HeadConfig(mtp_depth=1))

    params = jax.tree.map(jnp.asarray, random_params(config))
    engine = Engine(config, params, BYTES, serve, draft=draft)
    runner = engine.replicas[0]._runner
    sizes = engine_bytes(config, params, engine.serve, BYTES.vocab_size, draft=draft)
    assert sizes.weights == total((params, draft and draft[1]))
    layers = (*runner.state.layers, *runner.state.draft_layers)
    assert len(layers) == config.num_layers + (kind != "none")
    pages = sum(total(layer.tokens) for layer in layers)
    assert sizes.of_pages(serve.pages_of(serve.tokens)) == pages
    by_kind = [0] * len(runner.num_pages)
    for layer in layers:
        by_kind[layer.tokens.kind] += total(layer.tokens)
    page, *windowed = [of // count for of, count in zip(by_kind, runner.num_pages, strict=True)]
    assert (sizes.page, sizes.windowed_page) == (page, sum(windowed))
    assert bool(windowed) == (name == "windows")
    assert sizes.fixed == total(runner.state) - pages + total(runner._slots)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_device_of_a_mesh_has_its_own_heads(tensor: int):
    params = abstract_params(WIDE, "cpu")
    alone = engine_bytes(WIDE, params, SERVE, 260)
    sharded = engine_bytes(WIDE, params, SERVE, 260, {"tensor": tensor})
    assert sharded.page == alone.page // tensor
    latent = VARIANTS["latent"]
    params = abstract_params(latent, "cpu")
    whole = engine_bytes(latent, params, SERVE, latent.vocab_size)
    on_mesh = engine_bytes(latent, params, SERVE, latent.vocab_size, {"tensor": tensor})
    assert on_mesh.page == whole.page


def compiled_temporaries(config: ModelConfig, serve: ServeConfig) -> int:
    """Returns the temporaries of a step's two programs, as the compiler has them."""
    params = jax.tree.map(jnp.zeros_like, abstract_params(config, "cpu"))
    width = serve.padded_rows()
    ids = jnp.zeros((serve.slots, serve.pages_of(config.max_length)), jnp.int32)
    table = PageTable(ids, 1 + serve.pages_of(serve.tokens), PAGE_SIZE)
    state = programs.empty_state(
        params, None, table, config=config, rows=width, drafter=None, cache_dtype=None
    )
    slots = empty_slots(serve.slots, config.vocab_size, serve.drafts)
    numbers = jnp.zeros(width, jnp.int32)
    flags = jnp.zeros(width, bool)
    rows = StepRows(numbers, numbers, numbers, numbers, flags, numbers, numbers, flags)
    allowed = Allowed(numbers[: serve.slots], jnp.zeros(slots.rules.allowed.shape, jnp.uint32))
    one = jnp.int32(1)
    tile = serve.tiles[-1]

    def read(state, params):
        return programs.read(
            params, None, state, slots, table, rows, one, config=config, tile=tile, drafter=None
        )

    def draw(slots, logits):
        order = numbers
        return draw_step(slots, rows, logits, order, one, allowed, group=1, num_top=20)

    return temporaries(read, state, params) + temporaries(draw, slots, state.logits)


def temporaries(function, donated, other) -> int:
    # Shapes of a donated tree are no arrays, which annotated trees refuse: its leaves go in.
    leaves, tree = jax.tree.flatten(donated)

    def of_leaves(leaves, other):
        return jax.tree.leaves(function(jax.tree.unflatten(tree, leaves), other))

    lowered = jax.jit(of_leaves, donate_argnums=0).lower(leaves, other)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.thorough
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16"},
        {"layer_loop": "scan", "num_layers": 4},
        {"variant": "shared experts"},
    ],
    ids=str,
)
def test_temporaries_are_estimated_from_above(changes):
    variant = changes.get("variant")
    config = VARIANTS[variant] if variant else dataclasses.replace(WIDE, **changes)
    serve = dataclasses.replace(SERVE, tokens=1024)
    found = compiled_temporaries(config, serve)
    params = abstract_params(config, "cpu")
    estimated = engine_bytes(config, params, serve, config.vocab_size).temporaries
    assert found <= estimated <= 8 * found


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["relative", "prefix", "encoder-decoder"])
def test_every_structure_is_counted(name: str):
    config = VARIANTS[name]
    sizes = engine_bytes(config, abstract_params(config, "cpu"), SERVE, config.vocab_size)
    assert min(sizes.weights, sizes.page, sizes.fixed, sizes.temporaries) > 0


# Three layers of four have a window.
WINDOWED = EngineBytes(0, page=1_000, fixed=0, temporaries=0, windowed_page=3_000, most_windowed=40)


def test_layers_with_a_window_have_pages_for_all_slots_at_once_and_as_many_for_prompts():
    serve = ServeConfig(slots=4, tokens=16_000, rows=32, prefix_cache=True)
    # A window of 100 tokens and a step's 32 are 9 pages, and one that they begin in.
    assert most_windowed(serve, 100, 4096) == 4 * 10 * 2
    assert most_windowed(dataclasses.replace(serve, prefix_cache=False), 100, 4096) == 4 * 10
    # No more than a text has.
    assert most_windowed(serve, 100, 80) == 4 * 5 * 2
    assert pool_pages(serve, (0, 100), 4096) == (1001, 81)
    # Few pages are as many for both; layers that are all alike have one pool.
    few = dataclasses.replace(serve, tokens=160)
    assert pool_pages(few, (0, 100), 4096) == (11, 11)
    assert pool_pages(serve, (100,), 4096) == (1001,)


@pytest.mark.parametrize("room", [*range(0, 12_000, 1_000), 159_999, 160_000, 164_000, 200_000])
def test_the_pages_that_fit_are_as_many_as_their_bytes_say(room: int):
    count = WINDOWED.pages_in(room)
    assert count == 0 or WINDOWED.of_pages(count) <= room
    assert WINDOWED.of_pages(count + 1) > room


def test_windows_leave_room_for_more_tokens():
    serve = ServeConfig(slots=40, prefix_cache=True)
    one_pool = dataclasses.replace(WINDOWED, page=4_000, windowed_page=0)
    assert fit_tokens(serve, one_pool, 1_000_000, 256) == 192 * PAGE_SIZE
    assert fit_tokens(serve, WINDOWED, 1_000_000, 256) == 672 * PAGE_SIZE


SIZES = EngineBytes(weights=1_000_000, page=1_000, fixed=10_000, temporaries=40_000)


def test_tokens_are_what_is_left_of_the_share():
    serve = ServeConfig(slots=1_000, memory=0.5, rows=1_000)
    # 500,000 - 50,000 are 450 pages, of which one is nobody's; 449 = 0b111000001 -> 0b111000000.
    assert fit_tokens(serve, SIZES, 1_000_000, 256) == 448 * PAGE_SIZE
    more = dataclasses.replace(serve, memory=1.0)
    assert fit_tokens(more, SIZES, 1_000_000, 256) == 928 * PAGE_SIZE


def test_no_more_tokens_are_taken_than_are_of_use():
    serve = ServeConfig(slots=2, prefix_cache=False)
    assert fit_tokens(serve, SIZES, 10**9, 256) == 2 * 256
    assert fit_tokens(dataclasses.replace(serve, prefix_cache=True), SIZES, 10**9, 256) == 4 * 256


def test_a_little_more_memory_is_not_another_program():
    serve = ServeConfig(slots=1_000, rows=1_000)
    rooms = range(1_000_000, 1_020_000, 1_000)
    assert len({fit_tokens(serve, SIZES, room, 256) for room in rooms}) == 1
    assert fit_tokens(serve, SIZES, 1_100_000, 256) > fit_tokens(serve, SIZES, 1_000_000, 256)


def test_memory_too_small_says_what_takes_it_and_what_would_fit():
    with pytest.raises(UserError) as caught:
        fit_tokens(ServeConfig(memory=0.5), SIZES, 200_000, 1024)
    assert str(caught.value) == (
        "memory = 0.5 is too little: beside the weights, 1.0 MB, a device has 0.2 MB; slots take "
        "0.0 MB, temporaries 0.0 MB and the pages of one sequence of max_length = 1,024 0.1 MB. "
        "What would fit: tokens = 784, prompt and answer of a request together."
    )
    assert fit_tokens(ServeConfig(tokens=784), SIZES, 200_000, 1024) == 784


def test_tokens_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"tokens = 16000 is too much: .* fit: tokens = 2,384"):
        fit_tokens(ServeConfig(tokens=16_000), SIZES, 200_000, 1024)
    with pytest.raises(UserError, match="Take fewer slots or rows"):
        fit_tokens(ServeConfig(), SIZES, 50_000, 1024)


def test_cpu_devices_share_the_memory_of_the_host():
    [first, *_] = devices = jax.local_devices()
    alone = free_bytes({"a": jax.device_put(np.zeros(8), first)})
    mesh = jax.make_mesh((len(devices),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(np.zeros(8), jax.NamedSharding(mesh, jax.P("x")))
    assert free_bytes({"a": spread}) == pytest.approx(alone / len(devices), rel=0.2)


def compiled_programs() -> int:
    jitted = (
        programs.read,
        draw_step,
        admit,
        programs.copy_pages,
        programs.take_pages,
        programs.put_pages,
        programs.read_source,
        programs.read_prefix,
        propose,
    )
    return sum(each._cache_size() for each in jitted)


@pytest.mark.fast_cases("soft caps-3-True")
@pytest.mark.parametrize(
    ("name", "slots", "transfers"),
    [("soft caps", 3, True), ("soft caps", 5, False), ("encoder-decoder", 6, False)],
)
def test_the_list_of_programs_is_what_is_compiled(name: str, slots: int, transfers: bool):
    # Sizes that no other test has, so that nothing is compiled yet.
    config = dataclasses.replace(VARIANTS[name], max_length=272, vocab_size=300)
    rows = max(SERVE.rows, 2 * slots)
    serve = dataclasses.replace(SERVE, slots=slots, tokens=288, rows=rows, transfers=transfers)
    if name == "soft caps":
        guesses = {"drafts": 1, "speculate": "first_layers", "draft_layers": 1}
        serve = dataclasses.replace(serve, **guesses)
    params = jax.tree.map(jnp.asarray, random_params(config))
    before = compiled_programs()
    Engine(config, params, BYTES, serve)
    assert compiled_programs() - before == len(program_names(config, serve))
    assert ("put_pages" in program_names(config, serve)) == transfers


@pytest.mark.parametrize("invariant", [True, False])
@pytest.mark.parametrize("name", ["windows", "prefix", "encoder-decoder"])
def test_there_are_at_most_eight_programs(name: str, invariant: bool):
    config = dataclasses.replace(VARIANTS[name], max_length=32_768)
    for tiles in ((1, 2, 4), (8,), (2, 8, 16)):
        guesses = {"drafts": 1, "speculate": "mtp"} if name == "windows" else {}
        serve = ServeConfig(tiles=tiles, invariant=invariant, **guesses)
        assert len(program_names(config, serve)) <= MOST_PROGRAMS
    with pytest.raises(UserError, match="tiles"):
        ServeConfig(tiles=(1, 2, 4, 8, 16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("speculate", ["none", "lookup", "mtp"])
def test_there_are_at_most_eight_programs_with_transfers(speculate: str, dtype: str):
    config = dataclasses.replace(VARIANTS["windows"], dtype=dtype)
    fields = {"transfers": True, "speculate": speculate}
    most = 2 if speculate == "mtp" else 3
    serve = bind_serve(fields)
    assert len(serve.tiles) == most
    for tiles in (serve.tiles, (8,), (8, 16, 32)[:most]):
        names = program_names(config, bind_serve({**fields, "tiles": tiles}))
        assert len(names) <= MOST_PROGRAMS
        assert any("propose" in name for name in names) == (speculate == "mtp")
    rule = f"are {most + 1} programs to compile, and there may be {most}, as transfers are"
    with pytest.raises(UserError, match=rule):
        bind_serve({**fields, "tiles": (2, 8, 16, 32)[: most + 1]})
    # The control: without transfers these tiles are taken.
    assert bind_serve({"speculate": speculate, "tiles": (2, 8, 16, 32)}).tiles


def test_pages_are_moved_where_prompts_share_them():
    assert ServeConfig(transfers=True).of_structure("decoder").transfers
    for serve, structure in (
        (ServeConfig(transfers=True), "encoder_decoder"),
        (ServeConfig(transfers=True, prefix_cache=False), "decoder"),
    ):
        with pytest.raises(UserError, match=r"transfers = True is for decoders whose prompts"):
            serve.of_structure(structure)


def test_room_for_pages_that_are_moved_is_counted():
    params = abstract_params(WIDE, "cpu")
    plain, moving = (
        engine_bytes(WIDE, params, dataclasses.replace(SERVE, transfers=transfers), 260)
        for transfers in (False, True)
    )
    assert moving.temporaries - plain.temporaries == 2 * MOVED_PAGES * plain.page
    assert dataclasses.replace(moving, temporaries=plain.temporaries) == plain


def test_without_the_promise_a_row_alone_and_all_rows_have_tiles():
    assert ServeConfig().row_tiles() == (2, 8, 16)
    assert ServeConfig(invariant=False).row_tiles() == (1, 8, 16, 64)
    assert ServeConfig(tiles=(8,), slots=6, rows=6, invariant=False).row_tiles() == (1, 6)
    assert ServeConfig(slots=1, rows=1, invariant=False).row_tiles() == (1,)


def test_prompts_share_pages_in_decoders_alone():
    assert ServeConfig().of_structure("decoder").prefix_cache
    assert not ServeConfig(prefix_cache=False).of_structure("decoder").prefix_cache
    for structure in ("prefix", "encoder_decoder", "encoder"):
        assert ServeConfig().of_structure(structure).prefix_cache is False
        with pytest.raises(UserError, match=f"prefix_cache = True is for .* of '{structure}'"):
            ServeConfig(prefix_cache=True).of_structure(structure)


def test_in_16_bits_a_tile_has_eight_rows_at_least():
    wide = dataclasses.replace(VARIANTS["windows"], dtype="float32")
    narrow = dataclasses.replace(wide, dtype="bfloat16")
    assert step_tiles(wide, ServeConfig()) == (2, 8, 16)
    assert step_tiles(narrow, ServeConfig()) == (8, 16)
    assert step_tiles(narrow, ServeConfig(invariant=False)) == (8, 16, 64)
    # Of one that is asked for, and is smaller.
    assert step_tiles(narrow, ServeConfig(tiles=(2,))) == (2,)


def test_an_engine_has_drafts_and_rows_for_what_is_asked():
    serve = bind_serve({"slots": 32, "speculate": "lookup"})
    assert (serve.drafts, serve.rows) == (7, 256)
    assert bind_serve({}) == ServeConfig()
    with pytest.raises(UserError, match="slot is not a config field"):
        bind_serve({"slot": 1})


@pytest.mark.parametrize(
    ("chip", "dtype", "size", "nearest"),
    [("tpu", "auto", 12, 16), ("tpu", "int8", 32, 128), ("gpu", "int8", 24, 32)],
)
def test_a_page_size_that_no_kernel_takes_is_refused(chip, dtype, size, nearest, monkeypatch):
    config = dataclasses.replace(VARIANTS["windows"], dtype="bfloat16")
    params = abstract_params(config, "cpu")
    serve = ServeConfig(page_size=size, cache_dtype=dtype, tokens=256)
    # CPU takes all.
    assert (
        engine_bytes(config, params, serve, 64).page
        == size * engine_bytes(config, params, dataclasses.replace(serve, page_size=1), 64).page
    )
    monkeypatch.setattr("research.kernels.decode_attention.platform", lambda: chip)
    with pytest.raises(UserError, match=rf"page_size = {size} is not taken .* such as {nearest}"):
        engine_bytes(config, params, serve, 64)
