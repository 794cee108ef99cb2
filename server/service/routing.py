"""Ray Serve's way from its proxies to the replicas: a user's requests go where the user is. Needs ray."""

import pickle
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.service.parts import Part, about, order

STATS_PERIOD = 1.0
"""Seconds after which a router knows at the latest which part a new replica holds."""


class ByUser(RequestRouter):  # type: ignore[misc]
    """Sends every request to the replica that holds the user's part, or has the user's slot warm."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return replicas in the order in which they are asked."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        # Without it the router would ask again without a pause while all are full.
        pending_request.routing_context.should_backoff = True
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        parts = {name: part_in(replica.routing_stats) for name, replica in named.items()}
        return [[named[name] for name in names] for names in order(about(scope_of(pending_request)), parts)]


def part_in(stats: Mapping[str, Any]) -> Part:
    """Return the part that a replica has told of."""
    return Part(int(stats["part"]), int(stats["of"])) if "part" in stats else NOTHING


NOTHING = Part(-1, 1)
"""What is known of a replica before it has told anything: nobody is there."""


def scope_of(request: PendingRequest) -> Mapping[str, Any]:
    """Return the ASGI scope of a request that a proxy passes on."""
    if not request.metadata.is_http_request or not request.args:
        return {}
    # The proxy has pickled it a moment ago, in this very process.
    first = pickle.loads(request.args[0]) if isinstance(request.args[0], bytes) else request.args[0]
    found: Mapping[str, Any] = first.asgi_scope
    return found
