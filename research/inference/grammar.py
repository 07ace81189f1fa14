"""Answers that keep to a grammar: masks over the ids that may come next, by llguidance.

A matcher is a request's own, and so are all states of its lexer: llguidance's copy of a matcher
shares them, so that one text could use up what another may have. What a grammar allows thus is a
function of the grammar and the tokens before.
"""

import collections
import dataclasses
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.grammar_config import GrammarConfig, GrammarError, GrammarLimits
from research.inference.grammar_tokens import native_tokenizer, spells_every_byte
from research.inference.id_masks import WORD, mask_of, num_words

# How llguidance says that no token goes on.
NO_TOKEN = ("", "NoExtension", "NoExtensionBias")


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A grammar that was compiled once: its text in llguidance's form, and its first mask, which is
    that of every request.
    """

    text: str
    first_mask: UInt32[np.ndarray, "words"]


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and makes the masks of many requests at a time.

    Masks are those of `id_masks`: so llguidance writes them, and 128,000 ids are 16 kB.

    Args:
      tokenizer: of the model.
      num_ids: ids that may be drawn, the first ones of the tokenizer; None: all.
      limits: of each grammar.
      cached: grammars that are kept, those used last.
      threads: that make masks; None: 4 of 5 processors.

    Attributes:
      num_ids: as given, or all ids.
      end_ids: those of the tokenizer's end ids that may be drawn.
      num_words: of a mask.
      forces: whether text that a grammar forces is encoded as the tokenizer does; where it lacks
        some byte, the model decides on the tokens, and none is forced.

    Raises:
      UserError: llguidance is not installed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        num_ids: int | None = None,
        limits: GrammarLimits | None = None,
        cached: int = 128,
        threads: int | None = None,
    ):
        self._library = _llguidance()
        self._limits = limits or GrammarLimits()
        self._native_limits = self._library.LLParserLimits(
            max_items_in_row=self._limits.row_items,
            initial_lexer_fuel=self._limits.compile_steps,
            step_lexer_fuel=self._limits.lexer_steps,
            step_max_items=self._limits.parser_items,
            max_lexer_states=self._limits.lexer_states,
            max_grammar_size=self._limits.symbols,
            verbose_errors=False,
        )
        self.num_ids = tokenizer.vocab_size if num_ids is None else num_ids
        self.end_ids = tuple(i for i in tokenizer.end_ids if i < self.num_ids)
        self.forces = spells_every_byte(tokenizer, self.num_ids)
        self._tokenizer = native_tokenizer(self._library, tokenizer, self.num_ids, self.end_ids)
        self._executor = self._library.LLExecutor(threads)

        self.num_words = num_words(self._tokenizer.vocab_size)
        self._end_mask = mask_of(self.end_ids, self.num_words)
        self._cached = cached
        self._compiled: collections.OrderedDict[GrammarConfig, _Compiled] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def matcher(self, config: GrammarConfig) -> "Matcher":
        """Returns a matcher for one request.

        Raises:
          GrammarError: the grammar is none, no text of this tokenizer begins as it wants, or the
            limits are too small.
        """
        with self._lock:
            compiled = self._compiled.pop(config, None)
        if compiled is None:
            compiled = self._compile(config)
        with self._lock:
            self._compiled[config] = compiled
            while len(self._compiled) > self._cached:
                self._compiled.popitem(last=False)
        return Matcher(self, config, compiled)

    def _compile(self, config: GrammarConfig) -> _Compiled:
        text = self._translated(config)
        matcher = Matcher(self, config, _Compiled(text, self._end_mask))
        if matcher.native.is_error():
            reason = _one_line(matcher.native.get_error())
            raise config.error(f"cannot be compiled: {reason}.")

        masks, errors = self.native_masks([matcher])
        if errors[0] is not None:
            raise errors[0]
        if not masks.any():
            raise config.error("is met by the empty text alone.")
        return _Compiled(text, masks[0])

    def _translated(self, config: GrammarConfig) -> str:
        """Returns a grammar in llguidance's form."""
        native = self._library.LLMatcher
        if config.json_schema is not None:
            text = native.grammar_from_json_schema(config.json_schema)
        elif config.regex is not None:
            text = native.grammar_from_regex(config.regex)
        elif config.choices is not None:
            # A string in a Lark grammar is spelt as in JSON.
            quoted = [json.dumps(choice, ensure_ascii=False) for choice in config.choices]
            text = f"start: {' | '.join(quoted)}"
        else:
            text = native.grammar_from_lark(config.lark)
        if not self.forces:
            text = _unforced(text)
        if len(text) > self._limits.letters:
            raise config.error(f"is longer than letters = {self._limits.letters}.")
        return text

    def native(self, compiled: _Compiled) -> Any:
        """Returns llguidance's matcher of a grammar, at the beginning of a text."""
        return self._library.LLMatcher(
            self._tokenizer, compiled.text, log_level=0, limits=self._native_limits
        )

    def masks(
        self, matchers: Sequence["Matcher"]
    ) -> tuple[UInt32[np.ndarray, "rows words"], list[GrammarError | None]]:
        """Returns the mask of each matcher, and the error of each that has one, whose mask allows
        the end ids.

        They are made by the threads of this compiler, without the interpreter's lock but where a
        grammar forces text, which the tokenizer then encodes. No matcher may be used meanwhile.

        Args:
          matchers: different ones.
        """
        masks = np.zeros((len(matchers), self.num_words), np.uint32)
        errors: list[GrammarError | None] = [None] * len(matchers)
        rows = []
        for row, matcher in enumerate(matchers):
            known = matcher.known_mask()
            if known is None:
                rows.append(row)
            else:
                masks[row] = known
        if rows:
            made, found = self.native_masks([matchers[row] for row in rows])
            masks[rows] = made
            for row, error in zip(rows, found, strict=True):
                errors[row] = error
        return masks, errors

    def native_masks(
        self, matchers: Sequence["Matcher"]
    ) -> tuple[UInt32[np.ndarray, "rows words"], list[GrammarError | None]]:
        """Returns what `masks` does, all of it made by llguidance."""
        masks = np.zeros((len(matchers), self.num_words), np.uint32)
        pairs = [(matcher.native, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(
            pairs, masks.ctypes.data, masks.strides[0], len(matchers)
        )
        if not self.end_ids:
            # The id that stands for the end is none of the tokenizer's.
            masks &= mask_of(range(self.num_ids), self.num_words)
        return masks, [matcher.error() for matcher in matchers]

    @property
    def end_mask(self) -> UInt32[np.ndarray, "words"]:
        """The mask that allows the end ids alone."""
        return self._end_mask


class Matcher:
    """How far one text has come in a grammar. It is in one thread at a time.

    An end id is allowed where the grammar may end, and where a Lark grammar names it; a tokenizer
    without end ids has none, and `finished` tells.

    Args:
      compiler: that made it.
      config: the grammar.
      compiled: what the compiler made of it.

    Attributes:
      native: llguidance's.
      strained: whether a limit was reached: rejected drafts count too there, so no more are tried.
    """

    def __init__(self, compiler: GrammarCompiler, config: GrammarConfig, compiled: _Compiled):
        self._compiler = compiler
        self._config = config
        self._compiled = compiled
        self.native = compiler.native(compiled)
        # The tokens accepted, and whether an end id came after them.
        self._tokens: list[int] = []
        self._ended = False
        self.strained = False
        # Why no token can come next, and the tokens after which that is so.
        self._fault: tuple[list[int], GrammarError] | None = None

    def known_mask(self) -> UInt32[np.ndarray, "words"] | None:
        """Returns the mask where nothing has to be computed for it: at the beginning, and at the
        end.
        """
        if self._ended:
            return self._compiler.end_mask
        return None if self._tokens else self._compiled.first_mask

    def mask(self) -> UInt32[np.ndarray, "words"]:
        """Returns which ids may come next, as bits; after the end, the end ids.

        Raises:
          GrammarError: no token goes on, or the limits are too small.
        """
        masks, errors = self._compiler.masks([self])
        if errors[0] is not None:
            raise errors[0]
        return masks[0]

    def retried_mask(self) -> tuple[UInt32[np.ndarray, "words"], GrammarError | None]:
        """Returns mask and error as they are without rejected drafts, after an error with them."""
        self.strained = True
        self.native = self._replayed()
        masks, errors = self._compiler.native_masks([self])
        if errors[0] is not None:
            self._fault = (list(self._tokens), errors[0])
        return masks[0], errors[0]

    def accept(self, token: int) -> bool:
        """Adds a token, if it may come next; returns whether it may.

        Raises:
          GrammarError: the limits are too small.
        """
        if self._ended or not 0 <= token < self._compiler.num_ids:
            return False
        if self._fault is not None and self._fault[0] == self._tokens:
            raise self._fault[1]
        is_end = token in self._compiler.end_ids
        if is_end and self.native.is_accepting():
            self._ended = True
            return True
        if not is_end and self.native.try_consume_tokens([token]) == 1:
            self._tokens.append(token)
            return True

        # Where a limit was reached, the library says so only when it makes a mask; and a mask alone
        # tells of an end id that the grammar names.
        masks, errors = self._compiler.native_masks([self])
        if errors[0] is not None:
            self.strained = True
            raise errors[0]
        bit = np.uint32(1) << np.uint32(token % WORD)
        self._ended = is_end and bool(masks[0, token // WORD] & bit)
        return self._ended

    def rollback(self, count: int) -> None:
        """Takes back the last `count` tokens accepted; errors that came after them too."""
        assert 0 <= count <= len(self._tokens) + self._ended
        if count > 0 and self._ended:
            self._ended = False
            count -= 1
        if count == 0 and not self.native.is_error():
            return
        self._tokens = self._tokens[: len(self._tokens) - count]
        if self.native.is_error() or not self.native.rollback(count):
            self.native = self._replayed()

    def _replayed(self) -> Any:
        """Returns a matcher of llguidance's that has read the tokens accepted, with a mask before
        each: it comes as near to its limits as one without drafts.
        """
        native = self._compiler.native(self._compiled)
        for index, token in enumerate(self._tokens):
            if index:
                native.compute_bitmask()
            consumed = native.try_consume_tokens([token])
            assert consumed == 1
        return native

    def copy(self) -> "Matcher":
        """Returns a matcher that has come as far, and shares nothing with this one."""
        copy = Matcher(self._compiler, self._config, self._compiled)
        copy._tokens = list(self._tokens)
        copy._ended = self._ended
        copy.native = copy._replayed()
        return copy

    def forced(self, most: int = 32) -> list[int]:
        """Returns the next tokens as far as each is the only one that may come, `most` of them at
        most; drafts, therefore, that are never rejected.
        """
        if self._ended:
            return []
        if self.finished:
            end_ids = self._compiler.end_ids
            return list(end_ids) if len(end_ids) == 1 else []
        if not self._compiler.forces:
            return []
        tokens = self.native.compute_ff_tokens()[:most]
        return tokens[: self.native.validate_tokens(tokens)]

    @property
    def finished(self) -> bool:
        """Whether an end id was accepted, or nothing else may come."""
        return self._ended or (self.native.is_stopped() and not self.native.is_error())

    def error(self) -> GrammarError | None:
        """Returns why nothing can come next, where that is so."""
        if not self.native.is_error():
            return None
        reason = _one_line(self.native.get_error())
        if reason in NO_TOKEN:
            reason = "no token can come next"
        return self._config.error(f"cannot be met: {reason}.")


def _unforced(text: str) -> str:
    """Returns a grammar in which text that is forced is not encoded, which needs a tokenizer that
    has every byte: the model decides on its tokens.
    """
    options = '%llguidance {"no_forcing": true}\n'
    if not text.startswith("{"):
        return options + text
    (grammar,) = json.loads(text)["grammars"]
    if "json_schema" in grammar and grammar["json_schema"] is not None:
        return f"{options}start: %json {json.dumps(grammar['json_schema'], ensure_ascii=False)}"
    return options + grammar["lark_grammar"]


def _one_line(message: str) -> str:
    """Returns the lines of an error that say what is wrong, without the places they point at."""
    # "at 1(8): invalid regex\n    a(\n     ^\nerror: unclosed group\n" -> "at 1(8): invalid regex,
    # error: unclosed group"
    lines = [line.strip() for line in message.splitlines()]
    said = lines[:1] + [line for line in lines[1:] if line.startswith("error:")]
    return ", ".join(line.rstrip(".:") for line in said if line)


def _llguidance() -> Any:
    """Returns the library; raises UserError where it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise UserError(
            "grammars need llguidance: pip install -c constraints.txt -e '.[grammar]'."
        ) from error
    return llguidance
