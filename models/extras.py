"""The one line in which a program ends that lacks the packages of an extra."""

import sys
import typing

_OWN = {"models", "pallas_kernels", "s2jax", "training"}


def exit_for_missing(error: ModuleNotFoundError, program: str, extra: str) -> typing.NoReturn:
    """Ends a program whose imports failed: one line on stderr and exit code 2.

    Args:
        error: of the import; raised again if a module of this project is missing.
        program: its name.
        extra: of pyproject.toml, which has the missing package.
    """
    missing = (error.name or "").split(".")[0]
    if missing in _OWN or not missing:
        raise error
    print(
        f"{program}: the package {missing} is missing; from the checkout, this installs what is needed: "
        f"python -m pip install -c constraints.txt -e '.[{extra}]'",
        file=sys.stderr,
    )
    sys.exit(2)
