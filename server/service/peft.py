"""Adapters in and out: PEFT directories as ZIP archives, checked against the model that is served."""

import io
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora.codec import Layout
from lora.errors import DataError, ModelError
from lora.model import AdaptedModel
from lora.peft_files import CONFIG, WEIGHTS, ImportedAdapter, export_adapter, import_adapter

LARGEST = 64 * 2**20
"""Bytes of an archive, and of what is unpacked from it."""


@dataclass(frozen=True)
class Served:
    """A model whose adapters are served: its name, its slots' layout, and what PEFT calls its task."""

    name: str
    adapted: AdaptedModel
    layout: Layout
    reference: str
    task_type: str | None


def packed(served: Served, slot: Tensor) -> bytes:
    """Return a slot as a ZIP archive of a PEFT directory. Raises ModelError for slots with a head of their own."""
    _no_head(served)
    with tempfile.TemporaryDirectory() as place:
        folder = export_adapter(
            served.adapted, served.layout.views(slot), Path(place) / "adapter", reference=served.reference,
            task_type=served.task_type,
        )  # fmt: skip
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for name in (CONFIG, WEIGHTS):
                # A fixed date: equal adapters give equal archives.
                archive.writestr(zipfile.ZipInfo(name), (folder / name).read_bytes())
        return data.getvalue()


def unpacked(served: Served, data: bytes) -> Tensor:
    """Return the slot `[size]` of a PEFT directory in a ZIP archive.

    Raises DataError for what is no such archive, ModelError for an adapter of another base, rank or frame.
    """
    _no_head(served)
    with tempfile.TemporaryDirectory() as place:
        _extract(data, Path(place))
        try:
            found = import_adapter(Path(place))
        except ModelError as error:
            raise ModelError(str(error).replace(f"{place}/", "").replace(f"{place}: ", "")) from None
    return _slot(served, found)


def _extract(data: bytes, folder: Path) -> None:
    """Write the two files that are read; whatever else is in the archive, and wherever it points, is left there."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inside = {Path(each.filename).name: each for each in archive.infolist()}
            for name in (CONFIG, WEIGHTS):
                if name not in inside:
                    raise DataError(f"the archive has no {name}; send a ZIP of a PEFT directory")
                if inside[name].file_size > LARGEST:
                    raise DataError(f"{name} has {inside[name].file_size} bytes; the most is {LARGEST}")
                with archive.open(inside[name]) as member:
                    # The size that the archive claims may be a lie.
                    (folder / name).write_bytes(member.read(LARGEST + 1)[:LARGEST])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"the body is no ZIP archive that can be read ({type(error).__name__}); send one") from error


def _slot(served: Served, found: ImportedAdapter) -> Tensor:
    adapted = served.adapted
    names = {site.name for site in adapted.sites}
    if found.b.keys() != names:
        odd = sorted(found.b.keys() ^ names)[0]
        raise ModelError(f"the adapter and model {served.name} differ in '{odd}'; train it on the same target modules")
    if found.frame.rank != adapted.frame.rank:
        raise ModelError(
            f"the adapter has rank {found.frame.rank}, the service {adapted.frame.rank}; train it with that"
        )
    scale = found.alpha / found.frame.rank / adapted.scale
    blocks = {("B", name): scale * b for name, b in found.b.items()}
    if "A" in served.layout.parts:
        blocks |= {("A", name): a for name, a in found.frame.matrices.items()}
    elif any(not torch.equal(found.frame.matrices[name], adapted.frame.matrices[name].cpu()) for name in names):
        raise ModelError(
            f"the adapter's A differs from the frame of {served.name}; train B alone over that frame "
            "(export an adapter to get it)"
        )
    for entry in served.layout.entries:
        if tuple(blocks[entry.part, entry.name].shape) != entry.shape:
            raise ModelError(f"'{entry.name}' has another shape in the adapter; train it on {served.reference}")
    return torch.cat([blocks[entry.part, entry.name].flatten() for entry in served.layout.entries])


def _no_head(served: Served) -> None:
    if "head" in served.layout.parts:
        raise ModelError(f"the slots of {served.name} have heads of their own, which PEFT's directories do not hold")
