"""Pages that come from another engine are as good as those that were written here."""

import dataclasses
import hashlib
import logging
import math
from typing import Any

import jax
import numpy as np
import pytest

from research.core.errors import UserError
from research.data.tokenizers import ByteTokenizer
from research.inference import page_transfer
from research.inference.engine import Engine
from research.inference.page_names import digest_params
from research.inference.page_transfer import ExportedPages
from research.inference.pool_sizes import MOVED_PAGES
from research.inference.programs import take_pages
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.kernels.decode_attention import PAGE_SIZE
from research.models.config import LayerConfig
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.recipes.generation_mesh import shardings_for_generation
from tests.tiny import abstract_params, random_params, tiny_config

CONFIG = tiny_config(vocab_size=260, max_length=96)
SERVE = ServeConfig(slots=2, tokens=128, rows=16, tiles=(8,), transfers=True)
# Two full pages, and a part of a third.
IDS = tuple(np.random.default_rng(0).integers(0, 256, 2 * PAGE_SIZE + 5).tolist())
REQUEST = Request(IDS, SamplingConfig(max_tokens=6, seed=3))


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(CONFIG)


def engine_of(params: Any, **changes: Any) -> Engine:
    fields = {"params_digest": digest_params(params), **changes}
    return Engine(CONFIG, params, ByteTokenizer(), fields.pop("serve", SERVE), **fields)


def answer(engine: Engine, request: Request = REQUEST) -> tuple[Any, int]:
    """Tokens with their log-probabilities, and how many rows were read for them."""
    before = engine.replicas[0].num_rows
    [found] = engine.run([request])
    return found.samples[0].logprobs, engine.replicas[0].num_rows - before


@pytest.fixture(scope="module")
def pages(params) -> ExportedPages:
    engine = engine_of(params)
    answer(engine)
    return engine.export_pages(REQUEST)


def test_a_request_reads_only_the_rest_and_has_the_same_bits(params, pages):
    alone, rows = answer(engine_of(params))
    engine = engine_of(params)
    engine.import_pages(REQUEST, pages)
    # Those that are here already are not kept twice.
    engine.import_pages(REQUEST, pages)
    assert engine.replicas[0].available_pages == (SERVE.tokens // PAGE_SIZE,)
    found, rest = answer(engine)
    assert pages.count == 2
    assert rest == rows - 2 * PAGE_SIZE
    assert found == alone


def test_a_request_depends_on_the_pages_that_it_is_given(params, pages):  # the control
    numbers = np.frombuffer(pages.data, np.float32) + 1
    data = numbers.astype(np.float32).tobytes()
    wrong = dataclasses.replace(pages, data=data, sha256=hashlib.sha256(data).digest())
    engine = engine_of(params)
    engine.import_pages(REQUEST, wrong)
    assert answer(engine)[0] != answer(engine_of(params))[0]


def test_pages_may_go_to_another_mesh(params, pages):
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    shardings = shardings_for_generation(abstract_params(CONFIG), mesh, 3)
    digest = digest_params(params)
    engine = engine_of(jax.device_put(params, shardings), mesh=mesh, params_digest=digest)
    engine.import_pages(REQUEST, pages)
    found, rows = answer(engine)
    expected, all_rows = answer(engine_of(params))
    assert [each.token for each in found] == [each.token for each in expected]
    assert rows == all_rows - 2 * PAGE_SIZE
    assert digest_params(engine.replicas[0]._runner.params) == digest
    # And back, by heads that two devices have.
    assert engine.export_pages(REQUEST) == pages


def test_layers_with_a_window_give_and_take_its_pages_alone():
    config = dataclasses.replace(
        CONFIG, num_layers=3, pattern=(LayerConfig(window=20), LayerConfig())
    )
    params = random_params(config)
    digest = digest_params(params)
    long = Request((*IDS, *IDS), SamplingConfig(max_tokens=12, seed=3))

    def begun() -> Engine:
        return Engine(config, params, ByteTokenizer(), SERVE, params_digest=digest)

    alone, rows = answer(begun(), long)
    engine = begun()
    answer(engine, long)
    # Of 74 tokens 4 pages; token 64 attends to tokens 45 to 64, from page 2 on.
    exported = engine.export_pages(long)
    assert exported.count == 4
    assert [shape[0] for _, shape in exported.arrays] == [2, 2, 4, 4, 2, 2]

    other = begun()
    # So that the pages of both kinds have other ids here.
    other.replicas[0]._scheduler.kinds[1].take(1)
    other.import_pages(long, exported)
    found, rest = answer(other, long)
    assert (found, rest) == (alone, rows - 4 * PAGE_SIZE)
    # The control: other numbers in the last layer, which has a window.
    numbers = np.frombuffer(exported.data, np.float32).copy()
    numbers[-100:] += 1
    data = numbers.tobytes()
    wrong = dataclasses.replace(exported, data=data, sha256=hashlib.sha256(data).digest())
    other = begun()
    other.import_pages(long, wrong)
    assert answer(other, long)[0] != alone


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("pages.sha256", {"data": b"another"}),
        ("pages.page_size", {"page_size": 32}),
        ("pages.digest", {"count": 1}),
        ("pages.arrays", {"arrays": (("float32", (2, 2)),)}),
    ],
)
def test_pages_that_are_not_as_exported_are_refused(params, pages, field: str, changes: Any):
    with pytest.raises(UserError, match=field):
        engine_of(params).import_pages(REQUEST, dataclasses.replace(pages, **changes))


