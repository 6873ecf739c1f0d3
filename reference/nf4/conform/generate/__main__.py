"""The command that writes the vectors or, with --check, compares the stored ones with what it would write."""

import argparse
import sys
from pathlib import Path

from nf4.conform.generate import arithmetic, codec, files, lora, models, nested, random, step, training
from nf4.conform.generate.schemas import schemas
from nf4.conform.operations import OPERATIONS
from nf4.conform.vectors import VECTORS, canonical
from nf4.formats.files import atomic_write


def contents() -> dict[str, bytes]:
    """Return the file of each operation that has vectors, and the schemas, by name."""
    vectors = [
        vector
        for module in (codec, nested, random, lora, training, files, models, arithmetic, step)
        for vector in module.vectors()
    ]
    by_operation = {name: [v for v in vectors if v.operation == name] for name in OPERATIONS}
    return {f"{name}.json": canonical(name, mine) for name, mine in by_operation.items() if mine} | schemas()


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or compare them: the exit code is 1 where a stored file differs."""
    parser = argparse.ArgumentParser(prog="python -m nf4.conform.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a stored file differs")
    parser.add_argument(
        "--directory", type=Path, default=VECTORS, help="where they are (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    wrong = 0
    for name, content in contents().items():
        path = options.directory / name
        stored = path.read_bytes() if path.exists() else None
        if stored == content:
            continue
        wrong += 1
        if options.check:
            print(f"{path}: {'is missing' if stored is None else 'differs'}; write it with {parser.prog}")
        else:
            with atomic_write(path) as file:
                file.write(content)
            print(f"{path}: written, {len(content)} bytes")
    return int(options.check and wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
