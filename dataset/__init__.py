"""From files to batches: `load_faces` reads a source, `Batches` gives the batch of a step."""

from dataset.faces import Batches, Faces, load_faces

__all__ = ["Batches", "Faces", "load_faces"]
