"""Image-folder trees: found, decoded once into one uint8 tensor, and kept in a file."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experiments.data.cache import cached, writable_folder
from experiments.data.image_module import LabelledImages
from experiments.data.progress import track

_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff"})
_ANNOTATIONS = "val_annotations.txt"


@dataclass(frozen=True)
class ImageList:
    """Files of one part of a tree with the label of each; paths relative to `folder`."""

    folder: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in `folder`, sorted.

    Raises: FileNotFoundError where the folder or its classes are missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}: an image-folder tree has the layout "
            "ROOT/{train,test or val}/CLASS/*.png; set data.root to its ROOT"
        )
    names = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
    if not names:
        raise FileNotFoundError(f"{folder} holds no class folders: expected {folder}/CLASS/*.png")
    return names


def list_images(folder: Path, classes: Sequence[str]) -> ImageList:
    """Images of folder/CLASS/**, or of TinyImageNet's folder/images with val_annotations.txt.

    Raises: FileNotFoundError for no images, ValueError for a class that `classes` does not have.
    """
    number = {name: label for label, name in enumerate(classes)}
    annotations = folder / _ANNOTATIONS
    found: list[tuple[str, int]] = []
    if annotations.exists():
        for line in annotations.read_text().splitlines():
            name, kind = line.split("\t")[:2]
            if kind not in number:
                raise ValueError(f"{annotations}: class {kind!r} of {name} has no training folder")
            found.append((os.path.join("images", name), number[kind]))
    else:
        others = [name for name in class_names(folder) if name not in number]
        if others:
            raise ValueError(
                f"{folder} has classes that the training part has not: {', '.join(others[:5])}"
            )
        for name in class_names(folder):
            for parent, _, names in os.walk(folder / name):
                relative = os.path.relpath(parent, folder)
                found += [
                    (os.path.join(relative, file), number[name])
                    for file in names
                    if os.path.splitext(file)[1].lower() in _ENDINGS
                ]
    if not found:
        raise FileNotFoundError(f"{folder} holds no images ({', '.join(sorted(_ENDINGS))})")
    found.sort()
    return ImageList(folder, tuple(f for f, _ in found), tuple(label for _, label in found))


def tree_key(images: ImageList, size: int | None) -> str:
    """Fingerprint of names, labels, lengths and times of the files, and the size decoded to."""
    digest = hashlib.sha256(f"1 {size}".encode())
    for file, label in zip(images.files, images.labels, strict=True):
        status = os.stat(images.folder / file)
        digest.update(f"{file}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _decode(path: Path, size: int | None) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of an image file, resized to size x size if that is given."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
            if size is not None and rgb.size != (size, size):
                rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(rgb)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be decoded ({error}): the file is truncated or no image; "
            "fetch or unpack it again"
        ) from error


def decode_images(images: ImageList, size: int | None) -> torch.Tensor:
    """All images as uint8 (N, 3, H, W), decoded by a few threads with a progress bar.

    Raises: ValueError for a file that cannot be decoded or has another size, naming it.
    """
    first = _decode(images.folder / images.files[0], size)
    out = np.empty((len(images.files), 3, *first.shape[:2]), dtype=np.uint8)

    def fill(item: tuple[int, str]) -> None:
        number, file = item
        pixels = _decode(images.folder / file, size)
        if pixels.shape != first.shape:
            raise ValueError(
                f"{images.folder / file} is {pixels.shape[1]}x{pixels.shape[0]} pixels, the first "
                f"image {first.shape[1]}x{first.shape[0]}: give image_size to resize all"
            )
        out[number] = pixels.transpose(2, 0, 1)

    # PIL lets other threads run while it decodes; more than 8 wait for the disk.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done = pool.map(fill, enumerate(images.files))
        try:
            for _ in track(done, f"decoding {images.folder.name}", len(images.files)):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(out)


def load_images(images: ImageList, size: int | None, cache_dir: Path) -> LabelledImages:
    """Decoded images and labels, from the cache where the tree has not changed since."""
    where = str(images.folder.absolute())
    name = f"{images.folder.name}-{hashlib.sha256(where.encode()).hexdigest()[:8]}.pt"

    def build() -> dict[str, torch.Tensor]:
        return {"images": decode_images(images, size), "labels": torch.tensor(images.labels)}

    stored = cached(writable_folder(cache_dir) / name, tree_key(images, size), build)
    return LabelledImages(stored["images"], stored["labels"])
