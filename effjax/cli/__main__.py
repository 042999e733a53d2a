"""`python -m effjax.cli`: the same as `effjax`."""

import sys

from effjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
