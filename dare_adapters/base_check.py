"""Whether weights in memory are those of the base that an adapter was made over."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dare_adapters.errors import BaseMismatchError
from dare_adapters.matrix import MatrixView
from dare_adapters.witness import decode_witness, matches

__all__ = ["check_live_base"]

_LISTED = 6


def check_live_base(
    witness: Mapping[str, str],
    view_of: Callable[[str], MatrixView | None],
    *,
    label: str,
    base: str | None,
    revision: str | None,
) -> None:
    """Compare live weights, perhaps cast since they were read, with an adapter's witness.

    Args:
        witness: checkpoint name -> sampled values of the base, encoded.
        view_of: where a parameter is in memory; None: it is not, or not as plain floats, and
            cannot be compared.
        label: what to call the adapter.
        base, revision: what it was made over.

    Raises:
        BaseMismatchError: which parameters differ, and how far.
    """
    wrong: list[tuple[float, str]] = []
    for name, text in witness.items():
        view = view_of(name)
        if view is None:
            continue
        positions, expected = decode_witness(name, text)
        if len(positions) and int(positions.max()) >= view.rows * view.columns:
            wrong.append((float("inf"), name))
            continue
        found = view.take(0, view.rows, view.on_device(positions)).cpu()
        if not bool(matches(expected, found).all()):
            off = float((found.double() - expected.double()).abs().max())
            wrong.append((off, name))
    if not wrong:
        return
    wrong.sort(reverse=True)
    listed = ", ".join(f"{name} (off by {off:.2g})" for off, name in wrong[:_LISTED])
    raise BaseMismatchError(
        f"this model is not the base of {label}: {len(wrong)} of {len(witness)} sampled "
        f"parameters differ, most of all {listed}. It was extracted over {base!r}"
        + (f" at revision {revision}" if revision else "")
        + "; load that, or pass check_base=False if you know better"
    )
