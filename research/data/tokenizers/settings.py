"""The small JSON files beside a tokenizer: which tokens are special, and the chat templates.

They come from other projects, so anything may be missing or of another type.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from research.core.errors import UserError, shown
from research.data.tokenizers.base import MOST_SENTINELS, ROLES, SENTINEL

# The tokenizer's class by the model_type of config.json, for models whose tokenizer files do not
# name it.
MODEL_CLASSES = {"t5": "T5Tokenizer"}
T5_SENTINELS = 100
# Special tokens without a role; transformers 5 uses the second name.
FURTHER = ("additional_special_tokens", "extra_special_tokens")
# Folders of the templates beside the default one: older ones, and those that `transformers` writes.
TEMPLATE_FOLDERS = ("chat_templates", "additional_chat_templates")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the small JSON files beside a tokenizer say.

    Attributes:
      values: `tokenizer_config.json`, over `special_tokens_map.json`; the class also as the model's
          `config.json` says.
      added: the ids of tokens beyond the vocabulary, by their spelling.
      special: the tokens that the files call special, beside those of a role; not all need be in
          the vocabulary.
      chat_templates: by name, from `chat_template.jinja` and `chat_templates/*.jinja` or else from
          `values`.
    """

    values: Mapping[str, Any]
    added: Mapping[str, int]
    special: Sequence[str]
    chat_templates: Mapping[str, str]

    def class_name(self) -> str | None:
        """Returns the name of the tokenizer's class without `Tokenizer` and `Fast`."""
        name = self.values.get("tokenizer_class")
        return None if name is None else str(name).removesuffix("Fast").removesuffix("Tokenizer")

    def flag(self, name: str) -> bool | None:
        """Returns a field that is true, false or missing."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise UserError(
                f"is beside a tokenizer_config.json whose {name} = {value!r} is neither true nor "
                "false."
            )
        return value

    def specials(self) -> dict[str, Any]:
        """Returns the token of each role that the files name: a string, or the dict of an added
        token.
        """
        found = {}
        for role in ROLES:
            token = self.values.get(f"{role}_token")
            name = token.get("content", 0) if isinstance(token, dict) else token
            if not isinstance(name, str | None):
                raise UserError(
                    f"is beside a tokenizer_config.json whose {role}_token = {shown(token)} is "
                    "not a token."
                )
            if token is not None:
                found[role] = token
        return found

    def sentinels(self) -> int:
        """Returns how many sentinels a SentencePiece model has after its own ids."""
        # The sentinels that the files name one by one, from the first on.
        named = set(self.added)
        for field in FURTHER:
            tokens = self.values.get(field) or ()
            if not isinstance(tokens, list | tuple | dict):
                value = shown(tokens)
                raise UserError(
                    f"is beside a tokenizer_config.json whose {field} = {value} is no list of "
                    "tokens."
                )
            named.update(map(str, tokens))
        count = 0
        while SENTINEL.format(count) in named:
            count += 1

        stated = self._stated_sentinels()
        return count or stated

    def _stated_sentinels(self) -> int:
        """Returns the number that the files state, or that the class has by itself."""
        default = T5_SENTINELS if self.class_name() == "T5" else 0
        stated = self.values.get("extra_ids", default)
        if type(stated) is not int or not 0 <= stated <= MOST_SENTINELS:
            limit = f"a count up to {MOST_SENTINELS}"
            raise UserError(
                f"is beside a tokenizer_config.json whose extra_ids = {shown(stated)} is not "
                f"{limit}."
            )
        return stated

    def named_tokens(self) -> dict[str, str]:
        """Returns the tokens that the files name beside those of a role, as templates read them:
        `image_token`, …
        """
        stated = {name: token for name, token in self.values.items() if name.endswith("_token")}
        extra = self.values.get("extra_special_tokens")
        if isinstance(extra, dict):
            stated |= extra

        # Without `bos_token` and the like.
        roles = {f"{role}_token" for role in ROLES}
        named = {}
        for name, token in stated.items():
            spelling = _spelling(token)
            if name not in roles and isinstance(spelling, str):
                named[name] = spelling
        return named


def read_settings(folder: pathlib.Path) -> Settings:
    """Reads the small files beside a tokenizer.

    Raises:
      UserError: one of them is not JSON, or not the object that it should be.
    """
    special_map = _read_json(folder / "special_tokens_map.json")
    config = _read_json(folder / "tokenizer_config.json")
    values = special_map | config

    # Some folders name the tokenizer's class beside the model, or only the model's type.
    if values.get("tokenizer_class") is None:
        model = _read_json(folder / "config.json")
        model_class = MODEL_CLASSES.get(str(model.get("model_type")))
        values["tokenizer_class"] = model.get("tokenizer_class") or model_class

    try:
        added, special = _added_tokens(folder, values)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder}: its added tokens are not readable: {shown(error)}.") from error
    special += _listed_tokens(special_map)
    special += _listed_tokens(config)
    special = [token for token in special if isinstance(token, str)]
    return Settings(values, added, special, _chat_templates(folder, values))


def _added_tokens(
    folder: pathlib.Path, values: Mapping[str, Any]
) -> tuple[dict[str, int], list[Any]]:
    """Returns the ids of added tokens by their spelling, and those that are called special."""
    decoder = values.get("added_tokens_decoder")
    if decoder is None:
        # The file of older versions.
        ids = _read_json(folder / "added_tokens.json")
        return {str(token): int(i) for token, i in ids.items()}, []

    # {"0": {"content": "<pad>", "special": true}} -> {"<pad>": 0}, ["<pad>"]
    added = {token["content"]: int(i) for i, token in decoder.items()}
    special = [token["content"] for token in decoder.values() if token.get("special")]
    return added, special


def _listed_tokens(values: Mapping[str, Any]) -> list[Any]:
    """Returns the further special tokens that one of the small files lists."""
    listed = []
    for field in FURTHER:
        tokens = values.get(field)
        if isinstance(tokens, list):
            listed += map(_spelling, tokens)
    return listed


def _spelling(token: Any) -> Any:
    """Returns the spelling of a token that is stated as a string or as a dict."""
    if isinstance(token, dict) and "content" in token:
        return token["content"]
    return token


def _chat_templates(folder: pathlib.Path, values: Mapping[str, Any]) -> dict[str, str]:
    files = {"default": folder / "chat_template.jinja"}
    for name in TEMPLATE_FOLDERS:
        files |= {path.stem: path for path in sorted((folder / name).glob("*.jinja"))}

    found = {}
    for name, path in files.items():
        if path.is_file():
            found[name] = read_bytes(path).decode("utf-8", errors="replace")

    # A config's templates count only where no file is the default.
    if "default" in found:
        return found
    return _stated_templates(folder, values) | found


def _stated_templates(folder: pathlib.Path, values: Mapping[str, Any]) -> dict[str, str]:
    """Returns the chat templates of a `tokenizer_config.json`."""
    stated = values.get("chat_template")
    if stated is None:
        return {}
    if isinstance(stated, str):
        return {"default": stated}

    origin = folder / "tokenizer_config.json"
    try:
        found = {item["name"]: item["template"] for item in stated}
    except (KeyError, TypeError) as error:
        raise UserError(f"{origin}: chat_template is neither a text nor a list.") from error
    for name, template in found.items():
        if not isinstance(name, str) or not isinstance(template, str):
            raise UserError(f"{origin}: chat_template is a list of other things than texts.")
    return found


def read_bytes(path: pathlib.Path) -> bytes:
    """Returns the content of a file; raises a UserError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object of a JSON file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object.")
    return values
