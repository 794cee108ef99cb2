"""Flower's SuperLink, which also keeps a copy of every request of a node: bodies in one file, messages as JSON lines.

python tapped_superlink.py (as `flower-superlink`), with LETHE_TEST_TAP=FILE

Where FILE.fail exists, the next node that asks for messages gets an HTTP 500 instead, as when the database is locked.
"""

import json
import os
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from flwr.superlink.cli import flower_superlink
from flwr.superlink.servicer.fleet import fleet_handlers

PLACE = os.environ["LETHE_TEST_TAP"]
LOCK = threading.Lock()


def copied(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what a handler is asked, before it may refuse it."""

    @wraps(handler)
    def tapped(request: Any, *rest: Any, **named: Any) -> Any:
        with LOCK:
            with Path(PLACE).open("ab") as file:
                file.write(request.SerializeToString() + b"\n")
            if hasattr(request, "messages_list"):
                write_messages(request)
            if handler.__name__ == "pull_messages" and (wish := Path(f"{PLACE}.fail")).exists():
                wish.unlink()
                raise RuntimeError("database is locked")
        return handler(request, *rest, **named)

    return tapped


def write_messages(request: Any) -> None:
    with Path(f"{PLACE}.jsonl").open("a") as file:
        for message in request.messages_list:
            data = message.metadata
            line = {
                "node": str(request.node.node_id),
                "source": str(data.src_node_id),
                "run": str(data.run_id),
                "message": data.message_id,
                "answers": data.reply_to_message_id,
                "type": data.message_type,
                "error": message.HasField("error"),
            }
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    for name in (
        *("register_node", "activate_node", "deactivate_node", "unregister_node", "send_node_heartbeat"),
        *("pull_messages", "push_messages", "get_run", "get_fab", "push_object", "pull_object"),
        "confirm_message_received",
    ):
        setattr(fleet_handlers, name, copied(getattr(fleet_handlers, name)))
    flower_superlink()
