"""Impossible objectives are errors, and the shapes of a batch are known before there is
one.
"""

import pytest

from research.core.config import bind
from research.core.errors import UserError
from research.data.objectives import UL2, ObjectiveConfig, SpanConfig, batch_shapes
from research.data.prepare import DataConfig
from tests.data.objectives.examples import epoch, objective_of, packed
from tests.data.text import store


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "mask"}, "kind = 'mask' is not one of"),
        ({"encoder_length": 8}, "encoder_length = 8 must be None for kind = 'causal'"),
        ({"kind": "span", "encoder_length": 0}, "encoder_length = 0 must be at least 1"),
        ({"denoisers": []}, "denoisers = \\(\\) must name"),
        ({"masked": {"density": 1.0}}, r"masked\.density = 1\.0 must lie in \(0, 1\)"),
        ({"masked": {"mask": 0.8, "random": 0.3}}, r"masked\.mask = 0\.8 and random = 0\.3"),
        ({"span": {"mean_span": 0.5}}, r"span\.mean_span = 0\.5 must be at least 1"),
        ({"span": {"weight": 0.0}}, r"span\.weight = 0\.0 must be above 0"),
        ({"denoisers": [{"mode_id": -1}]}, r"denoisers\.0\.mode_id = -1"),
        ({"infill": {"density": 0.0}}, r"infill\.density = 0\.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(values, message):
    with pytest.raises(UserError, match=f"^objective\\.{message}"):
        bind(DataConfig, {"objective": values})


def test_ul2_is_three_kinds_of_denoiser():
    assert len(UL2) == 7
    assert sum(d.mean_span is None for d in UL2) == 1
    # Extreme: long spans or much noise.
    assert (
        sum(d.mean_span is not None and (d.density >= 0.5 or d.mean_span >= 12) for d in UL2) == 4
    )


@pytest.mark.parametrize("kind", ["causal", "masked", "prefix", "span", "denoise", "infill"])
def test_batches_have_the_shapes_that_were_promised(kind):
    encoded = kind in ("span", "denoise", "infill")
    options = {"encoder_length": 48} if encoded else {}
    batch = epoch(packed(store([30, 5, 200]), objective_of(kind, 32, **options)))
    shapes = batch_shapes(ObjectiveConfig(kind, **options), len(batch["tokens"]), 32)
    assert {name: (values.shape, values.dtype.name) for name, values in batch.items()} == shapes
    assert encoded == ("encoder_segments" in shapes)


def test_an_encoder_is_as_wide_as_the_decoder_by_default():
    assert batch_shapes(ObjectiveConfig("span"), 2, 16)["encoder_tokens"] == ((2, 16), "int32")


def test_a_mode_token_outside_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"^data\.objective: mode_id = 99999 .* \[0, 50200\)"):
        objective_of("denoise", 32, denoisers=(SpanConfig(mode_id=99_999),))
