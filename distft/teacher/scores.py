"""What the teacher said of a document's tokens, as arrays; torch-free, for all that reads a cache and runs no model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The teacher's word on some tokens of one document. Entry i belongs to the token at `positions[i]`, given the tokens before
    it (law 1).

    Kept entries are flat, `counts[i]` of them for token i, ids ascending; none where signals or hidden states alone are kept. Hidden
    states are flat too, equally many 16-bit words for each token: bfloat16 numbers, or the halves of float32 numbers."""

    positions: npt.NDArray[np.uint32]
    label_logprob: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]
    rank: npt.NDArray[np.uint32]
    tail: npt.NDArray[np.float32]
    counts: npt.NDArray[np.uint16]
    ids: npt.NDArray[np.uint32]
    logprobs: npt.NDArray[np.float16]
    hidden: npt.NDArray[np.uint16] = field(default_factory=lambda: np.zeros(0, np.uint16))

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def words(self) -> npt.NDArray[np.uint16]:
        """Hidden states as [tokens, words of each]."""
        return self.hidden.reshape(len(self), -1) if len(self) else self.hidden.reshape(0, 0)

    def select(self, chosen: npt.NDArray[np.bool_]) -> Scores:
        """The scores of some of the tokens."""
        if chosen.all():
            return self
        entries = np.repeat(chosen, self.counts)
        return Scores(
            positions=self.positions[chosen], label_logprob=self.label_logprob[chosen], entropy=self.entropy[chosen],
            rank=self.rank[chosen], tail=self.tail[chosen], counts=self.counts[chosen],
            ids=self.ids[entries], logprobs=self.logprobs[entries], hidden=self.words[chosen].reshape(-1),
        )  # fmt: skip

    def followed_by(self, other: Scores) -> Scores:
        """The scores of these tokens and of others of the same document behind them, whatever their places."""
        columns = {f.name: np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)}
        return Scores(**columns)

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.label_logprob).all() and np.isfinite(self.entropy).all())
