"""The one reader of image files: which files are images, and what their pixels are.

Training, `scripts/evaluate.py` and `--mask` all read through it. The processes that decode images import this module,
so PyTorch stays out of it.
"""

import hashlib
import os
import stat
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed
from PIL import Image, ImageOps, UnidentifiedImageError

from errors import UserError, note
from files import expand
from progress import progress_bar

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
ARRAY_ENDINGS = {".npy", ".npz"}
LIKE_LABELS = ("label", "y", "targets", "target", "classes", "class")
"""Names that arrays of labels have elsewhere."""
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # not every one of Pillow's: EPS runs Ghostscript
GREY_MODES = ("1", "L", "LA")
RUN_FILES = {".lock", "config.json", "last.pth", "log.jsonl", "metrics.json", "model.pth", "report.html"}
"""Files of a run folder; a folder of pictures may have one of these names, but hardly two."""
DRAWN = {"samples", "nir"}
"""Folders beside them for what the program draws. A user's own pictures may lie beside the results of an evaluation."""

MANY = 200  # more images than this are worth the second it takes to start processes
CHUNK = 32  # images that a process is given at a time

Images = Sequence[Path] | np.ndarray
"""Image files, or pixels uint8 [H,W,1 or 3] of each image; those of an array file are one array [N,H,W,1 or 3]."""


