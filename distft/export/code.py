"""Which code this is: the commit, where distft runs from a checkout of its repository, and the versions of what it stands on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import distft

PACKAGES = ("torch", "transformers", "safetensors", "deepspeed")
SECONDS = 10.0


def code_version() -> str:
    """`0.1.0`, with the commit and whether files of the package differ from it where git knows."""
    package = Path(distft.__file__).parent
    commit = _git(package, "rev-parse", "--show-toplevel", "HEAD").split("\n")
    if len(commit) != 2 or Path(commit[0]) != package.parent.resolve():
        return distft.__version__  # installed, or lying in somebody else's repository
    changed = _git(package, "status", "--porcelain", "--", str(package))
    return f"{distft.__version__}, commit {commit[1]}" + (", with changes that were not committed" if changed else "")


def package_versions() -> dict[str, str]:
    """Python's, and those of the packages that are here."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *command: str) -> str:
    """What git says; nothing where it is absent, slow or does not know."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
