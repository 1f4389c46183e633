"""Train the frozen feature net of ``fd-digits-v1``; seconds on one core.

    python training/train_digits_features.py OUTPUT.safetensors

The file in the package was made by this script; another seed gives another metric, hence the version in its name.
"""

import sys

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file

from stepdistill.images import load_digits, to_float
from stepdistill.metrics.digits import DigitsNet


def main(output: str, *, seed: int = 0, epochs: int = 12) -> None:
    """Fit on three quarters of the digits, report accuracy on the rest, save weights and feature statistics."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    images, labels = load_digits()
    x, order = to_float(images), torch.randperm(len(images))
    held_out, train = order[: len(order) // 4], order[len(order) // 4 :]
    net = DigitsNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            noisy = x[batch] + 0.05 * torch.randn_like(x[batch])
            F.cross_entropy(net(noisy)[0], labels[batch]).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        logits, features = net(x)
    accuracy = (logits[held_out].argmax(1) == labels[held_out]).float().mean().item()
    print(f"accuracy on {len(held_out)} held-out digits: {accuracy:.3f}")
    std = features.std(0)
    # Units that no digit fires keep their own scale: divided by next to nothing, one odd image would be the distance.
    statistics = {"mean": features.mean(0), "std": torch.where(std > 0, std, 1.0)}
    save_file({**net.state_dict(), **statistics}, output)


if __name__ == "__main__":
    main(sys.argv[1])
