"""Greedy answers, batched: prompts of like length together, padded on the left, with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distft.engine.pack import batches_by_tokens
from distft.progress import Meter


def answers(
    whole: Any, tokenizer: Any, chats: Sequence[list[dict[str, Any]]], *, max_new_tokens: int, tokens_per_batch: int,
    meter: Meter | None = None,
) -> list[str]:  # fmt: skip
    """The model's answer to each chat, decoded without special tokens. Greedy: the same on every run."""
    rendered = [render_prompt(tokenizer, chat) for chat in chats]
    device, texts = next(whole.parameters()).device, [""] * len(chats)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    whole.eval()
    for batch in batches_by_tokens([len(ids) + max_new_tokens for ids in rendered], tokens_per_batch):
        width = max(len(rendered[i]) for i in batch)
        tokens = torch.full((len(batch), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, i in enumerate(batch):
            tokens[row, width - len(rendered[i]) :] = torch.tensor(rendered[i])
            mask[row, width - len(rendered[i]) :] = 1
        with torch.no_grad():
            output = whole.generate(
                input_ids=tokens.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens, do_sample=False,
                temperature=None, top_p=None, top_k=None, pad_token_id=pad,
            )  # fmt: skip
        for row, i in enumerate(batch):
            texts[i] = tokenizer.decode(output[row, width:], skip_special_tokens=True)
        if meter:
            meter.advance(len(batch))
    return texts


def render_prompt(tokenizer: Any, chat: list[dict[str, Any]]) -> list[int]:
    """Token ids up to where the assistant speaks."""
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
