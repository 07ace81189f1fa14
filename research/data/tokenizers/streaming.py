"""Text of a stream of ids, character by character as it becomes certain."""

from collections.abc import Sequence

from research.data.tokenizers.base import Tokenizer

# What bytes that are not yet a whole character decode to, and how many of them at most.
REPLACEMENT = "\ufffd"
MOST_REPLACEMENTS = 3
# Ids before a stream that are decoded, at least.
CONTEXT = 32
# Ids that are decoded again at most while the text is uncertain, and those that are kept then: the
# bytes of an unfinished character, and before them those that a cut may have made unreadable.
MOST_PENDING = 16
KEPT_PENDING = 8


class StreamDecoder:
    """Decodes ids one by one: the texts that it returns add up to the text of all ids, and none has
    part of a character.

    The bytes of an unfinished character decode to up to three U+FFFD at the end, so these are
    pending until more ids, or the end, decide. Only a window of the last ids is decoded again, so
    that an id costs the same wherever it is: the window begins with the ids of an earlier text,
    because some tokenizers write the first id of a text differently.

    Args:
      tokenizer: of the ids.
      context: ids before the stream, whose text is not returned, but for the bytes of a character
        that they leave unfinished.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # `decode` leaves these out.
        self._silent = frozenset((tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id))
        self._window: list[int] = []
        # How many ids of the window, and how many characters of its text, were returned before.
        self._earlier = 0
        self._shown = 0
        self._read_context(context)

    def _read_context(self, context: Sequence[int]) -> None:
        """Begins the window with the last ids of the context, or all of them."""
        # Ids beyond the tokenizer's, which a model may have, are no text either.
        vocab_size = self._tokenizer.vocab_size
        spelt = [int(i) for i in context if i not in self._silent]
        ids = [i for i in spelt if i < vocab_size]
        size = CONTEXT
        while size < len(ids):
            # Past its first letter a text is not written as a beginning.
            if _is_visible(self._tokenizer.decode(ids[-size:-KEPT_PENDING])):
                break
            size *= 2

        self._window = ids[-size:]
        text = self._tokenizer.decode(self._window)
        self._shown = _certain(text)
        if ids and self._ends_with_replacement(ids):
            self._shown = len(text)
        if self._shown == len(text):
            self._earlier = len(self._window)

    def _ends_with_replacement(self, ids: Sequence[int]) -> bool:
        """Whether the text of these ids has U+FFFD itself at its end, and no unfinished
        character.
        """
        # Of byte tokens [EF, BF, BD], the three bytes of U+FFFD.
        spelling = self._tokenizer.encode(REPLACEMENT)[-MOST_REPLACEMENTS:]
        return bool(spelling) and list(ids[-len(spelling) :]) == spelling

    def push(self, token: int) -> str:
        """Adds one id and returns the text that has become certain, which may be empty."""
        token = int(token)
        if token in self._silent:
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        certain = _certain(text)
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)

        if certain < len(text):
            self._cut_pending(text)
        elif _is_visible(new):
            self._move_on()
        else:
            self._drop_spaces()
        return new

    def _move_on(self) -> None:
        """Drops the ids of the earlier text: those of the newest one take their place."""
        self._window = self._window[self._earlier :]
        self._earlier = len(self._window)
        self._shown = len(self._tokenizer.decode(self._window))

    def _drop_spaces(self) -> None:
        """Drops the newest id of a run of spaces, and keeps its first one: a window of spaces only
        would not show that its first id is not the first of a text.
        """
        if len(self._window) > self._earlier + 1:
            self._window.pop()
            self._shown = len(self._tokenizer.decode(self._window))

    def _cut_pending(self, text: str) -> None:
        """Drops the first ids of a long run of bytes that are no text."""
        if len(self._window) - self._earlier <= MOST_PENDING:
            return
        # A cut changes at most the first characters, so those not returned are counted from the
        # end: text "a\ufffd\ufffd\ufffd\ufffd", 2 shown -> the last 3 are pending.
        pending = len(text) - self._shown
        self._window = self._window[-KEPT_PENDING:]
        self._earlier = 0
        self._shown = max(0, len(self._tokenizer.decode(self._window)) - pending)

    def flush(self) -> str:
        """Returns the pending text; call it at the end of the stream."""
        text = self._tokenizer.decode(self._window)
        return text[self._shown :]


def _certain(text: str) -> int:
    """Returns how many characters of a text no further id can change."""
    replacements = len(text) - len(text.rstrip(REPLACEMENT))
    return len(text) - min(replacements, MOST_REPLACEMENTS)


def _is_visible(text: str) -> bool:
    """Whether there is more than spaces, which tokenizers may leave out at the beginning."""
    return bool(text.strip(" "))
