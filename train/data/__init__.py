"""Data: what a source string names, as packed rows of tokens for training and evaluation."""

from .evaluation import HeldOutRows
from .loader import TrainLoader, make_train_loader
from .packing import Batch
from .sources import iter_text

__all__ = ["Batch", "HeldOutRows", "TrainLoader", "iter_text", "make_train_loader"]
