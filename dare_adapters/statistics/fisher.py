"""Diagonal Fisher information: how much the model's answers depend on each entry.

For merging by Fisher-weighted averages (Matena and Raffel 2022, arXiv 2111.09832).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from dare_adapters.errors import DareError
from dare_adapters.live import LiveParameter
from dare_adapters.statistics.memory import require_memory
from dare_adapters.statistics.modes import gradients_of
from dare_adapters.statistics.places import find_places

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Estimate", "diagonal_fisher", "is_language_model", "resolve_estimate"]

Batch = Mapping[str, torch.Tensor]
Estimate = Literal["auto", "mergelm", "exact", "sampled", "labels"]


def diagonal_fisher(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    names: Iterable[str] | None = None,
    include: Seq[str] = ("*",),
    exclude: Seq[str] = (),
    estimate: Estimate = "auto",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The diagonal of the Fisher information of every float parameter, with the model in eval mode.

    With p = softmax(logits) of an example x, a constant where it stands under a root, and N
    examples in all:

    | estimate | F | gradients |
    |---|---|---|
    | mergelm | 1/N Σ_batches (∇ Σ_x Σ_c √p_c · log p_c)² | one a batch |
    | exact | 1/N Σ_x Σ_c p_c (∇ log p_c)² | one an example and class |
    | sampled | 1/N Σ_batches (∇ Σ_x log p_y)², y drawn from p | one a batch |
    | labels | 1/N Σ_batches (∇ Σ_x log p_y)², y the label | one a batch |

    "mergelm" is what MergeLM's `fisher_merging` computes. It squares what is summed over a batch
    and over classes, so cross terms stay in it and it depends on the batch size; batches of one
    example leave those between classes. Where the model has one output (regression) the gradient
    is that of the batch's mean squared error against `labels`, there too divided by N examples.
    "exact" is Matena and Raffel's definition. "sampled" estimates it without bias, since the
    cross terms between independent draws are zero on average.

    A causal language model has a class for each token of the vocabulary and an outcome for each
    position: log p_y is summed over the positions whose token and next token are not padding.
    MergeLM has no formula for it; "auto" is "sampled" there and "mergelm" elsewhere.

    Memory: 4 bytes for each entry, the gradients of a few layers, and one batch.

    Args:
        model: a sequence classifier, regressor, or causal language model; with whatever adapters
            are active.
        batches: of the model's inputs, each (examples, ...); `labels` where they are used.
        names: checkpoint names; by default those that saving the model would write.
        include, exclude: glob patterns of names.
        estimate: see above.
        seed: of the draws.

    Returns:
        Checkpoint name -> F, float32 of the parameter's shape, on the CPU; a tied weight under its
        first name. Zeros where the output does not depend on a parameter.

    Raises:
        DareError: no batches, a model or batch that the estimate cannot be made of, or a gradient
            that is not finite.
        UnsupportedParameterError: a parameter is on the meta device.
        ValueError: an unknown estimate, or patterns that leave nothing.
    """
    likelihood = _Likelihood(model, estimate, seed)
    places = find_places(model, names, include, exclude)
    parameters = {id(owner): owner for p in places.values() for owner in [_owner(model, p)]}
    require_memory(
        4 * sum(parameter.numel() for parameter in parameters.values()),
        f"the Fisher information of {len(places)} parameters",
        "choose some of them with include (--include PATTERN)",
    )
    with torch.inference_mode(False):
        totals = {key: torch.zeros(p.shape) for key, p in parameters.items()}

    def add_square(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        values = gradient.to("cpu", torch.float32)
        totals[id(parameter)].addcmul_(values, values)

    examples = 0
    with gradients_of(model, list(parameters.values()), add_square):
        for batch in batches:
            for value, last in likelihood.terms(batch):
                value.backward(retain_graph=not last)  # type: ignore[no-untyped-call]
            examples += _size(batch)
    if not examples:
        raise DareError("there are no examples to compute the Fisher information from")
    found = {}
    for total in totals.values():
        total.div_(examples)
    for name, place in places.items():
        found[name] = _window(place, totals[id(_owner(model, place))])
        if not bool(torch.isfinite(found[name]).all()):
            raise DareError(
                f"the Fisher information of {name} is not finite; compute it with the model in "
                "float32"
            )
    return found


def resolve_estimate(model: PreTrainedModel, estimate: Estimate) -> Estimate:
    """What "auto" stands for.

    Raises:
        ValueError: there is no such estimate.
    """
    if estimate not in get_args(Estimate):
        raise ValueError(f"estimate is {estimate!r}; there are {', '.join(get_args(Estimate))}")
    if estimate == "auto":
        return "sampled" if is_language_model(model) else "mergelm"
    return estimate


def is_language_model(model: PreTrainedModel) -> bool:
    """Whether its classes are tokens, one at each position from those before."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


class _Likelihood:
    """What a batch's gradients are taken of."""

    def __init__(self, model: PreTrainedModel, estimate: Estimate, seed: int) -> None:
        self._model = model
        self._causal = is_language_model(model)
        estimate = resolve_estimate(model, estimate)
        if self._causal and estimate in ("mergelm", "exact"):
            raise DareError(
                f"{type(model).__name__} is a language model, for which there are the estimates "
                f"sampled and labels, not {estimate}"
            )
        self._estimate = estimate
        self._generator = torch.Generator(model.device).manual_seed(seed)

    def terms(self, batch: Batch) -> Iterator[tuple[torch.Tensor, bool]]:
        """Scalars whose gradients are squared one by one; whether it is the graph's last."""
        if self._estimate == "exact":
            for number in range(_size(batch)):
                example = {key: value[number : number + 1] for key, value in batch.items()}
                yield from self._each_class(self._logits(example))
            return
        logits = self._logits(batch)
        if self._causal:
            yield self._tokens(batch, logits), True
        elif logits.shape[1] == 1:
            yield self._squared_error(batch, logits), True
        else:
            yield self._classes(batch, logits), True

    def _logits(self, batch: Batch) -> torch.Tensor:
        device = self._model.device
        # What was made in inference mode could not be kept for the backward pass.
        inputs = {
            key: value.to(device).clone() if value.is_inference() else value.to(device)
            for key, value in batch.items()
            if key != "labels"
        }
        found = getattr(self._model(**inputs), "logits", None)
        kind = type(self._model).__name__
        if not isinstance(found, torch.Tensor):
            raise DareError(f"{kind} has no logits; load it with the head of its task")
        logits = found.to(torch.float32)
        problem = getattr(self._model.config, "problem_type", None)
        if self._causal and logits.dim() == 3:
            return logits
        several = logits.dim() == 2 and logits.shape[1] > 1
        if logits.dim() != 2 or (several and problem not in (None, "single_label_classification")):
            raise DareError(
                f"{kind} has outputs {list(logits.shape)} for {problem or 'an unnamed problem'}; "
                "Fisher information is computed for sequence classifiers with one label an "
                "example, regressors with one output, and causal language models"
            )
        return logits

    def _each_class(self, logits: torch.Tensor) -> Iterator[tuple[torch.Tensor, bool]]:
        if logits.shape[1] == 1:
            raise DareError("a regressor has no classes: its Fisher information is mergelm's")
        terms = _weighted(logits)[0]
        for number, term in enumerate(terms, 1):
            yield term, number == len(terms)

    def _classes(self, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        if self._estimate == "mergelm":
            return _weighted(logits).sum()
        outcomes = self._draw(logits) if self._estimate == "sampled" else _labels(batch, logits)
        return -functional.cross_entropy(logits, outcomes.long(), reduction="sum")

    def _tokens(self, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        tokens = batch["input_ids"].to(logits.device)
        real = batch.get("attention_mask", torch.ones_like(tokens)).to(logits.device).bool()
        real = real[:, :-1] & real[:, 1:]
        if self._estimate == "labels":
            outcomes = (_labels(batch, logits) if "labels" in batch else tokens)[:, 1:]
            real &= outcomes >= 0  # -100 is what transformers leaves out
        if not bool(real.any()):
            raise DareError("a batch has no two tokens in a row that are not padding")
        logits = logits[:, :-1][real]
        drawn = self._draw(logits) if self._estimate == "sampled" else outcomes[real]
        return -functional.cross_entropy(logits, drawn, reduction="sum")

    def _squared_error(self, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        if self._estimate not in ("mergelm", "labels"):
            raise DareError(
                f"a regressor's Fisher information is of its labelled error: estimate mergelm, not "
                f"{self._estimate}"
            )
        return functional.mse_loss(logits[:, 0], _labels(batch, logits).to(logits.dtype))

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        shares = logits.detach().softmax(dim=-1)
        return torch.multinomial(shares, 1, generator=self._generator)[:, 0]


def _weighted(logits: torch.Tensor) -> torch.Tensor:
    """√p · log p, the root a constant: squaring a gradient makes it p again."""
    return logits.softmax(dim=-1).detach().sqrt() * logits.log_softmax(dim=-1)


def _labels(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    if "labels" not in batch:
        raise DareError(
            "this estimate needs labels, and the batch has none; name their column "
            "(label_column, --label-column)"
        )
    return batch["labels"].to(logits.device)


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _owner(model: PreTrainedModel, place: LiveParameter) -> nn.Parameter:
    owner = place.tensor(model)
    assert isinstance(owner, nn.Parameter)
    return owner


def _window(place: LiveParameter, owner: torch.Tensor) -> torch.Tensor:
    """A checkpoint parameter's part of its live owner's contiguous counterpart."""
    if place.positions is not None:
        return owner.view(-1)[place.positions].view(place.shape)
    return owner.as_strided(place.shape, place.strides, place.offset)
