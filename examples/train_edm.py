"""Trains the zoo's network with EDM preconditioning: about 8 minutes on one CPU core.

python examples/train_edm.py --threads 1
"""

import torch
import training
from k_diffusion.layers import Denoiser

from stepcache.demo import networks


def loss(network, images, labels, generator):
    sigma = (torch.randn(len(images), generator=generator) * 1.2 - 1.2).exp()  # Karras et al. (2022), table 1
    noise = torch.randn(images.shape, generator=generator)
    denoiser = Denoiser(network, networks.EDM_SIGMA_DATA)
    labels = training.drop_labels(labels, generator)
    return denoiser.loss(images, noise, sigma, label=labels).mean()


if __name__ == "__main__":
    training.train("edm", loss, training.arguments(__doc__, steps=4000))
