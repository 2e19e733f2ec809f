"""Trains the demo's digit classifier on the real images, and reports its accuracy on 500 held-out ones: one minute.

python examples/train_classifier.py
"""

import torch
import torch.nn.functional as F
import training

HELD_OUT = slice(0, None, 10)


def loss(network, images, labels, generator):
    rows, columns = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return F.cross_entropy(network(torch.roll(images, (rows, columns), (2, 3))), labels)


if __name__ == "__main__":

    def without_held_out():
        pixels, labels = training.digits()
        keep = torch.ones(len(labels), dtype=torch.bool)
        keep[HELD_OUT] = False
        return pixels[keep], labels[keep]

    options = training.arguments(__doc__, steps=3000)
    network = training.train("classifier", loss, options, data=without_held_out, learning_rate=2e-3)
    pixels, labels = training.digits()
    with torch.no_grad():
        right = (network(pixels[HELD_OUT]).argmax(1) == labels[HELD_OUT]).float().mean()
    print(f"{right:.1%} of 500 held-out real images recognised")
