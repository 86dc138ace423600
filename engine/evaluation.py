"""Using a model in the middle of its training without leaving a trace in the training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, in adapters neither) without gradients.

    Afterwards every module has its own mode again, and every global random number generator (of
    Python, numpy, PyTorch's CPU and the model's device) the state that it had.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    with _unchanged_generators(device), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _unchanged_generators(device: torch.device) -> Iterator[None]:
    backend = None if device.type == "cpu" else torch.get_device_module(device)
    # torch.mps has a single device and takes none.
    where = () if device.type == "mps" else (device,)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    state = backend.get_rng_state(*where) if backend else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if backend:
            backend.set_rng_state(state, *where)
