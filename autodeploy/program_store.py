"""The folder of stored programs: one entry per start, owner-only, each file known by its checksum. No torch here."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

from autodeploy.cache_folder import cache_folder

MANIFEST, LOCK, MEMORY = "manifest.json", ".lock", "memory"
FORMAT_VERSION = 1
UNFINISHED, MAX_AGE = ".new-", 3600.0
MAX_ENTRIES = 64
FIRST = "no program of this model is stored yet"

Facts = Mapping[str, str]
"""What decides a program: the name of each part, and its content or a hash of it."""


class Miss(Exception):
    """There is no usable entry; the text says why."""


def default_folder() -> Path | None:
    """Of programs, in the cache folder; None when $AUTODEPLOY_CACHE_DIR is "off"."""
    return None if os.environ.get("AUTODEPLOY_CACHE_DIR") == "off" else cache_folder() / "programs"


def store_of(option: bool | Path) -> Store | None:
    """Of the option `program_cache`; None: nothing is stored."""
    folder = default_folder() if option is True else option
    return Store(folder) if isinstance(folder, Path) else None


def model_name(folder: Path) -> str:
    """The name under which entries of the same model are found again."""
    return str(folder.resolve())


def key_of(facts: Facts) -> str:
    """The name of the entry of these facts."""
    return _digest(json.dumps(dict(facts), sort_keys=True).encode())


@dataclass(frozen=True)
class Entry:
    """A stored program. A broken manifest gives one whose facts are empty."""

    folder: Path
    model: str
    facts: Facts
    used: float
    """When it was last stored or loaded, in seconds since 1970."""

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())


@dataclass(frozen=True)
class Store:
    folder: Path

    def read(self, facts: Facts, model: str) -> dict[str, bytes]:
        """The files of the entry of these facts, each as it was written. Raises Miss."""
        entry = self.folder / key_of(facts)
        if not self.folder.is_dir():
            raise Miss(FIRST)
        with self._locked(fcntl.LOCK_SH):
            if not entry.is_dir():
                raise Miss(self._why_absent(facts, model))
            try:
                files = _verified(entry, facts)
                os.utime(entry)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise self.damaged(facts, str(error)) from error
            return files

    def damaged(self, facts: Facts, why: str) -> Miss:
        """Warns of an entry that cannot be used. The one written next takes its place."""
        warn(f"the stored program {self.folder / key_of(facts)} is ignored and built again: {why}", RuntimeWarning, stacklevel=3)
        return Miss("the stored program is damaged")

    def write(self, facts: Facts, model: str, write_files: Callable[[Path], object]) -> None:
        """Store the files that `write_files` puts in a folder, in the place of an entry of the same facts.

        Raises Miss when the folder may not be used, OSError when it cannot.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked(fcntl.LOCK_EX):
            new = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self.folder))  # made for the owner alone
            try:
                write_files(new)
                files = sorted(new.iterdir())
                checksums = {path.name: _digest(path.read_bytes()) for path in files}
                manifest = {"format": FORMAT_VERSION, "model": model, "facts": dict(facts), "files": checksums}
                (new / MANIFEST).write_text(json.dumps(manifest, indent=1))
                for path in new.iterdir():
                    path.chmod(0o600)
                self._put(new, self.folder / key_of(facts))
            finally:
                shutil.rmtree(new, ignore_errors=True)
            self._drop_old()

    def note_memory(self, facts: Facts, num_bytes: int) -> None:
        """Keep beside an entry how many bytes its weights took in the memory of the CPU; nothing happens where that cannot be."""
        with suppress(OSError, Miss), self._locked(fcntl.LOCK_EX):
            (self.folder / key_of(facts) / MEMORY).write_text(str(num_bytes))

    def last_memory(self, model: str) -> int:
        """What was noted of the entry of this model that was used last; 0: nothing."""
        try:
            with self._locked(fcntl.LOCK_SH):
                last = next(entry for entry in self.entries() if entry.model == model)
                return int((last.folder / MEMORY).read_text())
        except (Miss, StopIteration, OSError, ValueError):
            return 0

    def _put(self, new: Path, entry: Path) -> None:
        """A rename: the entry is there as a whole or not at all."""
        if entry.exists():
            old = entry.with_name(f"{new.name}-old")
            entry.rename(old)
            new.rename(entry)
            shutil.rmtree(old)
        else:
            new.rename(entry)

    def _drop_old(self) -> None:
        """Keep the entries used last, and nothing of writers that have ended early."""
        for entry in self.entries()[MAX_ENTRIES:]:
            shutil.rmtree(entry.folder)
        for path in self.folder.glob(f"{UNFINISHED}*"):
            if time.time() - path.stat().st_mtime > MAX_AGE:
                shutil.rmtree(path)

    def entries(self) -> list[Entry]:
        """The one used last first."""
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        entries = [_entry(folder) for folder in folders if _is_entry(folder)]
        return sorted(entries, key=lambda entry: -entry.used)

    def clear(self) -> tuple[int, int]:
        """Delete every entry, and nothing else; how many there were and their bytes. Raises Miss when that is not allowed."""
        if not self.folder.is_dir():
            return 0, 0
        with self._locked(fcntl.LOCK_EX):
            entries = self.entries()
            num_bytes = sum(entry.num_bytes for entry in entries)
            for path in (*(entry.folder for entry in entries), *self.folder.glob(f"{UNFINISHED}*")):
                shutil.rmtree(path)
        return len(entries), num_bytes

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        """Held by readers together and by a writer alone. Raises Miss for a folder that others can write to."""
        status = self.folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise Miss(f"{self.folder} belongs to others or can be written by others; chmod 700 it or choose another folder")
        with os.fdopen(os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)) as lock:
            fcntl.flock(lock, kind)
            yield

    def _why_absent(self, facts: Facts, model: str) -> str:
        """The parts in which the nearest entry of the same folder differs."""
        others = [_differences(facts, entry.facts) for entry in self.entries() if entry.model == model and entry.facts]
        if not others:
            return FIRST
        return f"changed: {', '.join(min(others, key=len))}"


def _differences(facts: Facts, other: Facts) -> list[str]:
    return [name for name in sorted({*facts, *other}) if facts.get(name) != other.get(name)]


def _verified(entry: Path, facts: Facts) -> dict[str, bytes]:
    """Every file of an entry. Raises ValueError, or what reading raises, where it is not what was written."""
    manifest: dict[str, Any] = json.loads((entry / MANIFEST).read_bytes())
    if manifest["format"] != FORMAT_VERSION or manifest["facts"] != dict(facts):
        raise ValueError("its manifest is of another program")
    files = {name: (entry / name).read_bytes() for name in manifest["files"]}
    for name, content in files.items():
        if _digest(content) != manifest["files"][name]:
            raise ValueError(f"{name} is not what was stored")
    return files


def _is_entry(folder: Path) -> bool:
    return len(folder.name) == 64 and not set(folder.name) - set("0123456789abcdef") and folder.is_dir()


def _entry(folder: Path) -> Entry:
    used = folder.stat().st_mtime
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return Entry(folder, str(manifest["model"]), dict(manifest["facts"]), used)
    except (OSError, ValueError, KeyError, TypeError):
        return Entry(folder, "damaged", {}, used)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
