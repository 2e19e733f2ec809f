"""Trains the zoo's v-prediction network: about 8 minutes on one CPU core.

python examples/train_v.py --threads 1
"""

import torch
import torch.nn.functional as F
import training


def loss(network, images, labels, generator):
    t = torch.rand(len(images), generator=generator)
    angle = (t * torch.pi / 2).view(-1, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator)
    x = angle.cos() * images + angle.sin() * noise
    v = angle.cos() * noise - angle.sin() * images
    return F.mse_loss(network(x, t, training.drop_labels(labels, generator)), v)


if __name__ == "__main__":
    training.train("v", loss, training.arguments(__doc__, steps=4000))
