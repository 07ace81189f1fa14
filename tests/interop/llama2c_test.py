"""Files of llama2.c: claims about `interop.llama2c`."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from research.core.errors import UserError
from research.core.trees import count, named_leaves
from research.data import tokenizers
from research.data.tokenizers import TokenizerConfig
from research.inference.generate import generate
from research.inference.sampling_config import SamplingConfig
from research.interop.huggingface import from_hugging_face, to_hugging_face
from research.interop.llama2c import from_llama2c
from tests.interop import cases
from tests.interop.folders import TOLERANCE, logits_of

# A key/value head for each query head, and for each four of them.
GOLDEN, GROUPED = "llama-2-7b", "llama-2-70b"


def write_bin(path, golden=GOLDEN, halves=True, tied=False):
    """Writes a golden LLaMA as llama2.c does, its output projection a matrix of its own or the
    embedding's.
    """
    tensors = cases.weights(cases.stored()[golden]["tensors"])
    fields = cases.stored()[golden]["config"]
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    rotated = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads} if halves else {}

    def neighbours(matrix, count):
        return matrix.reshape(count, 2, -1, matrix.shape[-1]).swapaxes(1, 2).reshape(matrix.shape)

    def layers(name):
        parts = [
            tensors[f"model.layers.{layer}.{name}.weight"]
            for layer in range(fields["num_hidden_layers"])
        ]
        return np.stack(
            [neighbours(part, rotated[name]) if name in rotated else part for part in parts]
        )

    names = "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
    names += " post_attention_layernorm mlp.gate_proj mlp.down_proj mlp.up_proj"
    table = np.zeros((fields["max_position_embeddings"], fields["head_dim"] // 2), np.float32)
    parts = [
        tensors["model.embed_tokens.weight"],
        *[layers(name) for name in names.split()],
        tensors["model.norm.weight"],
        table,
        table,
        *([] if tied else [tensors["lm_head.weight"]]),
    ]
    vocabulary = cases.VOCAB if tied else -cases.VOCAB
    header = [
        64,
        fields["intermediate_size"],
        2,
        heads,
        kv_heads,
        vocabulary,
        fields["max_position_embeddings"],
    ]
    path.write_bytes(
        np.array(header, "<i4").tobytes() + b"".join(part.astype("<f4").tobytes() for part in parts)
    )
    return path


@pytest.mark.parametrize("golden", [GOLDEN, GROUPED])
def test_logits_equal_torch_after_conversion(tmp_path, golden):
    config, params = from_llama2c(write_bin(tmp_path / "model.bin", golden))
    assert config == cases.CASES[golden].config()
    np.testing.assert_allclose(
        logits_of(config, params, cases.tokens()), cases.golden_logits(golden), atol=TOLERANCE
    )


def test_a_vocabulary_above_zero_ties_the_output_to_the_embedding(tmp_path):
    config, params = from_llama2c(write_bin(tmp_path / "model.bin"))
    tied_config, tied = from_llama2c(write_bin(tmp_path / "tied.bin", tied=True))
    assert tied_config == dataclasses.replace(config, tied_embeddings=True)
    held, wanted = named_leaves(tied), named_leaves(params)
    assert wanted.keys() - held.keys() == {"unembed"}
    for name, value in held.items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)


def test_rotary_halves_taken_for_neighbours_are_seen_by_the_comparison(tmp_path):
    config, params = from_llama2c(write_bin(tmp_path / "model.bin", halves=False))
    assert (
        np.abs(logits_of(config, params, cases.tokens()) - cases.golden_logits(GOLDEN)).max() > 0.1
    )


def test_broken_files_are_refused_in_one_line(tmp_path):
    whole = write_bin(tmp_path / "model.bin").read_bytes()
    path = tmp_path / "broken.bin"
    for content, message in (
        (b"", "has no header"),
        (whole[:-4], "describes"),
        (whole + b"0000", "describes"),
        (b"\0" * 64, "its header is"),
        (b"\xff" * 64, "its header is"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            from_llama2c(path)
    with pytest.raises(UserError, match="cannot be read"):
        from_llama2c(tmp_path / "none.bin")


@pytest.fixture(scope="module", params=["as it is", "through Hugging Face's form"])
def stories(shared_data, request, tmp_path_factory):
    folder = shared_data / "stories260K"
    tokenizer = tokenizers.build(
        TokenizerConfig(kind="sentencepiece", path=str(folder / "tok512.model")), ()
    )
    config, params = from_llama2c(folder / "stories260K.bin")
    if request.param != "as it is":
        out = tmp_path_factory.mktemp("stories")
        to_hugging_face(config, params, out)
        assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
        config, params = from_hugging_face(out)
    return config, params, tokenizer


def test_stories260k_continues_as_its_authors_run_does(stories):
    config, params, tokenizer = stories
    assert count(params) == 260_032
    (story,) = generate(
        config,
        params,
        tokenizer,
        ["Once upon a time"],
        SamplingConfig(temperature=0.0, max_tokens=24),
    )
    assert story.text.startswith(", there was a little girl named Lily.")


def test_stories260k_has_its_measured_loss(stories, shared_data):
    config, params, tokenizer = stories
    text = (shared_data / "tinystories-sample" / "tinystories_sample.txt").read_text()
    documents = [
        [1, *tokenizer.encode(part.strip())] for part in text.split("<|endoftext|>") if part.strip()
    ]
    assert len(documents) == 5
    rows = np.zeros((5, 512), np.int32)
    for row, ids in zip(rows, documents, strict=True):
        row[: len(ids)] = ids[:512]
    log_probabilities = jax.nn.log_softmax(logits_of(config, params, rows))
    losses = [
        -float(log_probabilities[i, t, rows[i, t + 1]])
        for i, ids in enumerate(documents)
        for t in range(min(len(ids), 512) - 1)
    ]
    assert len(losses) == 1804
    assert abs(np.mean(losses) - 1.2664) < 5e-5
