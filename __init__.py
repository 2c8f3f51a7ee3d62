"""puna trains and evaluates every Llama, from a laptop CPU to GPU and TPU pods.

Importing it costs nothing: each public name below loads what it needs when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configs import get_config as get_config
    from .eval.evaluate import evaluate as evaluate
    from .models.decode.generate import generate as generate
    from .models.text.tokenizer import load_tokenizer as load_tokenizer
    from .models.weights.load import load as load
    from .train.loop import train as train
    from .train.plan import plan as plan

__version__ = "0.1.0.dev0"

_HOME = {
    "evaluate": ".eval.evaluate",
    "generate": ".models.decode.generate",
    "get_config": ".configs",
    "load": ".models.weights.load",
    "load_tokenizer": ".models.text.tokenizer",
    "plan": ".train.plan",
    "train": ".train.loop",
}

__all__ = [
    "__version__",
    "evaluate",
    "generate",
    "get_config",
    "load",
    "load_tokenizer",
    "plan",
    "train",
]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'puna' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name], __name__)
    # Importing .train.loop binds `train` here to the subpackage. It is itself callable and must
    # stay: a function in its place would hide puna.train.loop and everything else below it.
    return globals().setdefault(name, getattr(module, name))


def __dir__():
    return sorted({*globals(), *__all__})
