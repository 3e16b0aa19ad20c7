"""The files that commands write."""

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
