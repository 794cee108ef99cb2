"""What a request reads: every file that is opened and every tensor that enters a computation, counted.

O3 claims to forget without retained data; the released code reads the retained file to select its detector. Here the
claim is checked while the work is done.
"""

import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora.errors import DataError

Call = Any
_KEPT_BYTES, _ENTRY_BYTES = 2**25, 2**12
"""Bytes that are noted before gone tensors are dropped, and what a note counts for by itself."""


@dataclass
class Audit:
    """The reads of one request. Everything that was not declared before it was read is in `foreign`.

    - files: every path that Python opens for reading in this thread (`open`, `numpy`, `torch.load`, `gzip`, ...), but
      for code; libraries that open files without Python (safetensors, tokenizers) are not seen, so models are loaded
      before.
    - tensors: every tensor that an operation of this thread reads and that no operation inside the audit had made;
      also those in the backward pass. Single numbers are only counted. numpy arrays count once torch reads them.
    - rows: how often each row of the request was read.
    """

    files: Counter[str] = field(default_factory=Counter)
    code: Counter[str] = field(default_factory=Counter)
    tensors: Counter[str] = field(default_factory=Counter)
    rows: Counter[int] = field(default_factory=Counter)
    scalars: int = 0
    foreign: list[str] = field(default_factory=list)
    _allowed_files: set[str] = field(default_factory=set, repr=False)
    _paused: bool = field(default=False, repr=False)
    _known: dict[int, tuple[StorageWeakRef, str | None]] = field(default_factory=dict, repr=False)
    _since: int = field(default=0, repr=False)
    """Bytes that were noted since it was last looked for what is gone."""

    def allow_files(self, paths: Iterable[str | Path]) -> None:
        """Declare the files of the request."""
        self._allowed_files |= {str(Path(path).resolve()) for path in paths}

    def declare(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Declare tensors, such as the model's parameters, that may be read; reads are counted under `kind`."""
        for tensor in tensors:
            self._know(tensor, kind)

    @contextmanager
    def reading(self, rows: Iterable[int]) -> Iterator[list[Tensor | None]]:
        """Count rows of the request; the block makes tensors of them and puts what it made into the list."""
        self.rows.update(rows)
        made: list[Tensor | None] = []
        self._paused = True
        try:
            yield made
        finally:
            self._paused = False
            self.declare("request", (tensor for tensor in made if tensor is not None))

    @contextmanager
    def watching(self) -> Iterator["Audit"]:
        """Count what this thread opens and computes with, for the block."""
        _install()
        watchers = _WATCHERS.setdefault(threading.get_ident(), [])
        watchers.append(self)
        try:
            with _Reads(self):
                yield self
        finally:
            watchers.remove(self)

    def check(self) -> None:
        """Raise DataError if anything was read that is not the request's, the model's or the slots'."""
        if self.foreign:
            more = f" and {len(self.foreign) - 3} more" if len(self.foreign) > 3 else ""
            raise DataError(
                f"the request read what is not its own: {'; '.join(self.foreign[:3])}{more}; only its rows, the base "
                "model and earlier requests' slots may be read"
            )

    def report(self) -> dict[str, int]:
        """Return the counts: files, tensors by kind, rows read (with repetition), distinct rows, foreign reads."""
        kinds = {f"tensors_{kind}": count for kind, count in sorted(self.tensors.items())}
        return {
            "files": self.files.total(),
            "code_files": self.code.total(),
            **kinds,
            "scalars": self.scalars,
            "row_reads": self.rows.total(),
            "rows": len(self.rows),
            "foreign": len(self.foreign),
        }

    def _know(self, tensor: Tensor, kind: str | None) -> None:
        # The weak reference keeps the storage's identity from being given to another one, and with it, in PyTorch, the
        # bytes of one that is gone: those are dropped before they are many. What is gone cannot be read again.
        reference = _storage(tensor)
        self._known[reference.cdata] = (reference, kind)
        self._since += tensor.untyped_storage().nbytes() + _ENTRY_BYTES
        if self._since > _KEPT_BYTES:
            self._known = {key: known for key, known in self._known.items() if not _gone(known[0])}
            self._since = 0

    def _opened(self, path: str) -> None:
        name = str(Path(path).resolve())
        if name.startswith((*_CODE, "/proc", "/sys")) or name.endswith((".py", ".pyc", ".so", _LIBRARY)):
            self.code[name] += 1
            return
        self.files[name] += 1
        if name not in self._allowed_files:
            self.foreign.append(f"file {Path(name).name}")

    def _read(self, tensor: Tensor, operation: str) -> None:
        if self._paused:
            return
        known = self._known.get(_storage(tensor).cdata)
        if known is not None:
            if known[1] is not None:
                self.tensors[known[1]] += 1
        elif tensor.numel() <= 1:
            self.scalars += 1
        else:
            self.foreign.append(f"a tensor of shape {tuple(tensor.shape)} in {operation}")
            self._know(tensor, "foreign")


def derived(values: NDArray[Any]) -> Tensor:
    """Return as a tensor what another library made of what the audits have seen; they count it as declared."""
    return drawn(lambda: torch.from_numpy(values))


def drawn(source: Callable[[], Tensor]) -> Tensor:
    """Return what comes from no data at all, such as noise; the audits count it as declared."""
    with ExitStack() as stack:
        made = [stack.enter_context(watcher.reading(())) for watcher in _watching()]
        tensor = source()
        for each in made:
            each.append(tensor)
    return tensor


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows an audit the inputs and outputs of every operation."""

    def __init__(self, audit: Audit) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.audit = audit

    def __torch_dispatch__(self, func: Call, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self.audit._read(tensor, str(func))
        answer = func(*args, **kwargs)
        for tensor in _tensors(answer):
            # A view of something declared stays what it is.
            if _storage(tensor).cdata not in self.audit._known:
                self.audit._know(tensor, None)
        return answer


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _gone(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())  # type: ignore[no-untyped-call]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# By thread: a server answers others while one request is worked on, and what it opens for them is not the request's.
_WATCHERS: dict[int, list[Audit]] = {}
_INSTALLED: list[bool] = []
_SCHEMES = ("stdlib", "platstdlib", "purelib", "platlib")
_CODE = tuple({str(Path(sysconfig.get_path(scheme)).resolve()) for scheme in _SCHEMES})
_LIBRARY = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
"""Where Python looks for its library first; a late import tries to open it."""


def _watching() -> list[Audit]:
    return _WATCHERS.get(threading.get_ident(), [])


def _install() -> None:
    """Ask Python to tell of opened files; such a hook stays for the life of the process, and is idle unwatched."""
    if not _INSTALLED:
        _INSTALLED.append(True)
        sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _watching():
        return
    path, mode, flags = arguments
    writes = (mode is not None and not set(mode) & {"r", "+"}) or (mode is None and flags & 1)
    if isinstance(path, str | bytes | Path) and not writes:
        for watcher in list(_watching()):
            watcher._opened(path.decode(errors="replace") if isinstance(path, bytes) else str(path))
