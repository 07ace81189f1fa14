"""The programs that an engine compiles at start: their names, and how many there are."""

from research.inference.serve_config import ServeConfig
from research.models.language_model import LanguageModelConfig, compute_dtype

# Programs of an engine, at most.
MOST_PROGRAMS = 8
# Those that every engine has, beside one to read for each tile.
COMMON = ("draw_step", "admit", "copy_pages")
# Those of pages that leave the engine and come to it.
TRANSFERS = ("take_pages", "put_pages")
# Widths of what is read in one piece, at most.
MOST_WIDTHS = 3
NARROWEST = 64

# Rows of a tile of activations in 16 bits, at least.
LEAST_NARROW_TILE = 8

# What is read in one piece, by the structure that does so.
PIECES = {"encoder_decoder": "read_source", "prefix": "read_prefix"}


def step_tiles(config: LanguageModelConfig, serve: ServeConfig) -> tuple[int, ...]:
    """Returns the tiles that steps are compiled for. In 16 bits fewer than `LEAST_NARROW_TILE` rows
    are no faster, as machines multiply whole blocks, and on some of them have other bits.

    Args:
      config: of the model.
      serve: how the engine runs.
    """
    tiles = serve.row_tiles()
    if compute_dtype(config).itemsize == 4:
        return tiles
    wide = tuple(tile for tile in tiles if tile >= LEAST_NARROW_TILE)
    return wide or tiles[-1:]


def piece_widths(max_length: int, num_tiles: int) -> tuple[int, ...]:
    """Returns the widths that an encoder's tokens and prefix decoders' prompts are padded to: each
    is a program.

    Args:
      max_length: of the model.
      num_tiles: that steps are compiled for.
    """
    most = min(MOST_WIDTHS, MOST_PROGRAMS - len(COMMON) - num_tiles)
    # 1024, at most 3 -> 64, 256, 1024
    widths = [max_length]
    while len(widths) < most and widths[0] > NARROWEST:
        widths.insert(0, max(NARROWEST, widths[0] // 4))
    return tuple(widths)


def draft_tiles(tiles: tuple[int, ...], serve: ServeConfig) -> tuple[int, ...]:
    """Returns the rows that guesses are made for at a time, where a model makes them: the smallest
    of the tiles that steps are compiled for, and the largest.

    Args:
      tiles: that steps are compiled for.
      serve: how the engine runs.
    """
    most = MOST_PROGRAMS - len(COMMON) - len(tiles)
    if serve.transfers:
        most -= len(TRANSFERS)
    return tuple(sorted({tiles[0], tiles[-1]}))[-most:]


def program_names(config: LanguageModelConfig, serve: ServeConfig) -> list[str]:
    """Returns the programs of an engine, at most `MOST_PROGRAMS`.

    Args:
      config: of the model.
      serve: how the engine runs.
    """
    tiles = step_tiles(config, serve)
    names = [f"read, {tile} rows" for tile in tiles]
    names += COMMON
    if serve.transfers:
        names += TRANSFERS
    if serve.guesses_on_device:
        names += [f"propose, {tile} rows" for tile in draft_tiles(tiles, serve)]
    if config.structure in PIECES:
        piece = PIECES[config.structure]
        widths = piece_widths(config.max_length, len(tiles))
        names += [f"{piece}, {width:,} tokens" for width in widths]
    return names
