"""What an export holds in memory, however large the model: no more than two of its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.exporting import save_checkpoint
from tests.helpers.models import tiny_model_folder

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from distft.export.stage import export_run
from tests.helpers.exporting import run_of

def resident(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

small, large, export = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)
export_run(*run_of(small, **export))  # what is loaded once is no part of it
given = run_of(large, **export)
open("/proc/self/clear_refs", "w").write("5")  # the peak until here is no concern of ours
before = resident("VmRSS")
export_run(*given)
print(json.dumps({"above": resident("VmHWM") - before}))
"""


@pytest.mark.parametrize(("shard_mib", "dtype", "ranks"), [(2, "float32", 1), (4, "float32", 8), (4, "bfloat16", 2)])
def test_peak_memory_is_at_most_two_files(tmp_path: Path, shard_mib: int, dtype: str, ranks: int) -> None:
    """The model has 64 MB of float32 weights, a matrix of 9 MB among them."""
    export = {"shard_bytes": shard_mib << 20, "dtype": dtype}
    tiny_model_folder(tmp_path / "small" / "model")
    tiny_model_folder(tmp_path / "large" / "model", hidden=256, layers=23, padded_rows=8192)
    for name in ("small", "large"):
        save_checkpoint(tmp_path / name, ranks=ranks, **export)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "small"), str(tmp_path / "large"), json.dumps(export)], capture_output=True,
        text=True, cwd=Path(__file__).parents[3], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    sizes = sorted(path.stat().st_size for path in (tmp_path / "large/store/runs/run/model").glob("*.safetensors"))
    assert sum(sizes) > 7 * export["shard_bytes"]
    assert sizes[-1] > export["shard_bytes"] >= sizes[-2] - 10_000
    assert found["above"] <= 2 * export["shard_bytes"], found
