"""Requests of wrong types; run as a module, it prints what is said of each as JSON."""

import json

import numpy as np

from research.core.errors import UserError
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig

PROMPT = (1, 2, 3)
# The field that is named, and what makes the request.
WRONG = {
    "ids of a fraction": ("ids", lambda: Request((1.5, 2))),
    "ids of letters": ("ids", lambda: Request("abc")),
    "a count of a fraction": ("count", lambda: Request(PROMPT, count=1.5)),
    "log-probabilities of a fraction": ("logprobs", lambda: Request(PROMPT, logprobs=1.5)),
    "no salt": ("salt", lambda: Request(PROMPT, salt=None)),
    "a priority of letters": ("priority", lambda: Request(PROMPT, priority="high")),
    "a deadline of letters": ("deadline", lambda: Request(PROMPT, deadline="1")),
    "an unknown kind": ("logprob_kind", lambda: Request(PROMPT, logprob_kind=7)),
    "the name of a kind": ("logprob_kind", lambda: Request(PROMPT, logprob_kind="RAW")),
    "a stop string that is no list": ("stop", lambda: Request(PROMPT, SamplingConfig(stop="END"))),
    "a seed of a fraction": ("seed", lambda: Request(PROMPT, SamplingConfig(seed=1.5))),
    "a stop id of a fraction": (
        "stop_ids",
        lambda: Request(PROMPT, SamplingConfig(stop_ids=(3.5,))),
    ),
    "a grammar that is none": ("grammar", lambda: Request(PROMPT, grammar={"regex": "a"})),
}


def main() -> None:
    """Prints what is said of each."""
    assert Request(np.array([1, 2])) == Request((1, 2)), "the control"
    said = {}
    for what, (_, make) in WRONG.items():
        try:
            make()
        except UserError as error:
            said[what] = str(error)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
