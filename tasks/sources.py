"""Which file, or which split inside a file, is the train, the validation and the test split."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from lora.errors import DataError, nearest
from tasks.config import DataConfig
from tasks.files import Table, kind_of, missing, read_file, stem_of

ROLES = ("train", "validation", "test")
ALIASES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""Names under which files and hubs keep each split."""

log = logging.getLogger(__name__)


def role_of(name: str | None) -> str | None:
    """Return the role that a split or file name is an alias of: `dev.tsv.gz` and `val` stand for `validation`."""
    stem = stem_of(Path(name)) if name else ""
    return next((role for role, aliases in ALIASES.items() if stem in aliases), None)


def choose(
    config: DataConfig, known: Sequence[str], *, source: str, roles: Collection[str] = ROLES, strict: bool = False
) -> dict[str, str]:
    """Pick the split for every role among the `known` names of one JSON file or hub data set.

    A role may be named exactly, by an alias (`val` for `validation`) or by a file name that is one (`dev.tsv.gz`);
    a role that is not named gets its own standard name, unless another role has taken it. A role that is left out
    is to be held out of train. Raises DataError for an unknown name (with `strict` also for an alias that finds
    nothing) and when there is no train split.
    """
    chosen: dict[str, str] = {}
    for role, wanted in _named_first(config):
        if role not in roles:
            continue
        name = _pick(role, wanted, known, taken=chosen.values())
        if name is not None:
            chosen[role] = name
        elif role == "train" or (wanted and (strict or role_of(wanted) is None)):
            raise DataError(f"data.{role}: {source} has no split '{wanted or role}'{nearest(wanted or role, known)}")
    return chosen


def read_path(config: DataConfig, *, fields: tuple[str, ...]) -> dict[str, Table]:
    """Read the tables of the local copy that `data.path` names, by role; train is always among them.

    Raises DataError where a name matches nothing or several files, or where no train split is found.
    """
    path = Path(config.path or "").expanduser().resolve()
    if not path.exists():
        raise DataError(f"data.path: {missing(path)}")
    for role, wanted in _named_first(config):
        if wanted and "[" in wanted:
            raise DataError(
                f"data.{role}: '{wanted}' is a slice, for hub data sets only; use data.max_train or max_eval"
            )
    if path.is_dir() and config.file:
        path = Folder(path).file(config.file, key="file")
    found = _in_folder(Folder(path), config) if path.is_dir() else _beside(path, config)
    contents = {file: read_file(file, fields=fields) for file in dict.fromkeys(found.values())}
    tables = _tables(found, contents, config)
    for role in ROLES[1:]:
        if getattr(config, role) and role not in tables:
            log.warning("data.%s: '%s' is not in %s; held out of train", role, getattr(config, role), config.path)
    return tables


class Folder:
    """The data files below a directory, at any depth unless `deep` is off; hidden files and READMEs aside."""

    def __init__(self, path: Path, *, deep: bool = True) -> None:
        self.path = path
        self.files = sorted(file for file in (path.rglob("*") if deep else path.iterdir()) if _is_data(file))

    def file(self, wanted: str, *, key: str) -> Path:
        """Return the file that is named; raise DataError with the nearest name if there is none."""
        match = self.named(wanted, key=key)
        if match is None:
            known = {file.name for file in self.files}
            remedy = f"name one with data.{key}=..."
            raise DataError(f"data.{key}: no data file '{wanted}' below {self.path}{nearest(wanted, known)}; {remedy}")
        return match

    def named(self, wanted: str, *, key: str, near: Path | None = None) -> Path | None:
        """Find the file that a name, the end of a path or a glob means, or (only in `near`, if given) a bare stem."""
        exact = [file for file in self.files if _ends(file, wanted)]
        stems = [file for file in self.files if stem_of(file) == wanted.lower() and near in (None, file.parent)]
        return self.only([file for file in exact if file.parent == near] or exact or stems, wanted, key=key)

    def standing_for(
        self, role: str, *, key: str, near: Path | None = None, taken: Collection[Path] = ()
    ) -> Path | None:
        """Find the file whose stem is an alias of the role, or failing that the file whose stem starts with one."""
        files = [file for file in self.files if file not in taken and near in (None, file.parent)]
        exact = [file for file in files if stem_of(file) in ALIASES[role]]
        return self.only(exact or [file for file in files if _starts_with_alias(file, role)], role, key=key)

    def only(self, matches: Sequence[Path], wanted: str, *, key: str) -> Path | None:
        """Return the one match, or None; raise DataError that lists them if there are several."""
        if len(matches) > 1:
            names = ", ".join(str(file.relative_to(self.path)) for file in matches[:8])
            found = f"'{wanted}' matches {len(matches)} files below {self.path}: {names}"
            raise DataError(f"data.{key}: {found}; name one of them with data.{key}=...")
        return matches[0] if matches else None


