"""The CLIP paper as a laboratory: `load()` a model, `tokenize` words, and go on from there."""

__version__ = "0.1.0"

from clip_lab.pretrained import available_models, convert, load, save
from clip_lab.tokenizer import tokenize

__all__ = ["available_models", "convert", "load", "save", "tokenize"]
