"""The layers of distft as a table, checked against every import, and what no file may do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "distft"

# A unit is a package or a part of one; the longest name that fits a module is its unit. Each may import itself and what stands here.
# An objective's settings and its rule are one file, so the run file's schema stands on the catalog: both are `rules`.
UNITS = {
    "errors": "errors", "ranks": "ranks", "progress": "progress", "panel": "progress", "stopping": "stopping", "": "root",
    "config": "rules", "objectives": "rules", "objectives.loss": "loss", "objectives.chunk": "loss", "objectives.whole": "loss",
    "objectives.distributions": "loss",
    "store": "store", "store.model_folder": "model folder",
    "corpus": "corpus", "engine": "engine",
    "teacher": "teacher", "teacher.identity": "identity", "teacher.reuse": "identity",
    "teacher.catalogue": "identity", "teacher.prune": "identity", "teacher.head_file": "identity",
    "teacher.tell": "identity", "train": "train", "train.identity": "identity", "train.record": "identity", "train.flops": "identity",
    "evaluate": "evaluate", "export": "export", "plan": "plan", "plan.stage": "plan stage", "plan.inputs": "plan stage",
    "report": "report", "annotate": "annotate",
    "cluster": "cluster", "pipeline": "pipeline", "demo": "demo", "cli": "cli", "cache_cli": "cli", "checkpoint_cli": "cli",
    "console": "cli", "__main__": "cli",
}  # fmt: skip
VOICE = {"root", "errors", "ranks", "progress"}
BASE = VOICE | {"rules"}
STORE = BASE | {"store", "model folder"}
CORE = STORE | {"corpus", "loss", "engine", "identity", "stopping"}
MAY_IMPORT = {
    "root": set(), "errors": set(), "ranks": {"errors"}, "progress": {"errors", "ranks"}, "stopping": VOICE,
    "rules": VOICE,
    "store": STORE, "model folder": STORE,
    "loss": BASE,
    "corpus": STORE,
    "engine": BASE | {"loss", "model folder"},
    "identity": STORE | {"corpus"},
    "teacher": CORE,
    "train": CORE | {"teacher"},
    "evaluate": CORE | {"teacher", "train"},
    "export": CORE | {"train"},
    "plan": STORE | {"corpus", "identity"},
    "plan stage": STORE | {"corpus", "identity", "teacher", "train", "evaluate", "plan"},
    "report": STORE | {"corpus", "identity"},
    "annotate": STORE | {"corpus", "identity", "teacher"},
    "cluster": BASE | {"stopping"},
    "pipeline": CORE | {"teacher", "train", "evaluate", "export", "plan", "plan stage", "report", "annotate", "cluster"},
    "demo": CORE | {"evaluate", "report", "pipeline"},
    "cli": CORE | {"teacher", "plan", "report", "annotate", "cluster", "pipeline", "demo"},
}  # fmt: skip

# Third parties with one home, and units that must answer before such a one has loaded.
HOMES = {
    "ray": ("cluster",),
    "deepspeed": ("engine.zero3",),
    "s3fs": ("store.s3_client",),
    "typer": ("cli", "cache_cli", "checkpoint_cli", "console"),
    "gguf": ("demo",),
    "tensorboardX": ("train.events",),
    "wandb": ("train.trackers",),
    "mlflow": ("train.trackers",),
}
WITHOUT_TORCH = {
    "root",
    "errors",
    "ranks",
    "progress",
    "stopping",
    "rules",
    "store",
    "model folder",
    "identity",
    "plan",
    "report",
    "cluster",
}
WITHOUT_TORCH_AT_THE_TOP = WITHOUT_TORCH | {"corpus", "plan stage", "pipeline", "cli", "demo"}
TORCH = {"torch", "transformers", "safetensors", "accelerate", "deepspeed"}


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int
    top: bool
    """At the module's top, not inside a function; what stands under TYPE_CHECKING is not imported at all, yet is a dependency."""

    def __str__(self) -> str:
        return f"distft.{self.importer}:{self.line} imports {self.imported}"


def unit(module: str) -> str:
    parts = module.split(".")
    for length in range(len(parts), -1, -1):
        name = ".".join(parts[:length])
        if name in UNITS and (name or module in ("", "__init__")):
            return UNITS[name]
    raise AssertionError(f"distft.{module} is in no unit: give it a place in the table")


