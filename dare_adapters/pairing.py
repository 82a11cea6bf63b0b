"""Which parameter of a fine-tune belongs to which of the base, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from dare_adapters.checkpoint import Checkpoint
from dare_adapters.errors import CheckpointMismatchError
from dare_adapters.live import LEGACY_SUFFIXES

__all__ = ["TIED_HEADS", "Pairing", "embedding_name", "pair_parameters"]

TIED_HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")
LISTED = 12


@dataclass
class Pairing:
    """The result: what both have, what only one has.

    Attributes:
        prefix: the fine-tune's name of a shared parameter is `prefix` + the base's, as a rule.
        common: base name -> fine-tune name, sorted.
        grown: base names whose fine-tune has more rows (an extended vocabulary).
        new: adapter name -> fine-tune name of what the base has not.
        ignored: base names that the fine-tune's architecture leaves out.
    """

    prefix: str = ""
    common: dict[str, str] = field(default_factory=dict)
    grown: set[str] = field(default_factory=set)
    new: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def pair_parameters(
    base: Checkpoint, finetuned: Checkpoint, ignore_missing: Sequence[str] = ()
) -> Pairing:
    """Match the parameters of two checkpoints.

    Args:
        ignore_missing: glob patterns of base parameters that the fine-tune may lack.

    Raises:
        CheckpointMismatchError: the fine-tune lacks base parameters, or shapes disagree; all are
            listed.
    """
    pairing = Pairing(prefix=_best_prefix(base, finetuned))
    found: dict[str, str] = {}
    for name in base:
        partner = _partner(name, pairing.prefix, finetuned)
        if partner is not None:
            found[name] = partner
    pairing.common = dict(sorted(found.items()))
    _drop_tied_copies(base, finetuned, pairing)
    _check_missing(base, finetuned, pairing, ignore_missing)
    _check_shapes(base, finetuned, pairing)
    taken = set(found.values())
    for name in sorted(set(finetuned) - taken - set(_tied_copies(base, finetuned, pairing))):
        inside = pairing.prefix and name.startswith(pairing.prefix)
        pairing.new[name.removeprefix(pairing.prefix) if inside else name] = name
    return pairing


def _best_prefix(base: Checkpoint, finetuned: Checkpoint) -> str:
    """What to put before base names so that most are found: "", "bert.", or "-bert." to strip."""
    candidates = [""]
    candidates += sorted({f"{name.split('.')[0]}." for name in finetuned if "." in name})
    candidates += sorted({f"-{name.split('.')[0]}." for name in base if "." in name})
    return max(candidates, key=lambda p: sum(_partner(n, p, finetuned) is not None for n in base))


def _partner(name: str, prefix: str, finetuned: Checkpoint) -> str | None:
    name = name.removeprefix(prefix[1:]) if prefix.startswith("-") else prefix + name
    if name in finetuned:
        return name
    for old, new in LEGACY_SUFFIXES.items():
        for have, want in ((old, new), (new, old)):
            renamed = name.removesuffix(have) + want
            if name.endswith(have) and "LayerNorm" in name and renamed in finetuned:
                return renamed
    return None


def _check_missing(
    base: Checkpoint, finetuned: Checkpoint, pairing: Pairing, ignore_missing: Sequence[str]
) -> None:
    """Base parameters without a partner are an error unless something explains them."""
    accounted = {*pairing.common, *pairing.ignored}
    missing = [name for name in base if name not in accounted]
    if not missing:
        return  # and spare the import of the model's class
    tied = set(_tied_copies(finetuned, base, pairing))
    backbone = _backbone_prefix(base)
    other_class = base.architectures != finetuned.architectures
    obsolete = _obsolete_patterns(base)
    left = []
    for name in missing:
        buffer = not base.info[name].dtype.is_floating_point
        head = other_class and backbone and not name.startswith(backbone)
        asked = any(fnmatchcase(name, pattern) for pattern in ignore_missing)
        if name in tied or buffer or head or asked or any(p.search(name) for p in obsolete):
            pairing.ignored.append(name)
        else:
            left.append(name)
    if left:
        raise CheckpointMismatchError(
            f"{finetuned.path} lacks {len(left)} of the {len(base)} parameters of {base.path}: "
            f"{_listed(left)}. Either it is not a fine-tune of that base, or it dropped them on "
            "purpose: then name them with ignore_missing (--ignore-missing PATTERN)"
        )


def _check_shapes(base: Checkpoint, finetuned: Checkpoint, pairing: Pairing) -> None:
    wrong = []
    for name, partner in list(pairing.common.items()):
        here, there = base.info[name], finetuned.info[partner]
        if here.dtype.is_floating_point != there.dtype.is_floating_point:
            wrong.append(f"{name} ({here.dtype} against {there.dtype})")
        elif here.shape == there.shape:
            continue
        elif _is_vocabulary(name, base) and _has_grown(here.shape, there.shape):
            pairing.grown.add(name)
        elif _is_head(name, base, finetuned):
            # A head for other labels has nothing in common with the base's: it travels whole.
            del pairing.common[name]
            pairing.new[name] = partner
        else:
            wrong.append(f"{name} ({list(here.shape)} against {list(there.shape)})")
    if wrong:
        raise CheckpointMismatchError(
            f"{len(wrong)} parameters have other shapes in {finetuned.path} than in {base.path}: "
            f"{_listed(wrong)}. Only a vocabulary may grow and a task head may be replaced"
        )


def _has_grown(base: tuple[int, ...], finetuned: tuple[int, ...]) -> bool:
    return len(base) == len(finetuned) and base[1:] == finetuned[1:] and finetuned[0] > base[0]


def _is_vocabulary(name: str, base: Checkpoint) -> bool:
    """Whether a parameter has a row for each token."""
    shape = base.info[name].shape
    if not shape:
        return False
    return shape[0] == base.vocab_size or bool(re.search(r"embed|wte|lm_head", name))


def _is_head(name: str, base: Checkpoint, finetuned: Checkpoint) -> bool:
    backbone = _backbone_prefix(base) or _backbone_prefix(finetuned)
    return bool(backbone) and not name.startswith(backbone) and name not in TIED_HEADS


def _backbone_prefix(checkpoint: Checkpoint) -> str:
    """`base_model_prefix` of the checkpoint's class with a dot, if its names have it."""
    import transformers

    for architecture in checkpoint.architectures:
        prefix = getattr(getattr(transformers, architecture, None), "base_model_prefix", "")
        if prefix and any(name.startswith(f"{prefix}.") for name in checkpoint):
            return f"{prefix}."
    return ""


