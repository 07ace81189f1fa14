"""The recipe for long context runs in its two stages, on one device and on a ring of them."""

import numpy as np
import pytest

from research import cli
from research.training.metrics import curve, read_metrics
from tests.recipes import runs

CONFIG = runs.ROOT / "configs" / "pretrain" / "long_context.py"
SMALL = {
    "train__steps": 4,
    "train__batch_size": 8,
    "train__log_every": 1,
    "train__eval_batches": 1,
    "optim__schedule__warmup_steps": 1,
    "data__sources__0__documents": 400,
}
LONG = {
    "model__position__theta": 500000.0,
    # 512, in blocks that the ring's halves divide
    "train__sequence_length": 512,
    "data__sources__0__length": 510,
}


@pytest.mark.thorough
def test_a_model_goes_on_at_a_greater_length_on_a_ring_of_devices(tmp_path, capsys):
    runs.run(f"{CONFIG}:short", tmp_path / "short", **SMALL)
    losses = []
    for context in (1, 4):
        workdir = tmp_path / f"context_{context}"
        changes = {**SMALL, **LONG, "mesh__data": 8 // context, "mesh__context": context}
        state = runs.run(CONFIG, workdir, start_from=tmp_path / "short", **changes)
        assert int(state.step) == 4
        losses.append(curve(read_metrics(workdir), "train/loss")[1])
    np.testing.assert_allclose(*losses, rtol=1e-5)

    assert cli.main(["evaluate", f"--workdir={workdir}", "--needle=128,512", "--prompts=2"]) == 0
    assert capsys.readouterr().out.count("0.00") > 10
