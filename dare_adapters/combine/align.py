"""Names that mean one parameter in several sources, made one."""

from __future__ import annotations

from collections.abc import Sequence

from dare_adapters.source import DeltaSource, Renamed

__all__ = ["align_names", "align_to"]


def align_names(sources: Sequence[DeltaSource]) -> list[DeltaSource]:
    """The sources under the first one's names.

    A bare encoder's checkpoint says "encoder…" where a task model's says "bert.encoder…", and a
    LoRA adapter has the names of the model that it was trained in. One prefix is added or
    stripped where that makes more names agree.
    """
    known = set(sources[0])
    return [sources[0], *(align_to(source, known) for source in sources[1:])]


def align_to(source: DeltaSource, known: set[str]) -> DeltaSource:
    """A source under names of which most are known, by one prefix added or stripped."""
    prefixes = {f"{name.split('.')[0]}." for name in known if "." in name}
    own = {f"{name.split('.')[0]}." for name in source if "." in name}
    changes = [("", ""), *(("", p) for p in sorted(prefixes)), *((p, "") for p in sorted(own))]

    def renamed(name: str, change: tuple[str, str]) -> str:
        strip, add = change
        return add + name.removeprefix(strip)

    def agreeing(change: tuple[str, str]) -> int:
        return sum(renamed(name, change) in known for name in source)

    best = max(changes, key=agreeing)  # the first of equals: no change
    if best == ("", ""):
        return source
    # Only where it helps: a task head has no prefix in either.
    names = {renamed(n, best) if renamed(n, best) in known else n: n for n in source}
    return source if len(names) < len(source) else Renamed(source, names)
