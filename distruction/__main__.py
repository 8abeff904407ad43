"""``python -m distruction``, and the script ``distruction``."""

import sys

from .errors import MissingPackage


def main() -> None:
    """Run the command line; ``doctor`` does without the packages of the others, as it says what is missing."""
    try:
        from .cli import main as run
    except MissingPackage as error:
        if sys.argv[1:] != ["doctor"]:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        from . import doctor

        print(doctor.report())
    else:
        run()


if __name__ == "__main__":
    main()
