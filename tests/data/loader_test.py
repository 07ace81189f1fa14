"""The row at a global index depends on the seed and the index alone: not on processes, workers or
restarts.
"""

import collections
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from research.core.errors import UserError
from research.data.loader import Loader, heldout_batches
from research.data.objectives import ObjectiveConfig, batch_shapes, build
from research.data.packing import PackedRows
from research.data.prepare import DataConfig
from research.data.sources import SourceConfig
from tests.data.text import MarkedBytes, corpora

B, T, SEED = 8, 32, 11
TOKENIZER = MarkedBytes()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return corpora(folder, 90), corpora(folder, 70, seed=2)


SOURCES = (SourceConfig(weight=3.0), SourceConfig(weight=1.0))
CONFIG = DataConfig(sources=SOURCES, block_documents=32)


def loader(pair, config=CONFIG, **options) -> Loader:
    values = {"batch_size": B, "sequence_length": T, "seed": SEED} | options
    return Loader([splits["train"] for splits in pair], config, TOKENIZER, **values)


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
    return [next(batches) for _ in range(count)]


def joined(batches) -> dict[str, np.ndarray]:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], kind: str = "causal") -> None:
    assert a.keys() == b.keys() == batch_shapes(ObjectiveConfig(kind), B, T).keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_out_the_same_rows(pair, count):
    parts = [take(loader(pair, part_index=p, part_count=count), 6) for p in range(count)]
    whole = take(loader(pair), 6)
    for step in range(6):
        assert_same(joined([part[step] for part in parts]), whole[step])


def test_workers_do_not_change_the_order(pair):
    config = DataConfig(sources=SOURCES, block_documents=32, workers=2, prefetch=2)
    with_workers = loader(pair, config, start=2 * B)
    found = take(with_workers, 5)
    state = with_workers.state()
    with_workers.close()
    expected = take(loader(pair), 7)
    assert_same(joined(found), joined(expected[2:]))
    assert state["position"] == 7 * B


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_restored_loader_resumes_where_it_was(pair, stop):
    unbroken = take(loader(pair), 8)
    first = loader(pair)
    take(first, stop)
    state = json.loads(json.dumps(first.state()))
    second = loader(pair)
    take(second, 2)
    second.restore(state)
    assert second.position == stop * B
    assert_same(joined(take(second, 3)), joined(unbroken[stop : stop + 3]))


def test_another_batch_size_goes_on_with_the_next_row(pair):
    rows = joined(take(loader(pair), 8))
    first = loader(pair)
    take(first, 3)
    second = loader(pair, batch_size=5)
    second.restore(first.state())
    assert_same(
        joined(take(second, 4)), {name: values[3 * B : 3 * B + 20] for name, values in rows.items()}
    )


KINDS = ("masked", "prefix", "span", "denoise", "infill")


def drawing(kind: str, **options) -> DataConfig:
    return DataConfig(
        sources=SOURCES, block_documents=32, objective=ObjectiveConfig(kind), **options
    )


@pytest.mark.fast_cases("masked", "span")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_depends_on_the_row_and_not_on_who_makes_it(pair, kind):
    """Through the end of the first epoch: in parts, from the middle, in other batches."""
    config = drawing(kind)
    count = loader(pair, config).rows_per_epoch // B + 3
    whole = joined(take(loader(pair, config), count))
    for parts in (2, 4):
        shares = [
            take(loader(pair, config, part_index=p, part_count=parts), count) for p in range(parts)
        ]
        assert_same(joined([share[step] for step in range(count) for share in shares]), whole, kind)
    first, second = loader(pair, config), loader(pair, config, batch_size=5)
    take(first, count - 2)
    second.restore(json.loads(json.dumps(first.state())))
    tail = {name: values[(count - 2) * B :][:10] for name, values in whole.items()}
    assert_same(joined(take(second, 2)), tail, kind)


def test_workers_draw_the_same(pair):
    with_workers = loader(pair, drawing("span", workers=2), start=B)
    found = take(with_workers, 4)
    with_workers.close()
    assert_same(joined(found), joined(take(loader(pair, drawing("span")), 5)[1:]), "span")


@pytest.mark.parametrize("kind", ["causal", *KINDS])
def test_the_second_epoch_has_the_same_text_and_other_draws(pair, kind):
    config = DataConfig(block_documents=32, objective=ObjectiveConfig(kind))
    one = loader(pair[:1], config, batch_size=1)
    everything = [take(one, one.rows_per_epoch) for _ in range(2)]
    texts, examples = [], []
    for batches in everything:
        rows = joined(batches)
        names = [name for name in rows if name.endswith("tokens")]
        both = np.concatenate(
            [rows[name][rows[name.replace("tokens", "segments")] > 0] for name in names]
        )
        texts.append(collections.Counter(both[both < 256].tolist()).total())
        examples.append(
            {b"".join(values.tobytes() for values in batch.values()) for batch in batches}
        )
    assert kind in ("masked", "infill") or texts[0] == texts[1]
    shared = len(examples[0] & examples[1]) / len(examples[0])
    # Short segments lose their one span at the end, as in T5, in every epoch. Causal rows are the
    # control.
    assert (
        shared == 1 if kind == "causal" else shared < (0.8 if kind in ("span", "denoise") else 0.1)
    ), shared


