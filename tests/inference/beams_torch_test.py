"""The golden beams live, where torch is importable (extra `parity`)."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra `parity`")
pytest.importorskip("transformers", reason="needs the extra `parity`")

from tests.inference import beam_cases, make_beam_goldens

pytestmark = pytest.mark.live

# A part of the grid: one of every width, and what stands alone at its end.
PART = [*range(2, 48, 13), *range(48, len(beam_cases.GRID))]


@pytest.mark.parametrize("name", [*beam_cases.MODELS, *beam_cases.ENCODER_DECODERS])
def test_goldens_are_what_transformers_finds(name):
    model, stored = make_beam_goldens.load(name), beam_cases.stored(name)
    grid = beam_cases.grid(name)
    for i in PART if grid is beam_cases.GRID else range(0, len(grid), 3):
        beams = grid[i]
        for prompt, wanted in zip(beam_cases.prompts(name, beams), stored[i], strict=True):
            found = make_beam_goldens.search(model, prompt, beams, beam_cases.eos_id(name))
            assert [tuple(ids) for ids, _ in found] == [one.tokens for one in wanted], beams
            np.testing.assert_allclose(
                [score for _, score in found], [one.score for one in wanted], atol=1e-4, rtol=1e-6
            )
