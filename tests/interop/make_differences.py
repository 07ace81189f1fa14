"""Writes how far each family is from torch, by the committed goldens: `python -m
tests.interop.make_differences`.

README's table of families is made from the file by `python -m research.bench.report README.md`.
"""

import dataclasses

from research.bench import report
from tests.interop import registry

COLUMNS = ["family", "presets", "what it is made of", "logits", "gradients"]


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
      name: as people call it.
      presets: of `configs/model`.
      parts: what it is made of.
      cases: golden cases, of which the largest difference counts.
    """

    name: str
    presets: str
    parts: str
    cases: str


FAMILIES = (
    Family(
        "Transformer (2017), Marian",
        "transformer",
        "encoder-decoder, sinusoidal, post-norm, shared embeddings",
        "transformer marian",
    ),
    Family("GPT", "gpt", "learned positions, post-norm", "gpt"),
    Family("GPT-2", "gpt2", "learned positions, pre-norm", "gpt2-small gpt2-xl"),
    Family("GPT-3, GPT-Neo", "gpt3", "dense and banded layers in turns", "gpt-3 gpt-neo"),
    Family(
        "Gopher, Chinchilla", "gopher chinchilla", "Transformer-XL's relative positions", "gopher"
    ),
    Family(
        "LLaMA 1, 2, 3",
        "llama",
        "rotary (linear, dynamic NTK, YaRN, LLaMA 3, LongRoPE), grouped queries",
        "llama-1-7b llama-2-7b llama-2-70b llama-3-8b llama-3.1-8b llama-3.2-1b "
        "llama-linear llama-dynamic llama-yarn llama-longrope llama-biases",
    ),
    Family(
        "Mistral, Ministral, Mixtral",
        "mistral mixtral",
        "sliding windows, experts",
        "mistral ministral mixtral",
    ),
    Family(
        "Gemma 2, 3",
        "gemma",
        "local and global layers, soft caps, sandwich norms, QK norm",
        "gemma2 gemma3",
    ),
    Family(
        "Qwen 2, 2.5, 3, mixtures",
        "qwen",
        "QK norm, experts, shared experts",
        "qwen2 qwen2-windows qwen2-moe qwen3 qwen3-moe",
    ),
    Family("OLMo 2", "olmo2", "norms of what sublayers give", "olmo2"),
    Family(
        "Falcon",
        "falcon",
        "parallel sublayers, multi-query, ALiBi",
        "falcon-7b falcon-40b falcon2-11b falcon-rw",
    ),
    Family("MPT", "mpt", "ALiBi", "mpt"),
    Family("Phi-3", "phi3", "LongRoPE, windows", "phi3 phi3-longrope"),
    Family("gpt-oss", "gpt_oss", "sinks, clamped experts, windows", "gpt-oss"),
    Family(
        "DeepSeek-V3",
        "deepseek",
        "latent attention, shared and routed experts, multi-token prediction",
        f"deepseek-v3 deepseek-v3-direct {registry.MTP}",
    ),
    Family(
        "BERT, RoBERTa, ModernBERT",
        "bert roberta modernbert",
        "encoders: segment embeddings, pooler, heads, local attention",
        "bert bert-words roberta xlm-roberta modernbert",
    ),
    Family(
        "T5, T5 1.1, UL2",
        "t5",
        "encoder-decoder, learned bias of distances, unscaled attention",
        "t5 t5-1.1 ul2 mt5",
    ),
    Family("BART", "bart", "encoder-decoder, learned positions, post-norm", "bart mbart"),
    Family(
        "prefix decoder",
        "prefix",
        "full attention over the prefix, causal after it",
        "prefix prefix-llama prefix-gpt2",
    ),
)


def row(family: Family) -> list[str]:
    """Returns a row of the table: the largest differences of the family's cases."""
    logits, gradients = [], []
    for name in family.cases.split():
        outputs, found = registry.ours(name)
        logits.append(registry.off_by(outputs, name))
        gradients.append(registry.facts_off_by(found, name))
    presets = ", ".join(f"`{preset}.py`" for preset in family.presets.split())
    return [family.name, presets, family.parts, part(max(logits)), part(max(gradients))]


def part(value: float) -> str:
    """Returns a small number with two digits: 5.7e-7."""
    return f"{value:.1e}".replace("e-0", "e-")


def main() -> None:
    """Writes the file."""
    rows = [row(family) for family in FAMILIES]
    report.write(
        report.FIGURES / "families_torch.json",
        "python -m tests.interop.make_differences",
        columns=COLUMNS,
        rows=rows,
    )


if __name__ == "__main__":
    main()
