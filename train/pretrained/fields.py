"""Settings in a file, each checked as it is read. Errors name the file, the field, its value and what was expected."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MISSING = object()


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a file, or of a group in it. A field that is null counts as one that is not there."""

    file: Path
    values: Mapping[str, Any]
    prefix: str = ""  # of the names in messages, for a group

    def wrong(self, name: str, expected: str) -> ValueError:
        """What to raise for a field."""
        value = self.values.get(name)
        shown = "is missing" if value is None else f"= {value!r}"
        return ValueError(f"{self.file}: {self.prefix}{name} {shown}: expected {expected}")

    def integer(self, name: str, default: Any = MISSING) -> int:
        """A positive integer."""
        value = self._get(name, default, "a positive integer")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(name, "a positive integer")
        return value

    def number(self, name: str, default: Any = MISSING) -> float:
        """A positive finite number."""
        value = self._get(name, default, "a positive number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: Any = MISSING) -> bool:
        """True or false."""
        value = self._get(name, default, "true or false")
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: Any = MISSING) -> str:
        """Some text."""
        value = self._get(name, default, "some text")
        if not isinstance(value, str):
            raise self.wrong(name, "some text")
        return value

    def group(self, name: str) -> "Fields":
        """The fields of a group; none where it is missing."""
        value = self._get(name, {}, "")
        if not isinstance(value, dict):
            raise self.wrong(name, "a group of fields")
        return Fields(self.file, value, f"{self.prefix}{name}.")

    def check(self, name: str, *allowed: Any, why: str = "") -> None:
        """Raises ValueError where a field has a value that is not among those allowed. It may be missing."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise self.wrong(name, " or ".join(map(repr, allowed)) + why)

    def _get(self, name: str, default: Any, expected: str) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is MISSING:
            raise self.wrong(name, expected)
        return default
