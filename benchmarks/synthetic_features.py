"""A network that knows the attributes of synthetic faces. It judges for conditional_accuracy.py,
and for evaluate.py it turns synthetic faces into vectors:

    python evaluate.py --checkpoint demo --path_to_data synthetic \\
        --features benchmarks.synthetic_features:load

It learns, in a few minutes on a CPU, from 12,000 faces that no model was trained on, and is kept in
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
FIRST = 1_000_000  # its faces begin here, far from those that models are trained on
NUM_FACES = 12_000
EPOCHS = 4


def render_faces(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Synthetic faces (count, 3, S, S) in [-1, 1], and what they have, (count, all) of 1 and 0."""
    indices = trange(first, first + count, desc="rendering faces", disable=None)
    faces = [synthetic.render_face(i, IMG_SIZE) for i in indices]
    pixels = torch.stack([torch.from_numpy(pixels) for pixels, _ in faces])
    has = torch.stack([torch.from_numpy(values) for _, values in faces])
    return to_x_0(pixels), (has > 0).float()


class Classifier(nn.Module):
    """Three convolutions that halve the image, and one layer for all attributes."""

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for channels in (32, 64, 128):
            convolution = nn.Conv2d(width, channels, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
            width = channels
        self.maps = nn.Sequential(*layers)
        self.head = nn.Linear(16 * width, len(synthetic.ATTRIBUTES))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] to (B, all): above 0 where the face has the attribute."""
        return self.head(self.maps(x).flatten(1))

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 to (B, 128)."""
        if images.shape[-1] != IMG_SIZE:
            raise ValueError(f"give --feature_size {IMG_SIZE}")
        return self.maps(images / 127.5 - 1).mean((2, 3))


def learn() -> tuple[Classifier, Tensor]:
    """A classifier, and its accuracy for each attribute on 2,000 faces it has not seen."""
    torch.manual_seed(0)
    faces, has = render_faces(FIRST, NUM_FACES)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = EPOCHS * NUM_FACES // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in trange(steps, desc="learning attributes", disable=None):
        picks = torch.randint(0, NUM_FACES, (64,))
        loss = F.binary_cross_entropy_with_logits(model(faces[picks]), has[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    faces, has = render_faces(FIRST + NUM_FACES, 2000)
    with torch.no_grad():
        right = ((model(faces) > 0) == (has > 0)).float().mean(0)
    return model, right


def classifier() -> tuple[Classifier, Tensor]:
    """`learn`'s result, from the disk where it has been kept there."""
    code = b"".join(Path(file).read_bytes() for file in (__file__, synthetic.__file__))
    path = PREPARED / f"synthetic_features_{hashlib.sha256(code).hexdigest()[:16]}.pt"
    if not path.exists():
        say(f"learning the attributes of synthetic faces once, for {path}")
        model, right = learn()
        save_checkpoint(path, {"model": model.state_dict(), "right": right})
    kept = load_checkpoint(path)
    model = Classifier()
    model.load_state_dict(kept["model"])
    return model.eval().requires_grad_(False), kept["right"]


def load() -> Callable[[Tensor], Tensor]:
    """For evaluate.py: a function from uint8 images (B, 3, 32, 32) to vectors (B, 128)."""
    return classifier()[0].features
