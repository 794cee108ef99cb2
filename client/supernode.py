"""Flower's SuperNode, with all its options, that looks for messages more often than every three seconds.

    python -m client.supernode --superlink ... (as `flower-supernode`)

LETHE_NODE_POLL sets the seconds between looks of an idle node.
"""

import os
import sys

from lora.errors import ConfigError, LetheError
from strategies.flower_runtime import run_supernode

POLL_VARIABLE = "LETHE_NODE_POLL"
POLL_S = 0.5


def pause() -> float:
    """Return the seconds between looks. Raises ConfigError for what is no number of seconds from 0.05 to 60."""
    text = os.environ.get(POLL_VARIABLE) or str(POLL_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not 0.05 <= seconds <= 60:
        raise ConfigError(f"{POLL_VARIABLE}={text}: give the seconds between looks for messages, 0.05 to 60")
    return seconds


def main() -> int:
    """Run the SuperNode; returns the exit code."""
    try:
        run_supernode(pause=pause())
    except LetheError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
