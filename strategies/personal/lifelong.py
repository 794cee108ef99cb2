"""Users for life: every event moves its user's history, representation and slot, and nobody else's.

The recommender, the meta-LoRAs and the routers stay frozen. What is known of a user is the history; representation and
slot follow from it, so a user can be brought up to date alone, at any time, and forgotten without a rest.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora.errors import DataError, ModelError
from strategies.personal.events import Event, checked
from strategies.personal.histories import Histories, State
from strategies.personal.own_steps import OwnSteps, questions, trained
from strategies.personal.personalized import Personalized
from strategies.personal.recommenders.boosted import Boosted
from strategies.personal.recommenders.protocol import Recommender
from strategies.personal.slots import UserSlots
from tasks.recommendation.interactions import Floats, Interactions, Ints, Queries

CHUNK = 512
"""Most users that are brought up to date together."""


@dataclass(frozen=True)
class Observed:
    """What came of events: the new version of every user who had some, and who was not known before."""

    versions: Mapping[str, int]
    new: tuple[str, ...]


class LifelongUsers:
    """Users by name, each with a history and a slot, served by one frozen `Personalized`.

    A slot is the mixture for the user's representation now, with `own` also trained on the user's latest events. It
    depends on the user's own events alone: by one at a time or all at once, beside whomever.

    | case | answer |
    |---|---|
    | nobody known (`None` in `logits`) | the empty history: no events in the prompt, and as slot `cold`, the gate's \
answer to a representation without events |
    | a user from the first event on | the user's own slot, of a history of one event |
    | a name that is not known | DataError with the nearest name; never the cold start |
    | a wrong event (`events.checked`) | EventRefused; no event of the call is taken |
    | a kill between event and slot | the event is kept; the next opening or `observe` writes the slot |
    | a kill while forgetting | the next opening finishes it |
    | opened with another personalised model of the same shape | every slot is mixed anew |

    **Guarantee**: observing or forgetting a user leaves the slot, the version and the answers of every other user as
    they were, bit for bit.
    """

    def __init__(
        self, personal: Personalized, terms: Interactions, *, own: OwnSteps | None = None, directory: Path | None = None
    ) -> None:
        """Open or make the users in `directory`, or some in memory only.

        `terms` gives catalogue, scale and what counts as a like; its events are not taken (see `start`). Raises
        ModelError where a mixture is no slot (routing by pair, own A's) or where scores would count other users'
        events, RunError for a directory that is in use, damaged, or of another model, adapter or catalogue.
        """
        self.personal, self.own, self._lock = personal, own, threading.RLock()
        if _counts_others(personal.asking.scorer):
            raise ModelError(
                "a scorer of boosted features counts what all users did, so one user's events would move another's "
                "answers; score by MF, DIN or SASRec"
            )
        self._nobody = _nobody(terms)
        self.cold = self._mixed(self._nobody, _from(self._nobody, ends=self._nobody.starts[:-1]))[0]
        """The slot of an empty history, `[size]`."""
        self._places = {name: place for place, name in enumerate(terms.catalogue.names)}
        self.slots = UserSlots.of(personal.adapted, None if directory is None else directory / "slots")
        try:
            self.histories = Histories(terms, kind=_kind(terms), directory=directory)
            self._restore()
        except BaseException:
            self.slots.close()
            raise

    def _restore(self) -> None:
        """Finish what a kill cut off, and mix everybody anew where the model is another."""
        stamp = _stamp(self.personal, self.own)
        if self.histories.noted("model") != stamp:
            self.histories.unsettle()
            self.histories.note("model", stamp)
        self._settle()

    def __len__(self) -> int:
        return len(self.histories)

    def __contains__(self, user: object) -> bool:
        return user in self.histories

    def answers(self, user: str) -> bool:
        """Return whether a user is known and has a slot: for want of room it may have to follow the first event."""
        return user in self.histories and user in self.slots

    def names(self) -> list[str]:
        """Return all users in alphabetical order."""
        return self.histories.names()

    def version(self, user: str) -> int:
        """Return the version of a user's slot, which grows with every call that brings the user events.

        Raises DataError for an unknown user.
        """
        with self._lock:
            self.histories.check([user])
            return self.slots.version(user)

    def history(self, user: str) -> list[Event]:
        """Return a user's events in order of time. Raises DataError for an unknown user."""
        with self._lock:
            log = self.histories.log([user])
        names = (log.catalogue.names[item] for item in log.items)
        columns = zip(names, log.ratings.tolist(), log.times.tolist(), strict=True)
        return [Event(user, item, rating, time) for item, rating, time in columns]

    def slot(self, user: str) -> Tensor:
        """Return a copy of a user's slot, `[size]`. Raises DataError for an unknown user."""
        with self._lock:
            self.histories.check([user])
            return self.slots.read([user]).values[0]

    def gate(self, user: str | None) -> Tensor:
        """Return the gate's weights for a user now, `[matrices, N]`, each row of sum one; None is the cold start.

        Raises DataError for an unknown user.
        """
        with self._lock:
            if user is None:
                return self.personal.weights(self._nobody, _from(self._nobody, ends=self._nobody.starts[:-1]))[
                    :, 0
                ].cpu()
            log = self.histories.log([user])
            return self.personal.weights(log, _from(log))[:, 0].cpu()

    def observe(self, user: str, item: str, rating: float, time: int) -> Observed:
        """Take one event; see `observe_many`."""
        return self.observe_many([Event(user, item, rating, time)])

    def observe_many(self, events: Sequence[Event]) -> Observed:
        """Take events, all or none, and bring their users up to date together; new users are added.

        The time of every user's events grows or stays. Raises EventRefused for an unknown item, a rating out of range,
        a time going backwards, a duplicate (same user, item and time), a time or a user that is none.
        """
        with self._lock:
            self._settle()
            rows = checked(events, self.histories, places=self._places, scale=self.histories.terms.scale)
            new = self.histories.add(rows)
            self._settle()
            users = dict.fromkeys(row.user for row in rows)
            return Observed({user: self.slots.version(user) for user in users}, new)

    def start(self, log: Interactions, *, among: Callable[[str], bool] = lambda user: True) -> Observed:
        """Take all events of a log over the same catalogue, such as what a model was trained on; of some users."""
        names = log.catalogue.names
        columns = zip(log.users.tolist(), log.items.tolist(), log.ratings.tolist(), log.times.tolist(), strict=True)
        rows = [Event(log.user_names[u], names[i], r, t) for u, i, r, t in columns]
        return self.observe_many([row for row in rows if among(row.user)])

    def logits(self, users: Sequence[str | None], items: Ints) -> Floats:
        """Return the log odds that `users[i]` likes `items[i]` now, `[users, c]` for places in the catalogue alike.

        Everything that was observed is known. None is somebody of whom nothing is known (cold start). Raises DataError
        for an unknown user or item.
        """
        if items.ndim != 2 or len(items) != len(users):
            raise DataError(f"items of shape {items.shape} for {len(users)} users; give a row of items for every user")
        outside = items[(items < 0) | (items >= len(self._places))]
        if outside.size:
            raise DataError(f"item {outside[0]} is not in the catalogue of {len(self._places)}; look it up by name")
        if not items.size:
            return np.zeros(items.shape)
        with self._lock:
            log, slots, rows = self._read(users)
            # The last is nobody, whose one event is not known.
            asked = _from(log, ends=np.append(log.starts[1:-1], log.starts[-2])).take(rows).about(items)
            views = self.personal.parts.meta.layout.views(slots.to(self.personal.base.placement.device))
            found = self.personal.answered(
                questions(self.personal.asking, log, asked),
                lambda groups: {key: view[rows[groups]] for key, view in views.items()},
                group=items.shape[1],
            )
        return found.reshape(items.shape)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Keep everybody as they are: what is asked inside is of one instant, and whatever would change it waits."""
        with self._lock:
            yield

    def shortlist(self, users: Sequence[str | None], count: int) -> list[Ints]:
        """Return for every user the places of `count` items or fewer: not rated yet, those first that the recommender
        likes best (in the catalogue's order, where no recommender scores). Raises DataError for an unknown user.
        """
        if not users:
            return []
        with self._lock:
            log, _, rows = self._read(users)
        everything = np.tile(np.arange(len(self._places)), (len(users), 1))
        asked = _from(log, ends=np.append(log.starts[1:-1], log.starts[-2])).take(rows).about(everything)
        scorer, odds = self.personal.asking.scorer, np.zeros(everything.shape)
        if scorer is not None:
            odds = scorer.logits(log, asked).reshape(everything.shape).copy()
        for row, place in enumerate(rows):
            if users[row] is not None:
                odds[row, log.items[log.starts[place] : log.starts[place + 1]]] = -np.inf
        order = np.argsort(-odds, axis=1, kind="stable")[:, :count]
        return [best[np.isfinite(own[best])] for best, own in zip(order, odds, strict=True)]

    def _read(self, users: Sequence[str | None]) -> tuple[Interactions, Tensor, Ints]:
        """Return histories and slots of distinct users, the cold start last, and where each of `users` stands."""
        known = [*dict.fromkeys(user for user in users if user is not None)]
        log = _with_nobody(self.histories.log(known), self._nobody)
        slots = torch.cat([self.slots.read(known).values, self.cold[None]])
        place = {name: number for number, name in enumerate(known)}
        return log, slots, np.array([len(known) if user is None else place[user] for user in users], dtype=np.int64)

    def forget(self, *users: str) -> None:
        """Delete slots and histories of some users, durably; raises DataError for an unknown one.

        What the shared weights learned from their events before is not undone by this: that is unlearning.
        """
        with self._lock:
            self.histories.check(users)
            self.histories.move(users, State.LEAVING)
            self._settle()

    def close(self) -> None:
        """Close the files; the object is of no use afterwards."""
        self.histories.close()
        self.slots.close()

    def _settle(self) -> None:
        """Carry out what is due: forget who is leaving, and write the slots of who has events that these lack."""
        leaving = self.histories.among(State.LEAVING)
        if leaving:
            self.slots.remove([user for user in leaving if user in self.slots])
            self.histories.erase(leaving)
        pending = self.histories.among(State.PENDING)
        for first in range(0, len(pending), CHUNK):
            self._update(pending[first : first + CHUNK])

    def _update(self, users: Sequence[str]) -> None:
        log = self.histories.log(users)
        values = self._mixed(log, _from(log))
        if self.own is not None:
            values = trained(self.personal, log, values, self.own)
        old = [place for place, user in enumerate(users) if user in self.slots]
        new = [place for place, user in enumerate(users) if user not in self.slots]
        self.slots.write([users[place] for place in old], values[old])
        self.slots.add([users[place] for place in new], values[new])
        self.histories.move(users, State.SETTLED)

    def _mixed(self, log: Interactions, queries: Queries) -> Tensor:
        vectors = self.personal.representation(log, queries).to(self.personal.base.placement.device)
        return self.personal.adapter_of(vectors).cpu()


def _from(log: Interactions, *, ends: Ints | None = None) -> Queries:
    """Ask on behalf of every user of a log, who knows all own events, or those before row `ends`."""
    first, end = log.starts[:-1], log.starts[1:] if ends is None else ends
    nothing = np.zeros(len(first), dtype=np.int64)
    return Queries(first, end, nothing, nothing)


def _nobody(terms: Interactions) -> Interactions:
    """Return a log with one event of no user: what recommenders read must have rows, even where a history has none."""
    one = np.zeros(1, dtype=np.int64)
    return replace(terms, users=one, items=one, ratings=np.full(1, terms.scale[0]), times=one, user_names=("",))


def _with_nobody(log: Interactions, nobody: Interactions) -> Interactions:
    return log.grown(
        np.full(1, len(log.user_names)), nobody.items, nobody.ratings, nobody.times, names=nobody.user_names
    )


def _counts_others(scorer: Recommender | None) -> bool:
    return isinstance(scorer, Boosted) or any(_counts_others(member) for member in getattr(scorer, "members", ()))


def _kind(terms: Interactions) -> str:
    """Return what stored events are of: items by place, ratings by scale."""
    told = "\n".join([*terms.catalogue.names, f"{terms.scale}"])
    return hashlib.sha256(told.encode()).hexdigest()


def _stamp(personal: Personalized, own: OwnSteps | None) -> str:
    """Return a digest of everything that makes a slot of a history, the recommender's weights aside.

    These cannot be read through its protocol; a recommender that is fitted anew comes with routers fitted anew.
    """
    digest = hashlib.sha256(("" if own is None else own.model_dump_json()).encode())
    tensors = {**personal.parts.modules().state_dict(), **personal.representation.state()}
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
