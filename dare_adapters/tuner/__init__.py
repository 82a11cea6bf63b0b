"""DARE as a method of PEFT: `PeftModel`, `load_adapter`, mixed batches, training.

Importing it imports PEFT, which takes seconds; `import dare_adapters` alone does not.
"""

import peft as _peft  # noqa: F401 (registers the method, by way of dare_adapters.peft_method)

from dare_adapters.tuner.config import DareConfig
from dare_adapters.tuner.mixed_model import allow_in_mixed_models
from dare_adapters.tuner.model import DareModel

__all__ = ["DareConfig", "DareModel", "allow_in_mixed_models"]
