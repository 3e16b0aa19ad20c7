"""The files that commands write, and what they need that may not be installed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


def check_output(name: str, path: Path) -> None:
    """Makes the folder of a file that a command will write when its work is done.

    Raises ValueError, naming the argument, where no such file can be there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ValueError(f"{name} = {path}: expected a file, and this is a folder")
    except OSError as error:  # a file among the folders, a name too long
        raise ValueError(f"{name} = {path}: cannot be written: {error.strerror}") from error


def check_empty(name: str, folder: Path) -> None:
    """Raises ValueError, naming the argument, where a folder to write is a file or holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{name} = {folder}: expected a folder that is empty or not there yet")


@contextlib.contextmanager
def missing_extra(extra: str) -> Iterator[None]:
    """Turns the lack of a package into a ValueError that names the extra which brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed: pip install -e ".[{extra}]"') from error
