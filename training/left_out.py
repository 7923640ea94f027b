"""Files, lines and records that a corpus leaves out: counted by reason, and shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


def shown(value: object, most: int = 100) -> str:
    """A value as part of a one-line message: escaped where it cannot be printed, and cut at `most` characters."""
    text = str(value)
    text = text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2) :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shown_path(path: Path) -> str:
    """A path as part of a one-line message, whole unless it is absurdly long."""
    return shown(path, most=400)


def shown_error(error: BaseException) -> str:
    """The words of a library's error on one line, or its type where it has none."""
    return shown(" ".join(str(error).split()) or type(error).__name__)


@dataclass
class LeftOut:
    """Counts by reason, each with the first name as an example; a noun in a reason ends in `(s)`."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Counts one more, or `count`."""
        before, example = self.reasons.get(reason, (0, name))
        self.reasons[reason] = (before + count, example)

    def with_more(self, other: LeftOut) -> LeftOut:
        """Both together."""
        together = LeftOut(dict(self.reasons))
        for reason, (count, example) in other.reasons.items():
            together.add(reason, example, count)
        return together

    @property
    def total(self) -> int:
        return sum(count for count, _ in self.reasons.values())

    def __bool__(self) -> bool:
        return bool(self.reasons)

    def __str__(self) -> str:
        """One line, such as `2 empty (a.txt), 1 binary (logo.png)`."""
        ranked = sorted(self.reasons.items(), key=lambda item: -item[1][0])
        return ", ".join(
            f"{count:,} {reason.replace('(s)', '' if count == 1 else 's')} ({shown(example, 60)})"
            for reason, (count, example) in ranked
        )