def reason(error: Exception) -> str:
    """The last line of an error, where Pillow, NumPy and torchvision say what happened."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


# ---- finding images ----


def find_images(path: Path, at_least: int = 1) -> Images:
    """The images at `path`: all image files under a folder, sorted; one image file; or the contents of an array file.

    In a folder, files with an ending in IMAGE_ENDINGS count, including those in subfolders and behind links. Hidden
    files and folders do not, nor do run folders below `path` and what an evaluation has drawn there, as a note on
    stderr says. A file that can be reached on several paths counts once.

    Raises UserError if there are fewer than `at_least` images, or if something cannot be read.
    """
    path = expand(path)
    images: Images
    if not os.path.isfile(path):
        images = _files_under(path)
    elif path.suffix.lower() in ARRAY_ENDINGS:
        images = _read_array(path)
    else:
        images = [path]
    if len(images) < at_least:
        endings = " ".join(sorted(IMAGE_ENDINGS))
        raise UserError(f"{path} holds {len(images)} images ({endings}): put {at_least} or more there, or name a file")
    return images


def identity(found: Path | os.DirEntry) -> tuple[int, int]:
    """Device and inode, the same for all paths to one file or folder. Raises UserError if it is neither."""
    try:
        status = found.stat()
    except OSError as error:
        raise UserError(f"cannot read {os.fspath(found)} ({error.strerror}): repair or remove it") from error
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # reading a pipe would never end
        raise UserError(f"cannot read {os.fspath(found)} (neither a file nor a folder): remove it")
    return status.st_dev, status.st_ino


def _files_under(folder: Path) -> list[Path]:
    files: dict[tuple[int, int], tuple[bool, str]] = {}  # for each file, whether its path is a link, and the path
    visited, ahead = set(), deque([folder])
    runs: list[Path] = []
    while ahead:
        parent = ahead.popleft()
        entries = list_folder(parent)
        if (this := identity(parent)) in visited:
            continue
        visited.add(this)
        names = {entry.name for entry in entries}
        if _has_results(names):
            runs.append(parent)
            names = set() if "config.json" in names and parent != folder else names - DRAWN
        elif {"images.npz", "grid.png"} <= names:  # the samples of a run, of which only png/ has one picture a file
            names = {"png"}
        for entry in (entry for entry in entries if entry.name in names and not entry.name.startswith(".")):
            is_link = entry.is_symlink()
            if os.path.isdir(entry) if is_link else entry.is_dir():  # isdir() is False where links go in a circle
                # links go last, so that a folder is first visited under its own name
                (ahead.append if is_link else ahead.appendleft)(Path(entry))
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_ENDINGS:
                file, found = identity(entry), (is_link, entry.path)
                files[file] = min(found, files.get(file, found))
    if runs:
        others = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        note(f"what a run has written to {runs[0]}{others} is not read as images")
    return sorted((Path(path) for _, path in files.values()), key=lambda path: path.parts)


def _has_results(names: set[str]) -> bool:
    """Whether a folder that holds these names is a run folder, or the `--result_path` of an evaluation."""
    return len(names & RUN_FILES) >= 2 or {".lock", "samples"} <= names


def list_folder(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read folder {folder} ({error.strerror}): check the path") from error


def folders_of(images: Images, root: Path) -> list[tuple[str, ...]]:
    """For each image at `root` the names of the folders between; none for an image from an array file."""
    return [image.relative_to(root).parts[:-1] if isinstance(image, Path) else () for image in images]


def take(images: Images, which: Sequence[int]) -> Images:
    """The images at these places."""
    return images[list(which)] if isinstance(images, np.ndarray) else [images[i] for i in which]


def alternate(folders: Sequence[tuple[str, ...]]) -> list[int]:
    """An order of images in which each round has one of every folder that has some left, shuffled in each round.

    `folders` are those of the images. Sorted images would begin with one folder, often one class, and some of what is
    done with images takes the first ones. If the order of folders were the same each round, images at even steps might
    all be of one folder.
    """
    rounds: Counter[tuple[str, ...]] = Counter()
    keys = []
    for folder in folders:
        shuffled = hashlib.sha256(f"{rounds[folder]} {folder}".encode()).digest()  # the same on every machine
        keys.append((rounds[folder], shuffled))
        rounds[folder] += 1
    return sorted(range(len(folders)), key=keys.__getitem__)


# ---- reading them ----


def read_images(
    images: Images,
    prepare: Callable[[Image.Image], Image.Image] | None = None,
    channels: int | None = None,
    behind: int = 255,
) -> np.ndarray:
    """Pixels of all images after `prepare`, uint8 [N,H,W,C]; C is `channels`, or else 1 if all are grey, 3 if not.

    `behind` is the level of grey that is seen through transparent pixels.

    Many images are shared among the cores. Raises UserError for a file that `read_image` refuses
    and for one whose size differs from that of the first.
    """
    if isinstance(images, np.ndarray) and prepare is channels is None:
        return images
    many = len(images) > MANY
    chunks = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
    # processes rather than threads: opening a small image takes longer than decoding it, and holds Python's lock
    workers = Parallel(n_jobs=-1 if many else 1, return_as="generator", max_nbytes=None)
    pixels: list[np.ndarray | UserError] = []
    with progress_bar(len(images), "reading images") as bar:
        for chunk in workers(delayed(_read_chunk)(chunk, prepare, channels, behind) for chunk in chunks):
            pixels += chunk
            bar.update(len(chunk))
    checked = _checked(pixels, images)
    stacked = np.empty((len(checked), *checked[0].shape[:2], max(one.shape[2] for one in checked)), np.uint8)
    for slot, one in zip(stacked, checked, strict=True):
        slot[...] = one  # grey is repeated
    return stacked


def _read_chunk(
    images: Images, prepare: Callable[[Image.Image], Image.Image] | None, channels: int | None, behind: int
) -> list[np.ndarray | UserError]:
    """Pixels [H,W,1 or 3] of each image, or what is wrong with it."""
    mode = {None: None, 1: "L", 3: "RGB"}[channels]

    def read(source: Path | np.ndarray) -> np.ndarray | UserError:
        try:
            image = _from_pixels(source) if isinstance(source, np.ndarray) else read_image(source, behind)
        except UserError as error:
            return error
        image = prepare(image) if prepare else image
        return np.array(image.convert(mode) if mode else image).reshape(image.height, image.width, -1)

    return [read(source) for source in images]


def _checked(pixels: list[np.ndarray | UserError], images: Images) -> list[np.ndarray]:
    """The pixels. Raises UserError for the first image that could not be read, or that is not as large as the first."""
    refused = [error for error in pixels if isinstance(error, UserError)]
    if refused:
        others = f" ({len(refused) - 1} more files are refused)" if len(refused) > 1 else ""
        raise UserError(f"{refused[0]}{others}") from refused[0]
    arrays = [array for array in pixels if not isinstance(array, UserError)]
    for array, image in zip(arrays, images, strict=True):
        if array.shape[:2] != arrays[0].shape[:2]:
            size, first = (f"{width}x{height}" for height, width, _ in (array.shape, arrays[0].shape))
            raise UserError(f"{image} is {size}, but the images before it are {first}: make them all one size")
    return arrays


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def read_image(path: Path, behind: int = 255) -> Image.Image:
    """The image in a file, with 8 bits, in mode "L" if it is grey and "RGB" if not.

    Of several frames the first; turned upright as its EXIF says; on the level `behind` where it is transparent; 16 bits
    scaled to 8.
    Raises UserError if it cannot be read, is too large (Pillow's MAX_IMAGE_PIXELS), or has floating-point or 32-bit
    pixels, whose black and white are not defined.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                ImageOps.exif_transpose(image, in_place=True)
                return _flatten(image, behind)
    except Exception as error:  # each decoder has its own way to refuse damaged bytes
        why = f"not one of {' '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise UserError(f"cannot read the image {path} ({why}): repair or remove it") from error


def _flatten(image: Image.Image, behind: int) -> Image.Image:
    """An opened image in mode L or RGB, on the level `behind` where it is transparent."""
    if image.mode[0] in "IF":
        levels = np.asarray(image)
        if image.mode == "I" and image.format in ("PNG", "PPM"):
            levels = levels.astype(np.uint16)  # in these formats "I" stands for 16 bits
        grey = _to_8_bits(levels)
        grey[levels == image.info.get("transparency")] = behind
        return Image.fromarray(grey)
    mode = "L" if image.mode in GREY_MODES else "RGB"
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (behind, behind, behind)), image.convert("RGBA"))
    return image.convert(mode)


