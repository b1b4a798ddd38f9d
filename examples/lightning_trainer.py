"""Lightning's Trainer as a member: scikit-learn's digits, a module with one hidden layer.

python examples/lightning_trainer.py HOME [ADDRESS]
"""

from __future__ import annotations

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tapestry.node import LightningCallback


class Digits(LightningModule):
    """64 pixels to 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, digits = batch
        return nn.functional.cross_entropy(self.layers(images), digits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(home: str, peer: str = "") -> None:
    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    callback = LightningCallback(
        home=home,
        peer=peer,
        name="lightning",
        inner_steps=20,
        until_epoch=2,
        flags=["--listen=/ip4/127.0.0.1/tcp/0"],
    )
    trainer = Trainer(
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Digits(), DataLoader(data, batch_size=32, shuffle=True))
    assert callback.swarm is not None
    print(f"epoch {callback.swarm.epoch} after {trainer.global_step} steps", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
