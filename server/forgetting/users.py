"""The users of a store: its files, opened for a moment, or the ones that a service in this process serves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lora.errors import RunError
from server.forgetting.store import Store
from strategies.personal.erasure import StoredUsers


@contextmanager
def users_of(store: Store, users: StoredUsers | None = None) -> Iterator[StoredUsers]:
    """Give the users: those that are served, else the store's directory, opened while the block runs.

    Raises RunError for a store without users, and for a directory that another process holds, such as a service.
    """
    if users is not None:
        yield users
        return
    directory = store.outside(store.about.users)
    if directory is None:
        raise RunError(f"{store.directory} has no users; make a store with some: lethe forget init … --users DIRECTORY")
    with StoredUsers(directory) as opened:
        yield opened


def subject_of(store: Store, kind: str, name: str) -> str:
    """Return the keyed digest by which a record names somebody: only who has name and salt can tell whose it is."""
    return store.keyed(kind, name)


def named_to_forget(store: Store) -> Callable[[str], bool]:
    """Return whether a user of a name was asked to be forgotten.

    It is told by the names' keyed digests, since the store holds no name; also of a request that waits or stopped, and
    of a user who came back.
    """
    subjects = {each.subject for each in store.requests() if each.kind == "user"}
    return lambda name: subject_of(store, "user", name) in subjects
