"""Backpropagation for multilayer perceptrons: CuPy where there is a CUDA GPU, NumPy everywhere else.

import backprop_gpu as bp
train, test = bp.datasets.load("mnist")
net = bp.Network([784, 512, 10])
bp.train(net, train.images, train.labels, optimizer=bp.Adam(1e-3), schedule="cosine")
bp.evaluate(net, test.images, test.labels)
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "AdaDelta",
    "AdaGrad",
    "Adam",
    "AdamW",
    "BackendError",
    "BackpropGPUError",
    "CheckpointError",
    "ConfigError",
    "Cost",
    "DataError",
    "DivergenceError",
    "Evaluation",
    "History",
    "Layer",
    "Lion",
    "NAdam",
    "Network",
    "RMSProp",
    "Run",
    "SGD",
    "datasets",
    "evaluate",
    "gradient_check",
    "load",
    "schedules",
    "save",
    "train",
]

if TYPE_CHECKING:
    from . import datasets, schedules
    from .activations import Activation
    from .checkpoint import load_network as load
    from .checkpoint import save_network as save
    from .costs import Cost
    from .errors import BackendError, BackpropGPUError, CheckpointError, ConfigError, DataError, DivergenceError
    from .gradient_checks import gradient_check
    from .network import Layer, Network
    from .optimizers import SGD, AdaDelta, AdaGrad, Adam, AdamW, Lion, NAdam, RMSProp
    from .training import Evaluation, History, Run, evaluate, train
else:  # the same names, each imported when it is first asked for (PEP 562)
    _NAMES = {
        "activations": "Activation",
        "costs": "Cost",
        "errors": "BackendError BackpropGPUError CheckpointError ConfigError DataError DivergenceError",
        "gradient_checks": "gradient_check",
        "network": "Layer Network",
        "optimizers": "SGD AdaDelta AdaGrad Adam AdamW Lion NAdam RMSProp",
        "training": "Evaluation History Run evaluate train",
    }
    _HOMES = {name: (module, name) for module, names in _NAMES.items() for name in names.split()}
    _HOMES |= {"load": ("checkpoint", "load_network"), "save": ("checkpoint", "save_network")}

    def __getattr__(name: str) -> object:
        import importlib

        if name in _HOMES:
            module, theirs = _HOMES[name]
            value = getattr(importlib.import_module(f"{__name__}.{module}"), theirs)
        elif name in __all__:
            value = importlib.import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
