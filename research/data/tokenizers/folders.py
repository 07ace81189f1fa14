"""The tokenizer of a Hugging Face folder: which files it is read from, and how to write them."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from research.core.errors import UserError, within
from research.data.tokenizers import exports, vocabularies
from research.data.tokenizers.base import SENTINEL, Tokenizer
from research.data.tokenizers.huggingface import HuggingFaceTokenizer, known_specials
from research.data.tokenizers.pieces import SentencePieceTokenizer
from research.data.tokenizers.settings import Settings, read_bytes, read_settings

# The files from which a tokenizer of each kind is read. Of several in a folder the first of these
# is read: it has the most information.
FILES = {
    "huggingface": ("tokenizer.json", "vocab.json", "vocab.txt"),
    "sentencepiece": ("tokenizer.model", "spiece.model", "sentencepiece.model", "tok*.model"),
}
ALL_FILES = ("tokenizer.json", *FILES["sentencepiece"], "vocab.json", "vocab.txt")
# The classes of `transformers` that read such a file as this module does; others have rules that
# are in no file.
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
    found = find_or_none(folder, names)
    if found is None:
        raise UserError(f"{folder} holds no tokenizer: it has none of {', '.join(names)}.")
    return found


def find_or_none(folder: pathlib.Path, names: Sequence[str] = ALL_FILES) -> pathlib.Path | None:
    """Returns what `find` does, or None where the folder has none of the files."""
    for name in names:
        paths = sorted(folder.glob(name))
        if paths:
            return paths[0]
    return None


def from_path(path: str | pathlib.Path, kind: str | None = None, sentinels: int = 0) -> Tokenizer:
    """Returns the tokenizer of a file, as it and the files beside it say.

    Args:
      path: a tokenizer.json, a *.model, a vocab.txt, or a vocab.json with its merges.txt beside it.
      kind: `huggingface` or `sentencepiece`; None: by the file's name.
      sentinels: ids after those of a *.model; 0: as the files beside it say.

    Raises:
      UserError: no such file, not one of these, or a tokenizer that these files do not describe
          completely.
    """
    path = pathlib.Path(path)
    data = read_bytes(path)
    settings = read_settings(path.parent)
    if kind is None:
        kind = "sentencepiece" if path.suffix == ".model" else "huggingface"
    form = ".model" if kind == "sentencepiece" else path.name
    _check_class(path, form, settings)

    # A vocab.json holds only half of a byte-level BPE.
    merges = b""
    if form == "vocab.json":
        merges = read_bytes(path.with_name("merges.txt"))
    with within("", str(path)):
        if form == ".model":
            tokenizer = _from_model(data, settings, sentinels)
        else:
            tokenizer = _from_vocabulary(form, data, merges, settings)

    tokenizer.chat_templates = settings.chat_templates
    tokenizer.named_tokens = settings.named_tokens()
    tokenizer.guarded_tokens = _guarded_tokens(tokenizer, settings)
    tokenizer.prompt_frame = _prompt_frame(tokenizer, settings, form)
    return tokenizer


def _check_class(path: pathlib.Path, form: str, settings: Settings) -> None:
    """Raises UserError where a tokenizer's class has rules that its file does not have."""
    if form not in CLASSES or settings.class_name() in (None, *CLASSES[form]):
        return
    raise UserError(
        f"{path}: tokenizer_class = {settings.values['tokenizer_class']!r} does more than this "
        "file says: save it with a tokenizer.json."
    )


def _guarded_tokens(tokenizer: Tokenizer, settings: Settings) -> tuple[str, ...]:
    """Returns the tokens that only the files beside the tokenizer's own call special."""
    control = tokenizer.control_tokens
    guarded = []
    for name in dict.fromkeys((*settings.special, *tokenizer.named_tokens.values())):
        if name not in control and tokenizer.id_of(name) is not None:
            guarded.append(name)
    return tuple(guarded)


def _prompt_frame(
    tokenizer: Tokenizer, settings: Settings, form: str
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the ids that `transformers` puts before and after a text, or None where only the
    class knows them.

    The post-processor of a tokenizer.json decides; beside other files `add_bos_token` and
    `add_eos_token`.
    """
    add_bos = settings.flag("add_bos_token")
    add_eos = settings.flag("add_eos_token")
    has_flags = add_bos is not None or add_eos is not None
    if form == "tokenizer.json" or not has_flags:
        if isinstance(tokenizer, HuggingFaceTokenizer):
            return tokenizer.frame_of_file()
        return None

    before = (tokenizer.bos_id,) if add_bos and tokenizer.bos_id is not None else ()
    after = (tokenizer.eos_id,) if add_eos and tokenizer.eos_id is not None else ()
    return before, after


def _from_model(data: bytes, settings: Settings, sentinels: int) -> Tokenizer:
    count = sentinels or settings.sentinels()
    tokenizer = SentencePieceTokenizer(data, sentinels=count)
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

    # Roles that the files do not name: the class gives each the token of the usual name.
    added = {token["content"] for token in json.loads(data)["added_tokens"]}
    tokenizer = HuggingFaceTokenizer(data, known_specials(added) | names)
    _check_added(tokenizer, settings)
    return tokenizer


def _check_added(tokenizer: Tokenizer, settings: Settings) -> None:
    """Raises UserError where the files beside a vocabulary name a token that it does not have, or
    has with another id.
    """
    ids = tokenizer.control_tokens
    for name, i in settings.added.items():
        is_other = name in ids and ids[name] != i
        if is_other or i >= tokenizer.vocab_size:
            raise UserError(
                f"is incomplete: it has no {name!r} with id {i}. Save it with a tokenizer.json."
            )


def to_hugging_face_files(tokenizer: Tokenizer, types: bool = False) -> dict[str, bytes]:
    """Returns the files, by name, from which `transformers` loads a tokenizer with the same ids and
    chat templates.

    A SentencePiece model is written both as it is and as a tokenizer.json.

    Args:
      tokenizer: the tokenizer.
      types: whether the model reads which of two texts a token belongs to, as BERT does.
    """
    files = tokenizer.files()
    if "tokenizer.json" not in files:
        files = {name.replace("sentencepiece", "tokenizer"): data for name, data in files.items()}
        files["tokenizer.json"] = exports.to_tokenizer_json(tokenizer)

    # The post-processor of the written tokenizer.json must frame a text in the same way.
    frame = tokenizer.prompt_frame
    if frame is not None:
        written = HuggingFaceTokenizer(files["tokenizer.json"])
        if frame != written.frame_of_file():
            files["tokenizer.json"] = exports.with_frame(files["tokenizer.json"], frame)

    values = _tokenizer_config(tokenizer, types)
    text = json.dumps(values, indent=2) + "\n"
    files["tokenizer_config.json"] = text.encode("utf-8")
    return files


def _tokenizer_config(tokenizer: Tokenizer, types: bool) -> dict[str, Any]:
    """Returns the content of a `tokenizer_config.json`; arguments as of `to_hugging_face_files`."""
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, token in tokenizer.specials.items():
        values[f"{role}_token"] = token

    named = tokenizer.named_tokens
    # Special tokens without a role or a name.
    further = [SENTINEL.format(i) for i in range(len(tokenizer.sentinel_ids))]
    further += [name for name in tokenizer.guarded_tokens if name not in named.values()]
    if further:
        values["additional_special_tokens"] = further
    if named:
        values["extra_special_tokens"] = dict(named)
    if types:
        values["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]

    # A single template is a text, several are a list.
    templates = tokenizer.chat_templates
    if list(templates) == ["default"]:
        values["chat_template"] = templates["default"]
    elif templates:
        values["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    return values
