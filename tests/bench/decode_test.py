"""`tessera bench decode`: its rows, its peers' weights, and what it refuses."""

import argparse
import dataclasses
import json

import pytest

from research.bench import decode
from research.bench.any_ids import AnyIds
from research.bench.serving_models import GGUF, MODELS, bytes_a_step, write_model
from research.bench.serving_sides import READ_BYTES, first_tokens, tessera
from research.core.errors import UserError


def arguments(*argv):
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    return parser.parse_args(argv)


def tiny(name: str):
    model = MODELS[name]
    heads = model.attention.num_kv_heads // 3
    attention = dataclasses.replace(model.attention, num_heads=4, num_kv_heads=heads, head_dim=16)
    return dataclasses.replace(
        model,
        vocab_size=1200,
        num_layers=2,
        embed_dim=64,
        max_length=64,
        attention=attention,
        mlp=dataclasses.replace(model.mlp, hidden_dim=256),
        init_stddev=0.2,
    )


def test_a_row_has_the_rates_of_all_sides_and_the_share_of_the_bandwidth(tmp_path, monkeypatch):
    def interleave_workers(commands, rounds, count):
        # 64 tokens of 8 sequences in two seconds.
        assert commands["tessera"][-2:] == ["8", "64"]
        return dict.fromkeys(commands, [2.0] * rounds)

    monkeypatch.setattr(decode, "interleave_workers", interleave_workers)
    monkeypatch.setattr(decode, "write_model", lambda *_: None)
    monkeypatch.setattr(decode, "same_tokens", lambda *_: "the same")
    # Whatever is installed here.
    monkeypatch.setitem(decode.PACKAGES, "transformers", "json")
    monkeypatch.setitem(decode.PACKAGES, "llama.cpp", "no_such_package")
    path = tmp_path / "decode.json"
    flags = ["--only=GPT-2 124 M", "--dtype=float32", "--sequences=8", f"--json={path}"]
    decode.main(arguments("--rounds=2", *flags))
    [(name, figure)] = json.loads(path.read_text())["figures"].items()
    assert name == "GPT-2 124 M, float32, 8 at once"
    assert figure["rounds"]["tessera"] == [256.0] * 2
    assert figure["skipped"] == {"llama.cpp": "no_such_package is not installed"}
    share = bytes_a_step(MODELS["GPT-2 124 M"], "float32") / (2 / 64 * READ_BYTES / 2)
    assert figure["note"].startswith(f"reads the weights at {share:.2f} of 1 GB/s; the same")


def test_the_bytes_of_a_step_are_those_of_the_weights_that_are_multiplied():
    # All but the learned positions, of which a step reads a row.
    gpt2 = 124_439_808 - 1024 * 768
    assert bytes_a_step(MODELS["GPT-2 124 M"], "float32") == 4 * gpt2
    assert bytes_a_step(MODELS["LLaMA 134 M"], "bfloat16") == 2 * 134_515_008


def test_every_id_of_a_model_of_random_weights_has_a_text():
    tokenizer = AnyIds(1200)
    assert tokenizer.vocab_size == 1200
    assert len(tokenizer.decode([65, 300, 1199])) == 3


@pytest.mark.live
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_reads_the_same_weights(name, tmp_path):
    pytest.importorskip("llama_cpp")
    from research.bench.serving_sides import llama_cpp

    write_model(tmp_path, tiny(name), "float32")
    ours = tessera(tmp_path, "float32", 3, 12)()
    assert llama_cpp(tmp_path, "float32", 3, 12)() == ours
    assert [len(tokens) for tokens in ours] == [12] * 3
    # The control: another prompt has another answer.
    assert ours[0] != ours[1]
    assert (tmp_path / GGUF).stat().st_size > 4 * 1200 * 64
    assert first_tokens(2) == [1000, 1037]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--only=GPT-5", "--only = 'GPT-5' is no model of this bench"),
        ("--sequences=1,9", "--sequences = '1,9' must be numbers from 1 to 8"),
        ("--tokens=2000", "--tokens = 2000 must be below 1024"),
    ],
)
def test_mistakes_are_one_line(flag, said):
    with pytest.raises(UserError, match=f"^{said}"):
        decode.main(arguments(flag))