def imports(source: str, importer: str) -> Iterator[Import]:
    """Every import of a module, those inside functions too; `importer` is its name below distft."""

    def walk(node: ast.AST, top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(importer, alias.name, child.lineno, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{importer}:{child.lineno}: relative imports hide where they lead"
                assert child.module is not None
                for alias in child.names:
                    # `from distft.train import identity` names a module, `from distft.errors import DataError` does not.
                    name = f"{child.module}.{alias.name}"
                    yield Import(importer, name if is_module(name) else child.module, child.lineno, top)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            lazy = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from walk(child, top and not inside and not lazy)

    yield from walk(ast.parse(source), True)


def is_module(name: str) -> bool:
    parts = name.split(".")
    path = PACKAGE.parent.joinpath(*parts)
    return parts[0] == "distft" and (path.with_suffix(".py").is_file() or path.is_dir())


def modules() -> dict[str, str]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        found[name] = path.read_text()
    return found


def wrong(found: list[Import]) -> list[str]:
    problems = []
    for one in found:
        mine, (root, _, rest) = unit(one.importer), one.imported.partition(".")
        if root == "distft":
            theirs = unit(rest)
            if theirs != mine and theirs not in MAY_IMPORT[mine]:
                problems.append(f"{one}: {mine} may not import {theirs}")
        elif root in HOMES and not f"{one.importer}.".startswith(tuple(f"{home}." for home in HOMES[root])):
            problems.append(f"{one}: {root} belongs in distft.{' or '.join(HOMES[root])}")
        elif root in TORCH and (one.top and mine in WITHOUT_TORCH_AT_THE_TOP):
            problems.append(f"{one}: {mine} must load without it")
        elif root == "torch" and mine in WITHOUT_TORCH:
            problems.append(f"{one}: {mine} must work without it")
    return problems


def test_every_import_keeps_to_its_layer() -> None:
    found = modules()
    assert len(found) > 50
    problems = [problem for name, source in found.items() for problem in wrong(list(imports(source, name)))]
    assert not problems, "\n".join(problems)


def test_the_table_itself_leads_downwards() -> None:
    """No unit may reach itself through others: then it would not be a layer."""
    assert set(UNITS.values()) == MAY_IMPORT.keys()
    done: set[str] = set()
    while open_units := MAY_IMPORT.keys() - done:
        free = {name for name in open_units if MAY_IMPORT[name] - {name, *_TWINS.get(name, ())} <= done}
        assert free, f"these import each other in a circle: {sorted(open_units)}"
        done |= free


_TWINS = {"store": {"model folder"}, "model folder": {"store"}}
"""A part of one package that another unit may import when it may not import the rest."""


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("store.fake", "from distft.corpus.reader import Corpus", "store may not import corpus"),
        ("config.fake", "def f():\n    from distft.store.location import open_location", "rules may not import store"),
        ("engine.fake", "import distft.teacher.cache", "engine may not import teacher"),
        ("engine.fake", "from distft.store import model_folder, shards", "engine may not import store"),
        ("corpus.fake", "from distft import cli", "corpus may not import cli"),
        ("plan.fake", "from distft.engine.load import load_model", "plan may not import engine"),
        ("plan.fake", "from distft.train import stage", "plan may not import train"),
        ("plan.tokens", "def f():\n    from distft.plan.stage import plan_run", "plan may not import plan stage"),
        ("plan.stage", "if TYPE_CHECKING:\n    from distft.pipeline import Pipeline", "plan stage may not import pipeline"),
        ("teacher.fake", "if TYPE_CHECKING:\n    from distft.train.loop import train", "teacher may not import train"),
        ("pipeline", "from distft.cli import app", "pipeline may not import cli"),
        ("train.fake", "def f():\n    import ray", "ray belongs in distft.cluster"),
        ("engine.local", "import deepspeed.comm", "deepspeed belongs in distft.engine.zero3"),
        ("config.fake", "def f():\n    import torch", "rules must work without it"),
        ("objectives.catalog.fake", "import torch.nn", "must load without it"),
        ("corpus.fake", "from transformers import AutoTokenizer", "corpus must load without it"),
        ("plan.stage", "import torch", "plan stage must load without it"),
        ("cli", "import torch", "cli must load without it"),
    ],
)
def test_an_import_that_breaks_the_table_is_caught(module: str, source: str, caught: str) -> None:
    assert [problem for problem in wrong(list(imports(source, module))) if caught in problem], "the walk is blind"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.zero3", "import deepspeed"),
        ("cluster.pool", "import ray"),
        ("corpus.fake", "def f():\n    from transformers import AutoTokenizer"),
        ("corpus.fake", "if TYPE_CHECKING:\n    from transformers import PreTrainedTokenizerFast"),
        ("objectives.loss", "import torch"),
        ("plan.fake", "from distft.train.identity import run_identity"),
    ],
)
def test_an_import_within_the_table_passes(module: str, source: str) -> None:
    assert wrong(list(imports(source, module))) == []


def test_a_new_package_needs_a_place_in_the_table() -> None:
    with pytest.raises(AssertionError, match="in no unit"):
        wrong(list(imports("import distft.helpers", "cli")))


UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}


def unsafe(source: str) -> list[str]:
    """What would run someone's bytes as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.partition(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found += [called] * (called in UNSAFE_CALLS)
            found += ["yaml.load"] * (called == "yaml.load" and given.get("Loader") not in ("_Strict", "yaml.SafeLoader"))
            found += ["torch.load"] * (called == "torch.load" and given.get("weights_only") != "True")
            found += ["shell=True"] * (given.get("shell", "False") != "False")
            found += ["trust_remote_code"] * (given.get("trust_remote_code", "False") != "False")
            found += ["allow_pickle"] * (given.get("allow_pickle", "False") != "False")
            found += ["weights_only"] * (given.get("weights_only", "True") != "True")
    return found


def test_nothing_runs_what_it_reads() -> None:
    problems = {name: found for name, source in modules().items() if (found := unsafe(source))}
    assert problems == {}


def test_pickled_files_are_read_in_one_place() -> None:
    """And there as tensors and plain values alone: what is our own is never pickled."""
    assert [name for name, source in modules().items() if "torch.load(" in source] == ["train.universal"]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "torch.load(x, weights_only=flag)",
        "eval('1')", "exec('1')", "yaml.load(x)",
        "yaml.load(x, Loader=yaml.Loader)", "run(x, shell=True)", "load(x, trust_remote_code=True)", "load(x, trust_remote_code=flag)",
        "numpy.load(x, allow_pickle=True)", "os.system('ls')",
    ],
)  # fmt: skip
def test_each_unsafe_thing_is_caught(source: str) -> None:
    assert unsafe(source)
    assert not unsafe("torch.load(x, weights_only=True)\nmodel.eval()")
    assert not unsafe("yaml.load(x, Loader=_Strict)\nload(x, trust_remote_code=False)")
