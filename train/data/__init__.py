"""Data: what a source string names, as packed rows of tokens for training and evaluation."""

from .evaluation import batches, make_eval_rows
from .loader import TrainLoader, make_train_loader
from .packing import Batch
from .sources import iter_text

__all__ = ["Batch", "TrainLoader", "batches", "iter_text", "make_eval_rows", "make_train_loader"]