def _to_8_bits(levels: np.ndarray) -> np.ndarray:
    """Levels of any type whose black and white are defined, as uint8. Raises ValueError for other types."""
    match levels.dtype.kind, levels.dtype.itemsize:
        case "b", _:
            return levels * np.uint8(255)
        case "u", 1:
            return levels
        case "u", 2:
            return np.round(levels / 257).astype(np.uint8)  # 257 = 65535 / 255
    raise ValueError(f"{levels.dtype} pixels, whose black and white are not defined")


# ---- array files ----


def _stored(path: Path, name: str) -> np.ndarray | None:
    """The array of this name in an .npz file, None if there is none; the only one of a file is its "images".

    Raises UserError if the file cannot be read, or has several arrays, none of which are images.
    """
    try:
        loaded = np.load(path)
        if isinstance(loaded, np.ndarray):
            return loaded if name == "images" else None
        with loaded:
            names = {"images": loaded.files[0]} if len(loaded.files) == 1 else {each: each for each in loaded.files}
            array = np.asarray(loaded[names[name]]) if name in names else None
    except Exception as error:  # not an array file, or not whole
        raise UserError(f"cannot read the {name} in {path} ({reason(error)}): repair or remove it") from error
    if "images" not in names:
        there = f"it has {len(names)} arrays: {', '.join(names)}" if names else "it has none"
        way = "name the images images and their labels labels, and save other splits to other files"
        raise UserError(f"cannot read the images in {path} ({there}): {way}")
    return array


