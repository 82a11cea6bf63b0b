"""One batch under adapters of different vocabularies: a fine-tune may have added words to its own.

A row's adapter gives the words that it lacks the logit -inf, so that the row never answers with
one. As input such a word is refused, but where it is masked: one tokenizer pads the whole batch,
perhaps with a word that not all of the adapters know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from dare_adapters.tuner.layer import DareLayer

__all__ = ["forward_known_words", "widened", "words_checked"]

# What models and `generate` call their tokens -> the mask of these.
_TOKENS = {
    "input_ids": "attention_mask",
    "inputs": "attention_mask",
    "decoder_input_ids": "decoder_attention_mask",
}


@contextmanager
def words_checked(
    model: nn.Module, adapters: Sequence[Sequence[str]], args: tuple[Any, ...], kwargs: Any
) -> Iterator[None]:
    """Inside the block, refuse a batch in which a row has a word that its adapter does not.

    What is checked is what `generate` is given, and the first forward. After that `generate` pads
    rows that have been answered with whatever the model pads with.

    Args:
        model: the base, with layers in it.
        adapters: of each row: its adapter, or none.
        args, kwargs: of the forward or `generate`, as far as PEFT tells.

    Raises:
        ValueError: which row, which word; from the forward or at once.
    """
    layer = _input_embeddings(model)
    own = isinstance(layer, DareLayer) and isinstance(layer.owner, nn.Embedding)
    known = [layer.rows_under("weight", names) for names in adapters] if own else []
    if len(set(known)) <= 1:
        yield
        return
    hooks: list[RemovableHandle] = []

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for hook in hooks:
            hook.remove()
        _check_words(module, adapters, known, args, kwargs)

    _check_words(model, adapters, known, args, kwargs)
    hooks.append(model.register_forward_pre_hook(check, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def forward_known_words(
    layer: DareLayer, adapters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A layer's forward, in which an embedding makes zeros of words that it does not have.

    Such are masked, or follow the end of a row that has been answered.
    """
    if not isinstance(layer.owner, nn.Embedding):
        return layer.forward_with(adapters, args, kwargs)
    tokens = args[0] if args else kwargs["input"]
    unknown = tokens >= layer.rows_under("weight", adapters)
    found = layer.forward_with(adapters, (tokens.masked_fill(unknown, 0),), {})
    return found.masked_fill(unknown.unsqueeze(-1), 0)


def widened(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs that differ in nothing but how many words there are, each with all of them."""
    widths = [one.shape[-1] if one.dim() else 0 for one in outputs]
    widest = max(widths)
    if min(widths) == widest or len({one.shape[1:-1] for one in outputs}) > 1:
        return list(outputs)
    if not all(one.is_floating_point() for one in outputs):
        return list(outputs)
    return [
        functional.pad(one, (0, widest - width), value=-torch.inf)
        for one, width in zip(outputs, widths, strict=True)
    ]


def _check_words(
    model: nn.Module,
    adapters: Sequence[Sequence[str]],
    known: Sequence[int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    given = {**dict(zip(("input_ids",), args, strict=False)), **kwargs}
    for name, mask_name in _TOKENS.items():
        tokens = given.get(name)
        if not isinstance(tokens, torch.Tensor) or tokens.shape[:1] != (len(known),):
            continue
        limit = torch.tensor(known, device=tokens.device)
        unknown = tokens >= limit.view(-1, *[1] * (tokens.dim() - 1))
        mask = given.get(mask_name)
        if isinstance(mask, torch.Tensor) and mask.shape == tokens.shape:
            unknown &= mask != 0
        elif (padding := _padding(model, kwargs)) is not None:
            unknown &= tokens != padding
        if bool(unknown.any()):
            row = int(unknown.flatten(1).any(1).nonzero()[0])
            word = int(tokens[row][unknown[row]][0])
            own = "the base" if not adapters[row] else f"adapter {adapters[row][0]!r}"
            raise ValueError(
                f"row {row} of {name} has the token {word}, and the vocabulary of {own} ends at "
                f"{known[row] - 1}: take each row's tokens from its own adapter's tokenizer"
            )


def _input_embeddings(model: nn.Module) -> Any:
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _padding(model: nn.Module, kwargs: Any) -> int | None:
    """The token by which `generate` finds out what to mask."""
    holders = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
    for value in (kwargs.get("pad_token_id"), *(getattr(h, "pad_token_id", None) for h in holders)):
        if isinstance(value, int):
            return value
    return None
