"""The CLIP paper as a laboratory: `load()` a model, `tokenize` words, and go on from there."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_lab.pretrained import available_models, convert, load, save
    from clip_lab.tokenizer import tokenize

__all__ = ["available_models", "convert", "load", "save", "tokenize"]

_HOME = {"available_models": "pretrained", "convert": "pretrained", "load": "pretrained", "save": "pretrained", "tokenize": "tokenizer"}


def __getattr__(name: str):
    # Found at first use, so that `clip-lab --help` does not wait for torch.
    if name not in _HOME: raise AttributeError(f"module 'clip_lab' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"clip_lab.{_HOME[name]}"), name)
