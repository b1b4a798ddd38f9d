"""Handwritten digits with a plain module: found a run, or join one with --peer.

    python examples/digits.py --home /tmp/first --part 1/2
    python examples/digits.py --home /tmp/second --part 2/2 --peer LINE   # which the first one prints

Needs scikit-learn. The run waits for its second member (min_members); each keeps its own half of the images.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tapestry.node import Swarm


def load(part: str) -> tuple[Tensor, Tensor]:
    """A part of the training images, such as every second one from the first on for 1/2."""
    number, count = map(int, part.split("/"))
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    return images[number - 1 :: count], torch.tensor(digits.target)[number - 1 :: count]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", required=True)
    parser.add_argument("--peer", default="")
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--members", type=int, default=2, help="how many the run waits for")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    images, labels = load(arguments.part)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)

    with Swarm(
        module,
        optimizer,
        home=arguments.home,
        peer=arguments.peer,
        name="digits",
        inner_steps=20,
        run={"round": {"min_members": arguments.members}},
        flags=["--listen=/ip4/127.0.0.1/tcp/0"],
    ) as swarm:
        torch.manual_seed(swarm.epoch)  # started again, it draws other rows than the first time
        if not arguments.peer and arguments.members > 1:
            print(f"the others join with --peer {swarm.invite(arguments.members - 1)}", flush=True)
        while swarm.epoch < arguments.epochs:
            rows = torch.randint(len(images), (32,))
            loss = nn.functional.cross_entropy(module(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if swarm.step(loss, samples=len(rows)):
                print(f"epoch {swarm.epoch}  loss {loss.item():.3f}", flush=True)
        digest = swarm.status()["state_digest"]

    accuracy = (module(images).argmax(1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.3f}  digest {digest}", flush=True)


if __name__ == "__main__":
    main()
