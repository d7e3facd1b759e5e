"""``python -m s2ap_ext.cli``: the ``s2ap`` command where its script is not on the path."""

import sys

from . import main

sys.exit(main())
