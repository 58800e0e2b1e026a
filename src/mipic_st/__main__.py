"""``python -m mipic_st``."""

import sys

from mipic_st.cli import main

if __name__ == "__main__":
    sys.exit(main())
