"""Tokenizer files as they lie beside a model: which there are, what they say, and how to write them
again.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from research.core.errors import UserError, shown, within
from research.data.tokenizers import exports, vocabularies
from research.data.tokenizers.base import MOST_SENTINELS, ROLES, SENTINEL, Tokenizer
from research.data.tokenizers.huggingface import HuggingFaceTokenizer, known_specials
from research.data.tokenizers.pieces import SentencePieceTokenizer

# The files from which a tokenizer of each kind is read, and where there are several: the first,
# which says most.
FILES = {
    "huggingface": ("tokenizer.json", "vocab.json", "vocab.txt"),
    "sentencepiece": ("tokenizer.model", "spiece.model", "sentencepiece.model", "tok*.model"),
}
ALL_FILES = ("tokenizer.json", *FILES["sentencepiece"], "vocab.json", "vocab.txt")
# The classes of `transformers` that do with such a file what is done here; others have rules that
# no file tells.
CLASSES = {
    ".model": (
        "T5",
        "Llama",
        "CodeLlama",
        "Gemma",
        "SentencePieceBackend",
        "PreTrained",
        "TokenizersBackend",
    ),
    "vocab.json": ("GPT2", "Roberta", "Bart", "PreTrained", "TokenizersBackend"),
    "vocab.txt": ("Bert", "DistilBert", "Electra", "MobileBert", "PreTrained", "TokenizersBackend"),
}
# The class where only the model's config.json tells, by its model_type; others say no more than
# their files.
MODEL_CLASSES = {"t5": "T5Tokenizer"}
T5_SENTINELS = 100
# Special tokens without a role; transformers 5 uses the second name.
FURTHER = ("additional_special_tokens", "extra_special_tokens")
# Where templates beside the default one lie: of elder folders, and as `transformers` writes them.
TEMPLATE_FOLDERS = ("chat_templates", "additional_chat_templates")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the small JSON files beside a tokenizer say; foreign files, so anything may be missing.

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

    def specials(self) -> dict[str, Any]:
        """Returns the token of each role that the files name: a string, or the dict of an added
        token.
        """
        found = {role: self.values.get(f"{role}_token") for role in ROLES}
        for role, token in found.items():
            name = token.get("content", 0) if isinstance(token, dict) else token
            if not isinstance(name, str | None):
                raise UserError(
                    f"is beside a tokenizer_config.json whose {role}_token = {shown(token)} is "
                    "not a token."
                )
        return {role: token for role, token in found.items() if token is not None}

    def sentinels(self) -> int:
        """Returns how many sentinels a SentencePiece model has after its own ids."""
        named = set(self.added)
        for field in FURTHER:
            listed = self.values.get(field) or ()
            if not isinstance(listed, list | tuple | dict):
                value = shown(listed)
                raise UserError(
                    f"is beside a tokenizer_config.json whose {field} = {value} is no list of "
                    "tokens."
                )
            named |= set(map(str, listed))
        count = next(n for n in itertools.count() if SENTINEL.format(n) not in named)
        stated = self.values.get(
            "extra_ids", T5_SENTINELS if _class_name(self.values) == "T5" else 0
        )
        if type(stated) is not int or not 0 <= stated <= MOST_SENTINELS:
            limit = f"a count up to {MOST_SENTINELS}"
            raise UserError(
                f"is beside a tokenizer_config.json whose extra_ids = {shown(stated)} is not "
                f"{limit}."
            )
        return count or stated

    def named_tokens(self) -> dict[str, str]:
        """Returns the tokens that the files name beside those of a role, as templates read them:
        `image_token`, …
        """
        extra = self.values.get("extra_special_tokens")
        told = {name: token for name, token in self.values.items() if name.endswith("_token")}
        told |= extra if isinstance(extra, dict) else {}
        spelt = {
            name: token["content"] if isinstance(token, dict) and "content" in token else token
            for name, token in told.items()
        }
        roles = {f"{role}_token" for role in ROLES}
        return {
            name: token
            for name, token in spelt.items()
            if isinstance(token, str) and name not in roles
        }


def from_folder(folder: str | pathlib.Path) -> Tokenizer:
    """Returns the tokenizer of a Hugging Face folder, with its special tokens and chat templates.

    Raises:
      UserError: none of the known files, or one that cannot be read.
    """
    return from_path(find(pathlib.Path(folder)))


def find(folder: pathlib.Path, names: Sequence[str] = ALL_FILES) -> pathlib.Path:
    """Returns the file of a folder from which its tokenizer is read, the first that is there of
    `names`.
    """
    found = look_for(folder, names)
    if found is None:
        raise UserError(f"{folder} holds no tokenizer: it has none of {', '.join(names)}.")
    return found


def look_for(folder: pathlib.Path, names: Sequence[str] = ALL_FILES) -> pathlib.Path | None:
    """Returns what `find` does, or None where the folder has none of the files."""
    return next((path for name in names for path in sorted(folder.glob(name))), None)


def from_path(path: str | pathlib.Path, kind: str | None = None, sentinels: int = 0) -> Tokenizer:
    """Returns the tokenizer of a file, as it and the files beside it say.

    Args:
      path: a tokenizer.json, a *.model, a vocab.txt, or a vocab.json with its merges.txt beside it.
      kind: `huggingface` or `sentencepiece`; None: as the file's name tells.
      sentinels: ids after those of a *.model; 0: as the files beside it say.

    Raises:
      UserError: no such file, not one of these, or a tokenizer that these files do not describe
          whole.
    """
    path = pathlib.Path(path)
    data, settings = _read(path), read_settings(path.parent)
    kind = kind or ("sentencepiece" if path.suffix == ".model" else "huggingface")
    form = ".model" if kind == "sentencepiece" else path.name
    known = CLASSES.get(form, ())
    if known and _class_name(settings.values) not in (None, *known):
        raise UserError(
            f"{path}: tokenizer_class = {settings.values['tokenizer_class']!r} does more than "
            "this file says: save it "
            f"with a tokenizer.json."
        )
    merges = _read(path.with_name("merges.txt")) if form == "vocab.json" else b""
    with within("", str(path)):
        if form == ".model":
            tokenizer = _from_model(data, settings, sentinels)
        else:
            tokenizer = _from_vocabulary(form, data, merges, settings)
    tokenizer.chat_templates = settings.chat_templates
    tokenizer.named_tokens = settings.named_tokens()
    special = dict.fromkeys((*settings.special, *tokenizer.named_tokens.values()))
    control = tokenizer.control_tokens
    tokenizer.guarded_tokens = tuple(
        name for name in special if name not in control and tokenizer.id_of(name) is not None
    )
    tokenizer.prompt_frame = _prompt_frame(tokenizer, settings, is_whole=form == "tokenizer.json")
    return tokenizer


def _prompt_frame(
    tokenizer: Tokenizer, settings: Settings, is_whole: bool
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the ids that `transformers` puts before and after a text, or None where only the
    class tells them.

    Its post-processor decides where a tokenizer.json is there; beside other files `add_bos_token`
    and `add_eos_token`.
    """
    flags = {name: _flag(settings.values, f"add_{name}_token") for name in ("bos", "eos")}
    if is_whole or all(flag is None for flag in flags.values()):
        return tokenizer.frame_of_file() if isinstance(tokenizer, HuggingFaceTokenizer) else None
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    before, after = (
        (ids[name],) if flag and ids[name] is not None else () for name, flag in flags.items()
    )
    return before, after