@pytest.mark.parametrize("kind", KINDS)
def test_heldout_rows_are_drawn_in_one_way(pair, kind):
    heldout = [splits["heldout"] for splits in pair]
    options = {"batch_size": 4, "sequence_length": T}
    first, again = (
        joined(list(heldout_batches(heldout, drawing(kind), TOKENIZER, **options)))
        for _ in range(2)
    )
    assert_same(first, again, kind)
    assert first["weights"].sum() > 0


def test_an_objective_needs_its_tokens(pair):
    config, tokenizer = DataConfig(objective=ObjectiveConfig("masked")), MarkedBytes()
    tokenizer.mask_id = None
    with pytest.raises(
        UserError, match=r"^data\.objective\.kind = 'masked' needs a tokenizer with mask_id"
    ):
        Loader([pair[0]["train"]], config, tokenizer, batch_size=1, sequence_length=T, seed=0)


def test_a_state_of_other_data_or_seed_is_refused(pair):
    state = loader(pair).state()
    other_weights = DataConfig(
        sources=(SourceConfig(weight=2.0), SourceConfig()), block_documents=32
    )
    for other in (
        loader(pair, seed=12),
        loader(pair, sequence_length=16),
        loader(pair, other_weights),
        loader(pair, drawing("prefix")),
    ):
        with pytest.raises(UserError, match="the checkpoint was made with other data"):
            other.restore(state)


def rows_of(batches: dict[str, np.ndarray]) -> list[bytes]:
    return [row.tobytes() for row in batches["tokens"]]


def test_an_epoch_holds_every_row_once_and_the_next_has_another_order(pair):
    config = DataConfig(block_documents=32)
    one = loader(pair[:1], config, batch_size=1)
    epochs = [rows_of(joined(take(one, one.rows_per_epoch))) for _ in range(3)]
    objective = build(ObjectiveConfig(), TOKENIZER, T)
    packed = PackedRows(pair[0]["train"], objective=objective, seed=SEED, block_documents=32)
    rows = np.arange(len(packed))
    everything = collections.Counter(rows_of(packed.batch(rows, np.zeros_like(rows))))
    assert all(collections.Counter(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert one.padding == pytest.approx(packed.plan.padding)


def test_sources_without_text_are_left_out(pair, tmp_path):
    empty = corpora(tmp_path, 3, heldout_fraction=1.0)
    assert_same(
        *(
            take(made, 1)[0]
            for made in (loader([pair[0], empty]), loader(pair[:1], DataConfig(block_documents=32)))
        )
    )
    with pytest.raises(UserError, match="no text to train on"):
        loader([empty], DataConfig())


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (16, 1), (16, 4)])
def test_evaluation_sees_every_heldout_pair_exactly_once(pair, batch, count):
    heldout = [splits["heldout"] for splits in pair]
    options = {"batch_size": batch, "sequence_length": T, "part_count": count}
    parts = [
        list(heldout_batches(heldout, CONFIG, TOKENIZER, part_index=p, **options))
        for p in range(count)
    ]
    assert len({len(part) for part in parts}) == 1
    assert all(values["tokens"].shape == (batch // count, T) for part in parts for values in part)
    everything = joined([values for part in parts for values in part])
    assert everything["weights"].sum() == sum(
        len(corpus.tokens) - corpus.num_documents for corpus in heldout
    )
    seen = collections.Counter(
        zip(
            *(
                everything[name][everything["weights"] > 0].tolist()
                for name in ("tokens", "targets")
            ),
            strict=True,
        )
    )
    wanted = collections.Counter()
    for corpus in heldout:
        for i in range(corpus.num_documents):
            ids = corpus.document(i).tolist()
            wanted.update(itertools.pairwise(ids))
    assert seen == wanted


def test_evaluation_can_stop_early_and_needs_text(pair):
    heldout = [splits["heldout"] for splits in pair]
    batches = list(
        heldout_batches(heldout, CONFIG, TOKENIZER, batch_size=4, sequence_length=T, max_batches=2)
    )
    whole = list(heldout_batches(heldout, CONFIG, TOKENIZER, batch_size=4, sequence_length=T))
    assert_same(joined(batches), joined(whole[:2]))
    with pytest.raises(UserError, match="no document is held out"):
        list(heldout_batches([], CONFIG, TOKENIZER, batch_size=4, sequence_length=T))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "part_count": 4}, "batch_size = 6 must be a multiple of its 4 parts"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"sequence_length": 0}, "sequence_length = 0"),
    ],
)
def test_impossible_sizes_are_refused(pair, options, message):
    with pytest.raises(UserError, match=message):
        loader(pair, **options)


def test_importing_the_loader_imports_no_heavy_optional_package():
    program = (
        "import sys, research.data.loader; print(*{name.split('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "grain" in loaded
    assert not {"tensorflow_datasets", "pyarrow", "tokenizers", "matplotlib", "torch"} & set(loaded)
