"""Everything that waits for a GPU, as one command for the minutes in which there is one.

python -m benchmarks.gpu --minutes 12 --out DIR
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The modules beside this folder import each other by name, as pytest lets them (pyproject.toml: pythonpath).
if str(ROOT / "benchmarks") not in sys.path:
    sys.path.insert(0, str(ROOT / "benchmarks"))
