"""Files that are there as a whole or not at all, whatever is killed."""

import os
from pathlib import Path

from lora.errors import RunError


def write_bytes(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write aside, sync, rename, and sync the directory: after a kill the old file is there, or the new one."""
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.unlink(missing_ok=True)
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
        sync(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written ({error.strerror}); nothing has changed: make room") from error


def sync(directory: Path) -> None:
    """Make renames in a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
