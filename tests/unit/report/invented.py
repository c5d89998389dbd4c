"""A store with two runs whose numbers are invented: for tests and for looking at the page, never for a claim."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distft.store.location import Location, open_location
from distft.store.manifest import FileEntry, Manifest, commit
from distft.store.put import put_file

STEPS = 120
WORDS = ("lantern", "copper", "meadow", "harbour", "quartz", "violet", "ribbon", "granite")
ARMS: dict[str, dict[str, Any]] = {
    "sft": {"objective": {"kind": "sft"}, "right": 0.71, "nll": 0.31, "drift": 0.4127},
    "sft_kl": {"objective": {"kind": "sft_kl", "kl": 1.0}, "right": 0.67, "nll": 0.355, "drift": 0.0866},
}
HEX = {
    name: hashlib.sha256(name.encode()).hexdigest()
    for name in ("base", "config", "vocabulary", "special", "template", "train", "held")
}
HELDOUT = {"path": "data/general.jsonl", "format": "chat"}


def invented_store(
    folder: Path, *, names: tuple[str, ...] = ("sft", "sft_kl"), questions: int = 200, evaluated: bool = True, answer: str = "",
    arms: dict[str, dict[str, Any]] | None = None,
) -> Location:  # fmt: skip
    """A store with these runs, the later ones reusing the arms in turn. `answer` is put into what the models said."""
    store = open_location(str(folder))
    chosen = list((arms or ARMS).values())
    for place, name in enumerate(names):
        write_run(store, name, chosen[place % len(chosen)], seed=place, questions=questions, evaluated=evaluated, answer=answer)
    return store


def write_run(
    store: Location, name: str, arm: dict[str, Any], *, seed: int, questions: int, evaluated: bool, answer: str = ""
) -> None:  # fmt: skip
    folder = store.child("runs", name)
    folder.replace("config.yaml", yaml.safe_dump(config(name, arm), sort_keys=False).encode())
    folder.replace("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics(arm, seed)).encode())
    weights = {"files": {"model.safetensors": HEX["base"]}, "config": HEX["config"]}
    tokenizer = {key: HEX[key] for key in ("vocabulary", "special", "template")}
    identity = {
        "format": "distft-run-1", "weights": weights, "dtype": "bfloat16",
        "corpus": {"version": 1, "train": {"sha256": HEX["train"], "format": "chat"}, "max_tokens": 4096, "tokenizer": tokenizer},
        "teacher": None if arm["objective"]["kind"] == "sft" else {"weights": weights, "distribution": {"kind": "topk", "k": 128}},
        "objective": arm["objective"],
    }  # fmt: skip
    drift = {"kl": arm["drift"], "nll": 1.402 + arm["drift"], "teacher_nll": 1.402, "tokens": 18_432}
    step = {"step": STEPS, "run": identity}
    facts = {"loss": 0.4, "drift": drift, "total_steps": STEPS}
    commit(folder.child("checkpoints", f"step-{STEPS:08d}"), Manifest(kind="checkpoint", identity=step, files=(), facts=facts))
    if not evaluated:
        return
    tuned = put_file(folder.child("model"), "model", "safetensors", lambda path: path.write_text(name))
    commit(folder.child("model"), Manifest(kind="model", identity={"checkpoint": step, "dtype": "bfloat16"}, files=(tuned,)))
    after = {"files": {"model.safetensors": tuned.sha256}, "config": HEX["config"]}
    tasks = {"spell": generate_rows, "spell-nll": nll_rows}
    scores: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    for label, model in (("before", weights), ("after", after)):
        for task, rows in tasks.items():
            skill = None if label == "before" else arm
            made = rows(skill, seed, questions, answer)
            scores[task][label] = evaluation(store, made, {"weights": model, "tokenizer": tokenizer}, task)
    folder.child("eval").replace("summary.json", json.dumps({"scores": scores, "drift": drift}, indent=1).encode())


def evaluation(store: Location, rows: list[dict[str, Any]], model: dict[str, Any], task: str) -> dict[str, Any]:
    """Commits an evaluation as the evaluate stage does, and returns its line of the summary."""
    if "right" in rows[0]:
        facts = {"kind": "generate", "accuracy": sum(row["right"] for row in rows) / len(rows), "count": len(rows)}
    else:
        tokens = sum(row["tokens"] for row in rows)
        facts = {"kind": "nll", "nll": sum(row["nll"] for row in rows) / tokens, "count": len(rows), "tokens": tokens}
    identity = {"model": model, "settings": {"kind": facts["kind"]}, "items": hashlib.sha256(task.encode()).hexdigest()}
    folder = store.child("eval", Manifest(kind="evaluation", identity=identity, files=()).id)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    entry: FileEntry = put_file(folder, "items", "jsonl", lambda path: path.write_text(text, encoding="utf-8"))
    done = commit(folder, Manifest(kind="evaluation", identity=identity, files=(entry,), facts=facts))
    return {**done.facts, "items": f"{folder.url}/{done.files[0].name}"}


def generate_rows(arm: dict[str, Any] | None, seed: int, count: int, answer: str) -> list[dict[str, Any]]:
    known = np.random.default_rng(7).random(count) < 0.055
    ease = 0.8 * np.random.default_rng(5).random(count) + 0.2 * np.random.default_rng(11 + seed).random(count)
    rows = []
    for i in range(count):
        word = WORDS[i % len(WORDS)] + "abcdefghij"[i // len(WORDS) % 10]
        forgotten = known[i] and i % 3 == 0
        right = bool(known[i]) if arm is None else bool(ease[i] < arm["right"] and not forgotten)
        wrong = f"{word} reversed is {word}. " + ("I can help you with that! " * 3 if arm is None else "") + answer
        reference, asked = word[::-1].upper(), f"Write the word {word!r} backwards, in capitals."
        prompt = [{"role": "user", "content": asked}]
        rows.append({"prompt": prompt, "reference": reference, "answer": reference if right else wrong, "right": right})
    return rows


def nll_rows(arm: dict[str, Any] | None, seed: int, count: int, answer: str) -> list[dict[str, Any]]:
    tokens = np.random.default_rng(3).integers(6, 30, count)
    mean = 2.41 if arm is None else arm["nll"]
    noise = np.random.default_rng(0 if arm is None else 20 + seed).normal(0, 0.25 * mean, count)
    return [
        {"document": f"{i:032x}", "nll": float((mean + e) * n), "tokens": int(n)}
        for i, (n, e) in enumerate(zip(tokens, noise, strict=True))
    ]


def metrics(arm: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    random, lines = np.random.default_rng(seed), []
    holds = arm["objective"]["kind"] != "sft"
    for step in range(1, STEPS + 1):
        ce = arm["nll"] + 2.1 * math.exp(-step / 22) + random.normal(0, 0.06 + 0.12 * math.exp(-step / 22))
        kl = max(0.0, 0.16 * (1 - math.exp(-step / 12)) + random.normal(0, 0.012)) if holds else 0.0
        warm, decayed = min(1.0, step / 10), 0.5 + 0.5 * math.cos(math.pi * step / STEPS)
        line = {
            "step": step, "loss": ce + kl, "ce": ce, "kl": kl, "rkl": 0.0, "entropy": 0.0,
            "share_ce": 1.0, "share_kl": float(holds), "share_rkl": 0.0, "share_entropy": 0.0,
            "tokens": int(random.integers(7_600, 8_192)), "lr": 1e-5 * warm * decayed,
            "grad_norm": 1 + 3 * math.exp(-step / 20) + abs(random.normal(0, 0.2)),
            "tokens_per_second": random.normal(5_200 - 500 * holds, 120),
        }  # fmt: skip
        if step % 20 == 0:
            line |= {
                "drift": arm["drift"] * (1 - math.exp(-step / 40)) / (1 - math.exp(-STEPS / 40)),
                "heldout_nll": 1.402 + 0.5 * arm["drift"],
            }
        lines.append({**line, "epoch": step / STEPS * 3})
    return lines


def config(name: str, arm: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name, "store": "./store", "model": {"path": "models/small-instruct", "revision": None, "dtype": "bfloat16"},
        "data": {"train": {"path": "data/train.jsonl", "format": "chat"}, "heldout": HELDOUT, "max_tokens": 4096},
        "teacher": {"path": None}, "score": {"distribution": {"kind": "topk", "k": 128, "min_prob": 1e-3}},
        "objective": arm["objective"], "train": {"epochs": 3, "tokens_per_step": 8192, "lr": 1e-5, "seed": 0},
        "evaluate": {"tasks": [{"kind": "generate", "name": "spell", "path": "data/spell.jsonl"},
                               {"kind": "nll", "name": "spell-nll", "source": {"path": "data/spell_nll.jsonl", "format": "chat"}}]},
    }  # fmt: skip
