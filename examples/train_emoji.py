"""Trains the demo's colour network, a rectified flow of emoji: about 80 minutes on one CPU core.

npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
python examples/train_emoji.py --images package --threads 1

The images are Noto Emoji by Google (Apache License 2.0), as the npm package emoji-datasource-google carries them. They
are not part of this repository; only the weights trained on them are.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
import training
from PIL import Image

from stepcache.demo import networks

CATEGORIES = {
    "faces": "face-smiling face-affection face-tongue face-glasses face-neutral-skeptical face-concerned face-sleepy "
    "face-hand face-hat face-unwell",
    "cats": "cat-face monkey-face",
    "animals": "animal-mammal",
    "birds": "animal-bird",
    "sea": "animal-marine animal-reptile animal-amphibian",
    "fruit": "food-fruit food-vegetable",
    "sweets": "food-sweet",
    "flowers": "plant-flower plant-other",
    "hearts": "heart",
    "vehicles": "transport-ground transport-water",
}
"""Unicode's subcategories that make up each class of `networks.EMOJI_CLASSES`."""


def emoji(folder):
    """Images (N, 3, 32, 32) in [-1, 1] on white with their labels (N,); every class has the same share of rows."""
    entries = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    by_class = []
    for name in networks.EMOJI_CLASSES:
        chosen = [e for e in entries if e["subcategory"] in CATEGORIES[name].split() and e["has_img_google"]]
        by_class.append([_read(folder / "img" / "google" / "64" / e["image"]) for e in chosen])
    rows = max(map(len, by_class))
    images = [images[i % len(images)] for images in by_class for i in range(rows)]
    return torch.stack(images), torch.arange(len(by_class)).repeat_interleave(rows)


def _read(path):
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    small = white.convert("RGB").resize((networks.EMOJI_SIZE, networks.EMOJI_SIZE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1


def loss(network, images, labels, generator):
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    t = torch.randn(len(images), generator=generator).sigmoid()  # logit-normal, as in Stable Diffusion 3
    eps = torch.randn(images.shape, generator=generator)
    x = torch.lerp(images, eps, t.view(-1, 1, 1, 1))
    labels = training.drop_labels(labels, generator, null=networks.NO_EMOJI)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = network(x, t, labels)
    return F.mse_loss(velocity.float(), eps - images)


if __name__ == "__main__":
    options = training.arguments(__doc__, 9000, "--images")
    training.train("emoji", loss, options, data=lambda: emoji(options.images), learning_rate=6e-4, average=0.999)
