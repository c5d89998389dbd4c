"""Tiny tokenizers and models for tests: real formats, random weights, made in a moment, the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

Family = Literal["llama", "qwen3", "gemma3_text", "mistral"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_CHATML = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
_TEXT = [
    "The teacher reads the training documents once, and what it thought of every token is kept.",
    "user assistant system Hello there! How are you today? I am fine, thank you. What is the capital of France? Paris.",
    "Add two and three. The answer is five. Yes. No. One, two, three, four, five, six, seven, eight, nine, ten.",
    "def add(a, b):\n    return a + b\n\nThe quick brown fox jumps over the lazy dog.\n",
]


def tiny_tokenizer_folder(
    path: Path, *, vocabulary: int = 384, template: str | None = CHATML, adds_bos: bool = False, eos: str | None = "<|im_end|>"
) -> Path:
    """A byte-level BPE tokenizer, its settings and its chat template, saved as transformers does. Ids 0-4 are <|bos|>, <|eos|>,
    <|pad|>, <|im_start|> and <|im_end|>; `vocabulary` tokens at most, and no fewer than 261."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator(_TEXT, trainer)
    if adds_bos:
        added = processors.TemplateProcessing(single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)])
        tokenizer.post_processor = added  # pyright: ignore[reportAttributeAccessIssue]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token=eos, pad_token="<|pad|>")
    wrapped.chat_template = template
    path.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(path)
    return path


def tiny_model_folder(
    path: Path,
    *,
    family: Family = "llama",
    seed: int = 0,
    tied: bool = True,
    padded_rows: int = 0,
    vocabulary: int = 384,
    template: str | None = CHATML,
    hidden: int = 64,
    layers: int = 2,
    **settings: Any,
) -> Path:
    """A random model of two small layers, and the tiny tokenizer. Its head has a row per token and `padded_rows` more; `settings` go
    to the family's config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tiny_tokenizer_folder(path, vocabulary=vocabulary, template=template)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    given: dict[str, Any] = {
        "vocab_size": len(tokenizer) + padded_rows,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "gemma3_text":
        given |= {"query_pre_attn_scalar": hidden // 4, "sliding_window": 32}
    if family == "mistral":
        given |= {"sliding_window": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(given | settings)), dtype=torch.float32)
    model.save_pretrained(path)
    return path
