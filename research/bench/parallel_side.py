"""The sides of `tessera bench parallel`, processes with eight host devices:

- `volumes PLATFORM CASE…` prints the bytes of compiled steps as JSON,
- `bubbles ROUNDS` prints the measured bubble of each pipeline schedule,
- `step CASE` reads a number of steps, takes them, and prints the seconds.
"""

import json
import os
import sys

from research.bench.sides import serve
from research.core import backend

FLAG = "--xla_force_host_platform_device_count=8"
STAGES = 4
MICROBATCHES = 8


def main(what: str, *arguments: str) -> None:
    """Does what a side is asked for."""
    # Before JAX starts.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    backend.configure()
    from research.bench import parallel_bubble, parallel_programs

    if what == "volumes":
        platform, *names = arguments
        found = {name: parallel_programs.volume(name, platform) for name in names}
        print(json.dumps(found))
    elif what == "bubbles":
        rounds = int(arguments[0])
        found = {}
        for name in parallel_bubble.CHUNKS:
            bubble = parallel_bubble.measure(name, STAGES, MICROBATCHES, rounds)
            found[name] = {
                "bubble": bubble,
                "devices": STAGES,
                "microbatches": MICROBATCHES,
                "chunks": parallel_bubble.CHUNKS[name],
                "costs": parallel_bubble.COSTS,
            }
        print(json.dumps(found))
    else:
        serve(parallel_programs.timed_step(arguments[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
