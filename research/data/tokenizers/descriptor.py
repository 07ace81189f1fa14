"""The descriptor of a saved tokenizer: the small JSON file that says how its files are read."""

import dataclasses
import json
from typing import Any

from research.core import config as configs
from research.core.errors import UserError, within
from research.data.tokenizers.base import DESCRIPTOR
from research.storage.paths import Path

# More ids than any vocabulary has. An end id may be beyond the tokenizer's own, since some models
# have more embeddings.
MOST_IDS = 1 << 24


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """What a descriptor holds; older ones have the first three fields only.

    Attributes:
      kind: of the tokenizer's class.
      options: further arguments of the class.
      files: SHA-256 digests of the tokenizer's files, by their names.
      chat_templates, further_end_ids, named_tokens, guarded_tokens, prompt_frame: as in
        `Tokenizer`.
    """

    kind: str
    options: dict[str, Any]
    files: dict[str, str]
    chat_templates: dict[str, str] = dataclasses.field(default_factory=dict)
    further_end_ids: tuple[int, ...] = ()
    named_tokens: dict[str, str] = dataclasses.field(default_factory=dict)
    guarded_tokens: tuple[str, ...] = ()
    prompt_frame: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __post_init__(self):
        before, after = self.prompt_frame or ((), ())
        _check_ids("further_end_ids", self.further_end_ids)
        _check_ids("prompt_frame", (*before, *after))


def _check_ids(field: str, ids: tuple[int, ...]) -> None:
    for i in ids:
        if not 0 <= i < MOST_IDS:
            raise UserError(field, list(ids), f": {i} must be an id in [0, {MOST_IDS}).")


def read_descriptor(folder: Path) -> Descriptor:
    """Returns the descriptor in the folder of a saved tokenizer; unknown fields are ignored.

    Raises:
      UserError: there is none, or one of its fields is missing or of another type.
    """
    path = folder / DESCRIPTOR
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} does not hold a saved tokenizer: {error}.") from error
    if not isinstance(values, dict):
        raise UserError("is not a JSON object.", origin=str(path))

    names = {field.name for field in dataclasses.fields(Descriptor)}
    known = {name: value for name, value in values.items() if name in names}
    with within("", str(path)):
        return configs.bind(Descriptor, known)
