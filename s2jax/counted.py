"""A number and its noun, as the programs print them."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Returns "1 head", "2 heads" or "1,024 heads"; a plural that is not the noun and an s is given."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
