"""Which answers of a replica get guesses, and how many of these were right."""

from collections.abc import Iterable

from research.inference.answers import Sample
from research.inference.serve_config import ServeConfig


class Guesses:
    """The guesses of a replica's answers.

    Args:
      serve: how the replica runs.
      on_device: whether the device guesses where no grammar forces a token.

    Attributes:
      made: tokens that were guessed so far.
      right: how many of these counted.
    """

    def __init__(self, serve: ServeConfig, *, on_device: bool):
        self._serve = serve
        self._on_device = on_device
        self.made = 0
        self.right = 0

    def most(self, running: int) -> int:
        """Returns how many guesses each of the running answers may have: as many as fit in a tile
        with all newest tokens, where they cost little.
        """
        if self._serve.speculate == "none" or not running:
            return 0
        return min(self._serve.drafts, (self._serve.tiles[-1] - running) // running)

    def wanted(self, sample: Sample, most: int) -> bool:
        """Returns whether a sample gets guesses in the next step."""
        return most > 0 and sample.answer.request.speculate and sample.gate.allows()

    def make(self, samples: Iterable[Sample], most: int, step: int) -> list[tuple[int, int, int]]:
        """Gives samples guesses of their next tokens.

        Args:
          samples: that run.
          most: guesses of each, at most.
          step: the newest one.

        Returns:
          the samples whose guesses the device makes: slot, position of the newest token, and the
          row of the step that it was drawn from.
        """
        on_device = []
        for sample in samples:
            sequence = sample.sequence
            # The last token allowed is never read.
            count = min(most, sequence.limit - 1 - sequence.length)
            if count <= 0 or not sequence.needs_host or not sequence.is_answering:
                continue
            if not sample.answer.request.speculate:
                continue
            drawn_in, row = sample.drawn_at
            if not self._on_device or sample.matcher is not None:
                sequence.drafts = tuple(sample.guess(count))
            elif drawn_in == step:
                sequence.drafts = (None,) * count
                assert sequence.slot is not None
                on_device.append((sequence.slot, sequence.length - 1, row))
        return on_device

    def observe(self, sample: Sample, found: int) -> None:
        """Counts how many guesses of a step were right.

        Args:
          sample: whose.
          found: tokens that the step drew for it.
        """
        made = len(sample.sequence.drafts)
        if made:
            sample.gate.observe(made, found - 1)
            self.made += made
            self.right += found - 1
