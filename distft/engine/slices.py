"""Whole tensors and slices of them: how the one becomes the other, and whether slices are all that was wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from distft.engine.base import Slice, Wanted
from distft.errors import CorruptArtifactError

MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = ("weight", *MOMENTS)


def cut(tensors: Mapping[str, Tensor], wanted: Iterable[Wanted]) -> Iterator[Slice]:
    """The slices that are wanted of whole tensors, named PART/NAME."""
    for name, shape, start, stop in wanted:
        parts = {part: tensors[f"{part}/{name}"] for part in PARTS}
        wrong = [part for part, tensor in parts.items() if tuple(tensor.shape) != shape]
        if wrong:
            raise CorruptArtifactError(f"{wrong[0]}/{name} has the shape {tuple(parts[wrong[0]].shape)}, not {shape}.")
        yield Slice(name=name, shape=shape, start=start, **{part: tensor.view(-1)[start:stop] for part, tensor in parts.items()})


class Taken:
    """Watches that what is restored is what was wanted: each element of it once, and nothing else."""

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self.wanted = {one.name: one for one in wanted}
        self.runs: dict[str, list[tuple[int, int]]] = {one.name: [] for one in wanted}

    def add(self, piece: Slice) -> None:
        """Refuses a piece that is not part of what is wanted, or is not of one length."""
        one = self.wanted.get(piece.name)
        if one is None or piece.shape != one.shape or not one.start <= piece.start <= piece.stop <= one.stop:
            raise CorruptArtifactError(
                f"Elements {piece.start} to {piece.stop} of {piece.name} {piece.shape} are no part of what is wanted, {one}."
            )
        if not len(piece.weight) == len(piece.exp_avg) == len(piece.exp_avg_sq):
            raise CorruptArtifactError(f"Weights and moments of {piece.name} from {piece.start} on are not equally many.")
        self.runs[piece.name].append((piece.start, piece.stop))

    def check(self) -> None:
        """Refuses what is not complete, or was given twice."""
        for name, one in self.wanted.items():
            reached = one.start
            for start, stop in sorted(self.runs[name]):
                if start != reached:
                    raise CorruptArtifactError(f"After element {reached} of {name} comes {start}.")
                reached = stop
            if reached != one.stop:
                raise CorruptArtifactError(f"Of {name}, elements {reached} to {one.stop} are missing.")
