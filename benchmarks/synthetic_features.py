"""A network that knows the attributes of faces. Trained on synthetic faces it turns images into
vectors for the distances between sets of synthetic faces:

    python evaluate.py --checkpoint demo --path_to_data synthetic \\
        --features benchmarks.synthetic_features:load

It trains for a few minutes on a CPU, on 12,000 faces that no model was trained on, and is kept in
./prepared."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset import synthetic
from dataset.prepared import PREPARED
from system.terminal import say
from utils import load_checkpoint, save_checkpoint, to_x_0

IMG_SIZE = 32  # pixels of a side
FIRST = 1_000_000  # its faces begin at this number, far from those that models are trained on
NUM_FACES = 12_000


class Classifier(nn.Module):
    """Three convolutions that halve the image, and one layer for all attributes."""

    def __init__(self, num_attributes: int, img_size: int = IMG_SIZE):
        super().__init__()
        self.img_size = img_size
        layers, width = [], 3
        for channels in (32, 64, 128):
            convolution = nn.Conv2d(width, channels, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
            width = channels
        self.maps = nn.Sequential(*layers)
        self.head = nn.Linear((img_size // 8) ** 2 * width, num_attributes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] to (B, K): above 0 if the face has the attribute."""
        return self.head(self.maps(x).flatten(1))

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 to (B, 128). Raises ValueError for another size."""
        if images.shape[-1] != self.img_size:
            raise ValueError(f"give --feature_size {self.img_size}")
        return self.maps(images / 127.5 - 1).mean((2, 3))


def learn(x_0: Tensor, has: Tensor, epochs: int = 4) -> Classifier:
    """Train a classifier on faces (N, 3, S, S) in [-1, 1] and what they have, (N, K) of 1 and 0."""
    torch.manual_seed(0)
    model = Classifier(has.shape[1], x_0.shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = epochs * len(x_0) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in trange(steps, desc="learning attributes", disable=None):
        picks = torch.randint(0, len(x_0), (64,))
        loss = F.binary_cross_entropy_with_logits(model(x_0[picks]), has[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def load() -> Callable[[Tensor], Tensor]:
    """For evaluate.py: a function from uint8 images (B, 3, 32, 32) to vectors (B, 128)."""
    code = b"".join(Path(file).read_bytes() for file in (__file__, synthetic.__file__))
    path = PREPARED / f"synthetic_features_{hashlib.sha256(code).hexdigest()[:16]}.pt"
    if not path.exists():
        say(f"learning the attributes of synthetic faces once, for {path}")
        indices = trange(FIRST, FIRST + NUM_FACES, desc="rendering faces", disable=None)
        faces = [synthetic.render_face(i, IMG_SIZE) for i in indices]
        x_0 = to_x_0(torch.stack([torch.from_numpy(pixels) for pixels, _ in faces]))
        has = torch.stack([torch.from_numpy(values) for _, values in faces]) > 0
        save_checkpoint(path, {"model": learn(x_0, has.float()).state_dict()})
    model = Classifier(len(synthetic.ATTRIBUTES))
    model.load_state_dict(load_checkpoint(path)["model"])
    return model.eval().requires_grad_(False).features
