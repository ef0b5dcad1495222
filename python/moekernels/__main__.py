"""`python -m moekernels`."""

import sys

from moekernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
