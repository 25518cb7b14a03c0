"""``python -m mscompile``."""

from mscompile.cli import main

if __name__ == "__main__":
    main()
