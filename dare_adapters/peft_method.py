"""Makes "DARE" a method of PEFT; run once PEFT is imported, by whoever imports it."""

from __future__ import annotations

__all__ = ["register"]

_NAME = "dare"


def register() -> None:
    """Enter the method in PEFT's tables; doing it again does nothing.

    A PEFT without the hooks that the tuner needs (before 0.21) is left as it is: using the method
    then fails with PEFT's own message.
    """
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.peft_types import PeftType, register_peft_method

    if _NAME.upper() in PeftType.__members__ or not hasattr(BaseTuner, "_get_adapter_state_dict"):
        return
    from dare_adapters.enum_member import add_member

    add_member(PeftType, _NAME.upper(), _NAME.upper())
    from dare_adapters.tuner.config import DareConfig
    from dare_adapters.tuner.model import DareModel

    register_peft_method(name=_NAME, config_cls=DareConfig, model_cls=DareModel)
    from peft.utils import transformers_weight_conversion as rules

    from dare_adapters.tuner.renaming import instead_of

    rules.build_peft_weight_mapping = instead_of(rules.build_peft_weight_mapping)
