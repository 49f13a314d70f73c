"""The one reader of image files: a table of odd files, and the three doors through which it is used."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import image_files
from datasets import load_dataset
from errors import UserError
from image_files import find_images, read_images
from pipeline.sampling.masks import hidden_pixels
from scripts.evaluate import load_images

Y, X = np.indices((16, 16), dtype=np.uint8)
GREY = 15 * Y + X
COLOUR = np.stack((GREY, 255 - GREY, np.full_like(GREY, 90)), axis=2)
LEFT = X < 8
LEVELS = (GREY.astype(np.uint16) * 257) + 100  # not quite the 8-bit levels: rounding is part of the reading
ROTATED = 6  # EXIF: turn a quarter clockwise to view


# ---- the doors: the pixels [C,H,W], or for --mask what is hidden, of one file ----


def train(path):
    Image.fromarray(GREY).save(make_folder(path.parent / "test") / "other.png")
    os.replace(path, make_folder(path.parent / "train") / path.name)
    return load_dataset("ImageFolder", path.parent, image_size=16).train[0].numpy()


def evaluate(path):
    return load_images(path.parent)[0].numpy()


def mask(path):
    return hidden_pixels(str(path), 16, 16).numpy()


DOORS = (train, evaluate, mask)


def make_folder(path):
    path.mkdir(exist_ok=True)
    return path


# ---- kinds of files ----


def save(pixels, **options):
    """A writer of a file of these pixels, an array or an image."""
    return lambda path: (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)


def turned(pixels, **options):
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    return save(np.ascontiguousarray(np.rot90(pixels)), exif=exif, **options)


def content(data):
    return lambda path: path.write_bytes(data)


def damaged(write, damage):
    """A writer of another writer's file with its bytes damaged."""

    def write_damaged(path):
        write(path)
        path.write_bytes(damage(path.read_bytes()))

    return write_damaged


