"""The machine that figures come from: what is said of it, and what is left out on which
processor.
"""

import pytest

from research.bench import machine

ZEN = (
    "processor\t: 0\nmodel name\t: AMD EPYC 9654\nflags\t\t: fpu avx2 avx512f "
    "avx512_bf16\n\nprocessor\t: 1\n"
)
OLD = "processor\t: 0\nmodel name\t: Intel Xeon E5\nflags\t\t: fpu avx2\n\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\n\n"


def on(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_processor", lambda: text.partition("\n\n")[0])


@pytest.mark.parametrize(
    ("text", "name", "avx512", "bfloat16"),
    [
        (ZEN, "AMD EPYC 9654", True, True),
        (OLD, "Intel Xeon E5", False, False),
        (ARM, "aarch64", False, True),
    ],
)
def test_a_processor_is_described_by_what_linux_says(text, name, avx512, bfloat16, monkeypatch):
    on(text, monkeypatch)
    monkeypatch.setattr(machine.platform, "processor", lambda: "aarch64")
    found = machine.describe()
    assert (found["processor"], found["avx512"], found["bfloat16"]) == (name, avx512, bfloat16)
    assert found["cores"] >= 1
    assert found["memory_gigabytes"] >= 1


def test_a_machine_is_one_line_with_the_versions():
    said = machine.sentence(machine.describe())
    assert "\n" not in said
    assert f"jax {machine.importlib.metadata.version('jax')}" in said


def test_torch_in_bfloat16_is_left_out_where_the_processor_has_no_instructions_for_it(monkeypatch):
    on(OLD, monkeypatch)
    peers, skipped = machine.without_torch_bfloat16(["jax.nn", "torch"], "bfloat16")
    assert peers == ["jax.nn"]
    assert skipped == {"torch": "the processor has no bfloat16 instructions"}
    assert machine.without_torch_bfloat16(["jax.nn", "torch"], "float32") == (
        ["jax.nn", "torch"],
        {},
    )
    assert machine.without_torch_bfloat16(["jax.nn"], "bfloat16") == (["jax.nn"], {})
    on(ZEN, monkeypatch)
    assert machine.without_torch_bfloat16(["torch"], "bfloat16") == (["torch"], {})
