"""``python -m thresher``: the same as the ``thresher`` command."""

import sys

from thresher.cli import main

if __name__ == "__main__":
    sys.exit(main())
