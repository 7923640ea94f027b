"""Values and counts in the messages of errors and programs."""

MOST_SHOWN = 100
"""Characters of a wrong value that an error quotes."""


def shown(value) -> str:
    """Returns `repr(value)`, cut to part of a line."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}… ({len(text)} characters)"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Returns "1 head", "2 heads" or "1,024 heads"; `plural` is needed where it is not the noun and an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