def test_pages_of_others_are_refused(params, pages):
    others = {
        "pages.digest": (engine_of(random_params(CONFIG, seed=1)), REQUEST),
        "params_digest": (engine_of(params, params_digest=None), REQUEST),
        "pages.count": (engine_of(params, serve=dataclasses.replace(SERVE, tokens=48)), REQUEST),
    }
    busy, _ = others["pages.count"]
    busy.submit(REQUEST)
    busy.run_step()
    busy.run_step()
    for field, (engine, request) in others.items():
        with pytest.raises(UserError, match=field):
            engine.import_pages(request, pages)
    with pytest.raises(UserError, match=r"pages.digest"):
        engine_of(params).import_pages(dataclasses.replace(REQUEST, salt="another"), pages)
    with pytest.raises(UserError, match="no full page"):
        engine_of(params).export_pages(REQUEST)


def test_pages_that_could_not_be_put_take_no_room(params, pages, monkeypatch):
    def broken(*_):
        raise MemoryError

    engine = engine_of(params)
    [replica] = engine.replicas
    before = replica.available_pages
    with monkeypatch.context() as patch:
        patch.setattr(page_transfer, "put_pages", broken)
        with pytest.raises(MemoryError):
            engine.import_pages(REQUEST, pages)
    assert replica.available_pages == before
    # Nobody finds what was not written.
    assert answer(engine) == answer(engine_of(params))


def test_an_import_that_is_broken_off_loses_no_answer(params, pages, monkeypatch):
    put = page_transfer.put_pages

    def broken(*taken):
        put(*taken)
        raise KeyboardInterrupt

    engine = engine_of(params)
    running = engine.submit(REQUEST)
    engine.run_step()
    with monkeypatch.context() as patch:
        patch.setattr(page_transfer, "put_pages", broken)
        with pytest.raises(KeyboardInterrupt):
            engine.import_pages(REQUEST, pages)
    while not running.finished:
        engine.run_step()
    [sample] = running.samples
    alone = engine_of(params).run([REQUEST])[0].samples[0]
    assert sample.logprobs == alone.logprobs


def test_an_engine_without_the_programs_moves_no_pages(params, pages):
    engine = engine_of(params, serve=dataclasses.replace(SERVE, transfers=False))
    answer(engine)
    for move in (lambda: engine.export_pages(REQUEST), lambda: engine.import_pages(REQUEST, pages)):
        with pytest.raises(UserError, match=r"transfers = False moves no pages: .* transfers = Tr"):
            move()


# Of no other test, so that nothing is compiled yet: more pages than are moved at a time, of two
# kinds of layers.
LONG = dataclasses.replace(
    CONFIG, num_layers=3, max_length=368, pattern=(LayerConfig(window=20), LayerConfig())
)
LONG_IDS = (*range(1, 251), *range(90))
LONG_REQUEST = Request(LONG_IDS, SamplingConfig(max_tokens=4, seed=3))


def long_engine(mesh_sizes: dict[str, int], slots: int) -> Engine:
    params = random_params(LONG)
    digest = digest_params(params)
    serve = dataclasses.replace(SERVE, slots=slots, tokens=640)
    mesh = None
    if mesh_sizes:
        devices = jax.devices()[: math.prod(mesh_sizes.values())]
        mesh = make_mesh(MeshConfig(**mesh_sizes), devices)
        shardings = shardings_for_generation(abstract_params(LONG), mesh, 3)
        params = jax.device_put(params, shardings)
    return Engine(LONG, params, ByteTokenizer(), serve, mesh, params_digest=digest)


@pytest.mark.fast_cases("one device", "tensor")
@pytest.mark.parametrize(
    ("mesh_sizes", "slots"),
    [({}, 2), ({"data": 1, "tensor": 2}, 3), ({"data": 2, "tensor": 2}, 3)],
    ids=["one device", "tensor", "data and tensor"],
)
def test_a_transfer_compiles_nothing_after_the_start(
    mesh_sizes: dict[str, int], slots: int, caplog: pytest.LogCaptureFixture
):
    sender, receiver = long_engine(mesh_sizes, slots), long_engine(mesh_sizes, slots)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        [alone] = sender.run([LONG_REQUEST])
        exported = sender.export_pages(LONG_REQUEST)
        receiver.import_pages(LONG_REQUEST, exported)
        [found] = receiver.run([LONG_REQUEST])
        assert receiver.export_pages(LONG_REQUEST) == exported
    assert exported.count > MOVED_PAGES
    assert found.samples[0].logprobs == alone.samples[0].logprobs
    rest = sum(replica.num_rows for replica in receiver.replicas)
    assert rest <= 1 + len(LONG_IDS) % PAGE_SIZE + 4
    assert not caplog.records


def test_a_transfer_whose_programs_are_not_compiled_is_logged(caplog):  # the control
    engine = long_engine({}, 2)
    engine.run([LONG_REQUEST])
    take_pages.clear_cache()
    engine.export_pages(LONG_REQUEST)
    assert "compiled while serving" in caplog.text
