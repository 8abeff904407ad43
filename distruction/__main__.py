"""``python -m distruction``."""

from .cli import main

main()
