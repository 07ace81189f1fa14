"""Presets bind, and are as large as published."""

import dataclasses
import pathlib

import jax
import pytest

from research.core import config as configs
from research.core.errors import UserError
from research.core.trees import count
from research.interop.architecture import fields_from
from research.interop.gpt2 import GPT2
from research.interop.llama import LLAMA
from research.models.config import ModelConfig
from research.models.transformer import init_params

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "model"

# Parameters in the released weights, each tied matrix once (their safetensors headers; LLaMA 1's are those of the
# weights in Hugging Face's form, which arXiv:2302.13971, table 2, gives as 6.7B, 13.0B, 32.5B and 65.2B).
GPT2_SIZES = {
    "small": 124_439_808,
    "medium": 354_823_168,
    "large": 774_030_080,
    "xl": 1_557_611_200,
}
GPT2_SIZES |= dict(zip(("124m", "355m", "774m", "1558m"), GPT2_SIZES.values(), strict=True))
LLAMA_SIZES = {
    "1-7b": 6_738_415_616,
    "1-13b": 13_015_864_320,
    "1-33b": 32_528_943_616,
    "1-65b": 65_285_660_672,
    "2-7b": 6_738_415_616,
    "2-13b": 13_015_864_320,
    "2-70b": 68_976_648_192,
    "3-8b": 8_030_261_248,
    "3-70b": 70_553_706_496,
    "3.1-8b": 8_030_261_248,
    "3.1-70b": 70_553_706_496,
    "3.1-405b": 405_853_388_800,
    "3.2-1b": 1_235_814_400,
    "3.2-3b": 3_212_749_824,
    "3.3-70b": 70_553_706_496,
}
# Hoffmann et al. 2022, arXiv:2203.15556, table A9, in millions.
CHINCHILLA_SIZES = [
    *(44, 57, 74, 90, 106, 117, 140, 163, 175, 196, 217, 251, 278, 306, 425, 489, 509, 552, 587, 632, 664, 724, 816),
    *(893, 1018, 1143, 1266, 1424, 1429, 1593, 1609, 1731, 1794, 2007, 2283, 2298, 2639, 2980, 3530, 3802, 4084),
    *(4516, 6796, 9293, 11452, 12295, 12569, 13735, 14940, 16183),
]


def preset(spec: str) -> ModelConfig:
    return configs.bind(ModelConfig, configs.load_file(str(FOLDER / spec)), "model")


def size_of(config: ModelConfig) -> int:
    # Scanned layers are traced once, however many there are.
    config = dataclasses.replace(config, layer_loop="scan")
    return count(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))


@pytest.mark.parametrize(
    ("spec", "published"),
    [(f"gpt2.py:{name}", size) for name, size in GPT2_SIZES.items()]
    + [(f"llama.py:{name}", size) for name, size in LLAMA_SIZES.items()],
)
def test_preset_has_the_published_parameters(spec, published):
    assert size_of(preset(spec)) == published


def test_all_sizes_are_tested():
    for file, sizes in (("gpt2.py", GPT2_SIZES), ("llama.py", LLAMA_SIZES)):
        with pytest.raises(UserError, match="Known: ") as error:
            configs.load_file(str(FOLDER / f"{file}:?"))
        assert set(str(error.value).partition("Known: ")[2].rstrip(".").split(", ")) == set(sizes)


def test_chinchilla_models_have_the_published_parameters_but_those_of_relative_positions():
    for millions in CHINCHILLA_SIZES:
        config = preset(f"chinchilla.py:{millions}m")
        heads_width = config.attention.num_heads * config.attention.head_dim
        relative = config.num_layers * (config.embed_dim + 2) * heads_width
        assert abs((size_of(config) + relative) / 1e6 - millions) < 1, millions


def test_chinchilla_70b_is_the_paper_s():
    config = preset("chinchilla.py:70b")
    relative = config.num_layers * config.embed_dim * config.embed_dim
    assert round((size_of(config) + relative) / 1e9) == 70


@pytest.mark.parametrize("spec", ["gpt2.py", "llama.py", "chinchilla.py"])
def test_preset_without_a_size_binds(spec):
    assert preset(spec).num_layers > 0


@pytest.mark.parametrize(("spec", "near"), [("gpt2.py:smal", "small"), ("llama.py:3-9b", "3-8b")])
def test_unknown_size_names_the_nearest(spec, near):
    with pytest.raises(UserError, match=f"Did you mean '{near}'"):
        preset(spec)


@pytest.mark.parametrize("name", ["gpt2.py:xl", "llama.py:1-65b", "llama.py:3.1-405b", "llama.py:3.2-3b"])
def test_transformers_counts_the_same_parameters(name):
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
    config = preset(name)
    fields = fields_from(GPT2 if name.startswith("gpt2") else LLAMA, config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields))
    assert sum(parameter.numel() for parameter in model.parameters()) == size_of(config)
