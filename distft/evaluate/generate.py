"""Greedy answers, batched: prompts of like length together, padded on the left, with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distft.corpus.chat import chat_template
from distft.engine.pack import batches_by_tokens
from distft.errors import ModelError
from distft.progress import Meter
from distft.store.model_folder import ModelFolder


def answers(
    whole: Any, tokenizer: Any, chats: Sequence[list[dict[str, Any]]], *, max_new_tokens: int, tokens_per_batch: int,
    stops: list[int] | None = None, meter: Meter | None = None,
) -> list[str]:  # fmt: skip
    """The model's answer to each chat, up to one of `stops` (None: the tokenizer's eos), decoded without special tokens. Greedy,
    whatever the model's own generation_config.json asks for: the same on every run."""
    from transformers import GenerationConfig

    stops = stops or [id for id in [tokenizer.eos_token_id] if id is not None]
    rendered = render_prompts(tokenizer, chats)
    device, texts = next(whole.parameters()).device, [""] * len(chats)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (*stops, 0)[0]  # masked, so that any will do
    whole.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops or None, pad_token_id=pad
    )
    whole.eval()
    for batch in batches_by_tokens([len(ids) + max_new_tokens for ids in rendered], tokens_per_batch):
        width = max(len(rendered[i]) for i in batch)
        tokens = torch.full((len(batch), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, i in enumerate(batch):
            tokens[row, width - len(rendered[i]) :] = torch.tensor(rendered[i])
            mask[row, width - len(rendered[i]) :] = 1
        with torch.no_grad():
            output = whole.generate(input_ids=tokens.to(device), attention_mask=mask.to(device))
        for row, i in enumerate(batch):
            texts[i] = tokenizer.decode(output[row, width:], skip_special_tokens=True)
        if meter:
            meter.advance(len(batch))
    return texts


def stop_tokens(folder: ModelFolder, tokenizer: Any) -> list[int]:
    """Where an answer ends: the tokenizer's eos, and what generation_config.json adds to it."""
    named = folder.generation_config().get("eos_token_id")
    ends = named if isinstance(named, list) else [named]
    return sorted({end for end in [tokenizer.eos_token_id, *ends] if end is not None})


def render_prompts(tokenizer: Any, chats: Sequence[list[dict[str, Any]]]) -> list[list[int]]:
    """Token ids up to where the assistant speaks, by the template as the corpus reads it: with its clock stopped, or what is
    measured would depend on the day."""
    template = chat_template(tokenizer)
    if template is None:
        raise ModelError(
            "The tokenizer has no chat template, and a generate task asks in chats.", where=str(tokenizer.name_or_path),
            help="Put a chat_template.jinja into the model's folder, or measure it by an nll task.",
        )  # fmt: skip
    texts = [template.prompt(chat, place=f"prompt {number}: {str(chat)[:200]}") for number, chat in enumerate(chats, 1)]
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
