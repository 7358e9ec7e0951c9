from __future__ import annotations

import io
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from hf_aha.images import ImageReadError, find_images, read_image


ORIENTATION_TAG = 0x0112


@pytest.fixture
def pixels() -> np.ndarray:
    """An image (6, 9, 3) without any symmetry, so that each rotation and flip of it is different."""
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encode(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def as_array(source, **options) -> np.ndarray:
    image = read_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


# Files and bytes


def test_path_string_and_bytes_agree(tmp_path, pixels):
    data = encode(Image.fromarray(pixels))
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    for source in (path, str(path), data, Image.fromarray(pixels)):
        assert np.array_equal(as_array(source), pixels)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageReadError, match=r"nowhere\.png does not exist\.$"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageReadError, match="is a folder, not an image"):
        read_image(tmp_path)


def test_name_that_no_file_can_have():
    with pytest.raises(ImageReadError, match=r"^The image aaaa.*\(5,000 characters\) cannot be read") as caught:
        read_image("a" * 5000)
    assert len(str(caught.value)) < 400
    with pytest.raises(ImageReadError, match="cannot be read"):
        read_image("photo\0.png")


def test_empty_file(tmp_path):
    path = tmp_path / "empty.jpg"
    path.write_bytes(b"")
    with pytest.raises(ImageReadError, match=r"empty\.jpg is empty \(0 bytes\)"):
        read_image(path)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF"])
def test_truncated_file(tmp_path, image_format):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), image_format)
    path = tmp_path / "half"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageReadError, match="half is (truncated or damaged|not in a format)"):
        read_image(path)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "WEBP", "PPM", "DDS", "GIF", "BMP"])
def test_damaged_bytes_fail_with_our_error_or_not_at_all(image_format):
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    options = {"exif": exif} if image_format in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    noise = np.random.default_rng(2).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    good = encode(Image.fromarray(noise), image_format, **options)
    generator = np.random.default_rng(3)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            bad = bytearray(good)
            for place in generator.integers(0, min(len(bad), 200), 3):
                bad[place] = generator.integers(0, 256)
            bad = bad[: generator.integers(1, len(bad) + 1)]
            try:
                read_image(bytes(bad))
            except ImageReadError:
                refused += 1
    assert refused > 0


@pytest.mark.parametrize("data", [b"<!doctype html><title>Sign in</title>", b"\0" * 100, b"%PDF-1.7\n"])
def test_not_an_image(tmp_path, data):
    path = tmp_path / "page.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageReadError, match=r"page\.jpg is not in a format that Pillow can read"):
        read_image(path)


