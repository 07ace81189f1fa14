#!/usr/bin/env bash
# The tests, in an environment of their own: bash launch/test.sh [pytest arguments]. EXTRA=dev adds torch for live comparisons.
#
#   bash launch/test.sh                        the tier `fast`
#   bash launch/test.sh -m ""                  every tier; they are listed in pyproject.toml
#   bash launch/test.sh -m compilers           one of them
#   bash launch/test.sh tests/models -k rope   those of `fast` that lie there and have this name
#   bash launch/test.sh -n 0                   in this process, as a debugger needs it
#
# Of an option that is given twice the last counts, so that each of these defaults can be replaced.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh "${EXTRA:-test}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# A file of tests stays in one process, which compiles what they share once. A process that dies ends
# the run: pytest-xdist can wait for ever for the one that takes its place.
exec "$PYTHON" -m pytest -m fast -n 2 --dist loadfile --max-worker-restart=0 --durations=20 "$@"