def _flag(values: Mapping[str, Any], name: str) -> bool | None:
    flag = values.get(name)
    if flag is not None and not isinstance(flag, bool):
        raise UserError(
            f"is beside a tokenizer_config.json whose {name} = {flag!r} is neither true nor false."
        )
    return flag


def _class_name(values: Mapping[str, Any]) -> str | None:
    name = values.get("tokenizer_class")
    return None if name is None else str(name).removesuffix("Fast").removesuffix("Tokenizer")


def _from_model(data: bytes, settings: Settings, sentinels: int) -> Tokenizer:
    tokenizer = SentencePieceTokenizer(data, sentinels=sentinels or settings.sentinels())
    _check_added(tokenizer, settings)
    return tokenizer


def _from_vocabulary(form: str, data: bytes, merges: bytes, settings: Settings) -> Tokenizer:
    specials = settings.specials()
    if form == "vocab.json":
        data = vocabularies.from_byte_pairs(data, merges, specials, settings.values)
    elif form == "vocab.txt":
        data = vocabularies.from_word_pieces(data, specials, settings.values)
    names = {role: vocabularies.token_name(token) for role, token in specials.items()}
    if form not in CLASSES:
        return HuggingFaceTokenizer(data, names or None)
    # Their classes give each role that the files do not name a token of the usual name.
    added = {token["content"] for token in json.loads(data)["added_tokens"]}
    tokenizer = HuggingFaceTokenizer(data, known_specials(added) | names)
    _check_added(tokenizer, settings)
    return tokenizer


def _check_added(tokenizer: Tokenizer, settings: Settings) -> None:
    """Raises UserError where the files beside a vocabulary name a token that it has not, or has
    under another id.
    """
    ids = tokenizer.control_tokens
    for name, i in settings.added.items():
        if i >= tokenizer.vocab_size or (name in ids and ids[name] != i):
            raise UserError(
                f"is not whole: it has no {name!r} with id {i}. Save it with a tokenizer.json."
            )