def _named_first(config: DataConfig) -> list[tuple[str, str | None]]:
    """Return (role, its name), those that the run file names first: they take precedence over standard names."""
    pairs = [(role, getattr(config, role)) for role in ROLES]
    return sorted(pairs, key=lambda pair: pair[1] is None)


def _pick(role: str, wanted: str | None, known: Sequence[str], *, taken: Iterable[str]) -> str | None:
    if wanted in known:
        return wanted
    if wanted and role_of(wanted) is None:
        return None
    free = set(known) - (set() if wanted else set(taken))
    aliases = ALIASES[role_of(wanted) or role]
    return next((name for alias in aliases for name in known if name.lower() == alias and name in free), None)


def _tables(
    found: Mapping[str, Path], contents: Mapping[Path, Table | dict[str, Table]], config: DataConfig
) -> dict[str, Table]:
    """Turn the files by role into tables by role; a train file of splits also serves the roles without a file."""
    files_aside = {role: None for role, wanted in _named_first(config) if role_of(wanted) is None and _is_file(wanted)}
    inside = config.model_copy(update=files_aside)
    tables: dict[str, Table] = {}
    for file, content in contents.items():
        roles = [role for role in ROLES if found.get(role, found["train"]) == file]
        if isinstance(content, Table):
            tables |= {role: content for role in roles if role in found}
        else:
            names = choose(inside, tuple(content), source=file.name, roles=roles)
            tables |= {role: content[name] for role, name in names.items()}
    return tables


def _in_folder(folder: Folder, config: DataConfig) -> dict[str, Path]:
    found = {"train": _train_file(folder, config)}
    near, inside = found["train"].parent, _holds_splits(found["train"])
    for role, wanted in _named_first(config):
        if role == "train" or (inside and not _is_file(wanted)):
            continue
        match = folder.named(wanted, key=role, near=near) if wanted else None
        if match is None and (not wanted or role_of(wanted)):
            taken = () if wanted else tuple(found.values())
            match = folder.standing_for(role_of(wanted) or role, key=role, near=near, taken=taken)
        if match is not None:
            found[role] = match
        elif wanted and role_of(wanted) is None:
            folder.file(wanted, key=role)  # raises, with the nearest name
    return found


def _train_file(folder: Folder, config: DataConfig) -> Path:
    """Find the train file: by name, by a name that starts with train, as a file of splits, or as the only file."""
    wanted = config.train
    match = folder.named(wanted, key="train") if wanted else None
    if match is None and (not wanted or role_of(wanted)):
        match = folder.standing_for(role_of(wanted) or "train", key="train")
    if match is None and (role_of(wanted) or not _is_file(wanted)):
        holding = [file for file in folder.files if _holds_splits(file)]
        match = folder.only(holding, "a file of splits", key="file")
    if match is None and len(folder.files) == 1 and (not wanted or role_of(wanted)):
        match = folder.files[0]
    return match or folder.file(wanted or "train", key="train")


def _beside(path: Path, config: DataConfig) -> dict[str, Path]:
    """With one file as `path` that file is the train split; other roles may name files of the same directory."""
    found = {"train": path}
    folder = Folder(path.parent, deep=False)
    for role, wanted in _named_first(config):
        if role == "train" or not wanted or not _is_file(wanted):
            continue
        match = folder.named(wanted, key=role) if role_of(wanted) else folder.file(wanted, key=role)
        if match is not None:
            found[role] = match
    return found


def _is_file(wanted: str | None) -> bool:
    """Whether a split is named as a file, not as a hub or JSON file would name it."""
    return bool(wanted and kind_of(Path(wanted)))


def _is_data(file: Path) -> bool:
    return bool(kind_of(file)) and file.is_file() and not re.match(r"\.|readme|licen[cs]e", file.name, re.IGNORECASE)


def _ends(file: Path, wanted: str) -> bool:
    parts = Path(wanted).parts
    tail = file.parts[-len(parts) :]
    return len(tail) == len(parts) and all(fnmatch(have, want) for have, want in zip(tail, parts, strict=True))


def _starts_with_alias(file: Path, role: str) -> bool:
    """Whether the stem is an alias and something that is no letter: `train_2`, not `training_notes` or `testimony`."""
    return any(re.fullmatch(rf"{alias}[^a-z].*", stem_of(file)) for alias in ALIASES[role])


def _holds_splits(file: Path) -> bool:
    try:
        return kind_of(file) == ".json" and isinstance(read_file(file), dict)
    except DataError:  # an unrelated file of the directory; one that is really meant is read again, and refused
        return False
