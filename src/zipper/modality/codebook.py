"""Codebooks: the centroids of points, and which of them is nearest. It knows nothing of what the
points are made of."""

from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.saving.files import check_finite, header, replacing

BATCH = 8_192  # points per step of the k-means


def nearest(
    points: Float32[np.ndarray, "points dim"], centroids: Float32[np.ndarray, "codes dim"]
) -> Int64[np.ndarray, " points"]:
    """Index of the nearest centroid (Euclid) of each point; the lowest of equals."""
    return (np.square(centroids).sum(axis=1) / 2 - points @ centroids.T).argmin(axis=1)


def stacked(
    points: Float32[np.ndarray, "points dim"], times: int
) -> Float32[np.ndarray, "stacks stacked_dim"]:
    """So many points side by side; the last stack is filled up by repeating the last point."""
    dim = times * points.shape[1]
    if not len(points):
        return np.zeros((0, dim), np.float32)
    return np.pad(points, ((0, -len(points) % times), (0, 0)), mode="edge").reshape(-1, dim)


def kmeans(
    points: Float32[np.ndarray, "points dim"],
    codes: int,
    seed: int,
    steps: int,
    batch: int = BATCH,
    points_of: str = "points",
    more: str = "data",
) -> Float32[np.ndarray, "codes dim"]:
    """Mini-batch k-means (Sculley 2010) from a k-means++ start, as scikit-learn has it, of at most
    so many steps of `batch` points.

    The same centroids for the same arguments. Raises ZipperError if there are fewer different
    points than codes, in the caller's words: `points_of` is what the points are, and `more` what to
    give more of.
    """
    if len(np.unique(points, axis=0)) < codes:
        raise ZipperError(
            f"{len(points)} {points_of} are too few, or too alike, for {codes} codes. Give "
            f"more {more} or ask for fewer codes."
        )
    batch = min(batch, len(points))
    fitted = extra("sklearn.cluster").MiniBatchKMeans(
        codes,
        batch_size=batch,
        max_iter=-(-steps * batch // len(points)),  # it counts rounds over all points
        n_init=1,
        random_state=seed,
    )
    centroids: np.ndarray = fitted.fit(points).cluster_centers_
    return centroids


def save_codebook(codebook: Float32[np.ndarray, "codes dim"], path: Path) -> None:
    """Writes a file of it, whole or not at all."""
    with replacing(path) as beside:
        save_file({"codebook": codebook}, beside)


def load_codebook(path: Path, codes: int | None, dim: int) -> Float32[np.ndarray, "codes dim"]:
    """What `save_codebook` wrote. Raises a ZipperError for anything else, before memory is taken
    for it."""
    entries = header(path)
    held = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    if held != {"codebook": ("F32", (codes, dim))}:
        raise ZipperError(
            f"{path} holds {held!s:.100}; a codebook of {codes} codes of {dim} numbers was wanted."
        )
    check_finite(path, entries)
    try:
        return load_file(path)["codebook"]
    except (OSError, SafetensorError) as error:
        raise ZipperError(f"{path} cannot be read: {error}.") from error
