"""Reading one photograph from anywhere a user may have it: PIL, path, bytes, array, tensor or http(s) URL."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError


ImageSource = Image.Image | str | os.PathLike[str] | bytes | np.ndarray | torch.Tensor

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

MAX_PIXELS = 100_000_000
MAX_DOWNLOAD_BYTES = 50_000_000
DOWNLOAD_TIMEOUT_SECONDS = 20.0

# What Pillow's decoders raise on damaged data, format by format.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)


class ImageReadError(ValueError):
    """An image could not be read; the message names the source and the reason in one sentence."""


def read_image(
    source: ImageSource,
    *,
    timeout: float = DOWNLOAD_TIMEOUT_SECONDS,
    max_download_bytes: int = MAX_DOWNLOAD_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Return `source` as an upright 8-bit RGB image.

    EXIF rotation is applied; CMYK, palette, grey, alpha and 16-bit images are converted as
    `transformers.image_utils.load_image` does (alpha is dropped, not blended), except that 16-bit grey is scaled
    to 8 bits instead of clipped, and that floating point images (TIFF) must hold 0..1.

    Args:
        source: a PIL image, a path, encoded bytes, an http(s) URL, or an array or tensor of shape (H, W), (H, W, 1),
            (H, W, 3), (H, W, 4) or channels first. Integer and boolean arrays hold 0..255 and False..True, floating
            ones 0..1. Where both ends of a shape could be channels, as in (3, 5, 4), the last are the channels of an
            array and the first those of a tensor.
        timeout: seconds a URL may stay silent.
        max_download_bytes: size at which a download is given up.
        max_pixels: largest accepted height x width.

    Raises:
        ImageReadError: the source is missing, empty, truncated, too large, or not an image.
        TypeError: `source` is of none of the types above.

    Example:
        >>> import numpy as np
        >>> read_image(np.zeros((4, 6, 3), dtype=np.uint8)).size
        (6, 4)
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the given PIL image", max_pixels)
    if isinstance(source, bytes):
        return _decode(source, "the given bytes", max_pixels)
    if isinstance(source, torch.Tensor):
        values = source.detach().cpu()
        array = values.float().numpy() if values.is_floating_point() else values.resolve_conj().numpy()
        return _from_array(array, f"the given tensor of shape {tuple(source.shape)}", max_pixels, channels_first=True)
    if isinstance(source, np.ndarray):
        return _from_array(source, f"the given array of shape {source.shape}", max_pixels, channels_first=False)
    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)
        if _is_url(name):
            return _decode(_download(name, timeout, max_download_bytes), f"the image {name}", max_pixels)
        return _decode(_read_file(name), f"the image {_shown(name)}", max_pixels)
    raise TypeError(
        f"An image must be a PIL image, path, URL, bytes, numpy array or tensor, not {type(source).__name__}."
    )


def find_images(patterns: list[str]) -> list[Path | str]:
    """Expand files, folders (searched recursively) and glob patterns into a list without repeats.

    The order is that of `patterns`, sorted within each folder and pattern. URLs are kept as they are, and so is a path
    that names no file, so that the caller reports it as missing.

    Args:
        patterns: files, folders, glob patterns (`*`, `?`, `[]`, `**` for any depth) and http(s) URLs. A file whose
            name holds one of these characters stands for itself.

    Returns:
        a `Path` for each file and a string for each URL; each can be given to `read_image`.

    Raises:
        ImageReadError: a folder holds no image, or a pattern matches no file.
    """
    found: dict[Path | str, None] = {}
    for pattern in patterns:
        if _is_url(pattern):
            found[pattern] = None
            continue
        path = Path(pattern)
        if os.path.isdir(path):
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not inside:
                raise ImageReadError(f"The folder {pattern} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            found.update(dict.fromkeys(inside))
        elif not os.path.exists(path) and any(c in pattern for c in "*?["):
            anchor = Path(path.anchor) if path.anchor else Path()
            matches = sorted(p for p in anchor.glob(str(path.relative_to(path.anchor))) if p.is_file())
            if not matches:
                raise ImageReadError(f"No file matches the pattern {pattern}.")
            found.update(dict.fromkeys(matches))
        else:
            found[path] = None
    return list(found)


def _is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def _shown(name: str, limit: int = 200) -> str:
    # A caller may pass encoded image data as a string; the message must not repeat megabytes of it.
    return name if len(name) <= limit else f"{name[:limit]}... ({len(name):,} characters)"


def _capital(name: str) -> str:
    return name[0].upper() + name[1:]


def _read_file(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except FileNotFoundError as error:
        raise ImageReadError(f"The image {_shown(name)} does not exist.") from error
    except IsADirectoryError as error:
        raise ImageReadError(f"{_shown(name)} is a folder, not an image.") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ImageReadError(f"The image {_shown(name)} cannot be read: {reason}.") from error


def _download(url: str, timeout: float, max_bytes: int) -> bytes:
    try:
        with urlopen(Request(url, headers={"User-Agent": "hf_aha"}), timeout=timeout) as response:
            length = response.headers.get("Content-Length", "")
            announced = int(length) if length.isdigit() else 0
            data = response.read(max_bytes + 1) if announced <= max_bytes else b""
    except HTTPError as error:
        error.close()
        raise ImageReadError(
            f"The image {url} could not be downloaded: the server answered {error.code} {error.reason}."
        ) from error
    except (OSError, HTTPException, ValueError) as error:  # ValueError: not a valid URL
        reason = getattr(error, "reason", None) or error
        raise ImageReadError(f"The image {url} could not be downloaded: {reason}.") from error
    if max(announced, len(data)) > max_bytes:
        raise ImageReadError(f"The image {url} is larger than the limit of {max_bytes:,} bytes.")
    if len(data) < announced:
        raise ImageReadError(f"The download of {url} broke off after {len(data):,} of {announced:,} bytes; try again.")
    return data


def _decode(data: bytes, name: str, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageReadError(f"{_capital(name)} is empty (0 bytes).")
    try:
        with warnings.catch_warnings():
            # PIL warns at half its own limit; `max_pixels` is ours and is checked from the header below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ImageReadError(f"{_capital(name)} is not in a format that Pillow can read.") from error
    except Image.DecompressionBombError as error:
        raise ImageReadError(f"{_capital(name)} is too large: {error}") from error
    except _DECODER_ERRORS as error:
        raise ImageReadError(f"{_capital(name)} is truncated or damaged: {error}.") from error
    with image:
        return _to_rgb(image, name, max_pixels)


def _from_array(array: np.ndarray, name: str, max_pixels: int, *, channels_first: bool) -> Image.Image:
    subject = _capital(name)
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise ImageReadError(f"{subject} holds {array.dtype}; an image holds integers, booleans or real numbers.")
    if array.ndim == 3:
        first, last = (array.shape[axis] in (1, 3, 4) for axis in (0, -1))
        if first and (channels_first or not last):
            array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise ImageReadError(
            f"{subject} is not an image; use (H, W), (H, W, 1), (H, W, 3), (H, W, 4) or the same channels first."
        )
    _check_size(array.shape[1], array.shape[0], name, max_pixels)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise ImageReadError(f"{subject} holds NaN or infinite pixels.")
        if array.min() < 0 or array.max() > 1:
            raise ImageReadError(
                f"{subject} holds values from {array.min():.3g} to {array.max():.3g}; "
                "floating point images must lie in 0..1 (undo any normalisation first)."
            )
        # Half precision cannot hold every integer product on the way to 255.
        array = (array.astype(np.float32) * 255).round()
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.min() < 0 or array.max() > 255:
        raise ImageReadError(f"{subject} holds integers from {array.min()} to {array.max()}, outside 0..255.")
    return Image.fromarray(array.astype(np.uint8)).convert("RGB")


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width == 0 or height == 0:
        raise ImageReadError(f"{_capital(name)} has no pixels ({width} x {height}).")
    if width * height > max_pixels:
        raise ImageReadError(f"{_capital(name)} has {width} x {height} pixels, more than the limit of {max_pixels:,}.")


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(*image.size, name, max_pixels)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")  # straight to RGB gives the same pixels and a warning
        if image.mode == "I" or image.mode.startswith("I;16"):
            return _grey_16_to_8_bits(np.asarray(image, dtype=np.float64))
        if image.mode != "F":
            return image.convert("RGB")
        levels = np.asarray(image)
    except _DECODER_ERRORS as error:
        raise ImageReadError(f"{_capital(name)} is truncated or damaged: {error}.") from error
    return _from_array(levels, name, max_pixels, channels_first=False)


def _grey_16_to_8_bits(levels: np.ndarray) -> Image.Image:
    # Pillow clips 16-bit grey to 255 on conversion, which turns most of such a photograph white.
    return Image.fromarray((levels / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
