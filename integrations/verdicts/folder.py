"""A temporary folder that is deleted whatever a program has put in it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Yield an empty folder; delete it at the end, as far as the system lets this user."""
    folder = tempfile.mkdtemp(prefix="program-")
    try:
        yield folder
    finally:
        with suppress(OSError):
            _empty(folder)
            os.rmdir(folder)


def _empty(folder: str) -> None:
    """Delete what a folder holds.

    ``shutil.rmtree`` takes a call and a descriptor for each folder inside another, and a program
    can nest thousands.  Here one folder is open at a time.  No link is followed.
    """
    here = os.open(folder, OPEN)
    way: list[tuple[tuple[int, int], list[str]]] = []  # from the top: a folder, and those in it
    try:
        folders = _clear(here)
        while folders or way:
            if folders:
                inside = os.open(folders[-1], OPEN, dir_fd=here)
                way.append((_identity(here), folders))
                folders = _clear(inside)
                here = _change(here, inside)
            else:
                here = _change(here, os.open("..", OPEN, dir_fd=here))
                identity, folders = way.pop()
                if _identity(here) != identity:  # something that still runs has moved it
                    return
                os.rmdir(folders.pop(), dir_fd=here)
    finally:
        os.close(here)


def _change(old: int, new: int) -> int:
    os.close(old)
    return new


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def _clear(descriptor: int) -> list[str]:
    """Delete the files of an open folder; return the names of its folders, which can be opened."""
    with os.scandir(descriptor) as found:
        entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
    for name, is_folder in entries:
        if is_folder:
            os.chmod(name, 0o700, dir_fd=descriptor)
        else:
            os.unlink(name, dir_fd=descriptor)
    return [name for name, is_folder in entries if is_folder]
