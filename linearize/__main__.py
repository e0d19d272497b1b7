"""`python -m linearize` is the command line."""

from __future__ import annotations

from linearize.cli import main

if __name__ == "__main__":
    main()
