"""What is left of a fine-tune after dropping, unrounded: of its delta, or of its weights."""

from __future__ import annotations

from dare_adapters.combine.sparsify import RandomMasks, drop_at_random, keep_largest
from dare_adapters.delta import Delta, DenseDelta
from dare_adapters.difference import ParameterDifference
from dare_adapters.source import BaseReader, DeltaSource, Renamed

__all__ = ["METHODS", "Pruned"]

METHODS = ("dare", "drop_only", "magnitude", "masked_weights")


class Pruned(Renamed):
    """A fine-tune with entries dropped, as a delta over its base.

    | method | the weights, W fine-tuned and B the base's, m a random mask |
    |---|---|
    | dare | B + m ⊙ (W - B) / (1-p) |
    | drop_only | B + m ⊙ (W - B) |
    | magnitude | B + the largest 1-p of W - B, by parameter |
    | masked_weights | m ⊙ W / (1-p): the paper's counter-example, which has no base |

    Args:
        source: fine-tune minus base, exact.
        method: one of METHODS.
        drop_rate: p.
        seed: of the masks.
        mask: "auto", "blocked" or "bernoulli".
        keep_vectors: leave parameters of one dimension as the fine-tune has them.
    """

    def __init__(
        self,
        source: DeltaSource,
        method: str,
        drop_rate: float,
        *,
        seed: int = 0,
        mask: str = "auto",
        keep_vectors: bool = False,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; there are {', '.join(METHODS)}")
        super().__init__(source, {name: name for name in source})
        self.method, self.drop_rate, self.mask = method, drop_rate, mask
        self.keep_vectors, self._seed = keep_vectors, source.mask_seed(seed)

    def __getitem__(self, name: str) -> Delta:
        difference = super().__getitem__(name)
        assert isinstance(difference, ParameterDifference)
        if self.drop_rate == 0 or (self.keep_vectors and len(difference.shape) < 2):
            return difference
        if self.method == "magnitude":
            return keep_largest(difference, self._density)
        masks = RandomMasks(name, [self._seed], self.mask)
        if self.method != "masked_weights":
            rescale = self.method == "dare"
            return drop_at_random(difference, self._density, masks, 0, rescale=rescale)
        shape = difference.shape
        weight = DenseDelta(difference.finetuned.float().view(shape), difference.added_rows)
        kept = drop_at_random(weight, self._density, masks, 0, rescale=True)
        change = kept.dense() - difference.base.float().view(shape)
        return DenseDelta(change, difference.added_rows)

    @property
    def _density(self) -> float:
        return round(1 - self.drop_rate, 12)  # 1 - 0.9 is below 0.1

    def parameter(self, name: str, base: BaseReader | None) -> Delta:
        return self[name]

    @property
    def identity(self) -> str:
        how = f"{self.method}-{self.drop_rate}-{self._seed}-{self.mask}-{self.keep_vectors}"
        return f"{self.source.identity}-{how}"
