"""PyTorch imported with Python's garbage collector at rest.

An import makes a million objects that stay. The collector goes through them again and again as
they come, for a sixth of the time that the import takes, and finds nothing.
"""

from __future__ import annotations

import gc

_collecting = gc.isenabled()
gc.disable()
try:
    import torch  # noqa: F401
finally:
    if _collecting:
        gc.enable()
