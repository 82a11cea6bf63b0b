"""Base and fine-tune to an adapter: save(prune(Difference))."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from tqdm.auto import tqdm

from dare_adapters import codec
from dare_adapters.adapter import Adapter
from dare_adapters.adapter_writer import AdapterWriter
from dare_adapters.checkpoint import Checkpoint, open_checkpoint
from dare_adapters.companions import copy_companions
from dare_adapters.config import AdapterConfig
from dare_adapters.difference import Difference, Finetuned
from dare_adapters.encode import EncodedParameter, encode_dense, encode_new, encode_sparse
from dare_adapters.errors import (
    CheckpointError,
    DeltaTooLargeError,
    DeltaTooLargeWarning,
)
from dare_adapters.finite import first_non_finite
from dare_adapters.model_card import write_model_card
from dare_adapters.output import complete_directory, require_space
from dare_adapters.pairing import Pairing, pair_parameters
from dare_adapters.parallel import worker_pool
from dare_adapters.prune import PruneRule
from dare_adapters.versions import library_versions
from dare_adapters.witness import encode_witness

__all__ = ["extract"]

# Parameters that are begun before the first of them is written: workers never wait for the disk.
AHEAD = 3
TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def extract(
    base: str | Path,
    finetuned: str | Path,
    out: str | Path,
    *,
    drop_rate: float = 0.9,
    bits: int = 4,
    method: Literal["dare", "drop_only", "magnitude"] = "dare",
    mask: Literal["auto", "blocked", "bernoulli"] = "auto",
    rescale: bool = True,
    seed: int | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    drop_rates: Mapping[str, float] | None = None,
    ignore_missing: Sequence[str] = (),
    on_large_delta: Literal["warn", "error", "ignore"] = "warn",
    revision: str | None = None,
    finetuned_revision: str | None = None,
    token: str | bool | None = None,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: bool = True,
) -> Adapter:
    """Turn a full fine-tune into an adapter over its base.

    Every parameter with two or more dimensions is pruned; the others are kept whole. What only
    the fine-tune has (a task head, added vocabulary rows) travels whole too. Parameters are
    streamed: memory is bounded by a few of the largest, and `out` appears complete or not at all.

    Args:
        base, finetuned: directories, or hub ids.
        out: directory to write.
        drop_rate: share p of each delta's entries that is dropped, in [0, 1).
        bits: 32, 16 (as they are), 8, 4, 2 or 1 bits for each survivor.
        method: "dare" (drop at random, rescale by 1/(1-p)), "drop_only" (no rescaling),
            "magnitude" (keep the largest).
        mask: "auto" is "blocked" wherever 1/(1-p) is a whole number, else "bernoulli".
        rescale: False makes "dare" the same as "drop_only".
        seed: 0 … 2**64-1; by default derived from the fine-tune's own values.
        include: glob patterns of the parameters to prune; what matches none is kept whole.
        exclude: glob patterns of parameters that are kept whole.
        drop_rates: glob pattern -> drop rate, for parameters that need another; the first match.
        ignore_missing: glob patterns of base parameters that the fine-tune may lack.
        on_large_delta: what to do about a delta outside the range in which DARE is known to hold.
        revision, finetuned_revision, token: for hub ids.
        workers: threads; by default the cores, at most eight. They never change the result.
        device: where survivors are gathered and rounded, such as "cuda"; masks are drawn on the
            CPU. Sums on another device may round a scale differently.
        overwrite: replace `out` if it exists.
        progress: show a bar.

    Returns:
        The adapter, opened.

    Raises:
        CheckpointError: a checkpoint cannot be read, or holds NaN or infinity.
        CheckpointMismatchError: the two do not describe the same parameters.
        DeltaTooLargeError: the delta is too large and `on_large_delta` is "error".
        AdapterExistsError: `out` exists and `overwrite` is not set.
        DareError: `out` cannot be written.
        ValueError: an option is out of range.
    """
    if method == "dare" and not rescale:
        method = "drop_only"
    plan = _Plan(
        PruneRule(method, drop_rate, mask),
        bits,
        tuple(include),
        tuple(exclude),
        {pattern: PruneRule(method, p, mask) for pattern, p in (drop_rates or {}).items()},
    )
    if seed is not None and not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; it must be 0 … 2**64-1")
    base_checkpoint = open_checkpoint(base, revision, token)
    finetuned_checkpoint = open_checkpoint(finetuned, finetuned_revision, token)
    pairing = pair_parameters(base_checkpoint, finetuned_checkpoint, ignore_missing)
    difference = Difference(base_checkpoint, finetuned_checkpoint, pairing)
    _report_large_delta(difference, on_large_delta)
    config = _describe(base_checkpoint, finetuned_checkpoint, pairing, plan)
    config.base_model_name_or_path, config.revision = str(base), revision
    config.finetuned_model["name_or_path"] = str(finetuned)
    config.finetuned_model["revision"] = finetuned_revision
    config.seed = int(Finetuned(difference).identity) if seed is None else seed
    target = Path(out)
    with complete_directory(target, overwrite) as directory:
        require_space(directory, _expected_bytes(difference, plan))
        _write_tensors(directory, difference, plan, config, workers, progress, device)
        copy_companions(base_checkpoint.path, finetuned_checkpoint.path, directory)
        config.save(directory)
        write_model_card(directory, config, base_checkpoint.nbytes)
    return Adapter.open(target, verify=False)


@dataclass
class _Plan:
    """Which parameters are pruned, and how."""

    rule: PruneRule
    bits: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    drop_rates: dict[str, PruneRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bits not in codec.BITS:
            valid = ", ".join(str(b) for b in codec.BITS)
            raise ValueError(f"bits is {self.bits}; there are {valid}")

    def rule_for(self, name: str, shape: tuple[int, ...]) -> PruneRule | None:
        """The rule of one parameter, None where it is kept whole."""
        for pattern, rule in self.drop_rates.items():
            if fnmatchcase(name, pattern):
                return rule
        whole = len(shape) < 2 or not _matches(name, self.include) or _matches(name, self.exclude)
        return None if whole else self.rule


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _report_large_delta(difference: Difference, action: str) -> None:
    concern = None if action == "ignore" else difference.sample().concern
    if concern is None:
        return
    if action == "error":
        raise DeltaTooLargeError(concern)
    warnings.warn(concern, DeltaTooLargeWarning, stacklevel=3)


def _describe(
    base: Checkpoint, finetuned: Checkpoint, pairing: Pairing, plan: _Plan
) -> AdapterConfig:
    architecture = finetuned.architectures[0] if finetuned.architectures else ""
    task = next((t for end, t in TASK_TYPES.items() if architecture.endswith(end)), None)
    return AdapterConfig(
        base_architectures=base.architectures,
        task_type=task,
        method=plan.rule.method,
        mask=plan.rule.mask,
        drop_rate=plan.rule.drop_rate,
        bits=plan.bits,
        rescale=plan.rule.method == "dare",
        finetuned_model={"architectures": finetuned.architectures},
        finetuned_prefix=pairing.prefix,
        ignored_base_parameters=sorted(pairing.ignored),
        base_parameter_count=sum(
            base.info[name].numel for name in base if base.info[name].dtype.is_floating_point
        ),
        library_versions=library_versions(),
    )


def _expected_bytes(difference: Difference, plan: _Plan) -> int:
    total = 1 << 20
    for name, info in difference.base.info.items():
        rule = plan.rule_for(name, info.shape)
        kept = info.numel if rule is None else info.numel * (1 - rule.drop_rate)
        total += int(kept * (32 if rule is None else plan.bits) / 8)
        if rule is not None and rule.block is None and rule.method == "magnitude":
            total += info.numel // 8
    for partner in difference.pairing.new.values():
        total += difference.finetuned.info[partner].nbytes
    return total


def _write_tensors(
    directory: Path,
    difference: Difference,
    plan: _Plan,
    config: AdapterConfig,
    workers: int | None,
    progress: bool,
    device: str | torch.device,
) -> None:
    """Stream all parameters into the tensors file and fill the config's entries."""
    base = difference.base
    total = sum(base.info[name].nbytes for name in difference)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="extract", disable=not progress)
    with AdapterWriter(directory, config) as writer, bar, worker_pool(workers) as pool:
        begun: deque[tuple[str, Callable[[], EncodedParameter | None]]] = deque()

        def finish() -> None:
            name, result = begun.popleft()
            encoded = result()
            config.witness[name] = encode_witness(name, base[name])
            pool.submit(difference[name].release)  # else all at once at the end, on one thread
            if encoded is not None:
                writer.add(encoded, plan.rule_for(name, base.info[name].shape))
            bar.update(base.info[name].nbytes)

        for name in difference:
            begun.append((name, _encode(pool, difference, name, plan, config.seed, device)))
            if len(begun) > AHEAD:
                finish()
        while begun:
            finish()
        for encoded in _new_parameters(difference):
            writer.add(encoded)