def test_lazily_opened_truncated_pil_image(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise))
    with pytest.raises(ImageReadError, match="^The given PIL image is truncated or damaged"):
        read_image(Image.open(io.BytesIO(data[: len(data) // 2])))


def test_pil_image_is_copied(pixels):
    source = Image.fromarray(pixels)
    read_image(source).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(source), pixels)


# Colour modes


def palette_with_transparency(pixels: np.ndarray) -> bytes:
    return encode(Image.fromarray(pixels).quantize(8), transparency=bytes(range(0, 256, 32)))


MODES = {
    "RGB": lambda x: encode(Image.fromarray(x)),
    "grey": lambda x: encode(Image.fromarray(x).convert("L")),
    "one bit": lambda x: encode(Image.fromarray(x).convert("1")),
    "grey and alpha": lambda x: encode(Image.fromarray(x).convert("LA")),
    "RGBA": lambda x: encode(Image.fromarray(np.concatenate([x, x[..., :1]], -1))),
    "palette": lambda x: encode(Image.fromarray(x).quantize(8)),
    "palette with a transparent entry": lambda x: encode(Image.fromarray(x).quantize(8), transparency=2),
    "palette with transparency": palette_with_transparency,
    "CMYK": lambda x: encode(Image.fromarray(x).convert("CMYK"), "JPEG"),
    "YCbCr": lambda x: encode(Image.fromarray(x), "JPEG"),
    "animation": lambda x: encode(
        Image.fromarray(x), "GIF", save_all=True, append_images=[Image.fromarray(255 - x)], duration=50
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_transformers_without_warning(tmp_path, pixels, mode):
    path = tmp_path / "image"
    path.write_bytes(MODES[mode](pixels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(load_image(str(path)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(as_array(path), expected)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(image_format):
    levels = np.array([[0, 257, 1000], [32896, 65278, 65535]], dtype=np.uint16)
    grey = as_array(encode(Image.fromarray(levels), image_format))
    assert np.array_equal(grey, np.repeat(np.array([[0, 1, 4], [128, 254, 255]])[..., None], 3, axis=-1))


def test_floating_point_tiff():
    levels = np.array([[0.0, 0.2, 1.0]], dtype=np.float32)
    assert as_array(encode(Image.fromarray(levels), "TIFF"))[..., 0].tolist() == [[0, 51, 255]]
    with pytest.raises(ImageReadError, match=r"values from 0 to 300; floating point images must lie in 0\.\.1"):
        read_image(encode(Image.fromarray(levels * 300), "TIFF"))


def test_mode_that_cannot_become_rgb():
    with pytest.raises(ImageReadError, match="conversion from La"):
        read_image(Image.new("La", (2, 2)))


# The eight values of the EXIF orientation tag, each as the operation that makes the stored pixels upright.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, pixels, orientation):
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    path = tmp_path / "rotated.png"
    path.write_bytes(encode(Image.fromarray(pixels), exif=exif))
    expected = UPRIGHT[orientation](pixels)
    assert np.array_equal(as_array(path), expected)
    assert np.array_equal(np.asarray(load_image(str(path))), expected)
    assert np.array_equal(as_array(Image.open(path)), expected)


# Sizes


def test_one_pixel():
    assert as_array(encode(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


def test_48_megapixels():
    image = read_image(encode(Image.new("L", (8000, 6000), 9), compress_level=1))
    assert image.size == (8000, 6000)
    assert image.getpixel((7999, 5999)) == (9, 9, 9)


def test_size_limit_is_checked_before_decoding():
    data = encode(Image.new("1", (400, 300)))
    broken = data[: len(data) // 2]
    for source in (data, broken, Image.new("L", (400, 300)), np.zeros((300, 400), np.uint8)):
        with pytest.raises(ImageReadError, match=r"has 400 x 300 pixels, more than the limit of 100,000\.$"):
            read_image(source, max_pixels=100_000)
    assert read_image(data, max_pixels=120_000).size == (400, 300)


def test_decompression_bomb():
    header = encode(Image.new("1", (1, 1)), "PPM").replace(b"1 1", b"60000 60000", 1)
    with pytest.raises(ImageReadError, match="too large"):
        read_image(header, max_pixels=10**10)


def test_image_without_pixels():
    with pytest.raises(ImageReadError, match="has no pixels"):
        read_image(Image.new("RGB", (0, 3)))


# Arrays and tensors


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_integer_arrays(pixels, dtype):
    assert np.array_equal(as_array(pixels.astype(dtype)), pixels)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_arrays(pixels, dtype):
    assert np.array_equal(as_array((pixels / 255).astype(dtype)), pixels)


def test_boolean_array():
    assert as_array(np.array([[True, False]]))[..., 1].tolist() == [[255, 0]]


def test_array_layouts(pixels):
    grey = pixels[..., 0]
    as_grey = np.repeat(grey[..., None], 3, -1)
    rgba = np.concatenate([pixels, grey[..., None]], -1)
    for given, expected in [
        (grey, as_grey),
        (grey[..., None], as_grey),
        (grey[None], as_grey),
        (pixels, pixels),
        (pixels.transpose(2, 0, 1), pixels),
        (rgba, pixels),
        (rgba.transpose(2, 0, 1), pixels),
        (pixels[::-1, ::2], pixels[::-1, ::2]),
    ]:
        assert np.array_equal(as_array(given), expected)
        assert np.array_equal(as_array(torch.from_numpy(given.copy())), expected)


def test_ambiguous_layout_follows_the_convention_of_the_type():
    values = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    assert np.array_equal(as_array(values), values[..., :3])
    assert np.array_equal(as_array(torch.from_numpy(values)), values.transpose(1, 2, 0))
    assert read_image(torch.rand(3, 1, 1)).size == (1, 1)
    assert read_image(np.zeros((1, 1, 3), np.uint8)).size == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_tensors(pixels, dtype):
    tensor = torch.from_numpy(pixels / 255).to(dtype)
    difference = as_array(tensor).astype(int) - pixels
    assert np.abs(difference).max() <= (1 if dtype == torch.bfloat16 else 0)


def test_tensor_that_requires_grad(pixels):
    tensor = torch.from_numpy(pixels / 255).permute(2, 0, 1).requires_grad_()
    assert np.array_equal(as_array(tensor), pixels)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 4, 4, 3), np.uint8), r"shape \(2, 4, 4, 3\) is not an image; use"),
        (np.zeros((5, 5, 2), np.uint8), "is not an image; use"),
        (np.zeros(5, np.uint8), "is not an image; use"),
        (np.array(3, np.uint8), "is not an image; use"),
        (np.zeros((0, 5, 3), np.uint8), "is not an image; use"),
        (np.full((2, 2), 256), r"holds integers from 256 to 256, outside 0\.\.255"),
        (np.array([[-1, 3]]), r"holds integers from -1 to 3, outside 0\.\.255"),
        (np.array([[-2.1, 2.6]]), r"holds values from -2\.1 to 2\.6; .*undo any normalisation"),
        (np.array([[0.5, 1.01]]), r"must lie in 0\.\.1"),
        (np.array([[0.5, np.nan]]), "NaN or infinite"),
        (np.array([[0.5, np.inf]]), "NaN or infinite"),
        (np.zeros((2, 2), complex), "holds complex128; an image holds"),
        (np.array([["a", "b"]]), "holds <U1; an image holds"),
        (np.array([[None, 1]]), "holds object; an image holds"),
    ],
)
def test_refused_arrays(array, reason):
    with pytest.raises(ImageReadError, match=reason) as caught:
        read_image(array)
    assert str(caught.value).startswith("The given array of shape")
    if array.dtype.kind in "uifc":
        with pytest.raises(ImageReadError, match=reason):
            read_image(torch.from_numpy(array))


@pytest.mark.parametrize("source", [None, 3, ["photo.jpg"], bytearray(b"x")])
def test_refused_types(source):
    with pytest.raises(TypeError, match=f"not {type(source).__name__}"):
        read_image(source)


# URLs


class Handler(BaseHTTPRequestHandler):
    picture = encode(Image.new("RGB", (5, 4), (10, 20, 30)))
    released = threading.Event()

    def do_GET(self):
        if self.path == "/hang.png":
            self.released.wait(20)
            return
        if self.path == "/garbage.png":
            self.wfile.write(b"not http at all\r\n\r\n")
            return
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/photo.png")
            self.end_headers()
            return
        bodies = {
            "/photo.png": self.picture,
            "/short.png": self.picture,
            "/unannounced.png": self.picture + bytes(2000),
            "/large.png": bytes(2000),
            "/page.html": b"<html></html>",
            "/empty.png": b"",
        }
        body = bodies.get(self.path.split("?")[0])
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/unannounced.png":
            self.send_header("Content-Length", str(len(body) + (100 if self.path == "/short.png" else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    Handler.released.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Handler.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("path", ["/photo.png", "/photo.png?size=5", "/moved.png"])
def test_url(server, path):
    assert as_array(server + path).shape == (4, 5, 3)
    assert as_array(server.replace("http", "HTTP", 1) + path)[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/nothing.png", "could not be downloaded: the server answered 404 Not Found"),
        ("/page.html", "is not in a format that Pillow can read"),
        ("/empty.png", "is empty"),
        ("/short.png", "broke off after"),
        ("/garbage.png", "could not be downloaded"),
        ("/large.png", "is larger than the limit of 1,000 bytes"),
        ("/unannounced.png", "is larger than the limit of 1,000 bytes"),
        ("/hang.png", "could not be downloaded: .*timed out"),
        ("/a b.png", "could not be downloaded"),
    ],
)
def test_url_that_fails(server, path, reason):
    with pytest.raises(ImageReadError, match=reason) as caught:
        read_image(server + path, timeout=0.3, max_download_bytes=1000)
    assert path in str(caught.value)


def test_url_without_server():
    with pytest.raises(ImageReadError, match="could not be downloaded"):
        read_image("http://127.0.0.1:9/photo.png", timeout=2)


# Finding files


@pytest.fixture
def folder(tmp_path, pixels, monkeypatch) -> Path:
    for name in ("b.png", "a.JPG", "deep/er/c.webp", "notes.txt", "odd[1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_find_images_in_a_folder(folder):
    names = [path.relative_to(folder).as_posix() for path in find_images([str(folder)])]
    assert names == ["a.JPG", "b.png", "deep/er/c.webp", "odd[1].png"]


def test_find_images_by_pattern(folder):
    assert find_images(["*.png"]) == [Path("b.png"), Path("odd[1].png")]
    assert find_images([f"{folder}/*.png"]) == [folder / "b.png", folder / "odd[1].png"]
    assert find_images(["**/*.webp"]) == [Path("deep/er/c.webp")]
    assert find_images(["?.png", "[ab].*"]) == [Path("b.png"), Path("a.JPG")]


def test_find_images_keeps_the_order_given_and_drops_repeats(folder):
    assert find_images(["b.png", "a.JPG", "./b.png", "*.png"]) == [Path("b.png"), Path("a.JPG"), Path("odd[1].png")]


def test_find_images_keeps_missing_files_literal_names_and_urls(folder):
    url = "https://example.org/photo.jpg?size=[1]*"
    assert find_images(["gone.png", "odd[1].png", url]) == [Path("gone.png"), Path("odd[1].png"), url]


def test_find_images_refuses_what_holds_none(folder):
    with pytest.raises(ImageReadError, match="The folder empty holds no image"):
        find_images(["empty"])
    with pytest.raises(ImageReadError, match=r"No file matches the pattern \*\.bmp"):
        find_images(["*.bmp"])
