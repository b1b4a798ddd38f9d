"""Cells, as a notebook has them: open a swarm, train for a while, look at the loss, go on, leave.

    python examples/notebook.py HOME [PICTURE]       or run the cells in an editor or a notebook

Needs matplotlib. Between two cells the node answers its peers; a round does not wait for you.
"""

# %% the module and the swarm
from __future__ import annotations

import sys

import matplotlib
import torch
from torch import nn

from tapestry.node import Swarm

matplotlib.use("Agg")  # a notebook needs no such line
from matplotlib import pyplot

home = sys.argv[1] if len(sys.argv) > 1 else "notebook-home"
picture = sys.argv[2] if len(sys.argv) > 2 else "loss.png"

torch.manual_seed(0)
x = torch.linspace(-3, 3, 256)[:, None]
y = torch.sin(2 * x)
module = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
losses: list[float] = []

swarm = Swarm(
    module,
    optimizer,
    home=home,
    name="notebook",
    inner_steps=25,
    evaluate=lambda: float((module(x) - y).square().mean()),
    flags=["--listen=/ip4/127.0.0.1/tcp/0"],
).open()


# %% train for some epochs; run this cell as often as you like
def train(epochs: int) -> None:
    end = swarm.epoch + epochs
    while swarm.epoch < end:
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        swarm.step(loss)


train(3)
print(f"epoch {swarm.epoch}, loss {losses[-1]:.4f}, {len(swarm.peers)} peers")

# %% look
pyplot.plot(losses)
pyplot.xlabel("step")
pyplot.ylabel("loss")
pyplot.savefig(picture)

# %% leave
print(f"the node ended with exit code {swarm.close()}")