def read_settings(folder: pathlib.Path) -> Settings:
    """Reads the small files that lie beside a tokenizer.

    Raises:
      UserError: one of them is not JSON, or not the object that it should be.
    """
    mapped, stated = (
        _read_json(folder / "special_tokens_map.json"),
        _read_json(folder / "tokenizer_config.json"),
    )
    values = mapped | stated
    if values.get("tokenizer_class") is None:
        model = _read_json(folder / "config.json")
        values["tokenizer_class"] = model.get("tokenizer_class") or MODEL_CLASSES.get(
            str(model.get("model_type"))
        )
    special: list[str] = []
    try:
        held = values.get("added_tokens_decoder")
        if held is None:
            added = {
                str(token): int(i) for token, i in _read_json(folder / "added_tokens.json").items()
            }
        else:
            added = {token["content"]: int(i) for i, token in held.items()}
            special = [token["content"] for token in held.values() if token.get("special")]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder}: its added tokens are not readable: {shown(error)}.") from error
    special += [*_listed_tokens(mapped), *_listed_tokens(stated)]
    return Settings(
        values,
        added,
        [token for token in special if isinstance(token, str)],
        _chat_templates(folder, values),
    )


def _listed_tokens(values: Mapping[str, Any]) -> list[Any]:
    """Returns the further special tokens that one of the small files lists."""
    lists = [values[field] for field in FURTHER if field in values]
    listed = [token for tokens in lists if isinstance(tokens, list) for token in tokens]
    return [
        token["content"] if isinstance(token, dict) and "content" in token else token
        for token in listed
    ]


def _chat_templates(folder: pathlib.Path, values: Mapping[str, Any]) -> dict[str, str]:
    files = {"default": folder / "chat_template.jinja"}
    for name in TEMPLATE_FOLDERS:
        files |= {path.stem: path for path in sorted((folder / name).glob("*.jinja"))}
    found = {
        name: _read(path).decode("utf-8", errors="replace")
        for name, path in files.items()
        if path.is_file()
    }
    # A config's templates stand behind files: they count where no file is the default.
    return found if "default" in found else _stated_templates(folder, values) | found


def _stated_templates(folder: pathlib.Path, values: Mapping[str, Any]) -> dict[str, str]:
    stated = values.get("chat_template")
    if stated is None:
        return {}
    if isinstance(stated, str):
        return {"default": stated}
    try:
        found = {item["name"]: item["template"] for item in stated}
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor a list."
        ) from error
    if not all(isinstance(text, str) for item in found.items() for text in item):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: chat_template is a list of other things than "
            "texts."
        )
    return found


def to_hugging_face_files(tokenizer: Tokenizer, types: bool = False) -> dict[str, bytes]:
    """Returns the files, by name, from which `transformers` loads a tokenizer with the same ids and
    chat templates.

    A SentencePiece model goes both as it is and as a tokenizer.json.

    Args:
      tokenizer: the tokenizer.
      types: whether the model is told which of two texts a token belongs to, as BERT is.
    """
    files = tokenizer.files()
    if "tokenizer.json" not in files:
        files = {name.replace("sentencepiece", "tokenizer"): data for name, data in files.items()}
        files["tokenizer.json"] = exports.to_tokenizer_json(tokenizer)
    frame = tokenizer.prompt_frame
    if frame is not None and frame != HuggingFaceTokenizer(files["tokenizer.json"]).frame_of_file():
        files["tokenizer.json"] = exports.with_frame(files["tokenizer.json"], frame)
    templates = [
        {"name": name, "template": text} for name, text in tokenizer.chat_templates.items()
    ]
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    values |= {f"{role}_token": token for role, token in tokenizer.specials.items()}
    further = [SENTINEL.format(i) for i in range(len(tokenizer.sentinel_ids))]
    further += [
        name for name in tokenizer.guarded_tokens if name not in tokenizer.named_tokens.values()
    ]
    if further:
        values["additional_special_tokens"] = further
    if tokenizer.named_tokens:
        values["extra_special_tokens"] = dict(tokenizer.named_tokens)
    if types:
        values["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    if templates:
        values["chat_template"] = (
            templates if [*tokenizer.chat_templates] != ["default"] else templates[0]["template"]
        )
    files["tokenizer_config.json"] = (json.dumps(values, indent=2) + "\n").encode("utf-8")
    return files


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object of a JSON file; one that is not there says nothing."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object.")
    return values
