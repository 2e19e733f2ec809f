"""Trains the demo's eps-prediction U-Net: about 25 minutes on two CPU cores.

python examples/train_unet.py
"""

import torch
import torch.nn.functional as F
import training

from stepcache.demo import networks

alphas = networks.alphas_cumprod()


def loss(network, images, labels, generator):
    t = torch.randint(len(alphas), (len(images),), generator=generator)
    eps = torch.randn(images.shape, generator=generator)
    a = alphas[t].view(-1, 1, 1, 1)
    return F.mse_loss(
        network(a.sqrt() * images + (1 - a).sqrt() * eps, t, training.drop_labels(labels, generator)), eps
    )


if __name__ == "__main__":
    training.train("unet", loss, training.arguments(__doc__, steps=5000))
