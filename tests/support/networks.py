"""A small network and its training."""

import torch
from torch import nn


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def train(net, optimizer, steps, seed=1, after=lambda: None):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss = net(torch.randn(4, 8, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
