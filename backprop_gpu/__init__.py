"""Backpropagation for multilayer perceptrons: CuPy where there is a CUDA GPU, NumPy everywhere else.

import backprop_gpu as bp
train, test = bp.datasets.load("mnist")
net = bp.Network([784, 512, 10])
bp.train(net, train.images, train.labels, optimizer=bp.Adam(1e-3), schedule="cosine")
bp.evaluate(net, test.images, test.labels)
"""

import logging as _logging

from . import datasets, schedules
from .activations import Activation
from .checkpoint import load_network as load
from .checkpoint import save_network as save
from .costs import Cost
from .errors import BackendError, BackpropGPUError, CheckpointError, ConfigError, DataError, DivergenceError
from .network import Layer, Network
from .optimizers import SGD, Adam, AdamW
from .training import Evaluation, History, Run, evaluate, train

__version__ = "0.1.0"

__all__ = [
    "Activation",
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
    "Network",
    "Run",
    "SGD",
    "datasets",
    "evaluate",
    "load",
    "schedules",
    "save",
    "train",
]

_logging.getLogger("backprop_gpu").addHandler(_logging.NullHandler())