def _read_array(path: Path) -> np.ndarray:
    """Images uint8 [N,H,W,1 or 3] of an .npy file, or of an .npz file with one array or one named "images".

    The array may lack the dimension of channels, or be a single image. Raises UserError if it is something else.
    """
    stored = _stored(path, "images")
    assert stored is not None
    array = stored if stored.shape[-1:] in ((1,), (3,)) else stored[..., None]
    if array.ndim == 3:
        array = array[None]
    try:
        if array.ndim != 4 or 0 in array.shape:
            first = stored.ndim == 4 and stored.shape[1] in (1, 3)
            way = "save array.transpose(0, 2, 3, 1)" if first else "save it in one of these shapes"
            raise ValueError(f"shape {list(stored.shape)}, not [N,H,W], [N,H,W,1] or [N,H,W,3]): {way}")
        return _whole_array_to_8_bits(array)
    except ValueError as error:
        raise UserError(f"cannot read the images in {path} ({error}") from error


def _whole_array_to_8_bits(array: np.ndarray) -> np.ndarray:
    """As `_to_8_bits`; integers of other widths count as 8 bits if they are from 0 to 255, and not just 0 and 1.

    Raises ValueError for other values, with what to do after a closing bracket.
    """
    kind, width = array.dtype.kind, array.dtype.itemsize
    if kind not in "iuf":
        try:
            return _to_8_bits(array)
        except ValueError as error:
            raise ValueError(f"{array.dtype} values): save uint8, 0 black to 255 white") from error
    low, high = array.min(), array.max()
    sixteen_bits = (kind, width) == ("u", 2)
    if (kind, width) == ("u", 1) or (sixteen_bits and not 0 < high <= 255):
        return _to_8_bits(array)
    if kind != "f" and not sixteen_bits and low >= 0 and (high > 1 or high == low == 0) and high <= 255:
        return array.astype(np.uint8)
    way = ": (255 * array).round().astype('uint8')" if low >= 0 and high <= 1 else ""
    raise ValueError(f"{array.dtype} values from {low:g} to {high:g}): save uint8, 0 black to 255 white{way}")


def stored_labels(path: Path, count: int) -> tuple[list[str], tuple[str, ...]] | None:
    """The classes of the `count` images in an .npz file by name, and these names in the order of their numbers.

    They are its array "labels", [N] or [N,1], of whole numbers from 0 or of names. Numbers are places in its array
    "class_names", if it has one, and else stand for themselves. None without labels, and for other files and folders.
    Raises UserError for labels that do not fit.
    """
    if path.suffix.lower() != ".npz" or not os.path.isfile(path):
        return None
    labels = _stored(path, "labels")
    if labels is None:
        if named := next((name for name in LIKE_LABELS if _stored(path, name) is not None), None):
            note(f"{path} has an array {named}, which is not used: if it holds labels, name it labels")
        return None
    numbers, class_names = labels.dtype.kind in "iub", _stored(path, "class_names")
    if labels.shape not in ((count,), (count, 1)):
        shape = list(labels.shape)
        raise UserError(f"{path} has {count} images, but labels of the shape {shape}: save one label for each image")
    if not numbers and labels.dtype.kind != "U":
        raise UserError(f"{path} has labels of the type {labels.dtype}: save whole numbers from 0, or names")
    values = labels.reshape(-1).astype(int if numbers else str).tolist()
    order = tuple(map(str, sorted(set(values)) if class_names is None else class_names.reshape(-1)))
    if class_names is None:
        wrong = {value for value in values if numbers and value < 0}
    else:
        wrong = set(values) - set(range(len(order)) if numbers else order)
    if wrong:
        allowed = "from 0" if class_names is None else f"one of its {len(order)} class_names"
        raise UserError(f"{path} has the label {min(wrong)}, which is not {allowed}: correct or remove the labels")
    if len(set(order)) < len(order):
        raise UserError(f"{path} has two class_names that are the same: rename one")
    return [order[value] if numbers and class_names is not None else str(value) for value in values], order
