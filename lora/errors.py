"""Every error that a user can cause, in one small tree.

    LetheError
    ├── ConfigError          a run file or an override is wrong
    ├── DataError            a data file, a column or a label is wrong
    ├── ModelError           a base model or its modules cannot be used
    ├── FrameMismatch        two sides hold different frames (or layouts)
    ├── WrongUpdate          a reply's vector cannot be aggregated
    ├── PrivacyError         a privacy request that cannot be met
    │   └── BudgetExceeded   the next private step would pass the budget
    ├── RunError             a run directory cannot be used
    │   └── CheckpointError  a checkpoint is missing, damaged or of another config
    ├── FederationError      too few clients are left to go on
    ├── DeploymentError      a process of a deployment cannot be started or reached, or a submitted run failed
    └── ServiceError         a request that the personalisation service cannot answer
        ├── Busy             too much is waiting already; the same request succeeds later
        ├── Denied           the caller may not ask this
        ├── Unavailable      what the service stands on, such as its database, does not answer
        └── Unknown          a user, adapter, model or request that is not there

A message states the value, the limit and the remedy, in the spelling of the run file.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class LetheError(Exception):
    """Root of everything that Lethe raises on purpose."""


class ConfigError(LetheError):
    """A run file, a section of it or a command-line override is wrong."""


class DataError(LetheError):
    """A data file is missing or malformed, or a row cannot be used."""


class ModelError(LetheError):
    """A base model cannot be loaded or does not have the named modules."""


class FrameMismatch(LetheError):
    """Two sides of a federation hold different frames or layouts."""


class WrongUpdate(LetheError):
    """An update has the wrong length, or values that are not finite."""


class PrivacyError(LetheError):
    """A privacy request cannot be met as stated."""


class BudgetExceeded(PrivacyError):
    """The next private step would pass the budget; nothing was charged, trained or sent."""


class RunError(LetheError):
    """A run directory exists already, is missing, or cannot be written."""


class CheckpointError(RunError):
    """A checkpoint is missing, damaged, or belongs to another configuration."""


class FederationError(LetheError):
    """Fewer clients answered than the run file demands."""


class DeploymentError(LetheError):
    """A process of a deployment cannot be started or reached, or a submitted run failed."""


class ServiceError(LetheError):
    """A request that the personalisation service cannot answer."""


class Busy(ServiceError):
    """Too much is waiting already; the same request succeeds after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Denied(ServiceError):
    """The caller may not ask this."""


class Unavailable(ServiceError):
    """What the service stands on does not answer; the same request succeeds once it is back."""


class Unknown(ServiceError):
    """A user, adapter, model or request that is not there."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest known name, else the list of known names."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""
