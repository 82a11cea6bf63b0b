"""A combination type of one's own: after `pip install ./examples/own_method` it is everywhere.

    model.add_weighted_adapter(["a", "b", "c"], [1, 1, 1], "mid", combination_type="median")
    dare-adapters combine a b c --combination-type median -o scale=1.5 out

The signature is the configuration: what follows the `*` are its options.
"""

from collections.abc import Sequence

import torch

from dare_adapters import delta_method
from dare_adapters.combine.union import Elementwise
from dare_adapters.delta import Delta


@delta_method("median", least=3)
def median(deltas: Sequence[Delta], weights: Sequence[float], *, scale: float = 1.0) -> Delta:
    """scale · median(wᵢ δᵢ), entry by entry: one adapter that goes astray moves nothing.

    Args:
        deltas: of one parameter, at least three.
        weights: one for each.
        scale: factor of the result.
    """
    factors = torch.tensor(list(weights))[:, None]

    def middle(values: torch.Tensor) -> torch.Tensor:
        return (values * factors).median(dim=0).values * scale

    return Elementwise(deltas, middle)
