"""What passes between a federation's server and the node whose rows are to be forgotten: offers, and letters about one.

A node is asked what it offers (`OFFERS`), is sent an order and answers it (`ORDER`), and is sent the signed record when
the answer is served (`RECORD`). No row is in any of them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from lora.errors import WrongUpdate
from strategies.federated.wire import ARRAYS, CONFIG, REPORT

OFFERS, ORDER, RECORD = "query.offers", "query.forget", "query.forgotten"
_DATA = "data"


def ask_offers(run: str) -> RecordDict:
    """Ask a node what it offers to have forgotten of a run."""
    return RecordDict({CONFIG: ConfigRecord({"run": run})})


def asked_run(message: Message) -> str:
    """Return the run that a node is asked about. Raises WrongUpdate."""
    try:
        config: Any = message.content[CONFIG]
        return str(config["run"])
    except (KeyError, TypeError) as error:
        raise WrongUpdate(f"the question names no run ({type(error).__name__})") from error


@dataclass(frozen=True)
class Offered:
    """A node's name and the ids of what it offers; `answered` are those that it has trained an answer for before."""

    client: str
    offers: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()

    def content(self) -> RecordDict:
        """Return the message content."""
        told: dict[str, Any] = {"client": self.client, "offers": list(self.offers), "answered": list(self.answered)}
        return RecordDict({REPORT: ConfigRecord(told)})

    @classmethod
    def read(cls, message: Message) -> "Offered":
        """Read a node's reply. Raises WrongUpdate for anything else."""
        try:
            told: Any = message.content[REPORT]
            return cls(str(told["client"]), tuple(map(str, told["offers"])), tuple(map(str, told["answered"])))
        except (KeyError, TypeError) as error:
            raise WrongUpdate(f"the reply is no list of offers ({type(error).__name__})") from error


@dataclass(frozen=True)
class Letter:
    """Bytes about one offer: an order, its answer, or the record. Without any it asks for an answer that was made."""

    offer: str
    data: bytes = b""

    def content(self) -> RecordDict:
        """Return the message content; bytes travel as an array, which Flower sends in pieces."""
        content = RecordDict({CONFIG: ConfigRecord({"offer": self.offer})})
        if self.data:
            content[ARRAYS] = ArrayRecord({_DATA: Array(np.frombuffer(self.data, dtype=np.uint8))})
        return content

    @classmethod
    def read(cls, message: Message) -> "Letter":
        """Read a message. Raises WrongUpdate where it is no letter."""
        try:
            config: Any = message.content[CONFIG]
            arrays: Any = message.content.get(ARRAYS)
            data = b"" if arrays is None else arrays[_DATA].numpy().astype(np.uint8, casting="safe").tobytes()
            return cls(str(config["offer"]), data)
        except Exception as error:  # What was sent may break NumPy's reader in ways that no list of types covers.
            raise WrongUpdate(f"the message is no letter about an offer ({type(error).__name__})") from error
