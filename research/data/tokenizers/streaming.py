"""Text of a stream of ids, character by character as it becomes certain."""

from research.data.tokenizers.base import Tokenizer

# What bytes that are not yet a whole character decode to, and how many of them at most.
REPLACEMENT = "\ufffd"
MOST_REPLACEMENTS = 3


class StreamDecoder:
    """Decodes ids one by one: the texts that it returns add up to the text of all ids, and none has
    part of a character.

    The bytes of an unfinished character decode to up to three U+FFFD at the end, so these are
    pending until more ids, or the end, decide. Only a window of the last ids is decoded again: it
    begins with the ids of an earlier text, because some tokenizers write the first id of a text
    differently.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        # How many ids of the window, and how many characters of its text, were returned before.
        self._earlier = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """Adds one id and returns the text that has become certain, which may be empty."""
        self._window.append(int(token))
        text = self._tokenizer.decode(self._window)

        replacements = len(text) - len(text.rstrip(REPLACEMENT))
        certain = len(text) - min(replacements, MOST_REPLACEMENTS)
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)

        # The window moves on when all of its text is certain. One of spaces only would not show
        # that its first id is the first of a text.
        if new.strip() and certain == len(text):
            self._window = self._window[self._earlier :]
            self._earlier = len(self._window)
            self._shown = len(self._tokenizer.decode(self._window))
        return new

    def flush(self) -> str:
        """Returns the pending text; call it at the end of the stream."""
        text = self._tokenizer.decode(self._window)
        return text[self._shown :]
