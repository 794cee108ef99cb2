"""The job as the server reads it."""

from typing import Any

from pydantic import Field

from server.config import ServerConfig
from strategies.federated.job import Job


class ServerJob(Job):
    """The shared sections, and the server's own."""

    server: ServerConfig = ServerConfig()
    training: dict[str, Any] = Field(default_factory=dict)
    """The clients' section, unread: a checkpoint keeps it, because a run of other training is another run."""
