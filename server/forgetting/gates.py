"""The forget requests of a store as a service applies them: every batch sees those that are done when it begins."""

import os

from torch import Tensor

from lora.errors import Unavailable
from server.forgetting.store import MANIFEST, Store
from server.service.texts import Gated
from strategies.unlearning.forgotten import Forgotten
from tasks.tokens import Batch


class StoreGates:
    """Gates of a store's requests, loaded anew when another process has carried one out.

    **Guarantee**: a batch that begins after a request is done has its slot mixed in.

    | case | what happens |
    |---|---|
    | a request is done meanwhile (`o3`) | its slot and detector are loaded before the next batch |
    | the adapter itself was replaced (`gs-lora`) | Unavailable for every text, until the service is started again |
    | a damaged slot or detector | RunError for every text; never an answer without it |
    """

    def __init__(self, store: Store, served: Forgotten) -> None:
        self.store, self.served = store, served
        self._adapter = store.manifest.adapter
        self._seen = -1
        self._renew()

    def __call__(self, batch: Batch) -> Gated:
        """Return what the requests add to a batch."""
        self._renew()
        weights: Tensor = self.served.weights(batch)
        names = tuple(each.request for each in self.served.requests)
        return Gated(self.served.overlay(weights), names, weights)

    def _renew(self) -> None:
        # The file is replaced as a whole, so the time of its last change is that of the newest one.
        now = os.stat(self.store.directory / MANIFEST).st_mtime_ns
        if now == self._seen:
            return
        if self.store.manifest.adapter != self._adapter:
            raise Unavailable("a request to forget was folded into the adapter that is served; start the service again")
        bare = self.served.without()
        self.served = bare.beside(*self.store.gated(bare))
        self._seen = now
