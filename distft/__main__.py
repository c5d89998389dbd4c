"""`python -m distft`, and `torchrun -m distft train ...`."""

from __future__ import annotations

from distft.cli import main

if __name__ == "__main__":
    main()
