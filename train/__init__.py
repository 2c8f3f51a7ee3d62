"""What changes parameters: data, objectives, the optimizer, the step, checkpoints, the loop.

`puna.train` is this package and, in a notebook, also the function `puna.train(config, workdir)`:
the package is callable and hands the call to `train.loop.train`, as the command line does.
"""

import sys
import types


class _CallablePackage(types.ModuleType):
    def __call__(self, config, workdir, evaluators=None, tasks=None, profile=0):
        """Train a model, as `puna train` does; see `puna.train.loop.train`."""
        from .loop import train

        return train(config, workdir, evaluators, tasks, profile)


sys.modules[__name__].__class__ = _CallablePackage
