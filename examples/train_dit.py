"""Trains the demo's rectified-flow transformer: about 25 minutes on two CPU cores.

python examples/train_dit.py
"""

import torch
import torch.nn.functional as F
import training


def loss(network, images, labels, generator):
    t = torch.randn(len(images), generator=generator).sigmoid()  # logit-normal, as in Stable Diffusion 3
    eps = torch.randn(images.shape, generator=generator)
    x = torch.lerp(images, eps, t.view(-1, 1, 1, 1))
    return F.mse_loss(network(x, t, training.drop_labels(labels, generator)), eps - images)


if __name__ == "__main__":
    training.train("dit", loss, training.arguments(__doc__, steps=5000))
