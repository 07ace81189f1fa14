"""The tokenizer that `convert` writes beside a model."""

import logging

from research.core.errors import UserError, listed
from research.data.tokenizers import Tokenizer, folders
from research.recipes.model_source import ModelSource
from research.storage.paths import Path, local_path

logger = logging.getLogger("tessera")


def fitting_tokenizer(model: ModelSource, source: Path, given: str | None) -> Tokenizer:
    """Returns the tokenizer of a model, with the model's end-of-text ids.

    Args:
      model: that is converted.
      source: its file or folder.
      given: the tokenizer's file or folder, or None to take the model's own.

    Raises:
      UserError: there is none, or its text becomes ids that the model does not have.
    """
    if given is None and model.tokenizer is not None:
        tokenizer = model.tokenizer
    else:
        tokenizer = _read_tokenizer(source, given)

    # Control tokens may lie beyond the embedding: text never becomes one of them.
    rows = model.config.vocab_size
    control_tokens = tokenizer.control_tokens.items()
    beyond = sorted(name for name, i in control_tokens if i >= rows)
    if tokenizer.vocab_size - rows > len(beyond):
        raise UserError(
            "tokenizer",
            constraint=f": its vocabulary of {tokenizer.vocab_size} does not fit the model's "
            f"vocab_size = {rows}.",
        )
    if beyond:
        logger.warning(
            "The tokenizer has ids that the model's embedding of %d rows has not: %s",
            rows,
            listed(beyond),
        )
    tokenizer.further_end_ids = tuple(i for i in model.end_ids if i != tokenizer.eos_id)
    return tokenizer


def _read_tokenizer(source: Path, given: str | None) -> Tokenizer:
    """Returns the tokenizer of the file or folder `given`, or of the files beside the model."""
    if given is not None:
        path = local_path("tokenizer", given)
        return folders.from_folder(path) if path.is_dir() else folders.from_path(path)

    # A folder's tokenizer is inside it, a file's beside it.
    folder = source if source.is_dir() else source.parent
    path = folders.find_or_none(folder)
    if path is None:
        raise UserError(
            "tokenizer",
            constraint=f"is missing: {folder} has none of {', '.join(folders.ALL_FILES)}.",
        )
    return folders.from_path(path)
