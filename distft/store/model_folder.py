"""A model as a folder of files: what it weighs, what it is, and what identifies it; nothing of it is loaded or run.

Weights are safetensors. Identity is made of file contents and of the settings that change what the model computes, so that a
copied or renamed folder is the same model. Torch and transformers stay out of here: `plan` must answer in a second.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from distft.errors import CorruptArtifactError, ModelError
from distft.store.digest import files_sha256
from distft.store.location import check_name

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
HEADER_LIMIT: Final = 100 << 20
"""Bytes of a safetensors header, at most; the format's own limit."""

HUB_FILES: Final = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
HUB_IGNORED: Final = ("*/*", "*.bin", "*.pt", "*.pth", "*.py", "consolidated*", "adapter_*")

_TERMS = ("LICENSE", "LICENCE", "NOTICE")
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_VOCABULARY = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt",
               "added_tokens.json")  # fmt: skip
_TOKENIZER = ("tokenizer.json", *_VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
              "chat_template.json")  # fmt: skip

_MEANINGLESS = {"name_or_path", "_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache"}
"""Keys of config.json that say where it came from or how it was run, at any depth."""

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
         "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
         "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder that holds a model in the format of transformers."""

    path: Path
    config: dict[str, Any]
    """config.json, parsed."""

    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the weights, sorted by name."""
        single, index = self.path / SINGLE, self.path / INDEX
        if index.is_file():
            named = self._indexed(index)
            # transformers prefers the single file, its index says the shards: no guessing which the user means.
            if single.is_file() and SINGLE not in named:
                raise self._wrong(f"both {SINGLE} and {INDEX}, which names other files", "Remove the one that is out of date.")
            missing = [name for name in named if not (self.path / name).is_file()]
            if missing:
                listed = ", ".join(missing[:5]) + ("..." if len(missing) > 5 else "")
                raise self._wrong(f"no {listed}, though {INDEX} names it", "Copy or download the folder again.")
            return [self.path / name for name in named]
        if single.is_file():
            return [single]
        files = sorted(p for p in self.path.glob("*.safetensors") if p.is_file() and not p.name.startswith("adapter_"))
        if files:
            return files
        raise self._no_weights()

    def tokenizer_files(self) -> list[Path]:
        """The files that the tokenizer and its chat template are made of, sorted by name."""
        return sorted(path for name in _TOKENIZER if (path := self.path / name).is_file())

    def license_files(self) -> list[Path]:
        """The terms that the model came with, and whom they want named, sorted by name."""
        return sorted(path for path in self.path.iterdir() if path.is_file() and path.name.upper().startswith(_TERMS))

    def card(self) -> str:
        """What the model's makers say of it, in Markdown; empty where they say nothing that is text."""
        try:
            return (self.path / "README.md").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    def weights_identity(self) -> dict[str, Any]:
        """What the model computes: each weight file's sha256, and a digest of the settings."""
        digests = files_sha256(self.weight_files())
        return {"files": {path.name: digest for path, digest in digests.items()}, "config": _sha256(_meaning(self.config))}

    def tokenizer_identity(self) -> dict[str, Any]:
        """How text becomes tokens: `vocabulary`, `special` and `template`, told apart so that an error can say which changed."""
        settings = self._json("tokenizer_config.json") or {}
        special = {key: value for key, value in settings.items() if key != "chat_template"}
        template = self._template(settings)
        return {
            "vocabulary": self._vocabulary(),
            "special": _sha256(_meaning({"config": special, "map": self._json("special_tokens_map.json") or {}})),
            "template": hashlib.sha256(template.encode()).hexdigest() if template else "",
        }

    def generation_config(self) -> dict[str, Any]:
        """What the model's makers advise for generation; empty where they say nothing."""
        return self._json("generation_config.json") or {}

    def check_shared_by(self, ranks: int) -> None:
        """Refuses to spread the model over so many GPUs, of which each would get a fraction of an attention head."""
        config = self.config.get("text_config") or self.config
        heads = int(config.get("num_attention_heads") or ranks)
        shared = math.gcd(heads, int(config.get("num_key_value_heads") or heads))
        if shared % ranks:
            possible = ", ".join(str(n) for n in range(1, shared + 1) if shared % n == 0)
            raise ModelError(
                f"The model's attention heads cannot be shared evenly among {ranks} ranks: it has {heads}, with "
                f"{config.get('num_key_value_heads') or heads} for keys and values.", where=str(self.path),
                help=f"Set score.tensor_parallel to one of {possible}.",
            )  # fmt: skip

    def check_rows_shared_by(self, ranks: int) -> None:
        """Refuses to have so many ranks share rows of tokens, which takes a whole number of attention heads for each. Heads for keys
        that are fewer than ranks go to several."""
        config = self.config.get("text_config") or self.config
        heads = int(config.get("num_attention_heads") or config.get("n_head") or ranks)
        keys = int(config.get("num_key_value_heads") or heads)
        possible = [n for n in range(1, heads + 1) if heads % n == 0 and (keys % n == 0 or n % keys == 0)]
        if ranks not in possible:
            raise ModelError(
                f"The model's attention heads cannot be shared evenly among {ranks} ranks: it has {heads}, with {keys} for keys and "
                "values.", where=str(self.path), help=f"Set train.sequence_parallel to one of {', '.join(map(str, possible))}.",
            )  # fmt: skip

    def parameter_count(self) -> int:
        """Numbers in the weight files, from their headers; a tied matrix that is stored once counts once."""
        return sum(self.tensor_sizes().values())

    def tensor_sizes(self) -> dict[str, int]:
        """Numbers of each tensor, from the files' headers."""
        counts: dict[str, int] = {}
        for path in self.weight_files():
            counts |= _tensor_sizes(path)
        return counts

    def vocabulary_rows(self) -> int:
        """Rows of the output head, which may be more than the tokenizer has tokens."""
        text = self.config.get("text_config")
        for settings in (self.config, text if isinstance(text, dict) else {}):
            rows = settings.get("vocab_size")
            if type(rows) is int and rows > 0:
                return rows
        raise self._wrong("no vocab_size in config.json", "Give a causal language model.")

    def _indexed(self, index: Path) -> list[str]:
        named = (self._json(INDEX) or {}).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
            raise self._wrong(f"an {INDEX} without a weight_map", "Copy or download the folder again.")
        try:
            names = sorted({check_name(name, str(index)) for name in named.values()})
        except CorruptArtifactError as error:
            raise self._wrong(f"an {INDEX} that names files outside: {error.problem}", "Do not use this model.") from error
        foreign = [name for name in names if not name.endswith(".safetensors")]
        if foreign:
            raise self._wrong(f"an {INDEX} that names {foreign[0]}, which is not safetensors", "Convert it to safetensors.")
        return names

    def _vocabulary(self) -> str:
        whole = self.path / "tokenizer.json"
        # tokenizer.json holds all of it, and is what is loaded where it exists.
        names = ["tokenizer.json"] if whole.is_file() else [name for name in _VOCABULARY if (self.path / name).is_file()]
        names = names or sorted(path.name for path in self.path.glob("*.tiktoken"))
        if not names:
            raise self._wrong("no tokenizer.json, *.model or vocabulary file", "Copy the tokenizer's files into the folder.")
        digests = files_sha256(self.path / name for name in names)
        if len(names) == 1:
            return digests[self.path / names[0]]
        return _sha256({name: digests[self.path / name] for name in names})

    def _template(self, settings: dict[str, Any]) -> str:
        """The chat template that transformers would use: the file wins over the tokenizer's settings; "" when there is none."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise self._wrong(f"a chat_template.jinja that cannot be read ({error})", "Write it as UTF-8 text.") from error
        found = settings.get("chat_template") or (self._json("chat_template.json") or {}).get("chat_template") or ""
        if isinstance(found, list):  # several named templates
            by_name = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
            found = by_name.get("default") or ""
        if not isinstance(found, str):
            raise self._wrong("a chat_template that is not text", "Put the template into chat_template.jinja.")
        return found

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.is_file():
            return None
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise self._wrong(f"a {name} that cannot be read ({error})", "Copy or download the folder again.") from error
        if not isinstance(document, dict):
            raise self._wrong(f"a {name} that is not a JSON object", "Copy or download the folder again.")
        return document

    def _no_weights(self) -> ModelError:
        names = sorted(path.name for path in self.path.iterdir() if path.is_file())
        listed = ", ".join(names[:12]) + ("..." if len(names) > 12 else "") or "nothing"
        pickled = [name for name in names if name.endswith(_PICKLED)]
        if pickled:
            what = f"pickled weights ({pickled[0]}), which can run code when they are loaded and are refused; it holds {listed}"
            help = (
                "Convert it where you trust the file: AutoModelForCausalLM.from_pretrained(folder, weights_only=True)"
                ".save_pretrained(new_folder) writes safetensors."
            )
        elif any(name.startswith("adapter_") for name in names):
            what, help = f"an adapter, not a model; it holds {listed}", "Merge the adapter into its base model first."
        else:
            what = f"no weights: neither {SINGLE} nor {INDEX}; it holds {listed}"
            help = "Give a folder that save_pretrained wrote, or the name of a hub repository."
        return self._wrong(what, help)

    def _wrong(self, has: str, help: str) -> ModelError:
        return ModelError(f"{self.path} has {has}", where=str(self.path), help=help)


def resolve_model(path: str, revision: str | None) -> ModelFolder:
    """The folder at `path`, or that repository of the hub, downloaded where it is not cached yet."""
    try:
        given = Path(path).expanduser()
    except RuntimeError as error:  # ~someone who is not a user here
        raise ModelError(str(error), where=path, help="Write the path out.") from error
    if given.is_dir():
        if revision is not None:
            raise ModelError(
                f"{path} is a folder, and a folder has no revision {revision!r}",
                where="model.revision",
                help="Leave revision null, or give the name of a hub repository.",
            )
        folder = given.absolute()
    else:
        folder = _from_hub(path, revision)
    model = ModelFolder(folder, {})
    config = model._json("config.json")
    if config is None:
        raise model._wrong("no config.json", "Give a folder that save_pretrained wrote, or the name of a hub repository.")
    if "auto_map" in config:
        raise model._wrong(
            "auto_map in config.json: it brings its own Python code, which is not run",
            "Use a model whose architecture transformers has; if it has it by now, remove auto_map from a copy of the folder.",
        )
    model.generation_config()  # transformers reads it when it loads the weights, and stumbles
    return ModelFolder(folder, config)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RevisionNotFoundError

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*HUB_FILES], ignore_patterns=[*HUB_IGNORED]))
    except GatedRepoError as error:
        help = "Ask for access on the repository's page, then set HF_TOKEN."
        raise ModelError(f"{name} is gated, and this account has no access", where=name, help=help) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision}", where=name, help="Give a branch, tag or commit of it.") from error
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{name}{at} is neither a folder nor reachable on the hub",
            where=name,
            help=f"Check the path, seen from {Path.cwd()}, or the repository's name, the network, HF_TOKEN and HF_HUB_OFFLINE.",
        ) from error


def _tensor_sizes(path: Path) -> dict[str, int]:
    """Numbers per tensor of a safetensors file. The header is anyone's bytes: every figure is checked against the file's size."""

    def corrupt(why: str) -> ModelError:
        return ModelError(f"{path} is not a sound safetensors file: {why}", where=str(path), help="Copy or download it again.")

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise corrupt(f"a header of {length:,} bytes in a file of {size:,}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise corrupt("its header is not JSON") from error
    if not isinstance(header, dict):
        raise corrupt("its header is not a JSON object")
    counts: dict[str, int] = {}
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, start, end)) and start <= end <= size - 8 - length
            count = math.prod(shape) if sound else 0
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt(f"tensor {name[:100]!r} lacks a dtype, a shape or offsets") from error
        if not sound or (dtype in _BITS and count * _BITS[dtype] != 8 * (end - start)):
            raise corrupt(f"tensor {name[:100]!r} of {dtype} {shape} does not fill bytes {start} to {end}")
        counts[name] = count
    return counts


def _meaning(value: Any) -> Any:
    """A config without the keys that do not change what is computed, and with architectures in no order."""
    if isinstance(value, dict):
        kept = {key: _meaning(inner) for key, inner in value.items() if key not in _MEANINGLESS}
        names = kept.get("architectures")
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            kept["architectures"] = sorted(names)
        return kept
    return [_meaning(inner) for inner in value] if isinstance(value, list) else value


def _sha256(document: Any) -> str:
    # Unlike identities, config files may hold Infinity (Python's json reads and writes it); it must not stop a model.
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
