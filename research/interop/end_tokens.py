"""The ids that end a model's text, as Hugging Face's `config.json` and `generation_config.json`
name them.

Instruct models have several: the end of a text and the end of a turn (Gemma, LLaMA 3, Qwen, Phi-3),
and the call of a tool (gpt-oss). One of the two files may name fewer than the other.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError, within
from research.storage.json_files import read_object

GENERATION = "generation_config.json"
FIELD = "eos_token_id"
# More than any model has; each new token is compared with all of them.
MOST = 256
# What `generate` of transformers reads from generation_config.json alone, once there is one.
_COPIED = (
    "bos_token_id",
    FIELD,
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


def end_ids_of(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the ids that one of the two files names: one, several, or none. A negative id is
    none.

    Raises:
      UserError: something else than ids, or more of them than any model has.
    """
    value = values.get(FIELD)
    if value is None:
        return ()

    ids = value if isinstance(value, list) else [value]
    if len(ids) > MOST:
        raise UserError(f"{FIELD} names {len(ids):,} ids: it must be at most {MOST}.")
    for i in ids:
        if type(i) is not int or i >= 2**31:
            raise UserError(FIELD, i, "must be an id or a list of ids.")
    return tuple(i for i in ids if i >= 0)


def read_end_ids(folder: pathlib.Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns every id that ends a text, those of `config` (the folder's config.json) first, none
    of them twice.

    Raises:
      UserError: a file that is no JSON object, or names something else than ids.
    """
    path = folder / GENERATION
    ids = list(_end_ids_in(folder / "config.json", config))
    if path.is_file():
        ids += _end_ids_in(path, read_object(path))
    # A dict keeps the first of each id, in order.
    return tuple(dict.fromkeys(ids))


def generation_config(fields: Mapping[str, Any]) -> bytes:
    """Returns the generation_config.json with the tokens of the config.json that has `fields`."""
    values = {}
    for name in _COPIED:
        if fields.get(name) is not None:
            values[name] = fields[name]
    text = json.dumps(values, indent=2)
    return f"{text}\n".encode()


def _end_ids_in(path: pathlib.Path, values: Mapping[str, Any]) -> tuple[int, ...]:
    with within("", str(path)):
        return end_ids_of(values)
