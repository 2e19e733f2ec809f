"""What a profile is worth after a LoRA: it was made for the network without one.

pip install peft
python benchmarks/lora.py [--records tune-output/records.jsonl] [--networks unet@3 dit@3] [--calls 8]

Reads the profiles that benchmarks/tune.py has found in 20 steps. A LoRA of rank 8 learns to draw thick digits, in a
few minutes; then the profile is run at half of its strength and at all of it, on seeds of its own. Beside it: a profile
that is made for the network with the LoRA, Forecast with as many calls or more ("its calls"), and fewer steps. "without
LoRA" is how far the LoRA itself moves the images of the full run.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from statistics import fmean

import peft
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import stepcache
from stepcache import method
from stepcache.bench import KDiffusion
from stepcache.demo import networks, zoo
from stepcache.extend import Profile

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))
import training
import transfer

RANK = 8


def thick() -> tuple[Tensor, Tensor]:
    """The digits with lines that are two pixels wider, and their labels."""
    images, labels = training.digits()
    return F.max_pool2d(images, 3, stride=1, padding=1), labels


def learn(subject: KDiffusion, steps: int) -> nn.Module:
    """Trains the LoRA in the subject's network, which is returned."""
    network = next(module for module in subject.model.modules() if isinstance(module, (networks.UNet, networks.DiT)))
    layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers)
    peft.inject_adapter_in_model(config, network)
    optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    images, labels = thick()
    levels = subject.sigmas(100)[:-1]
    for _ in track(range(steps), description=f"LoRA of {subject.name}"):
        rows = torch.randint(len(images), (64,), generator=generator)
        sigma = levels[torch.randint(len(levels), (64,), generator=generator)]
        noise = torch.randn(images[rows].shape, generator=generator)
        wide = sigma.view(-1, 1, 1, 1)
        known = training.drop_labels(labels[rows], generator)
        off = (subject.model(images[rows] + wide * noise, sigma, label=known) - images[rows]) / wide
        optimiser.zero_grad()
        off.square().mean().backward()
        optimiser.step()
    return network.requires_grad_(False).eval()


def strength(network: nn.Module, value: float) -> None:
    """Sets how much of the LoRA is added."""
    for module in network.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", value)


def row(record: dict, subject: KDiffusion, value: float, calls: int, before: Tensor, seeds: list[int]) -> str:
    """A line of the table."""

    def reached(steps: int, how: stepcache.Method | None) -> float:
        return fmean(zoo.psnr_of_range(subject.sample(sampler, steps, how, seeds).images, full, seeds))

    sampler = record["sampler"]
    full = subject.sample(sampler, 20, None, seeds).images
    own = stepcache.tune(subject, calls=calls, sampler=sampler, steps=20, seeds=16)
    made, rival = transfer.forecast(subject, sampler, 20, calls, seeds[0])
    old = Profile.read(json.dumps(record["profile"]))
    scores = [reached(20, method("profile", path=one)) for one in (old, own)]
    scores += [reached(20, rival), reached(calls, None), fmean(zoo.psnr_of_range(full, before, seeds))]
    texts = [f"{score:.1f}" for score in scores]
    return f"| {record['network']}, {sampler} | {value:g} | {' | '.join(texts)} | {made} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=Path("tune-output/records.jsonl"))
    parser.add_argument("--networks", nargs="+", default=["unet@3", "dit@3"])
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--train", type=int, default=400, help="steps of training")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # that the model is another is what is measured
    console = Console(width=140)
    heads = "network", "LoRA", "profile", "made with the LoRA", "Forecast", "fewer steps", "without LoRA", "its calls"
    console.print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", markup=False)
    seeds = list(range(2000, 2000 + options.seeds))
    records = [json.loads(line) for line in options.records.read_text().splitlines()]
    for name in options.networks:
        subject = zoo.subject(name)
        mine = [one for one in records if (one["network"], one["steps"], one["calls"]) == (name, 20, options.calls)]
        before = {one["sampler"]: subject.sample(one["sampler"], 20, None, seeds).images for one in mine}
        network = learn(subject, options.train)
        for value in (0.5, 1.0):
            strength(network, value)
            for one in mine:
                line = row(one, subject, value, options.calls, before[one["sampler"]], seeds)
                console.print(line, markup=False)


if __name__ == "__main__":
    main()
