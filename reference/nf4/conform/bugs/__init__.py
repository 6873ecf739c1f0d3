"""Wrong ports: for each flag of the vectors one that has that bug and no other (NF4-13.1).

BUGS holds them by flag, as Python ports (NF4-13.3); each is a subclass of Plain, which is a correct one.
"""

from nf4.conform.bugs import codec, exact, files, step, training
from nf4.conform.bugs.plain_files import Plain

__all__ = ["BUGS", "Plain"]

BUGS: dict[str, Plain] = {
    name: kind()
    for module in (codec, training, files, exact, step)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and kind.__module__ == module.__name__ and issubclass(kind, Plain)
}
