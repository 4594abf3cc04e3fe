"""The benchmarks import one another as scripts do: by their file's name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
