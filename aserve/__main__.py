"""``python -m aserve``."""

import sys

from aserve.server.cli import main

if __name__ == "__main__":
    sys.exit(main())
