"""The base class of tokenizers: text to ids and back, with control ids that no text can produce."""

import abc
import hashlib
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, Integer

from research.core.errors import UserError
from research.data.tokenizers import chat
from research.data.tokenizers.source_texts import SourceTexts, ids_of
from research.storage import files
from research.storage.paths import Path, as_path

DESCRIPTOR = "descriptor.json"
# The roles of special tokens in Hugging Face's files (`bos_token`, …).
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# How the tokens that replace a span are spelt (Raffel et al. 2020, arXiv:1910.10683).
SENTINEL = "<extra_id_{}>"
# More than any model has: the spelling of each is in memory.
MOST_SENTINELS = 10_000


def check_sentinels(count: int) -> int:
    """Returns the count; raises UserError where no model could have as many sentinels."""
    if type(count) is not int or not 0 <= count <= MOST_SENTINELS:
        raise UserError("sentinels", count, f"must be a whole number in [0, {MOST_SENTINELS}].")
    return count


class Tokenizer(SourceTexts):
    """Text to ids and back.

    Control tokens are inserted by code only: text that spells `<s>`, `[MASK]` or `<|endoftext|>` is
    encoded as plain characters. Where there is no such token, its id is None.

    Attributes:
      kind: the name of the class in a descriptor.
      vocab_size: number of ids, V; every id is in [0, V).
      bos_id: what begins a text; BERT's `[CLS]`.
      eos_id: what ends it; BERT's `[SEP]`.
      pad_id: what fills a row.
      unk_id: what replaces text that the vocabulary cannot spell. Text does produce it.
      mask_id: what replaces a token to be predicted.
      sentinel_ids: what replaces the first, second, … span to be predicted; empty where there are
          none.
      chat_templates: Jinja templates by name, the usual one under `default`; kept with the
          tokenizer's files.
      further_end_ids: what ends a text beside EOS, as an instruct model's end of turn; kept with
          the tokenizer's files.
      named_tokens: more tokens, which chat templates read as variables (`image_token`), by their
        names; kept with the tokenizer's files.
      guarded_tokens: more tokens, which the files beside the tokenizer's own call special. In a
        chat only the template can write them, like control tokens; kept with the tokenizer's files.
      prompt_frame: the ids that the published tokenizer of a model puts before and after a text;
        kept with the tokenizer's files. None: a prompt begins as a document does.
    """

    kind: ClassVar[str]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None = None
    mask_id: int | None = None
    sentinel_ids: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = types.MappingProxyType({})
    further_end_ids: tuple[int, ...] = ()
    named_tokens: Mapping[str, str] = types.MappingProxyType({})
    guarded_tokens: tuple[str, ...] = ()
    prompt_frame: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @abc.abstractmethod
    def _encode_batch(self, texts: list[str]) -> list[Int[np.ndarray, "_"]]:
        """Encodes texts that UTF-8 can hold."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Decodes ids in [0, V), none of them BOS, EOS or PAD; other control ids as they are
        spelt.
        """

    @property
    @abc.abstractmethod
    def specials(self) -> dict[str, str]:
        """The spelling of the special tokens, by their `ROLES`."""

    @property
    @abc.abstractmethod
    def control_tokens(self) -> dict[str, int]:
        """The ids of all control tokens, by their spelling."""

    @abc.abstractmethod
    def token_of(self, token_id: int) -> str | None:
        """Returns the spelling of the token with an id in [0, V), or None where text cannot have
        it.
        """

    @abc.abstractmethod
    def id_of(self, token: str) -> int | None:
        """Returns the id of the token with this spelling, or None where there is none."""

    @abc.abstractmethod
    def bytes_of(self, token_id: int) -> bytes | None:
        """Returns the bytes that the token with an id in [0, V) adds to a text that has begun.

        They are not always whole characters. None where the token is no text: a control token,
        what is unknown, or an id without a token.
        """

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """Returns the files that hold this tokenizer, by name."""

    @abc.abstractmethod
    def options(self) -> dict[str, Any]:
        """Returns what the descriptor holds beside the kind: the further arguments of the class."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without control ids; raises a UserError for half a surrogate
        pair.
        """
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[Int[np.ndarray, "_"]]:
        """Returns the int32 ids of each text; in parallel where the library can."""
        texts = list(texts)
        for text in texts:
            _check_unicode(text)
        return self._encode_batch(texts)

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, "_"]) -> str:
        """Returns the text of `ids` without BOS, EOS and PAD; bytes that are not UTF-8 become
        U+FFFD.

        Raises:
          UserError: an id outside [0, V).
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(
                    f"token id {i} is outside the vocabulary: it must lie in [0, "
                    f"{self.vocab_size})."
                )
        without_text = (self.bos_id, self.eos_id, self.pad_id)
        return self._decode([i for i in ids if i not in without_text])

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids at any of which a model's text ends: EOS, where there is one, and then the
        further ones.
        """
        ids = () if self.eos_id is None else (self.eos_id,)
        further = [i for i in self.further_end_ids if i not in ids]
        return (*ids, *further)

    @property
    def chat_tokens(self) -> dict[str, int]:
        """The ids of the tokens that only a template writes in a chat, by their spelling.

        They are the control tokens, the `guarded_tokens`, and what ends a text at `end_ids`, since
        a message that holds one of those would end the turn.
        """
        ends = [self.token_of(i) or "" for i in self.end_ids if i < self.vocab_size]
        further = {}
        for name in (*self.guarded_tokens, *ends):
            # A token of spaces only would be in every message.
            token_id = self.id_of(name) if name.strip() else None
            if token_id not in (None, self.unk_id):
                further[name] = token_id
        return further | self.control_tokens

    @property
    def document_start_id(self) -> int | None:
        """What begins a document: BOS; without BOS it is EOS, as for GPT-2, but nothing if there
        are sentinels, as for T5.
        """
        if self.bos_id is None and not self.sentinel_ids:
            return self.eos_id
        return self.bos_id

    def frame(self, ids: Int[np.ndarray, "_"]) -> Int[np.ndarray, "_"]:
        """Returns one document as a model reads it: [start] ids [end]; the end is EOS, or
        nothing.
        """
        start = np.array(ids_of(self.document_start_id), np.int32)
        end = np.array(ids_of(self.eos_id), np.int32)
        return np.concatenate([start, ids, end])

    def encode_prompt(self, text: str) -> list[int]:
        """Returns a text's ids for a decoder to continue: framed by `prompt_frame`, or as a
        document begins.

        An empty prompt gives the ids that a document begins with.
        """
        ids = self.encode(text)
        start = ids_of(self.document_start_id)
        if self.prompt_frame is None:
            return [*start, *ids]
        before, after = self.prompt_frame
        return [*before, *ids, *after] or start

    def render_chat(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """Returns a conversation as the text that the model's chat template makes of it.

        Args:
          messages: dicts of `role`, `content` and whatever else the template reads; plain JSON
              values.
          add_generation_prompt: whether the text ends with what begins the assistant's next turn.
          tools: JSON schemas of functions that the model may call.
          template: the name of one of `chat_templates`; None takes `tool_use` where tools are
              given, or `default`.
          variables: further variables of the template.

        Raises:
          UserError: no such template, messages that are no plain JSON, or a template that rejects
              them or fails.
        """
        inputs = chat.plain(
            {
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
                **variables,
            }
        )
        source = chat.choose(self.chat_templates, template, tools is not None)
        inputs = chat.with_reasoning(inputs, source)
        return chat.render(source, self._named(inputs))

    def encode_chat(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """Returns the ids of a conversation: `chat_tokens` that the template writes become their
        ids.

        Messages, tools and variables that spell one of them stay plain text, so nobody can end a
        turn or begin another from within one. For all others the ids are those of `transformers`'
        `apply_chat_template`.

        Args: as `render_chat`.

        Raises:
          UserError: as `render_chat`; half a surrogate pair in the text.
        """
        source = chat.choose(self.chat_templates, template, tools is not None)
        inputs = chat.plain(
            {
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
                **variables,
            }
        )
        inputs = chat.with_reasoning(inputs, source)

        # The inputs spell no token while the template runs, so those that come out are its own:
        # content "</s>" -> "<G/s>", rendered "<s><G/s></s>" -> marked "M<s><G/s>M</s>"
        tokens = list(self.chat_tokens)
        guard, mark = chat.unused_characters(source, inputs)
        guarded = chat.guarded(inputs, tokens, guard)
        rendered = chat.render(source, self._named(guarded))
        _check_unicode(rendered)
        marked = chat.marked(rendered, tokens, mark)
        return self._encode_marked(marked.replace(guard, ""), mark)

    def _named(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns a template's variables with those that name this tokenizer's special tokens."""
        names = {f"{role}_token": token for role, token in self.specials.items()}
        return {"documents": None} | names | dict(self.named_tokens) | inputs

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Encodes text in which `mark` before the spelling of one of `chat_tokens` makes it that
        token.

        The texts between them are encoded one by one: SentencePiece puts its space before each, as
        the published code of LLaMA does.
        """
        ids: list[int] = []
        tokens = {mark + name: i for name, i in self.chat_tokens.items()}
        for part in chat.split(text, list(self.chat_tokens), mark):
            if part in tokens:
                ids.append(tokens[part])
            else:
                ids += self.encode(part)
        return ids

    def descriptor(self) -> dict[str, Any]:
        """Returns the small JSON from which `load` makes the tokenizer again."""
        # What generating text needs, and training does not; empty values are not written.
        further = {
            "further_end_ids": self.further_end_ids,
            "named_tokens": dict(self.named_tokens),
            "guarded_tokens": self.guarded_tokens,
            "prompt_frame": self.prompt_frame,
        }
        return self._identity() | {name: value for name, value in further.items() if value}

    def _identity(self) -> dict[str, Any]:
        """Returns the part of the descriptor that decides how text and conversations become ids."""
        files = self.files()
        digests = {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}
        identity = {"kind": self.kind, "options": self.options(), "files": digests}
        if self.chat_templates:
            identity["chat_templates"] = dict(self.chat_templates)
        return identity

    def digest(self) -> str:
        """Returns a hash of all that decides how this tokenizer encodes."""
        text = json.dumps(self._identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files and, last, its descriptor."""
        folder = as_path(folder, "folder")
        files.make_folder(folder)
        for name, data in self.files().items():
            files.write_bytes(folder / name, data)
        descriptor = json.dumps(self.descriptor(), indent=2)
        files.write_text(folder / DESCRIPTOR, descriptor + "\n")


def _check_unicode(text: str) -> None:
    """Raises UserError where UTF-8 cannot hold a text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text has half a surrogate pair at character {error.start}: not Unicode."
        ) from error