def _encode(
    pool: ThreadPoolExecutor,
    source: Difference,
    name: str,
    plan: _Plan,
    seed: int,
    device: str | torch.device,
) -> Callable[[], EncodedParameter | None]:
    """Begin with one parameter; the result is None where the fine-tune did not change it."""
    difference = source[name]
    rule = plan.rule_for(name, difference.shape)
    if rule is None:
        future = pool.submit(encode_dense, difference)

        def begun() -> EncodedParameter:
            return future.result()

    else:
        begun = encode_sparse(pool, difference.to(device), rule, seed, plan.bits)

    def result() -> EncodedParameter | None:
        encoded = begun()
        return None if encoded.empty and difference.unchanged() else encoded

    return result


def _new_parameters(source: Difference) -> list[EncodedParameter]:
    """What only the fine-tune has, and integer buffers that it changed."""
    found = []
    for name, partner in source.pairing.new.items():
        value = source.finetuned[partner]
        if value.is_floating_point() and first_non_finite(value.reshape(-1)) is not None:
            raise CheckpointError(f"{partner} of the fine-tune holds NaN or infinity")
        found.append(encode_new(name, value, partner if partner != name else None))
    for name, partner in source.pairing.common.items():
        if not source.base.info[name].dtype.is_floating_point:
            value = source.finetuned[partner]
            if not torch.equal(value, source.base[name]):
                found.append(encode_new(name, value, partner if partner != name else None))
    return found
