"""What changes parameters: data, objectives, the optimizer, the step, checkpoints, the loop.

`puna.train` is this package and, in a notebook, also the function `puna.train(config, workdir)`:
the package is callable and hands the call to the command line's own `train`.
"""

import importlib
import sys
import types


class _CallablePackage(types.ModuleType):
    def __call__(self, config, workdir, evaluators=None):
        """Train a model, as `puna train` does; see `puna.train.loop.train`."""
        wiring = importlib.import_module(f"{__name__.rpartition('.')[0]}.__main__")
        return wiring.train(config, workdir, evaluators)


sys.modules[__name__].__class__ = _CallablePackage
