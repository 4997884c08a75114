"""Texts that known figures hold on. They are no part of this project; where they are missing, tests skip and say so."""
import os
from pathlib import Path


def find(name: str) -> Path:
    "The file in the folder that LLMQUANT_TEXTS names, else in any `data/eval` beside the checkout; it may not exist."
    if folder := os.environ.get("LLMQUANT_TEXTS"): return Path(folder) / name
    return next(iter(sorted(Path(__file__).resolve().parents[2].glob(f"*/data/eval/{name}"))), Path(name))
