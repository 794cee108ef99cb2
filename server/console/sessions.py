"""Who is signed in: a random token in a cookie, and beside it, in memory alone, the digest of the key it stands for."""

import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

LASTS = 12 * 3600.0
"""Seconds after which one has to sign in again."""
MOST = 10_000


class Sessions:
    """Sessions of one process; after a restart everybody signs in again.

    **Guarantee**: neither a cookie nor what is kept here contains an API key, and a form is only taken from the browser
    that it was made for.

    | case | answer |
    |---|---|
    | a token that was never given out, has expired, or was closed | nobody |
    | a key that was revoked | `Keys.caller_of` finds that out at the next page, `TRUSTED` seconds later at most |
    | a form of another browser, or of another session of the same | does not fit |
    | more than `most` sessions | the oldest ends |
    """

    def __init__(self, *, lasts: float = LASTS, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self.lasts, self.most, self._clock = lasts, most, clock
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._open: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def fresh(self) -> str:
        """Return a token of nobody yet: that of a browser that has still to sign in."""
        return secrets.token_urlsafe(32)

    def open(self, digest: str) -> str:
        """Return a new token that stands for the key with this digest."""
        token = self.fresh()
        with self._lock:
            self._open[token] = self._clock(), digest
            while len(self._open) > self.most:
                self._open.popitem(last=False)
        return token

    def digest(self, token: str) -> str | None:
        """Return the digest of the key that a token stands for, or None."""
        with self._lock:
            found = self._open.get(token)
            if found is not None and self._clock() - found[0] < self.lasts:
                return found[1]
            self._open.pop(token, None)
            return None

    def close(self, token: str) -> None:
        """Sign out."""
        with self._lock:
            self._open.pop(token, None)

    def form_token(self, token: str) -> str:
        """Return what a form carries that is shown to the browser with this cookie."""
        return hmac.new(self._secret, token.encode(), hashlib.sha256).hexdigest()

    def fits(self, token: str, given: str) -> bool:
        """Return whether a form was made for the browser with this cookie."""
        return bool(token) and hmac.compare_digest(self.form_token(token).encode(), given.encode("utf-8", "replace"))
