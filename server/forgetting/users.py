"""The users of a store: its files, opened for a moment, or the ones that a service in this process serves."""

from collections.abc import Iterator
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
