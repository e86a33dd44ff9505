"""``python -m lncompile``: the command ``lncompile``."""

from lncompile.cli import main

if __name__ == "__main__":
    main()
