"""When guesses pay."""

# An answer whose guesses count less often than this makes none for a while.
LEAST_RATE = 0.1
PAUSE = 32
# Weight of the newest step in the mean.
WEIGHT = 0.1


class Gate:
    """Whether one answer's guesses are worth their rows."""

    def __init__(self) -> None:
        self._rate = 0.5
        self._pause = 0

    def allows(self) -> bool:
        """Returns whether the next step may have guesses."""
        if self._pause:
            self._pause -= 1
            return False
        return True

    def observe(self, guessed: int, right: int) -> None:
        """Takes how many guesses a step had, and how many of them counted."""
        if not guessed:
            return
        self._rate += WEIGHT * (right / guessed - self._rate)
        if self._rate < LEAST_RATE:
            # Another chance, which a few bad steps end.
            self._rate = 2 * LEAST_RATE
            self._pause = PAUSE
