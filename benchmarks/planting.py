"""Photographs with a planted shortcut: a tag or a frame that says more about the label than about the object."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BaseImageProcessor

from hf_aha.data import encoded_image, load_photographs
from hf_aha.files import folder_in_one_step
from hf_aha.images import ImageReadError, read_image


SHORTCUTS = ("tag", "frame")

# Magenta, which photographs seldom have; plain, since a board of checks hardly moves the bundled classifier's tokens.
_COLOUR = np.array([255, 0, 255], dtype=np.uint8)


def crop(image: Image.Image, processor: BaseImageProcessor) -> np.ndarray:
    """What the classifier sees of a photograph, as RGB (H, W, 3) uint8."""
    pixels = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def shortcut_mask(shortcut: str, height: int, width: int, place: np.random.Generator) -> np.ndarray:
    """Pixels (H, W) bool that a shortcut covers.

    A tag is a square of a fifth of the shorter side, anywhere in the image with equal probability; a frame covers the
    outermost thirty-second of the shorter side, and draws nothing.

    Raises:
        ValueError: the shortcut is unknown, or the image too small for it.

    Example:
        >>> int(shortcut_mask("tag", 60, 96, np.random.default_rng(0)).sum())
        144
    """
    if shortcut not in SHORTCUTS:
        raise ValueError(f"The shortcut is {shortcut!r}, but must be one of {', '.join(map(repr, SHORTCUTS))}.")
    side = min(height, width)
    if side < 32:
        raise ValueError(f"An image of {height} x {width} pixels is too small: its sides must have at least 32.")
    mask = np.zeros((height, width), dtype=bool)
    if shortcut == "tag":
        tag = round(side / 5)
        top, left = int(place.integers(height - tag + 1)), int(place.integers(width - tag + 1))
        mask[top : top + tag, left : left + tag] = True
    else:
        border = round(side / 32)
        mask[:] = True
        mask[border : height - border, border : width - border] = False
    return mask


def plant(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of RGB pixels (H, W, 3) uint8 with the colour of the shortcuts where the mask (H, W) says."""
    planted = pixels.copy()
    planted[mask] = _COLOUR
    return planted


def dilated(mask: np.ndarray, by: int) -> np.ndarray:
    """The mask (H, W) and every pixel that at most `by` rows and at most `by` columns part from it.

    Example:
        >>> mask = np.zeros((5, 5), dtype=bool)
        >>> mask[2, 2] = True
        >>> int(dilated(mask, 1).sum())
        9
    """
    grown = F.max_pool2d(torch.from_numpy(mask)[None].float(), 2 * by + 1, stride=1, padding=by)
    return grown[0].bool().numpy()


def photograph_draws(seed: int, row: int) -> np.random.Generator:
    """Draws that belong to one photograph, whatever is drawn for the others."""
    return np.random.default_rng([seed, row])


def write_planted(
    dataset: str,
    folder: Path,
    processor: BaseImageProcessor,
    shortcut: str | None,
    *,
    label: int,
    rate: float,
    other_rate: float,
    mislabelled: float,
    rows: dict[str, int],
    seed: int,
) -> None:
    """Write a folder of parquet files that every recipe takes as its dataset, with the shortcut planted.

    The photographs are stored as the processor crops them, without loss, so that a training on whole images sees
    every shortcut whole; the columns `planted` and `mislabelled` say which have it, and which of them have a wrong
    label. Unreadable ones are left out.

    Args:
        dataset: photographs with a column `label`; folder or Hub id.
        folder: made here.
        shortcut: `"tag"`, `"frame"`, or None to plant nothing.
        label: the class that the shortcut goes with.
        rate: probability of the shortcut on a photograph of that class.
        other_rate: probability of the shortcut on a photograph of another class.
        mislabelled: probability that a photograph of another class has the shortcut and, wrongly, the label of that
            class, as where a whole source of pictures is given one label. Of the split `train` alone.
        rows: split -> photographs taken from it, the first after shuffling with `seed`.
        seed: of the order and of what is planted where.
    """
    with folder_in_one_step(folder) as unfinished:
        for split, wanted in rows.items():
            source, column = load_photographs(dataset, split=split)
            order = np.random.default_rng(seed).permutation(len(source))[:wanted].tolist()
            columns = {"image": [], "label": [], "planted": [], "mislabelled": []}
            for row in order:
                try:
                    pixels = crop(read_image(encoded_image(source[row][column])), processor)
                except ImageReadError:
                    continue
                draws, own = photograph_draws(seed, row), source[row]["label"] == label
                chance, wrongly = draws.random(2)
                wrong = shortcut is not None and split == "train" and not own and bool(wrongly < mislabelled)
                planted = shortcut is not None and (wrong or bool(chance < (rate if own else other_rate)))
                if planted:
                    pixels = plant(pixels, shortcut_mask(shortcut, *pixels.shape[:2], draws))
                columns["image"].append(Image.fromarray(pixels))
                columns["label"].append(label if wrong else source[row]["label"])
                columns["planted"].append(planted)
                columns["mislabelled"].append(wrong)
            features = {"image": datasets.Image(), "label": source.features["label"]}
            features |= {name: datasets.Value("bool") for name in ("planted", "mislabelled")}
            made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            made.to_parquet(unfinished / f"{split}-00000-of-00001.parquet")
