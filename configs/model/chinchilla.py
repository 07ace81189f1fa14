"""Chinchilla: the fifty models of the scaling study, 44M to 16183M parameters, and the 70B:
`…/chinchilla.py:70b`.

Source: Hoffmann et al. 2022, arXiv:2203.15556, table A9 (the study) and table 4 (70B); RMSNorm,
relative positions (Dai et al. 2019, arXiv:1901.02860), the vocabulary of 32,000 and 2,048 tokens of
context are Gopher's, Rae et al. 2021, arXiv:2112.11446, section 3.1.

Neither paper says which projections have biases or whether embeddings are tied; the counts do: with
biases everywhere and tied embeddings they agree with the table to one million in every row. The
activation is not stated; GELU is GPT-2's, whose design Gopher follows.
"""

import ml_collections

from configs.model import gopher
from research.core.errors import UserError, nearest

# published millions of parameters: width, heads, head width, layers. The MLP is four times as wide
# as the model.
SIZES = {
    "44m": (512, 8, 64, 8),
    "57m": (576, 9, 64, 9),
    "74m": (640, 10, 64, 10),
    "90m": (640, 10, 64, 13),
    "106m": (640, 10, 64, 16),
    "117m": (768, 12, 64, 12),
    "140m": (768, 12, 64, 15),
    "163m": (768, 12, 64, 18),
    "175m": (896, 14, 64, 14),
    "196m": (896, 14, 64, 16),
    "217m": (896, 14, 64, 18),
    "251m": (1024, 16, 64, 16),
    "278m": (1024, 16, 64, 18),
    "306m": (1024, 16, 64, 20),
    "425m": (1280, 10, 128, 18),
    "489m": (1280, 10, 128, 21),
    "509m": (1408, 11, 128, 18),
    "552m": (1280, 10, 128, 24),
    "587m": (1408, 11, 128, 21),
    "632m": (1536, 12, 128, 19),
    "664m": (1408, 11, 128, 24),
    "724m": (1536, 12, 128, 22),
    "816m": (1536, 12, 128, 25),
    "893m": (1792, 14, 128, 20),
    "1018m": (1792, 14, 128, 23),
    "1143m": (1792, 14, 128, 26),
    "1266m": (2048, 16, 128, 22),
    "1424m": (2176, 17, 128, 22),
    "1429m": (2048, 16, 128, 25),
    "1593m": (2048, 16, 128, 28),
    "1609m": (2176, 17, 128, 25),
    "1731m": (2304, 18, 128, 24),
    "1794m": (2176, 17, 128, 28),
    "2007m": (2304, 18, 128, 28),
    "2283m": (2304, 18, 128, 32),
    "2298m": (2560, 20, 128, 26),
    "2639m": (2560, 20, 128, 30),
    "2980m": (2560, 20, 128, 34),
    "3530m": (2688, 22, 128, 36),
    "3802m": (2816, 22, 128, 36),
    "4084m": (2944, 22, 128, 36),
    "4516m": (3072, 24, 128, 36),
    "6796m": (3584, 28, 128, 40),
    "9293m": (4096, 32, 128, 42),
    "11452m": (4352, 32, 128, 47),
    "12295m": (4608, 36, 128, 44),
    "12569m": (4608, 32, 128, 47),
    "13735m": (4864, 32, 128, 47),
    "14940m": (4992, 32, 128, 49),
    "16183m": (5120, 40, 128, 47),
    "70b": (8192, 64, 128, 80),
}


def get_config(size: str = "70b") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(
            f"size = {size!r} is not a model of the Chinchilla study. {nearest(size, SIZES)}"
        )
    width, heads, head_dim, layers = SIZES[size]
    return gopher.build(layers, width, heads, head_dim)
