"""Putting many files into a directory at once: all of them, or none.

A save is written to a folder of its own. In a new directory that folder becomes the directory, by one rename. In one
that is there, the rename of the folder within it (`.partial` -> `.saved`) is the moment from which the save counts:
then its files go to their places, and should the process end before all are there, the next to load or save there
completes it. Libraries that know nothing of this see whole weights at every moment: shards never take the names of
others, and the file that lists them comes last.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moekernels._files import sync
from moekernels.checkpoint.errors import CheckpointError
from moekernels.checkpoint.files import SAFETENSORS, SAFETENSORS_INDEX

_FILES, _OBSOLETE = "files", "obsolete.json"
#: What readers look for first: they take their places last, and leave first.
_ENTRIES = (SAFETENSORS, SAFETENSORS_INDEX)


@contextmanager
def replace_files(directory: str | os.PathLike[str], obsolete: Sequence[str] = ()) -> Iterator[Path]:
    """Write files into the directory that this yields; when the block ends they take their place in `directory`.

    They are on disk before anything of the target changes. Files of the same names are replaced, those that match the
    patterns in `obsolete` removed; all others stay. Should anything fail within the block nothing has changed, and a
    process that is killed leaves the old files or the new ones.

    Raises:
        CheckpointError: `directory` is a file.
    """
    target = Path(directory).absolute()
    exists = target.is_dir()
    if target.exists() and not exists:
        raise CheckpointError(f"{target}: is a file, expected a directory to save to")
    home = target if exists else target.parent
    home.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(home, target.name)
    with _stage(home, target.name) as stage:
        files = stage / _FILES
        files.mkdir()
        yield files
        for path in (*files.iterdir(), files):
            sync(path)
        if not exists and _renamed(files, target):
            sync(home)
            return
        names = {path.name for pattern in obsolete for path in target.glob(pattern)}
        names -= {path.name for path in files.iterdir()}
        (stage / _OBSOLETE).write_text(json.dumps(sorted(names, key=_leaves)), encoding="utf-8")
        sync(stage / _OBSOLETE)
        sync(stage)
        os.rename(stage, target / stage.with_suffix(".saved").name)
        sync(target)
    finish_saves(target)


def finish_saves(directory: Path) -> None:
    """Complete the saves into a directory that a process began to put in place and did not end.

    Raises:
        CheckpointError: there is one, and the directory cannot be written.
    """
    if not any(directory.glob(".*.saved")):
        return
    with _locked(directory):
        for save in sorted(directory.glob(".*.saved"), key=lambda path: path.stat().st_mtime_ns):
            try:
                _put_in_place(save, directory)
            except OSError as error:
                raise CheckpointError(
                    f"{directory}: a save into it was interrupted, and cannot be completed: {error}"
                ) from error


def _put_in_place(save: Path, directory: Path) -> None:
    # Whatever was done before an interruption is done; the rest is the same.
    for name in sorted(os.listdir(save / _FILES), key=lambda name: (name in _ENTRIES, name)):
        os.rename(save / _FILES / name, directory / name)
    sync(directory)
    for name in json.loads((save / _OBSOLETE).read_text(encoding="utf-8")):
        (directory / name).unlink(missing_ok=True)
    sync(directory)
    # Under a name that nobody completes: removing takes more than one step.
    done = save.with_suffix(".partial")
    os.rename(save, done)
    shutil.rmtree(done, ignore_errors=True)


def _leaves(name: str) -> tuple[bool, str]:
    return name not in _ENTRIES, name


def _renamed(files: Path, target: Path) -> bool:
    """Whether `files` became the target; not if another process made that meanwhile."""
    try:
        os.rename(files, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


@contextmanager
def _stage(home: Path, name: str) -> Iterator[Path]:
    """A new folder, locked for as long as it is in use, and removed after that if it still has its name."""
    stage = home / f".{name}.{uuid.uuid4().hex[:8]}.partial"
    stage.mkdir()
    try:
        with _locked(stage):
            stage.mkdir(exist_ok=True)  # removed before it was locked
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _remove_abandoned(home: Path, name: str) -> None:
    """Remove the folders of saves whose process ended before they counted."""
    for stage in home.glob(f".{glob.escape(name)}.{'[0-9a-f]' * 8}.partial"):
        try:
            handle = os.open(stage, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stage, ignore_errors=True)
        except OSError:  # it is in use, or the file system has no locks
            pass
        finally:
            os.close(handle)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
                raise
        yield
    finally:
        os.close(handle)
