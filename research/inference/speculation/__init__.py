"""Speculation: guesses of an answer's next tokens, one file a kind.

A step reads guesses as it reads a prompt, and draws from each of them with the noise of its own
position. A guess counts where the draw before it is the same token. So whatever the guesses are,
and whoever makes them, the answer is the one without them.
"""