def _obsolete_patterns(base: Checkpoint) -> list[re.Pattern[str]]:
    """Names that transformers itself skips: buffers that old releases saved."""
    import transformers

    patterns = [r"rotary_emb\.inv_freq$", r"\.position_ids$", r"\.attn\.(masked_)?bias$"]
    for architecture in base.architectures:
        known = getattr(transformers, architecture, None)
        patterns += getattr(known, "_keys_to_ignore_on_load_unexpected", None) or []
    return [re.compile(pattern) for pattern in patterns]


def _drop_tied_copies(base: Checkpoint, finetuned: Checkpoint, pairing: Pairing) -> None:
    """Where both store the tied head as well as the embedding, one delta is enough."""
    for name in TIED_HEADS:
        if name in pairing.common and base.tied and finetuned.tied:
            embedding = embedding_name(pairing.common)
            if embedding and _same(finetuned, pairing.common[name], pairing.common[embedding]):
                del pairing.common[name]
                pairing.ignored.append(name)


def _tied_copies(holder: Checkpoint, other: Checkpoint, pairing: Pairing) -> list[str]:
    """Heads that `other` stores although it ties them, where `holder` does not."""
    return [
        name
        for name in TIED_HEADS
        if name in other and other.tied and (name not in holder) and holder.tied
    ]


def embedding_name(names: Iterable[str]) -> str | None:
    """The first of these that is an input embedding, as checkpoints call them."""
    for name in names:
        if re.search(r"(embed_tokens|word_embeddings|wte|embed_in|shared)\.weight$", name):
            return name
    return None


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    return checkpoint.info[one] == checkpoint.info[other] and torch.equal(
        checkpoint[one], checkpoint[other]
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
