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
from .gradient_check import gradient_check
from .network import Layer, Network
from .optimizers import SGD, AdaDelta, AdaGrad, Adam, AdamW, Lion, NAdam, RMSProp
from .training import Evaluation, History, Run, evaluate, train

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

_logging.getLogger("backprop_gpu").addHandler(_logging.NullHandler())
