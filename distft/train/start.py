"""Where a run is to be trained: in this process, or by how many ranks that are started for it."""

from __future__ import annotations

import os
from contextlib import suppress

from distft import ranks
from distft.config.schema import Run
from distft.engine.world import device_count
from distft.errors import ArtifactError, ConfigError
from distft.store.location import Location
from distft.train.record import newest_checkpoint


def ranks_to_start(run: Run, folder: Location) -> int | tuple[int, int] | None:
    """How many, or how few and how many; None is one per GPU of the cluster. With 1 this process trains, alone or as one of a launched
    group; so it does where nothing is left to train, for it costs a look. Of a range, this machine has a number for good."""
    asked = run.train.workers
    if ranks.size() > 1 or asked == 1 or _is_trained(folder):
        return 1
    if run.cluster.address != "local":
        return None if asked == "auto" else asked
    gpus = device_count()
    if asked == "auto":
        return max(1, gpus)
    fewest = run.train.least_ranks
    if 0 < gpus < fewest:
        raise ConfigError(f"train.workers={fewest} need a GPU each, and this machine has {gpus}.", where="train.workers",
                          help=f"Lower it to {gpus}, or leave it `auto`.")  # fmt: skip
    return asked if isinstance(asked, int) else max(fewest, min(asked[1], gpus or os.cpu_count() or 1))


def _is_trained(folder: Location) -> bool:
    """Whether its last step is kept. Whether it is the run that is meant, and what is wrong with a checkpoint, others say."""
    with suppress(ArtifactError):
        found = newest_checkpoint(folder.child("checkpoints"))
        return found is not None and found[1].identity["step"] >= found[1].facts["total_steps"]
    return False
