"""`python -m qmica`, and the `qmica` script that pip installs."""

import sys

from qmica.cli import main

if __name__ == "__main__":
    sys.exit(main())