def png(width, height, depth, kind, rows=b"", *others):
    """The bytes of a PNG file of a kind that Pillow does not write; `kind` 0 grey, 2 colour; others: (name, bytes)."""
    header = struct.pack(">2I5B", width, height, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *others, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rows(array):
    """Big-endian rows, each after the number of its filter, as in a PNG file."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)


def with_alpha(pixels):
    return np.dstack((pixels, np.where(LEFT, 255, 0).astype(np.uint8)))


def seen_through(pixels, opaque=LEFT):
    """What is to be read, given the level of grey behind the image."""
    return lambda behind: np.where(opaque if pixels.ndim == 2 else opaque[..., None], pixels, behind)


def palette(pixels=GREY // 128):
    image = Image.fromarray(pixels).convert("P")
    image.putpalette([200, 20, 30, 40, 250, 60])
    return image


PALETTE = np.array([[200, 20, 30], [40, 250, 60]], np.uint8)[GREY // 128]
OTHER = Image.fromarray(255 - GREY)
FRAMES = {"save_all": True, "append_images": [OTHER, OTHER]}
CMYK = Image.new("CMYK", (16, 16), (0, 0, 255, 0))
CMYK.paste((0, 0, 0, 255), (8, 0, 16, 16))
YELLOW = np.where(LEFT[..., None], np.array([255, 255, 0]), 0)  # and black

PIXELS = {
    "1 bit, one level transparent": (
        "a.png",
        save(Image.fromarray(LEFT), transparency=0),
        seen_through(np.full_like(GREY, 255)),
    ),
    "1 bit": ("a.png", save(Image.fromarray(GREY > 127)), np.where(GREY > 127, 255, 0)),
    "8 bits": ("a.png", save(GREY), GREY),
    "16 bits PNG": ("a.png", save(LEVELS), GREY),
    "16 bits TIFF": ("a.tif", save(LEVELS), GREY),
    "16 bits TIFF, big-endian": (
        "a.tif",
        save(Image.frombytes("I;16B", (16, 16), LEVELS.astype(">u2").tobytes())),
        GREY,
    ),
    "16 bits PGM": ("a.pgm", content(b"P5 16 16 65535\n" + LEVELS.astype(">u2").tobytes()), GREY),
    "10 bits PGM": (
        "a.pgm",
        content(b"P5 16 16 1023\n" + (GREY * np.int64(4)).astype(">u2").tobytes()),
        np.round(GREY * 4.0 / 1023 * 255),
    ),
    "16 bits, colour": ("a.png", content(png(16, 16, 16, 2, rows(COLOUR.astype(int) * 257))), COLOUR),
    "16 bits, one level transparent": (
        "a.png",
        content(png(16, 16, 16, 0, rows(LEVELS), (b"tRNS", struct.pack(">H", LEVELS[0, 0])))),
        seen_through(GREY, GREY[0, 0] != GREY),
    ),
    "colour": ("a.png", save(COLOUR), COLOUR),
    "grey and alpha": ("a.png", save(with_alpha(GREY)), seen_through(GREY)),
    "colour and alpha": ("a.png", save(with_alpha(COLOUR)), seen_through(COLOUR)),
    "alpha in WebP": ("a.webp", save(with_alpha(COLOUR), lossless=True), seen_through(COLOUR)),
    "one grey transparent": (
        "a.png",
        save(GREY, transparency=int(GREY[3, 3])),
        seen_through(GREY, GREY[3, 3] != GREY),
    ),
    "one colour transparent": (
        "a.png",
        save(COLOUR, transparency=tuple(COLOUR[0, 0].tolist())),
        seen_through(COLOUR, (COLOUR[0, 0] != COLOUR).any(2)),
    ),
    "palette": ("a.png", save(palette()), PALETTE),
    "palette with a transparent colour": (
        "a.png",
        save(palette(), transparency=0),
        seen_through(PALETTE, GREY > 127),
    ),
    "palette with an alpha each": (
        "a.png",
        save(palette(), transparency=bytes([0, 255])),
        seen_through(PALETTE, GREY > 127),
    ),
    "CMYK TIFF": ("a.tif", save(CMYK), YELLOW),
    "CMYK JPEG": ("a.jpg", save(CMYK, quality=100), YELLOW),
    "animated GIF": ("a.gif", save(palette(), save_all=True, append_images=[OTHER]), PALETTE),
    "animated PNG": ("a.png", save(GREY, **FRAMES), GREY),
    "TIFF of pages": ("a.tiff", save(GREY, **FRAMES), GREY),
    "EXIF rotation PNG": ("a.png", turned(GREY), GREY),
    "EXIF rotation PNG, 16 bits": ("a.png", turned(LEVELS), GREY),
    "EXIF rotation JPEG": ("a.jpg", turned(255 - 255 * LEFT.astype(np.uint8), quality=100), np.where(LEFT, 0, 255)),
    "EXIF rotation TIFF": ("a.tif", turned(COLOUR), COLOUR),
    "another format's ending": ("a.jpg", save(GREY, format="PNG"), GREY),
    "ending in capitals": ("a.PNG", save(GREY, format="PNG"), GREY),
}

LEVELS_UNDEFINED = "black and white are not defined"
REFUSED = {
    "float": ("a.tif", save(GREY.astype(np.float32)), LEVELS_UNDEFINED),
    "32 bits": ("a.tif", save(GREY.astype(np.int32) << 20), LEVELS_UNDEFINED),
    "empty": ("a.png", content(b""), "not one of PNG"),
    "text": ("a.jpg", content(b"<html>not found</html>"), "not one of PNG"),
    "PostScript, which is a program": ("a.png", save(COLOUR, format="EPS"), "not one of PNG"),
    "truncated PNG": ("a.png", damaged(save(COLOUR), lambda data: data[:-60]), "cannot read"),
    "truncated JPEG": ("a.jpg", damaged(save(COLOUR), lambda data: data[:-200]), "cannot read"),
    "truncated header": ("a.png", damaged(save(COLOUR), lambda data: data[:20]), "cannot read"),
    "truncated BMP": ("a.bmp", damaged(save(COLOUR), lambda data: data[:-90]), "cannot read"),
    "damaged checksum": (
        "a.png",
        damaged(save(COLOUR), lambda data: data.replace(b"IHDR\0", b"IHDR\1")),
        "cannot read",
    ),
    "gigantic": ("a.png", content(png(20_000, 20_000, 8, 0)), "exceeds limit"),
    "nearly gigantic": ("a.png", content(png(10_000, 9_000, 8, 0)), "exceeds limit"),
    "dangling link": ("a.png", lambda path: path.symlink_to("nowhere"), "a.png"),
    "circular link": ("a.png", lambda path: path.symlink_to(path.name), "a.png"),
    "pipe": ("a.png", os.mkfifo, "a.png"),
}


@pytest.mark.parametrize("kind", PIXELS)
@pytest.mark.parametrize("door", DOORS)
def test_pixels_are_the_same_through_every_door(door, kind, tmp_path, capfd):
    name, write, expected = PIXELS[kind]
    write(tmp_path / name)
    seen = door(tmp_path / name)
    if callable(expected):
        expected = expected(0 if door is mask else 255)
    expected = np.asarray(expected).astype(np.uint8)
    if door is mask:
        bright = np.array(Image.fromarray(expected).convert("L")) >= 128
        assert np.array_equal(seen, bright)
    else:
        channels = expected[None] if expected.ndim == 2 else expected.transpose(2, 0, 1)
        assert seen.shape == channels.shape and seen.dtype == np.uint8
        assert np.abs(seen.astype(int) - channels).max() <= (2 if name.endswith("jpg") else 0)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("door", DOORS)
def test_refusals_are_the_same_through_every_door(door, kind, tmp_path, capfd):
    name, write, words = REFUSED[kind]
    write(tmp_path / name)
    with pytest.raises(UserError) as caught:
        door(tmp_path / name)
    message = str(caught.value)
    assert words in message and name in message and str(tmp_path) in message and "\n" not in message
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("unpainted", [(255, 255, 255, 0), (0, 0, 0, 0), (0, 0, 0, 255), (255, 255, 255, 127)])
@pytest.mark.parametrize("brush", [(255, 255, 255, 255), (255, 255, 255, 128), (140, 140, 140, 255)])
def test_a_mask_is_what_is_painted_white(unpainted, brush, tmp_path):
    """On a transparent layer, too, whatever colour its transparent pixels have."""
    layer = np.where(LEFT[..., None], np.array(brush), np.array(unpainted)).astype(np.uint8)
    Image.fromarray(layer).save(tmp_path / "mask.png")
    assert np.array_equal(hidden_pixels(str(tmp_path / "mask.png"), 16, 16), LEFT)


# ---- which files are images: the two doors that take a folder ----


def link_folder(root):
    save(GREY)(make_folder(root / "b") / "1.png")
    (root / "a").symlink_to("b")


def circle(root):
    save(GREY)(make_folder(root / "a") / "1.png")
    (root / "a" / "up").symlink_to(root)
    (root / "self").symlink_to("self")


def hidden(root):
    save(GREY)(root / "1.png")
    save(GREY)(root / ".2.png")
    (root / "._3.png").write_bytes(b"left by a file manager")
    save(GREY)(make_folder(root / ".thumbnails") / "4.png")


def other_files(root):
    save(GREY)(root / "1.png")
    (root / "notes.txt").write_text("not one of PNG")
    np.save(root / "labels.npy", np.arange(3))


def links_to_a_file(root):
    save(GREY)(root / "2.png")
    (root / "1.png").symlink_to("2.png")
    os.link(root / "2.png", root / "3.png")


def folder_named_as_an_image(root):
    save(GREY)(make_folder(root / "a.png") / "1.png")


def links_to_elsewhere(root):
    elsewhere = make_folder(root.parent / "elsewhere")
    save(GREY)(elsewhere / "1.png")
    save(GREY)(elsewhere / "2.png")
    (root / "a").symlink_to(elsewhere)
    (root / "b.png").symlink_to(elsewhere / "1.png")


def run_folder(root):
    """A run of ours: config.json and what follows from it."""
    make_folder(root)
    for name in ("config.json", "log.jsonl", ".lock"):
        (root / name).touch()
    for name in ("reconstructions_epoch_001.png", "grid.png", "trajectory.png", "images.npz", "png/00000.png"):
        (path := root / "samples" / name).parent.mkdir(parents=True, exist_ok=True)
        save(255 - GREY)(path) if name.endswith("png") else path.touch()
    save(GREY)(root / "spikes.png")


def a_run_below(root):
    save(GREY)(root / "1.png")
    make_folder(root / "result")
    run_folder(make_folder(root / "result" / "ImageFolder") / "snn-vq-vae")


def a_run_that_was_stopped(root):
    a_run_below(root)
    (root / "result" / "ImageFolder" / "snn-vq-vae" / "log.jsonl").unlink()


def a_packed_run(root):
    save(GREY)(root / "1.png")
    run_folder(root / "packed")
    (root / "packed" / ".lock").unlink()


def results_of_an_evaluation_here(root):
    """What `--result_path .` leaves beside pictures; and in one of the folders."""
    for folder in (root, root / "a"):
        run_folder(folder)
        for name in ("config.json", "log.jsonl", "spikes.png"):
            (folder / name).unlink()
        save(GREY + 1 if folder == root else GREY)(folder / "1.png")


def samples_of_a_run_alone(root):
    """Someone copies them to train on: the grids are no pictures."""
    run_folder(root.parent / "run")
    os.replace(root.parent / "run" / "samples", root / "a")


def folders_with_our_names(root):
    for name in ("result/1.png", "samples/2.png", "samples/grid.png", "nir/3.png"):
        (root / name).parent.mkdir(exist_ok=True)
        save(GREY)(root / name)
    (root / "config.json").touch()


FOLDERS = {
    a_run_below: ["1.png"],
    a_run_that_was_stopped: ["1.png"],
    a_packed_run: ["1.png"],
    results_of_an_evaluation_here: ["1.png", "a/1.png"],
    samples_of_a_run_alone: ["a/png/00000.png"],
    folders_with_our_names: ["nir/3.png", "result/1.png", "samples/2.png", "samples/grid.png"],
    link_folder: ["b/1.png"],
    circle: ["a/1.png"],
    hidden: ["1.png"],
    other_files: ["1.png"],
    links_to_a_file: ["2.png"],
    folder_named_as_an_image: ["a.png/1.png"],
    links_to_elsewhere: ["a/1.png", "a/2.png"],
}


@pytest.mark.parametrize("make", FOLDERS)
def test_what_counts_as_an_image(make, tmp_path):
    root = make_folder(tmp_path / "train")
    make(root)
    assert find_images(root) == [root / name for name in FOLDERS[make]]
    save(GREY)(make_folder(tmp_path / "test") / "other.png")
    assert (
        len(load_dataset("ImageFolder", tmp_path, image_size=16).train) == len(load_images(root)) == len(FOLDERS[make])
    )


def test_what_a_run_has_written_is_left_out_with_a_note(tmp_path, capsys):
    a_run_below(tmp_path)
    find_images(tmp_path)
    assert capsys.readouterr().err.startswith(f"note: what a run has written to {tmp_path / 'result' / 'ImageFolder'}")
    run = tmp_path / "result" / "ImageFolder" / "snn-vq-vae"
    for root in (run / "samples", run / "samples" / "png"):
        assert find_images(root) == [run / "samples" / "png" / "00000.png"], "someone trains on them on purpose"
    assert capsys.readouterr().err == ""


def test_order_is_that_of_names_folder_by_folder(tmp_path):
    names = ["a/2.png", "a/10.png", "a-b/1.png", "B/1.png", "0.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(GREY)(tmp_path / name)
    assert find_images(tmp_path) == [
        tmp_path / name for name in ("0.png", "B/1.png", "a/10.png", "a/2.png", "a-b/1.png")
    ]


# ---- array files ----


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GREY, GREY[None, :, :, None]),
        (COLOUR, COLOUR[None]),
        (np.stack((GREY, 255 - GREY)), np.stack((GREY, 255 - GREY))[..., None]),
        (GREY[None, :, :, None], GREY[None, :, :, None]),
        (COLOUR[None], COLOUR[None]),
        (LEVELS, GREY[None, :, :, None]),
        (LEFT, np.where(LEFT, 255, 0)[None, :, :, None]),
        (GREY.astype(np.int64), GREY[None, :, :, None]),
        (COLOUR.astype(">i2")[None], COLOUR[None]),
        (LEFT.astype(np.uint8) * 200, np.where(LEFT, 200, 0)[None, :, :, None]),
    ],
)
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_array_files_are_images(name, array, expected, tmp_path):
    path = tmp_path / name
    np.save(path, array) if name == "a.npy" else np.savez(path, whatever=array)
    seen = load_images(path)
    assert np.array_equal(seen.permute(0, 2, 3, 1), expected) and str(seen.dtype) == "torch.uint8"
    if len(expected) == 1:
        grey = np.array(Image.fromarray(expected[0].astype(np.uint8).squeeze()).convert("L"))
        assert np.array_equal(hidden_pixels(str(path), 16, 16), grey >= 128)
    else:
        with pytest.raises(UserError, match="holds 2 images"):
            hidden_pixels(str(path), 16, 16)
        data = load_dataset("ImageFolder", path, image_size=16)
        assert np.array_equal(data.test, seen[:1]) and np.array_equal(data.train, seen[1:])
        assert data.class_names is data.train_labels is None


def test_npz_with_several_arrays_has_its_images_under_that_name(tmp_path):
    np.savez(tmp_path / "a.npz", labels=np.arange(3), images=GREY[None])
    assert np.array_equal(load_images(tmp_path / "a.npz")[0, 0], GREY)


@pytest.mark.parametrize(
    "arrays",
    [
        {"a": GREY, "b": GREY},
        {"a": GREY / 255},
        {"a": GREY.astype(int) - 1},
        {"a": np.arange(3)},
        {"a": np.zeros((2, 3, 16, 16), np.uint8)},
        {"a": np.zeros((2, 0, 16), np.uint8)},
        {"a": np.array([{}])},
        {},
    ],
)
def test_arrays_that_are_not_images(arrays, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    for door in (load_images, lambda path: load_dataset("ImageFolder", path), lambda path: hidden_pixels(path, 16, 16)):
        with pytest.raises(UserError, match=f"cannot read the images in {path}") as caught:
            door(path)
        assert "\n" not in str(caught.value)


MANY_GREY = np.stack([GREY] * 5)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (GREY / 240, "float64 values from 0 to 1): save uint8, 0 black to 255 white: (255 * array).round()"),
        (GREY.astype(np.float32), "float32 values from 0 to 240): save uint8, 0 black to 255 white"),
        (GREY / 127.5 - 1, "float64 values from -1 to 0.882353): save uint8"),
        (np.where(LEFT, np.nan, 0.5), "float64 values from nan to nan): save uint8"),
        (LEFT.astype(np.int64), "int64 values from 0 to 1): save uint8, 0 black to 255 white: (255 * array)"),
        (GREY.astype(int) * 257, "int64 values from 0 to 61680): save uint8"),
        (GREY.astype(int) - 1, "int64 values from -1 to 239): save uint8"),
        (GREY.astype(np.uint16), "uint16 values from 0 to 240): save uint8"),
        (GREY.astype(complex), "complex128 values): save uint8"),
        (GREY.astype(str), "values): save uint8"),
        (np.stack([MANY_GREY] * 3, 1), "[N,H,W,1] or [N,H,W,3]): save array.transpose(0, 2, 3, 1)"),
        (MANY_GREY[:, None], "shape [5, 1, 16, 16], not [N,H,W], [N,H,W,1] or [N,H,W,3]): save array.transpose"),
        (np.stack([MANY_GREY] * 4, 3), "shape [5, 16, 16, 4], not [N,H,W], [N,H,W,1] or [N,H,W,3]): save it in one"),
    ],
)
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_what_to_do_about_an_array(name, array, words, tmp_path):
    path = tmp_path / name
    np.save(path, array) if name == "a.npy" else np.savez(path, images=array, labels=np.arange(5))
    with pytest.raises(UserError) as caught:
        load_images(path)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_which_arrays_are_read_is_said(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=GREY[None], y_train=np.arange(1))
    with pytest.raises(UserError, match=r"2 arrays: x_train, y_train\): name the images images and"):
        load_images(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize("data", [b"", b"text", b"\x93NUMPY\1\0", b"PK\3\4"])
def test_damaged_array_files(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        load_images(tmp_path / name)


# ---- many files, and the paths of a user ----


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(image_files, "MANY", 2)
    monkeypatch.setattr(image_files, "CHUNK", 2)


def write_grey(folder, count):
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16), dtype=np.uint8)
    for number, image in enumerate(images):
        save(image)(folder / f"{number}.png")
    return images


def test_many_images_are_read_in_order_by_several_processes(tmp_path, many):
    images = write_grey(tmp_path, 9)
    assert np.array_equal(read_images(find_images(tmp_path))[..., 0], images)


def test_the_first_of_many_damaged_files_is_named(tmp_path, many, capfd):
    write_grey(tmp_path, 9)
    for number in (3, 5, 8):
        (tmp_path / f"{number}.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"3\.png .*2 more files are refused") as caught:
        load_images(tmp_path)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_each_file_is_opened_once(tmp_path, monkeypatch):
    write_grey(tmp_path, 20)
    opened, image_open = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, **options: opened.append(path) or image_open(path, **options))
    load_dataset("ImageFolder", tmp_path)
    assert sorted(opened) == find_images(tmp_path)


def test_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    images = write_grey(make_folder(tmp_path / "own"), 3)
    assert np.array_equal(load_images("~/own")[:, 0], images)
    assert len(load_dataset("ImageFolder", "~/own").train) == 2
    assert np.array_equal(hidden_pixels("~/own/0.png", 16, 16), images[0] >= 128)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/own", "x" * 300])
def test_paths_that_lead_nowhere(path):
    for door in (load_images, lambda path: load_dataset("ImageFolder", path), lambda path: hidden_pixels(path, 16, 16)):
        with pytest.raises(UserError, match=path):
            door(path)
