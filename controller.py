"""Finding and training the small net. In this order:

images        labelled images; MNIST, CIFAR, a user's own folder, more than the memory holds; drawn
              digits; what trains and what validates
training      teacher and student: accuracy, loss, plan, a step; the step on a GPU; the loop, `fit`;
              how the images of a foreign net were normalised
timing        latency of a net, speed of a training
structures    which widths reach a MACs reduction
the LSTM      the policy, what it reads of a net
searching     settings, candidates and rewards; by REINFORCE (the papers), by regression (`fast`)
the run       its methods, its folder and files, its trainer, the search loop, the checkpoints of
              its rows, the row of `sep`, all rows

One `fit` serves all trainings: of the baseline (no teacher), of candidates (recoveries and trials),
and the final ones. The same epoch of all trainings of a run shows the same images, in the same
order, under the same crops. Every other random stream has a seed of its own (`seed_for`), so that a
run that was stopped goes on with the same numbers. A *cut* is a MACs reduction.
"""

import errno
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property, partial
from io import StringIO
from itertools import chain, pairwise, product
from pathlib import Path
from textwrap import shorten

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

try:
    import fcntl
except ImportError:  # not a POSIX system: there, nothing keeps two processes from one folder
    fcntl = None

import models
import sep
from models import Net, UserError

VALIDATION_SHARE = 0.1  # of the training images; used for the rewards (paper)
MOMENTUM = 0.9  # SGD of every training (script)
WEIGHT_DECAY = 5e-4  # (script)
BATCH_SIZE = 128  # (script)
CROSS_ENTROPY_WEIGHT = 0.1  # beside the teacher's term (script)
ADVANTAGE_SCALE = 10  # (script)
POLICY_LR = 0.001  # Adam (script)
LSTM_HIDDEN = 100  # (script)
LSTM_LAYERS = 2  # (script)
LSTM_DROPOUT = 0.8  # (script)
# A reward is the accuracy less this times the share of the MACs that is left. The script takes
# 4e-10 for each MAC, which is 0.16 for the whole VGG-19.
COMPLEXITY_WEIGHT = 0.16
# ours: how many bytes of its outputs a Teacher keeps; those of further epochs are computed anew.
TEACHER_BYTES = 1 << 30


def seed_for(*keys) -> int:
    """A seed for one random stream, the same on every machine.

    The keys say what is drawn, usually the run's seed first. Other keys give other random numbers.
    """
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:7], "big")


# ---- images ------------------------------------------------------------------------------------


class Images:
    """A labelled set of images in memory, and how they are augmented and normalised.

    pixels (N, H, W, C) uint8, labels (N,) int64; `crop` in pixels (of a border that is added
    first), or with `zooms` crops of many sizes, as usual for photographs; `mean` and `std` per
    channel, of pixels in [0, 1]; `class_names` where a user gave them.
    """

    def __init__(
        self, pixels, labels, *, mean, std, crop=0, zooms=False, flip=False, class_names=()
    ):
        self.pixels = pixels
        self.labels = labels.long()
        self.crop = crop
        self.zooms = zooms
        self.flip = flip
        self.class_names = list(class_names)
        self.mean = mean
        self.std = std
        # pixels * factor - shift is (pixels / 255 - mean) / std.
        mean_tensor = torch.tensor(mean, device=pixels.device).reshape(-1, 1, 1)
        std_tensor = torch.tensor(std, device=pixels.device).reshape(-1, 1, 1)
        self.shift = mean_tensor / std_tensor
        self.factor = 1 / (255 * std_tensor)

    def __len__(self):
        return len(self.labels)

    def replace(self, pixels, labels, mean=None, std=None) -> "Images":
        """Images with these pixels and labels, and by default this mean and std. All else stays."""
        return self.make_like(type(self), pixels, labels, mean, std)

    def make_like(self, images_class, pixels, labels, mean=None, std=None) -> "Images":
        """`replace`, as an instance of Images or of ImagesInFiles."""
        return images_class(
            pixels,
            labels,
            mean=mean or self.mean,
            std=std or self.std,
            crop=self.crop,
            zooms=self.zooms,
            flip=self.flip,
            class_names=self.class_names,
        )

    def select(self, index) -> "Images":
        return self.replace(self.pixels[index], self.labels[index])

    def to(self, device) -> "Images":
        return self.replace(self.pixels.to(device), self.labels.to(device))

    def normalised_by(self, mean, std) -> "Images":
        return self.replace(self.pixels, self.labels, mean, std)

    def load_into_memory(self) -> "Images":
        return self

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def size(self) -> int:
        """Pixels of an image's side."""
        return self.pixels.shape[1]

    @property
    def classes(self) -> int:
        """How many the user named, else the largest label + 1."""
        return len(self.class_names) or int(self.labels.max()) + 1

    @property
    def is_augmented(self) -> bool:
        return bool(self.crop or self.zooms or self.flip)

    def draw_epoch(self, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(order, crops) of an epoch. They depend on seed and epoch alone: all candidates see the
        same images.

        order (N,) has the indices as they are shown. Row i of the crops is for image i, not for the
        i-th image that is shown: (top, left, is flipped), (N, 3) int64; with `zooms` (N, 5) float32
        of `draw_zooms`. None without augmentation.
        """
        generator = torch.Generator().manual_seed(seed_for(seed, "images", epoch))
        order = torch.randperm(len(self), generator=generator)
        if self.zooms:
            return order.to(self.device), self.draw_zooms(generator).to(self.device)
        crops = torch.randint(0, 2 * self.crop + 1, (len(self), 3), generator=generator)
        # The third column is drawn anew: whether the image is flipped.
        crops[:, 2] = torch.randint(0, 2, (len(self),), generator=generator) * self.flip
        crops = crops.to(self.device) if self.is_augmented else None
        return order.to(self.device), crops

    def draw_zooms(self, generator: torch.Generator) -> torch.Tensor:
        """A random part of each image, (N, 5) float32: x and y of its middle, half its width, half
        its height, direction.

        Lengths are such that the whole image is the square from -1 to 1 in x and y. The direction
        is -1 if the part is flipped, else 1.
        """
        area = torch.empty(len(self)).uniform_(*ZOOM_AREA, generator=generator)
        log_ratio = torch.empty(len(self)).uniform_(-1, 1, generator=generator) * ZOOM_LOG_RATIO
        halves = [(area * log_ratio.exp()).sqrt(), (area * (-log_ratio).exp()).sqrt()]
        half_sizes = torch.stack(halves, 1).clamp_max(1)
        middles = torch.empty(len(self), 2).uniform_(-1, 1, generator=generator)
        is_flipped = torch.randint(0, 2, (len(self), 1), generator=generator) * self.flip
        return torch.cat([middles * (1 - half_sizes), half_sizes, 1.0 - 2 * is_flipped], 1)

    def batch(self, index, crops=None) -> torch.Tensor:
        """The images `index` (B,), normalised: float32 (B, C, H, W), channels-last.

        `crops` is the second result of `draw_epoch`, for all N images; None: they are taken as they
        are.
        """
        return self.prepare(self.pixels[index], index, crops)

    def batches(self, chunks: Sequence[torch.Tensor], crops=None) -> Iterator[torch.Tensor]:
        """Yield the `batch` of each of the `chunks`, which are indices."""
        for index in chunks:
            yield self.batch(index, crops)

    def prepare(self, pixels, index, crops) -> torch.Tensor:
        """The pixels (B, H, W, C) of the images `index`, made a `batch`."""
        if crops is None:
            x = pixels.permute(0, 3, 1, 2).float()
        elif self.zooms:
            x = zoom(pixels, crops[index]).contiguous(memory_format=torch.channels_last)
        else:
            x = crop_and_flip(pixels, crops[index], self.crop).permute(0, 3, 1, 2).float()
        return x.mul_(self.factor).sub_(self.shift)


def crop_and_flip(pixels, crops, border: int) -> torch.Tensor:
    """Crops of the images' own size, from pixels (B, H, W, C) with a black border around them.

    crops (B, 3): the first row and column of each in the image with its border, and whether it is
    flipped.
    """
    top, left, is_flipped = crops.unbind(1)
    count, height, width = pixels.shape[:3]
    rows = top[:, None] + torch.arange(height, device=pixels.device)
    columns = torch.arange(width, device=pixels.device).expand(count, -1)
    columns = torch.where(is_flipped[:, None] > 0, width - 1 - columns, columns)
    columns = left[:, None] + columns
    padded = F.pad(pixels, (0, 0, border, border, border, border))
    images = torch.arange(count, device=pixels.device)
    return padded[images[:, None, None], rows[:, :, None], columns[:, None, :]]


def zoom(pixels, parts) -> torch.Tensor:
    """The `parts` (B, 5) of pixels (B, H, W, C) at full size: (B, C, H, W) of [0, 255]."""
    x, y, half_width, half_height, direction = parts.unbind(1)
    zero = torch.zeros_like(x)
    entries = [half_width * direction, zero, x, zero, half_height, y]
    matrices = torch.stack(entries, 1).view(-1, 2, 3)
    pixels = pixels.permute(0, 3, 1, 2).float()
    # bfloat16 would move the places: the teacher would see other crops than the student.
    with torch.autocast(pixels.device.type, enabled=False):
        grid = F.affine_grid(matrices, list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


# ours: the smallest and the largest share of a photograph's area that a random part has, and the
# logarithm of its largest ratio of sides, 4 : 3. torchvision's default goes down to 0.08 of the
# area, which needs more epochs than these data sets get.
ZOOM_AREA = (0.35, 1.0)
ZOOM_LOG_RATIO = math.log(4 / 3)


def split_into_chunks(images: Images) -> tuple[torch.Tensor, ...]:
    """Indices (N,) in chunks that an evaluation takes at once."""
    return torch.arange(len(images), device=images.device).split(chunk_size_for(images))


# ours: (the most images, the most pixels) of a chunk. With more, the maps do not fit into the
# caches of a CPU, which then takes up to a third longer. With fewer, some of its cores are idle.
CPU_CHUNK = (250, 400 * 32 * 32)
GPU_CHUNK = (2000, 2000 * 32 * 32)


def chunk_size_for(images: Images) -> int:
    """How many images a chunk has, by CPU_CHUNK or GPU_CHUNK; at least 1."""
    most_images, most_pixels = GPU_CHUNK if images.device.type == "cuda" else CPU_CHUNK
    return max(1, min(most_images, most_pixels // images.size**2))


# Mean and standard deviation of the training pixels in [0, 1].
STATISTICS = {
    "mnist": ((0.1307,), (0.3081,)),
    "digits": ((0.16,), (0.33,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
OWN_IMAGES = "images in "  # begins the name of a user's own data set; its folder follows


def load_data(
    name: str,
    folder: Path,
    *,
    crop=0,
    flip=False,
    size=32,
    size_advice="",
    only_test=False,
    say=lambda text: None,
) -> tuple[Images | None, Images, str]:
    """(training images, test images, what they are) of a data set; downloads what is missing. With
    `only_test` the training images are not read, and None.

    A `folder` with train/CLASS and test/CLASS in it is the user's own data set. It is taken instead
    of `name`, with the statistics of `name`. Photographs, which are of many sizes or large, are
    brought to `size`; `say` tells the user, with `size_advice` added. Raises UserError.
    """
    folder = Path(folder)
    mean, std = STATISTICS[name]
    statistics = {"mean": mean, "std": std}
    augmentation = {"crop": crop, "flip": flip}
    if is_image_folder(folder):
        train, test = load_own_images(
            name,
            folder,
            statistics,
            augmentation,
            size=size,
            size_advice=size_advice,
            only_test=only_test,
            say=say,
        )
        return train, test, describe_data(name, folder)

    if name == "digits":
        augmentation = {}

    def read_part(*, is_train: bool):
        """(pixels, labels) of the training or the test images."""
        if name != "digits":
            return load_from_torchvision(name, folder, is_train=is_train, say=say)
        count = 6000 if is_train else 2000
        return draw_digits(count, seed_for("digits", count))

    train = None
    if not only_test:
        train = Images(*read_part(is_train=True), **statistics, **augmentation)
    return train, Images(*read_part(is_train=False), **statistics), name


def load_own_images(
    name: str,
    folder: Path,
    statistics: dict,
    augmentation: dict,
    *,
    size: int,
    size_advice: str,
    only_test: bool,
    say: Callable,
) -> tuple[Images | None, Images]:
    """(training, test) images of a user's folder, in place of the data set `name`; see load_data.

    Raises UserError.
    """
    if name == "digits":
        raise UserError(
            f"digits are drawn and read no folder; {folder} serves the other experiments, mnist "
            "(gray) and those of CIFAR (RGB); name another --data-dir",
            2,
        )
    found = open_image_folder(folder, size, is_gray=name == "mnist")
    if found.need_resizing:
        count = len(found.paths["test"]) if only_test else found.count
        say(
            f"{count:,} photographs ({found.size_words} pixels) are resized and cropped in "
            f"their middle to {size} x {size}{size_advice}"
        )
    images_class = Images
    if found.exceeds_memory_limit:
        images_class = ImagesInFiles
        if not only_test:
            say(
                f"{found.count:,} images of {found.size} x {found.size} pixels would take "
                f"{found.byte_count / 1e9:.1f} GB of memory: they are read from their files in "
                "every epoch, which is slower"
            )
    if found.size >= MIN_ZOOMED_SIZE:
        augmentation = {"zooms": True, "flip": augmentation["flip"]}
    statistics = statistics | {"class_names": found.class_names}
    train = None
    if not only_test:
        train = images_class(*found.read("train"), **statistics, **augmentation)
    return train, images_class(*found.read("test"), **statistics)


def describe_data(name: str, folder: Path) -> str:
    """What the images of a run are: the name of a data set, or the folder of a user's own."""
    return f"{OWN_IMAGES}{Path(folder).resolve()}" if is_image_folder(folder) else name


def is_image_folder(folder: Path) -> bool:
    """Whether `folder` is a user's own data set: train/CLASS/images and test/CLASS/images.

    Raises UserError if it is half of one, or a file.
    """
    if Path(folder).is_file():
        raise UserError(f"{folder} is a file; --data-dir names a folder", 2)
    parts = [part for part in ("train", "test") if (Path(folder) / part).is_dir()]
    if len(parts) == 1:
        hint = ""
        if parts == ["train"] and (Path(folder) / "val").is_dir():
            hint = "; if val/ has the images to test with, make a link to it named test"
        raise UserError(
            f"{folder} has {parts[0]}/ alone; a data set of your own has train/CLASS/images and "
            f"test/CLASS/images{hint}"
        )
    return bool(parts)


def load_from_torchvision(name: str, folder: Path, *, is_train: bool, say: Callable):
    """(pixels, labels) of MNIST, CIFAR-10 or CIFAR-100. Where they are not in the folder, they are
    downloaded, and `say` tells the user. Raises UserError."""
    from torchvision import datasets

    dataset_class = getattr(datasets, name.upper())
    try:
        with removing_new_folders_on_error(folder):
            try:
                dataset = dataset_class(folder, train=is_train)
            except RuntimeError:  # not there, or not complete
                check_is_no_image_folder(folder)
                # On a terminal torchvision shows bars on standard error.
                error_stream = sys.stderr if sys.stderr.isatty() else StringIO()
                with redirect_stdout(StringIO()), redirect_stderr(error_stream):
                    dataset = dataset_class(folder, train=is_train, download=True)
                say(f"{name} was not in {folder} and has been downloaded to it")
            pixels, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        hint = ""
        if folder.name in ("MNIST", "cifar-10-batches-py", "cifar-100-python"):
            hint = " (the folder above that one)"
        elif folder.name == "raw":
            hint = " (two folders above that one)"
        missing = f"{folder} has no complete {name} data, or damaged files of it,"
        if not folder.exists():
            missing = f"there is no folder {folder} with {name} data,"
        raise UserError(
            f"{missing} and it could not be downloaded; name its folder{hint} with "
            f"--data-dir{suggest_image_folder(folder)} ({reason[:200]})"
        ) from error
    # CIFAR's pixels come as a view of another order: (N, C, H, W), seen as (N, H, W, C).
    return pixels.reshape(*pixels.shape[:3], -1).contiguous(), labels


@contextmanager
def removing_new_folders_on_error(folder: Path):
    """If the body of the `with` fails, remove the folders that did not exist before it, where they
    are empty."""
    folders = (folder / "MNIST" / "raw", folder / "MNIST", folder, *folder.parents)
    new_folders = [path for path in folders if not path.exists()]
    try:
        yield
    except Exception:
        for new_folder in new_folders:
            with suppress(OSError):  # it is not empty
                new_folder.rmdir()
        raise


def check_is_no_image_folder(folder: Path) -> None:
    """Raise UserError (status 2) where a folder is the wrong level of a user's own data set, so
    that nothing is downloaded into it: train/ or test/ itself, a class folder, or a folder of
    classes without train/ and test/."""
    if not folder.is_dir():
        return
    folder = Path(os.path.abspath(folder))  # "." and ".." have no names
    if has_images(folder) and folder.parent.name in ("train", "test"):
        raise UserError(
            f"{folder} is two levels too deep: give --data-dir {folder.parent.parent}, which has "
            "train/ and test/",
            2,
        )
    inner = [path for path in sorted(folder.iterdir()) if os.path.isdir(path)]
    with_images = [path for path in inner if has_images(path)]
    if folder.name in ("train", "test") and with_images:
        raise UserError(
            f"{folder} is one level too deep: give --data-dir {folder.parent}, which has train/ "
            "and test/",
            2,
        )
    if len(with_images) > 1:
        raise UserError(
            f"{folder} holds images, but no train/ and test/: move them to "
            f"{folder}/train/CLASS/ and {folder}/test/CLASS/",
            2,
        )


def suggest_image_folder(folder: Path) -> str:
    """Where images of the user's own lie one level below a folder: what to do to take them."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            # os.path: Path.is_dir raises where a folder is not to be read.
            if os.path.isdir(path / "train") and os.path.isdir(path / "test"):
                return f"; for the images in {path} give --data-dir {path}"
    return ""


def has_images(folder: Path) -> bool:
    """Whether images lie in a folder itself; False where it may not be read."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return any(name.lower().endswith(IMG_EXTENSIONS) for name in names)


# ours: in pixels. Images of at least this size are augmented by crops of many sizes (`zooms`);
# smaller ones are augmented in the way that is usual for CIFAR (`crop`).
MIN_ZOOMED_SIZE = 64
# ours: in pixels. Larger images count as photographs even if all are squares of one size.
MAX_SQUARE_SIZE = 256
# ours: a photograph is resized until its shorter side is this many times the side of the net's
# images. Then its middle is cropped to the size of the net's images.
PHOTOGRAPH_MARGIN = 256 / 224
# ours: a data set with more bytes of pixels is read from its files in every epoch. A run holds the
# images that it trains with twice: all of them, and again in those that train and those that
# validate.
MAX_IMAGE_BYTES = 2 << 30


@dataclass
class OwnImages:
    """A user's own data set: its files, and how they will be read."""

    paths: dict[str, list]  # of "train" and "test"
    labels: dict[str, list[int]]
    class_names: list[str]
    size: int  # pixels of a side, as the net will read them
    is_gray: bool  # they are read as gray images, else as RGB
    need_resizing: bool  # they are of many sizes, no squares, or large
    size_words: str  # their own size

    @property
    def count(self) -> int:
        return sum(map(len, self.paths.values()))

    @property
    def byte_count(self) -> int:
        """What all pixels take in memory."""
        return self.count * self.size * self.size * (1 if self.is_gray else 3)

    @property
    def exceeds_memory_limit(self) -> bool:
        return self.byte_count > MAX_IMAGE_BYTES

    def read(self, part: str) -> tuple["torch.Tensor | PixelsInFiles", torch.Tensor]:
        """(pixels, labels) of a part. The pixels are a tensor, or PixelsInFiles if they would fill
        the memory. Raises UserError."""
        labels = torch.tensor(self.labels[part])
        resized_to = self.size if self.need_resizing else None
        pixels = PixelsInFiles(self.paths[part], self.size, resized_to, self.is_gray)
        if not self.exceeds_memory_limit:
            pixels = pixels.read_all()
        return pixels, labels


def open_image_folder(folder: Path, size: int, *, is_gray: bool) -> OwnImages:
    """What is in folder/train and folder/test. Photographs will be brought to `size`.

    Raises UserError where headers of images cannot be read, or the two parts have other classes.
    """
    paths, labels, names = {}, {}, {}
    for part in ("train", "test"):
        paths[part], labels[part], names[part] = list_image_files(folder / part)
    if len(names["train"]) < 2:
        raise UserError(
            f"{folder / 'train'} has one class alone, {names['train'][0]}; there is nothing to "
            "tell apart"
        )
    if names["train"] != names["test"]:
        train_names, test_names = set(names["train"]), set(names["test"])
        unshared = {"train": train_names - test_names, "test": test_names - train_names}
        different = "; ".join(
            f"{', '.join(sorted(classes))} in {part} alone"
            for part, classes in unshared.items()
            if classes
        )
        raise UserError(
            f"{folder}: train and test have different classes ({different}); each class needs a "
            "folder in both"
        )
    sizes = Counter()
    examples = {}
    errors = {}
    for path in chain(*paths.values()):
        try:
            size_of_image = measure_image(path)
        except UserError as error:
            errors[path] = error
            continue
        sizes[size_of_image] += 1
        examples.setdefault(size_of_image, path)
    raise_for_unreadable(errors)
    (width, height), _ = sizes.most_common(1)[0]
    need_resizing = len(sizes) > 1 or width != height or width > MAX_SQUARE_SIZE
    return OwnImages(
        paths,
        labels,
        names["train"],
        size if need_resizing else width,
        is_gray,
        need_resizing,
        describe_sizes(sizes, examples),
    )


# ours: up to so large a share of the images is named as the exception among images of one size.
EXCEPTION_SHARE = 0.1


def describe_sizes(sizes: Counter, examples: dict) -> str:
    """The (width, height) of images in words: how many have each, and the path of one of them. A
    few that differ from all others are most likely a mistake, so one of them is named."""
    ((width, height), count), *others = sizes.most_common()
    if not others:
        return f"{width} x {height}"
    if sizes.total() - count > EXCEPTION_SHARE * sizes.total():
        return f"most often {width} x {height}"
    other_width, other_height = others[0][0]
    return (
        f"{width} x {height}, but for {sizes.total() - count:,}, for example "
        f"{examples[other_width, other_height]} with {other_width} x {other_height}"
    )


def list_image_files(folder: Path) -> tuple[list[str], list[int], list[str]]:
    """(paths, labels, class names) of folder/CLASS/images, without what is hidden (`.name`).

    Classes and images come in the order of torchvision's ImageFolder. Raises UserError where there
    is no class, or a class has no images.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    try:
        class_names = sorted(
            entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
        )
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    paths, labels, empty_classes = [], [], []
    for label, name in enumerate(class_names):
        images = [
            path
            for path in list_visible_files(folder / name)
            if path.lower().endswith(IMG_EXTENSIONS)
        ]
        if not images:
            empty_classes.append(name)
        paths += images
        labels += [label] * len(images)
    if empty_classes or not class_names:
        found = "it has no folder of a class"
        if empty_classes:
            found = f"there are no images for {shorten(', '.join(empty_classes), 150)}"
        raise UserError(
            f"{folder}: {found}; a folder for each class holds its images "
            f"({', '.join(IMG_EXTENSIONS)})"
        )
    return paths, labels, class_names


def list_visible_files(folder: Path) -> list[str]:
    """All files below a folder, in the order of their folders, without what is hidden.

    Links to folders are followed. One can lead back to a folder above it, so each real folder
    counts once, under the path that is met first.
    """
    files_of, real_folders = {}, set()
    for path, subfolders, names in os.walk(folder, followlinks=True):
        real_path = os.path.realpath(path)
        if real_path in real_folders:
            subfolders.clear()  # os.walk goes into those that are left in this list
            continue
        real_folders.add(real_path)
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        files_of[path] = [os.path.join(path, name) for name in sorted(names) if name[0] != "."]
    return [file for path in sorted(files_of) for file in files_of[path] if not is_special(file)]


def is_special(path: str) -> bool:
    """Whether there is something else than a file, as a pipe, which may block its reader. A broken
    link is not special: to read it fails, and the error tells the user."""
    return os.path.exists(path) and not os.path.isfile(path)


LONG_MODES = ("I", "F")  # of PIL: 16 or 32 bits a channel
# What a disk or network says, not a decoder of images.
FILE_ERRORS = (errno.ENOENT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)


@contextmanager
def opened_image(path: str):
    """Yields the PIL image of a file. Pillow decodes it where the caller uses it, so errors in the
    body of `with opened_image(path)` become UserErrors, too."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(LONG_MODES):
                raise UserError(
                    f"{path} cannot be read as an image of 8 bits a channel; convert or remove it"
                )
            yield image
    except (UserError, MemoryError):
        raise
    except PermissionError as error:
        raise UserError(f"{path} may not be read by this user") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has too many pixels; make it smaller, or remove it") from error
    except Exception as error:  # as many kinds as there are decoders
        if isinstance(error, OSError) and error.errno in FILE_ERRORS:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if os.path.isfile(path) and not os.path.getsize(path):
            raise UserError(f"{path} is empty") from error
        raise UserError(
            f"{path} cannot be read as an image of 8 bits a channel, or is damaged; remove or "
            "replace it"
        ) from error


# ours: so many files that cannot be read are named in one line.
NAMED_FILES = 5


def raise_for_unreadable(errors: dict[str, UserError]) -> None:
    """Raise the first error of image files, by path, and name the others: the user can mend all of
    them at once."""
    if not errors:
        return
    (_, first_error), *others = errors.items()
    if not others:
        raise first_error
    count = "1 other" if len(others) == 1 else f"{len(others):,} others"
    names = [str(path) for path, _ in others[: NAMED_FILES - 1]]
    if len(others) > len(names):
        names.append("...")
    raise UserError(f"{first_error}; {count} cannot be read either: {', '.join(names)}")


def measure_image(path: str) -> tuple[int, int]:
    """(width, height) of an image as its file says, without decoding it. Raises UserError.

    If the camera was turned, `read_image` may exchange the two.
    """
    with opened_image(path) as image:
        return image.size


def read_image(path: str, is_gray: bool, size: int | None = None) -> torch.Tensor:
    """An image as uint8 (H, W, C), C = 1 or 3, upright as its camera says; with a `size` resized
    and cropped in its middle to that square. Raises UserError where it is none of 8 bits."""
    from PIL import ImageOps
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    with opened_image(path) as image:
        image = ImageOps.exif_transpose(image).convert("L" if is_gray else "RGB")
    if size is not None:
        image = center_crop(resize(image, round(size * PHOTOGRAPH_MARGIN)), size)
    return pil_to_tensor(image).permute(1, 2, 0)


# ---- images: more than the memory holds --------------------------------------------------------

MAX_READERS = 16  # ours: threads that read image files
IMAGES_OF_A_READER = 32  # ours: in a block of images that are read into memory


def count_readers() -> int:
    """How many threads read image files.

    Threads, not the processes of a DataLoader: decoding and resizing leave Python's lock to others,
    and a stop signal finds no processes to wait for.
    """
    return min(MAX_READERS, torch.get_num_threads())


class PixelsInFiles:
    """Stands in for a uint8 tensor (N, H, W, C) of pixels that would fill the memory.

    `pixels[index]`, with a tensor of indices (B,), reads these images from their files.
    """

    def __init__(self, paths, size: int, resized_to: int | None, is_gray: bool, device="cpu"):
        self.paths = list(paths)
        self.size = size
        self.resized_to = resized_to
        self.is_gray = is_gray
        self.device = torch.device(device)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.paths), self.size, self.size, 1 if self.is_gray else 3

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """The pixels of the images `index` (B,), uint8 (B, H, W, C). Raises UserError."""
        paths = [self.paths[number] for number in index.tolist()]
        return self.stack(paths, map(self.read_or_explain, paths))

    def read_all(self) -> torch.Tensor:
        """The pixels of all images, read by several threads. Raises UserError."""
        readers = count_readers()
        pool = ThreadPoolExecutor(readers)
        # Block by block, so that few images wait to be put into their places.
        size = IMAGES_OF_A_READER * readers
        blocks = (self.paths[start : start + size] for start in range(0, len(self.paths), size))
        images = (pool.map(self.read_or_explain, block) for block in blocks)
        try:
            return self.stack(self.paths, chain.from_iterable(images))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def read_or_explain(self, path) -> torch.Tensor | UserError:
        """The pixels (H, W, C) of a file, or the error of one that cannot be read."""
        try:
            return read_image(path, self.is_gray, self.resized_to)
        except UserError as error:
            return error

    def stack(self, paths, images: Iterable[torch.Tensor | UserError]) -> torch.Tensor:
        """The images of these files, in one tensor (B, H, W, C). Raises UserError where some cannot
        be read."""
        pixels = torch.empty((len(paths), *self.shape[1:]), dtype=torch.uint8)
        errors = {}
        for place, image in enumerate(images):
            if isinstance(image, UserError):
                errors[paths[place]] = image
            else:
                pixels[place] = image
        raise_for_unreadable(errors)
        return pixels.to(self.device)

    def select(self, index) -> "PixelsInFiles":
        """The files `index`, a tensor of indices or a slice; none is read."""
        chosen = torch.arange(len(self.paths))[index].tolist()
        return self.replace([self.paths[number] for number in chosen], self.device)

    def to(self, device) -> "PixelsInFiles":
        return self.replace(self.paths, device)

    def replace(self, paths, device) -> "PixelsInFiles":
        return PixelsInFiles(paths, self.size, self.resized_to, self.is_gray, device)


class ImagesInFiles(Images):
    """Images whose `pixels` are PixelsInFiles."""

    def select(self, index) -> "ImagesInFiles":
        return self.replace(self.pixels.select(index), self.labels[index])

    def load_into_memory(self) -> Images:
        return self.make_like(Images, self.pixels.read_all(), self.labels)

    def batches(self, chunks, crops=None) -> Iterator[torch.Tensor]:
        """Yield the `batch` of each of the `chunks`; threads read the next ones meanwhile."""
        readers = count_readers()
        pool = ThreadPoolExecutor(readers)
        files = self.pixels.to("cpu")
        pending = deque()
        try:
            for index in chunks:
                pending.append((index, pool.submit(files.__getitem__, index.cpu())))
                if len(pending) > readers:
                    yield self.prepare_next(pending, crops)
            while pending:
                yield self.prepare_next(pending, crops)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def prepare_next(self, pending: deque[tuple[torch.Tensor, Future]], crops) -> torch.Tensor:
        index, pixels = pending.popleft()
        return self.prepare(pixels.result().to(self.device), index, crops)


# ---- images: fingerprint -----------------------------------------------------------------------


def fingerprint(*sets: Images) -> str:
    """A hash of all pixels and labels, to recognise the same data.

    Images that stay in their files are not read. In place of their pixels count the names of the
    files, their sizes in bytes, and the size at which they are read.
    """
    digest = hashlib.sha256()
    for images in sets:
        if isinstance(images, ImagesInFiles):
            digest.update(repr((images.pixels.shape, images.pixels.resized_to)).encode())
            for path in map(Path, images.pixels.paths):
                name = f"{path.parent.name}/{path.name} {path.stat().st_size}"
                digest.update(name.encode(errors="surrogateescape"))
        else:
            digest.update(images.pixels.cpu().numpy())
        digest.update(images.labels.cpu().numpy())
    return digest.hexdigest()[:16]


# ---- images: drawn digits ----------------------------------------------------------------------

# Ten classes of strokes, as corner points (x, y) in ninths of [-1, 1], y downwards.
STROKES = [
    "-6-9 6-9 8 0 6 9 -6 9 -8 0 -6-9",
    "-4-6 0-9 0 9",
    "-7-5 0-9 7-5 -7 9 7 9",
    "-6-9 6-9 0-1 6 4 0 9 -6 7",
    "3 9 3-9 -7 3 8 3",
    "7-9 -6-9 -6-1 4-2 7 4 2 9 -7 8",
    "5-9 -5 0 -6 6 0 9 6 5 3 0 -5 2",
    "-7-9 7-9 -2 9",
    "0 0 5-5 0-9 -5-5 0 0 6 5 0 9 -6 5 0 0",
    "5-2 -3 0 -6-5 0-9 6-6 5-2 3 9",
]
DIGIT_SIZE = 28


def draw_digits(count: int, seed: int):
    """(pixels (N, 28, 28, 1) uint8, labels (N,)) of ten classes of strokes. Not MNIST.

    Thickness, slant, turn, scale, shift and noise vary.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    labels = torch.randint(0, 10, (count,), generator=generator)
    corners = stroke_corners()[labels]  # (N, P, 2)
    corners = corners + 0.09 * torch.randn(corners.shape, generator=generator)
    slant, turn, scale = uniform(-0.4, 0.4), uniform(-0.3, 0.3), uniform(0.5, 0.85, 2)
    x, y = (corners * scale[:, None]).unbind(2)
    x = x - slant[:, None] * y
    cosine, sine = turn.cos()[:, None], turn.sin()[:, None]
    turned = torch.stack([x * cosine - y * sine, x * sine + y * cosine], 2)
    points = turned + uniform(-0.18, 0.18, 1, 2)
    distance = distance_from_strokes(points)
    ink = torch.sigmoid((uniform(0.05, 0.14, 1) - distance) * 30) * uniform(0.6, 1.0, 1)
    ink = ink + uniform(0.0, 0.25, 1) * torch.randn(ink.shape, generator=generator)
    pixels = (ink.clamp(0, 1) * 255).to(torch.uint8)
    return pixels.reshape(-1, DIGIT_SIZE, DIGIT_SIZE, 1), labels


def stroke_corners() -> torch.Tensor:
    """The corners of each class (10, P, 2); shorter strokes repeat their last one."""
    strokes = [
        torch.tensor([int(number) for number in re.findall(r"-?\d", text)]).reshape(-1, 2) / 9.0
        for text in STROKES
    ]
    longest = max(len(stroke) for stroke in strokes)
    return torch.stack(
        [torch.cat([stroke, stroke[-1:].expand(longest - len(stroke), 2)]) for stroke in strokes]
    )


def distance_from_strokes(points: torch.Tensor) -> torch.Tensor:
    """The distance (N, 784) of each pixel from the polyline through points (N, P, 2)."""
    axis = (torch.arange(DIGIT_SIZE) - 13.5) / 13.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), 2).reshape(1, -1, 2)
    nearest = torch.full((len(points), DIGIT_SIZE**2), 9.0)
    for start, end in pairwise(points.unbind(1)):
        direction = (end - start)[:, None]
        length = direction.square().sum(2).clamp_min(1e-9)
        along = (((grid - start[:, None]) * direction).sum(2) / length).clamp(0, 1)
        offset = start[:, None] + along[..., None] * direction - grid
        nearest = torch.minimum(nearest, offset.norm(dim=2))
    return nearest


# ---- images: what trains and what validates ----------------------------------------------------


@dataclass(frozen=True, eq=False)
class DataSplit:
    """The images of a run. `all` is training and validation together, for the final training."""

    all: Images
    train: Images
    validation: Images
    test: Images
    seed: int  # of the split

    def to(self, device) -> "DataSplit":
        sets = (images.to(device) for images in (self.all, self.train, self.validation, self.test))
        return DataSplit(*sets, self.seed)


def shuffle_for_split(images: Images, seed: int) -> torch.Tensor:
    """The indices (N,) in the order of a seed."""
    generator = torch.Generator().manual_seed(seed_for(seed, "split"))
    return torch.randperm(len(images), generator=generator)


def split_indices(images: Images, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of what (trains, validates): 10 % of the images validate, chosen by `seed`.

    Raises UserError where these are fewer than 10.
    """
    order = shuffle_for_split(images, seed)
    count = int(VALIDATION_SHARE * len(images))
    if count < 10:
        raise UserError(
            f"{len(images)} training images are too few: {VALIDATION_SHARE:.0%} of them validate, "
            f"so at least {10 / VALIDATION_SHARE:.0f} are needed"
        )
    return order[count:], order[:count]


def split_images(images: Images, seed: int) -> tuple[Images, Images]:
    """(training, validation) images; see `split_indices`."""
    train, validation = split_indices(images, seed)
    return images.select(train), images.select(validation)


def make_data_split(
    images: Images, test: Images, seed: int, *, max_images: int | None = None
) -> DataSplit:
    """The images of a run, at most `max_images` that train or validate, and as many that test.

    They are split before some are left out, so that what validates a net in a small run validates
    it in a large one, too. Raises UserError where the images are too few.
    """
    train, validation = split_indices(images, seed)
    used = images
    if max_images is not None and max_images < len(images):
        count = int(VALIDATION_SHARE * max_images)
        train, validation = train[: max_images - count], validation[:count]
        used = images.select(torch.cat([train, validation]))
    if max_images is not None and max_images < len(test):
        generator = torch.Generator().manual_seed(seed_for("few"))
        order = torch.randperm(len(test), generator=generator)
        test = test.select(order[:max_images])
    return DataSplit(used, images.select(train), images.select(validation), test, seed)


# ---- training ----------------------------------------------------------------------------------


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast_for(device: torch.device) -> torch.autocast:
    """bfloat16 autocast where the device computes it natively, else float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


@contextmanager
def float32_for(device: torch.device):
    """No autocast. On a GPU convolutions do not use TF32, either, which has three digits."""
    allowed_before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed_before


@torch.no_grad()
def compute_logits(net: Net, images: Images, *, in_float32: bool = False) -> torch.Tensor:
    """The logits (N, classes) of a net for images, float32, in the images' order. They are computed
    as in training, in bfloat16 where the machine has it, unless `in_float32`."""
    net.eval()
    device = images.device
    with float32_for(device) if in_float32 else autocast_for(device):
        return torch.cat([net(x).float() for x in images.batches(split_into_chunks(images))])


def measure_accuracy(net: Net, images: Images, *, in_float32: bool = False) -> float:
    """Share of `images` that `net` classifies right, in [0, 1]."""
    predicted = compute_logits(net, images, in_float32=in_float32).argmax(1)
    return int((predicted == images.labels).sum()) / len(images)


@torch.no_grad()
def measure_usage_by_class(net: Net, images: Images) -> dict:
    """Which kernels a gated net uses for which class: {"classes": their names, "layers": {name of a
    gated layer: (classes, C), the share of a class's images that each kernel serves}}; shares in
    [0, 1], to three decimals."""
    gated_names = [
        prunable.layer_name
        for prunable, gate in zip(net.prunable, sep.gates_of(net))
        if gate is not None
    ]
    layers = {name: [] for name in gated_names}
    class_names = []
    for label in range(net.classes):
        images_of_class = (images.labels == label).nonzero()[:, 0]
        if len(images_of_class) == 0:
            continue
        class_names.append(images.class_names[label] if images.class_names else str(label))
        batches = images.batches(images_of_class.split(chunk_size_for(images)))
        usages = [usage for usage in sep.measure_usage(net, batches) if usage is not None]
        for name, usage in zip(gated_names, usages):
            layers[name].append([round(share, 3) for share in usage.share_of_kernel.tolist()])
    return {"classes": class_names, "layers": layers}


class Teacher:
    """The softmax outputs of a net on a set of images, for the crops of each epoch.

    `seed` must be the one that `fit` gets: it decides the order and the crops of an epoch. Outputs
    are kept in memory, up to TEACHER_BYTES.
    """

    def __init__(self, net: Net, images: Images, seed: int):
        self.net = net
        self.images = images
        self.seed = seed
        self.kept_probabilities = {}

    def probabilities(self, epoch: int, shown_count: int) -> torch.Tensor:
        """(N, classes) float32, row i for image i.

        Only the first `shown_count` images in the epoch's order are computed; the other rows are 0.
        Without augmentation the outputs are the same in all epochs: then they are computed once,
        for all images.
        """
        if not self.images.is_augmented:
            epoch, shown_count = 0, len(self.images)
        if (epoch, shown_count) in self.kept_probabilities:
            return self.kept_probabilities[epoch, shown_count]
        probabilities = self.compute(epoch, shown_count)
        if probabilities.nbytes * (len(self.kept_probabilities) + 1) <= TEACHER_BYTES:
            self.kept_probabilities[epoch, shown_count] = probabilities
        return probabilities

    @torch.no_grad()
    def compute(self, epoch: int, shown_count: int) -> torch.Tensor:
        order, crops = self.images.draw_epoch(self.seed, epoch)
        shown = order[:shown_count].sort().values
        chunks = shown.split(chunk_size_for(self.images))
        self.net.eval()
        with autocast_for(self.images.device):
            parts = [self.net(x).float().softmax(1) for x in self.images.batches(chunks, crops)]
        classes = parts[0].shape[1]
        probabilities = torch.zeros(len(self.images), classes, device=order.device)
        probabilities[shown] = torch.cat(parts)
        return probabilities


def distillation_loss(logits, labels, teacher_probs=None, temperature=None) -> torch.Tensor:
    """Cross-entropy or, with a teacher, MSE between the softmaxes + 0.1 * cross-entropy (script).

    logits (B, classes), labels (B,), teacher_probs (B, classes): the teacher's softmax. With a
    temperature T (ours, for `fast`) T^2 * KL between the softmaxes of logits / T takes the MSE's
    place (Hinton et al. 2015): a teacher that is sure of its training images still tells which
    classes are like which.
    """
    cross_entropy = F.cross_entropy(logits, labels)
    if teacher_probs is None:
        return cross_entropy
    if temperature is None:
        distance = F.mse_loss(logits.softmax(1), teacher_probs)
    else:
        teacher_logits = teacher_probs.clamp_min(1e-30).log()
        distance = temperature**2 * F.kl_div(
            (logits / temperature).log_softmax(1),
            (teacher_logits / temperature).softmax(1),
            reduction="batchmean",
        )
    return distance + CROSS_ENTROPY_WEIGHT * cross_entropy


@dataclass(frozen=True)
class TrainingPlan:
    """How long a net is trained, and at which learning rate: always `lr`, or in one cycle. The
    cycle rises from 0 to `lr` in the first fifth of the training, and then falls to 0, linearly."""

    epochs: int
    lr: float
    is_one_cycle: bool = False
    max_steps: int | None = None  # of an epoch; None: all of its images are shown
    temperature: float | None = None  # of the distillation; None: the papers' MSE

    def lr_at(self, progress: float) -> float:
        """The learning rate at `progress` in [0, 1] of the training."""
        if not self.is_one_cycle:
            return self.lr
        return self.lr * min(progress / 0.2, (1 - progress) / 0.8)


def make_optimizer(net: Net, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


class TrainStep:
    """A training step, as it runs on a CPU; GraphTrainStep is the one for a GPU. `fit` calls
    start_epoch(), the step itself for each batch, and finish_epoch()."""

    def __init__(self, net: Net, optimizer, temperature: float | None = None):
        self.net = net
        self.optimizer = optimizer
        self.temperature = temperature
        # On a GPU it is True, and then it is also in the optimizer's state that progress.pt keeps.
        # A training that goes on with that state on a CPU must not have it.
        optimizer.param_groups[0]["fused"] = None

    def start_epoch(self) -> None:
        self.net.train()

    def __call__(self, x, labels, teacher_probs, lr: float) -> torch.Tensor:
        """Train on x (B, C, H, W), labels (B,), teacher_probs (B, classes) or None; the loss."""
        self.optimizer.param_groups[0]["lr"] = lr
        return self.update(x, labels, teacher_probs)

    def finish_epoch(self) -> None:
        """Nothing here. A GraphTrainStep copies the weights of its padded net back."""

    def update(self, x, labels, teacher_probs, side_stream=None) -> torch.Tensor:
        """One step at the learning rate that the optimizer has. Returns the loss, a scalar tensor.

        `side_stream`: a SideStreamWeightGrads to compute the weights' gradients with.
        """
        with autocast_for(x.device), side_stream or nullcontext():
            logits = self.net(x)
        loss = distillation_loss(logits.float(), labels, teacher_probs, self.temperature)
        self.optimizer.zero_grad()
        try:
            loss.backward()
        finally:
            if side_stream:
                # In `finally`, because Ctrl-C may come while a graph is captured: the capture
                # cannot end while another stream has work that is not joined.
                side_stream.join()
        if side_stream:
            side_stream.assign_gradients()
        self.optimizer.step()
        return loss.detach()


# ---- training: on a GPU ------------------------------------------------------------------------
#
# This section has what is different in a training on a GPU; `make_train_step` is its one entry.
# Two parts of that stand elsewhere: `TrainStep.update` takes a second stream, and `draw_batches`
# reads more images at once.
#
# A step of a narrow net runs hundreds of small kernels. Three things make it faster: one CUDA graph
# runs all kernels without Python, weight gradients are computed in parallel with the rest of the
# backward pass, and widths are padded to multiples of 8.


def make_train_step(net: Net, optimizer, temperature: float | None = None) -> TrainStep:
    """The training step for the device that `net` is on."""
    is_on_gpu = next(net.parameters()).is_cuda
    step_class = GraphTrainStep if is_on_gpu else TrainStep
    return step_class(net, optimizer, temperature)


class GraphTrainStep(TrainStep):
    """A training step on a GPU: captured in one CUDA graph by the first call, replayed by all.

    The graph's inputs keep their shapes and their places in memory.
    """

    def __init__(self, net: Net, optimizer, temperature: float | None = None):
        padded_net, padded_optimizer = pad_widths(net, optimizer)
        super().__init__(padded_net, padded_optimizer, temperature)
        self.original_net = net
        self.original_optimizer = optimizer
        self.graph = None
        self.graph_inputs = ()
        self.graph_loss = None
        self.side_stream = None

    def __call__(self, x, labels, teacher_probs, lr: float) -> torch.Tensor:
        inputs = (x, labels, teacher_probs, torch.full((), lr, device=x.device))
        if self.graph is None:
            self.graph_inputs = [None if value is None else value.clone() for value in inputs]
            # The fused optimizer reads the rate from where it lies.
            self.optimizer.param_groups[0].update(lr=self.graph_inputs[3], fused=True)
            self.capture()
        for graph_input, value in zip(self.graph_inputs, inputs):
            if value is not None:
                graph_input.copy_(value)
        self.graph.replay()
        return self.graph_loss  # the next call writes the next loss to the same place

    def finish_epoch(self) -> None:
        if self.net is not self.original_net:  # it is a padded copy
            copy_training_state(
                self.net, self.optimizer, self.original_net, self.original_optimizer
            )

    def capture(self) -> None:
        """Record one step as a CUDA graph, after three warm-up steps in a stream of their own.

        CUDA's libraries allocate memory and choose kernels in their first calls, which a recording
        must not contain. Weights, buffers and momenta are restored afterwards.
        """
        state_before = deepcopy(self.net.state_dict())
        momenta_before = {
            parameter: state["momentum_buffer"].clone()
            for parameter, state in self.optimizer.state.items()
        }
        if any(isinstance(module, nn.Conv2d) for module in self.net.modules()):
            # An attribute, not a local: the graph writes into its tensors at every replay.
            self.side_stream = SideStreamWeightGrads(self.net)
        batch = self.graph_inputs[:3]
        warm_up_stream = torch.cuda.Stream()
        warm_up_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up_stream):
            for _ in range(3):
                self.update(*batch, self.side_stream)
        torch.cuda.current_stream().wait_stream(warm_up_stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.graph_loss = self.update(*batch, self.side_stream)
        self.net.load_state_dict(state_before)  # in place
        for parameter, state in self.optimizer.state.items():
            if parameter in momenta_before:
                state["momentum_buffer"].copy_(momenta_before[parameter])
            else:
                state["momentum_buffer"].zero_()


class SideStreamConv2d(torch.autograd.Function):
    """conv2d without a bias, whose weight's gradient is computed in a second stream and left there
    for SideStreamWeightGrads to assign."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding, side_stream):
        ctx.save_for_backward(x, weight)
        # (bias sizes, stride, padding, dilation, is transposed, output padding, groups)
        ctx.geometry = (None, stride, padding, [1, 1], False, [0, 0], 1)
        ctx.side_stream = side_stream
        return torch.ops.aten.convolution(x, weight, *ctx.geometry)

    @staticmethod
    def backward(ctx, grad):
        side_stream = ctx.side_stream

        def compute(of_input: bool, of_weight: bool):
            return torch.ops.aten.convolution_backward(
                grad, *ctx.saved_tensors, *ctx.geometry, [of_input, of_weight, False]
            )

        if side_stream.stream:
            side_stream.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream.stream):
            weight_grad = compute(of_input=False, of_weight=True)[1]
        # These tensors are kept until the side stream has read them; otherwise the allocator would
        # reuse their memory. Autograd does not wait for the side stream, so it gets None as the
        # gradient of the weight.
        side_stream.pending.append((grad, *ctx.saved_tensors, weight_grad))
        input_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = compute(of_input=True, of_weight=False)[0]
        return input_grad, None, None, None, None


class SideStreamWeightGrads(TorchFunctionMode):
    """A context for a forward pass whose convolutions a GPU trains faster, to the same numbers.

    One kernel casts the weights of all convolutions to bfloat16, and one kernel casts their
    gradients back. The weight gradients are computed in a second stream, in parallel with the rest
    of the backward pass, because the kernels of a narrow net leave most of a GPU idle. `join` waits
    for these gradients, `assign_gradients` writes them into the net's parameters.
    """

    def __init__(self, net: Net):
        super().__init__()
        device = next(net.parameters()).device
        # On a CPU, in tests, there is no stream, and torch.cuda.stream(None) does nothing.
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        # (gradient of the output, input, cast weight, gradient of the weight) of each convolution.
        self.pending = []
        dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
        self.cast_weights = {
            module.weight: module.weight.detach().to(dtype, copy=True).requires_grad_()
            for module in net.modules()
            if isinstance(module, nn.Conv2d)
        }

    def __enter__(self):
        with torch.no_grad():
            torch._foreach_copy_(list(self.cast_weights.values()), list(self.cast_weights))
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.conv2d or args[1] not in self.cast_weights:
            return func(*args, **(kwargs or {}))
        # nn.Conv2d gives all its arguments by position. The other two are a dilation of 1 and one
        # group in all our nets.
        x, weight, bias, stride, padding = args[:5]
        weight = self.cast_weights[weight]
        y = SideStreamConv2d.apply(x.to(weight.dtype), weight, stride, padding, self)
        if bias is None:
            return y
        return y + bias.to(y.dtype).reshape(-1, 1, 1)

    def join(self) -> None:
        if self.stream and self.pending:
            torch.cuda.current_stream().wait_stream(self.stream)

    def assign_gradients(self) -> None:
        # `saved_tensors` of the backward pass are the very tensors that the forward pass saved, so
        # a cast weight can be looked up. Each convolution runs once in a forward pass.
        gradient_of = {cast_weight: gradient for *_, cast_weight, gradient in self.pending}
        for weight in self.cast_weights:
            weight.grad = torch.empty_like(weight)
        torch._foreach_copy_(
            [weight.grad for weight in self.cast_weights],
            [gradient_of[cast_weight] for cast_weight in self.cast_weights.values()],
        )
        self.pending.clear()


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is at least `number`."""
    return -(-number // multiple) * multiple


def pad_widths(net: Net, optimizer) -> tuple[Net, torch.optim.SGD]:
    """(net, optimizer) with channels of zeros up to multiples of 8, which a GPU trains faster.

    The added weights stay zero: a channel of zeros contributes nothing and gets no gradient.
    The arguments themselves are returned, without padding, in three cases: all widths are multiples
    of 8 already; the net has gates, because these refer to kernels by their index; the net has
    sigmoids, because sigmoid(0) is not 0.
    """
    widths = tuple(round_up(width, 8) for width in net.widths)
    has_sigmoids = any(prunable.activation == "sigmoid" for prunable in net.prunable)
    if net.gates is not None or widths == net.widths or has_sigmoids:
        return net, optimizer
    with next(net.parameters()).device:
        padded_net = models.build_like(net, widths).to(memory_format=torch.channels_last)
    padded_optimizer = make_optimizer(padded_net, optimizer.defaults["lr"])
    padded_group, group = padded_optimizer.param_groups[0], optimizer.param_groups[0]
    padded_group["weight_decay"] = group["weight_decay"]
    copy_training_state(net, optimizer, padded_net, padded_optimizer)
    return padded_net, padded_optimizer


@torch.no_grad()
def copy_training_state(net: Net, optimizer, to_net: Net, to_optimizer) -> None:
    """Copy weights and momenta: what both nets have room for, zeros elsewhere.

    The nets are of one architecture, so their tensors come in the same order; only the widths
    differ.
    """
    create_missing_momenta(net, optimizer)
    create_missing_momenta(to_net, to_optimizer)
    sources = training_state(net, optimizer)
    targets = training_state(to_net, to_optimizer)
    for source, target in zip(sources, targets):
        room = tuple(slice(min(sizes)) for sizes in zip(source.shape, target.shape))
        target.zero_()[room] = source[room]


def create_missing_momenta(net: Net, optimizer) -> None:
    """Zeros as the momentum of each parameter that has not been trained yet."""
    for parameter in net.parameters():
        if not optimizer.state[parameter]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def training_state(net: Net, optimizer) -> list[torch.Tensor]:
    """The net's parameters and buffers, then the momentum of each parameter, in order."""
    momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in net.parameters()]
    return [*net.state_dict().values(), *momenta]


# ---- training: the loop ------------------------------------------------------------------------


def draw_batches(images: Images, teacher_probs, order, crops, batch_size: int) -> Iterator:
    """Yield (x (B, C, H, W), labels (B,), teacher_probs (B, classes) or None) along `order`."""
    batches_at_once = 1
    if images.device.type == "cuda":
        # A dozen small kernels less for each step.
        batches_at_once = max(1, 16 * 32 * 32 // images.size**2)
    chunks = order.split(batch_size * batches_at_once)
    for index, x in zip(chunks, images.batches(chunks, crops)):
        labels = images.labels[index]
        probs = None if teacher_probs is None else teacher_probs[index]
        for start in range(0, len(index), batch_size):
            batch = slice(start, start + batch_size)
            yield x[batch], labels[batch], None if probs is None else probs[batch]


def fit(
    net: Net,
    images: Images,
    plan: TrainingPlan,
    *,
    optimizer,
    seed: int,
    teacher: Teacher | None = None,
    epochs: range | None = None,
    wrap_steps: Callable = iter,
) -> Iterator[tuple[int, float]]:
    """Train `net` in place, an epoch per iteration of this generator: yields (epoch, mean loss).

    `epochs` are those of the plan to train, by default all of them. The plan says the learning rate
    of each step, whatever the optimizer has. The `teacher` must have the same `seed`.
    `wrap_steps(steps)` yields the steps of an epoch one by one, and may show how far it is.
    """
    batch_size = min(BATCH_SIZE, len(images))
    # ours: the last, smaller batch of an epoch is left out. Each epoch has another order, so these
    # are other images each time.
    steps = len(images) // batch_size
    if plan.max_steps:
        steps = min(steps, plan.max_steps)
    count = steps * batch_size
    train_step = make_train_step(net, optimizer, plan.temperature)
    if epochs is None:
        epochs = range(plan.epochs)
    for epoch in epochs:
        train_step.start_epoch()
        order, crops = images.draw_epoch(seed, epoch)
        teacher_probs = None
        if teacher:
            teacher_probs = teacher.probabilities(epoch, count)
        total_loss = torch.zeros((), device=images.device)
        batches = draw_batches(images, teacher_probs, order[:count], crops, batch_size)
        for step, batch in zip(wrap_steps(range(steps)), batches):
            lr = plan.lr_at((epoch * steps + step + 0.5) / (plan.epochs * steps))
            total_loss += train_step(*batch, lr)
        train_step.finish_epoch()
        yield epoch, total_loss.item() / steps


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch says that a CPU or a GPU has no memory left: on a CPU by a RuntimeError."""
    signs = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "alloc_failed",  # cuBLAS and cuDNN
    )
    return any(sign in str(error).lower() for sign in signs)


def is_gpu_error(error: Exception) -> bool:
    """Whether PyTorch reports a fault of the GPU or its libraries, not of a net's shapes.

    "Unable to find an engine" is cuDNN's message where the memory is full, or where this cuDNN does
    not support the GPU.
    """
    signs = ("cuda error", "cudnn error", "unable to find an engine")
    return any(sign in str(error).lower() for sign in signs)


# ---- training: how a foreign net is read -------------------------------------------------------
#
# A foreign state dict was not written by this tool. It seldom says how images were normalised, and
# never all of its architecture. A *reading* is an architecture that fits the weights. An *attempt*
# is one reading with one normalisation. Attempts are tried on some of the training images.
#
# Two measures rank them. One is the accuracy. The other is the norm mismatch: how far the inputs of
# the batch norms are from their running means and variances. With the right attempt it is small. It
# decides between attempts of about the same accuracy, as relu and GELU.

# What foreign nets are usually trained with, per number of channels.
COMMON_NORMALISATIONS = {
    3: {
        "ImageNet's mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "mean and std 0.5": ((0.5,) * 3, (0.5,) * 3),
        "pixels in [0, 1]": ((0.0,) * 3, (1.0,) * 3),
        # Of github.com/kuangliu/pytorch-cifar, and of many after it: the mean of the images' stds.
        "CIFAR-10's mean and a std of 0.2": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    },
    1: {"mean and std 0.5": ((0.5,), (0.5,)), "pixels in [0, 1]": ((0.0,), (1.0,))},
}


def stored_normalisation(net: Net, facts: dict) -> tuple | None:
    """(mean, std), per channel, that a checkpoint's facts name; None where they name none that are
    valid."""
    mean, std = facts.get("mean"), facts.get("std")
    for values in (mean, std):
        if not isinstance(values, list) or len(values) != net.channels:
            return None
        if not all(isinstance(value, float) and math.isfinite(value) for value in values):
            return None
    return (mean, std) if min(std) > 0 else None


@dataclass(frozen=True)
class Normalisation:
    """How images are normalised: by a mean and a std for each channel, of pixels in [0, 1]."""

    name: str  # for the user
    mean: tuple
    std: tuple


def list_normalisations(train: Images) -> list[Normalisation]:
    """The mean and std that the images come with, and the common ones."""
    own = (train.mean, train.std)
    names = [name for name, statistics in STATISTICS.items() if statistics == own]
    own_name = f"mean and std of {names[0]}" if names else "their own mean and std"
    common = COMMON_NORMALISATIONS[len(train.mean)]
    others = [Normalisation(name, *each) for name, each in common.items() if each != own]
    return [Normalisation(own_name, *own), *others]


@dataclass(frozen=True)
class AttemptRound:
    """All attempts are measured on the first `max_images` images, and the best ones stay."""

    max_images: int
    survivors: int


# ours: after these rounds, the attempts that are left are measured on all images.
ATTEMPT_ROUNDS = (
    AttemptRound(32, survivors=50),
    AttemptRound(128, survivors=12),
    AttemptRound(512, survivors=3),
)
# ours: above MAX_ATTEMPTS all readings are tried with one normalisation first, and the best
# MAX_SHORTLIST of them with all.
MAX_ATTEMPTS = 2000
MAX_SHORTLIST = 25
# ours: so many readings, the best ones of the first round, are tried with rare activations, too.
READINGS_WITH_RARE_ACTIVATIONS = 3
# ours: where the best accuracy is below this, rare activations are tried with all readings. Below
# it the loss says little, and decides nothing.
POOR_ACCURACY = 0.5


@dataclass(frozen=True, eq=False)
class KnownNet:
    """A net of which only the normalisation is unknown. In an Attempt it takes the place of a
    models.Reading."""

    net: Net

    @property
    def architecture(self):
        return self.net.architecture

    def build(self) -> Net:
        return self.net


# ours: the accuracy of a rare activation has to be higher than that of a usual one by at least this
# share of the images, unless batch norms decide for the rare one. A net that is hardly trained may
# be a little more accurate with an activation that it was not trained with.
MIN_HANDICAP = 0.05


@dataclass(frozen=True, eq=False)
class Attempt:
    """One way to use foreign weights: a reading and a normalisation."""

    reading: models.Reading | KnownNet
    normalisation: Normalisation
    rank: int  # in the order of all attempts, the most usual first

    @property
    def is_rare(self) -> bool:
        return self.reading.architecture.activation in models.RARE_ACTIVATIONS

    def handicap(self, image_count: int) -> float:
        """What is subtracted from its accuracy, in [0, 1]; 0 for a usual activation.

        For a rare one at least two standard deviations of an accuracy on `image_count` images.
        """
        if not self.is_rare:
            return 0.0
        # An accuracy has a standard deviation of at most 0.5 / sqrt(image_count).
        return max(MIN_HANDICAP, 2 * 0.5 * image_count**-0.5)

    def with_rare_activations(self) -> list["Attempt"]:
        readings = map(self.reading.with_activation, models.RARE_ACTIVATIONS)
        return [Attempt(reading, self.normalisation, self.rank) for reading in readings]


def list_attempts(readings: Iterable, normalisations: Iterable[Normalisation]) -> list[Attempt]:
    """All readings with all normalisations, both with the most usual ones first."""
    pairs = product(readings, normalisations)
    return [Attempt(*pair, rank) for rank, pair in enumerate(pairs)]


@dataclass(frozen=True, eq=False)
class AttemptScore:
    """How good an attempt is, on some images."""

    is_right: torch.Tensor  # (N,) bool: which images
    loss: float  # the cross-entropy, summed over the images
    norm_mismatch: float | None  # see `measure_norm_mismatch`; None where no batch norm tells

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return int(self.is_right.sum()) / len(self.is_right)


# ours: above this mismatch the user is warned. Wrong readings had 0.01 to 3.5, half of them more
# than this.
MIN_STRANGE_MISMATCH = 0.15


@dataclass(frozen=True)
class FoundReading:
    """How foreign weights are read, and what tells so."""

    net: Net
    normalisation: Normalisation
    accuracy: float  # in [0, 1]
    image_count: int  # on how many images `accuracy` was measured
    norm_mismatch: float | None  # see `measure_norm_mismatch`; None where no batch norm tells
    # False where another attempt of the last round may as well be the right one. Such a rival
    # - has a usual activation if this one is usual, and a rare one if this one is rare,
    # - has batch norms that match as well,
    # - is not clearly less accurate, and
    # - computes other outputs.
    is_only_best: bool

    @property
    def has_strange_norms(self) -> bool:
        """Whether its batch norms read something else than in training."""
        return self.norm_mismatch is not None and self.norm_mismatch > MIN_STRANGE_MISMATCH


# ours: the last round has at least so many images, where there are so many; fewer leave much to
# chance.
MIN_TRIED_IMAGES = 400


def find_reading(
    readings: list,
    train: Images,
    *,
    normalisation: Normalisation | None = None,
    tries_activations=False,
    show_progress=lambda attempts: attempts,
) -> FoundReading:
    """The reading and the normalisation that fit a foreign net best, as `sort_attempts` says.

    They are tried on the same images whatever the seed of a run: so `prune` takes the very net that
    `evaluate` has shown.

    `readings` are models.Readings, the likeliest first, or one KnownNet. Each is tried with the
    `normalisation`, or where it is not known with each of `list_normalisations`, in rounds; with
    `tries_activations` rare ones are tried, too. `show_progress(attempts)` passes on the attempts
    of a round, to show them.
    """
    normalisations = list_normalisations(train) if normalisation is None else [normalisation]
    # Shuffled, for files in folders come class by class.
    count = max(MIN_TRIED_IMAGES, int(VALIDATION_SHARE * len(train)))
    sample = train.select(shuffle_for_split(train, seed=0)[:count])
    ranked = choose_attempts(
        readings, normalisations, sample, show_progress, tries_activations=tries_activations
    )
    if tries_activations:
        ranked = retry_with_rare_activations(
            ranked, readings, normalisations, sample, show_progress
        )
    best, score = ranked[0]
    matching = find_matching([attempt_score for _, attempt_score in ranked])
    rivals = [
        other
        for other, other_score in ranked[1:]
        if other.is_rare == best.is_rare and is_as_good(other_score, score, matching)
    ]
    is_only_best = all(have_equal_outputs(best, rival, sample) for rival in rivals)
    return FoundReading(
        best.reading.build().to(train.device),
        best.normalisation,
        score.accuracy,
        len(sample),
        score.norm_mismatch,
        is_only_best=is_only_best,
    )


def is_as_good(score: AttemptScore, best: AttemptScore, matching: list[AttemptScore]) -> bool:
    """Whether the images leave open which attempt is right: the one with `score` or the one with
    `best`. `matching` is what `find_matching` returns for the scores of all attempts."""
    if not math.isfinite(score.loss):  # with this reading the net may not even take these images
        return False
    if (score in matching) != (best in matching):
        return False
    return not is_clearly_less_accurate(score, best)


# ours: in place of MAX_ATTEMPTS where all readings are tried with rare activations
# (models.RARE_ACTIVATIONS).
MAX_RARE_ATTEMPTS = 100


def retry_with_rare_activations(
    ranked: list[tuple[Attempt, AttemptScore]],
    readings: list,
    normalisations: list[Normalisation],
    sample: Images,
    show_progress: Callable,
) -> list[tuple[Attempt, AttemptScore]]:
    """`ranked`, or a second ranking with rare activations, whichever has the better best attempt.

    So far only the best readings were tried with rare activations. Their poolings and paddings were
    chosen with a usual activation, and may be wrong. So there is a second ranking in two cases:

    - The best attempt of `ranked` has a rare activation: all readings are tried with this one.
    - The best accuracy in `ranked` is below POOR_ACCURACY: all readings are tried with each rare
      activation.
    """
    best, score = ranked[0]
    if not best.is_rare and score.accuracy >= POOR_ACCURACY:
        return ranked
    activations = models.RARE_ACTIVATIONS
    if best.is_rare:
        activations = [best.reading.architecture.activation]
    rare_readings = [
        reading
        for activation in activations
        for reading in models.change_activation(readings, activation)
    ]
    rare_ranked = choose_attempts(
        rare_readings, normalisations, sample, show_progress, max_attempts=MAX_RARE_ATTEMPTS
    )
    best_of_both = sort_attempts([ranked[0], rare_ranked[0]], len(sample))[0]
    return ranked if best_of_both is ranked[0] else rare_ranked


def have_equal_outputs(attempt: Attempt, other: Attempt, sample: Images) -> bool:
    """Whether two attempts give the same logits for some images: for example where one averages the
    last map and the other does not, but the map is 1 x 1."""
    nets, images = [], []
    for each in (attempt, other):
        mean, std = each.normalisation.mean, each.normalisation.std
        nets.append(each.reading.build().to(sample.device))
        images.append(sample.normalised_by(mean, std))
    return have_equal_logits(nets, images)


def have_equal_logits(nets: list[Net], images: list[Images]) -> bool:
    """Whether two nets, each with its own images, give the same logits for the first 32 of them, up
    to rounding in float32."""
    logits = [
        compute_logits(net, own_images.select(slice(32)), in_float32=True)
        for net, own_images in zip(nets, images)
    ]
    return torch.allclose(*logits, rtol=1e-4, atol=1e-5)


def choose_attempts(
    readings: list,
    normalisations: list[Normalisation],
    sample: Images,
    show_progress: Callable,
    *,
    tries_activations=False,
    max_attempts=MAX_ATTEMPTS,
) -> list[tuple[Attempt, AttemptScore]]:
    """The attempts of the last round, each with its score on all images, the best first."""
    first_round, *later_rounds = ATTEMPT_ROUNDS
    if len(normalisations) > 1 and len(readings) * len(normalisations) > max_attempts:
        readings = shortlist_readings(readings, normalisations[0], sample, show_progress)
    attempts = list_attempts(readings, normalisations)
    ranked = rank_attempts(attempts, sample, first_round.max_images, show_progress)
    attempts = [attempt for attempt, _ in ranked[: first_round.survivors]]
    if tries_activations:
        attempts += list_rare_attempts(attempts)
    for attempt_round in later_rounds:
        ranked = rank_attempts(attempts, sample, attempt_round.max_images, show_progress)
        attempts = [attempt for attempt, _ in ranked[: attempt_round.survivors]]
    return rank_attempts(attempts, sample, None, show_progress)


def list_rare_attempts(attempts: list[Attempt]) -> list[Attempt]:
    """The best readings of `attempts`, which come the best first, with every rare activation. Each
    reading is taken once, with its best normalisation."""
    best_attempts = {}
    for attempt in attempts:
        best_attempts.setdefault(attempt.reading, attempt)
    rare_attempts = []
    for attempt in list(best_attempts.values())[:READINGS_WITH_RARE_ACTIVATIONS]:
        rare_attempts += attempt.with_rare_activations()
    return rare_attempts


def shortlist_readings(
    readings: list, normalisation: Normalisation, sample: Images, show_progress: Callable
) -> list:
    """The best readings by one normalisation, on few images; the most usual first, for
    `list_attempts` numbers attempts by their order."""
    attempts = list_attempts(readings, [normalisation])
    max_images = ATTEMPT_ROUNDS[0].max_images
    ranked = rank_attempts(attempts, sample, max_images, show_progress)
    shortlist = [attempt for attempt, _ in ranked[:MAX_SHORTLIST]]
    shortlist.sort(key=lambda attempt: attempt.rank)
    return [attempt.reading for attempt in shortlist]


def rank_attempts(
    attempts: list[Attempt],
    sample: Images,
    max_images: int | None,
    show_progress: Callable,
) -> list[tuple[Attempt, AttemptScore]]:
    """(attempt, score) of each, on the first `max_images` images (None: all), the best first."""
    images = sample.select(slice(max_images))
    if max_images is not None:
        images = images.load_into_memory()
    scored = []
    reading = net = None
    for attempt in show_progress(attempts):
        if attempt.reading is not reading:  # those of one reading often stand side by side
            reading = attempt.reading
            net = reading.build().to(images.device)
        mean, std = attempt.normalisation.mean, attempt.normalisation.std
        normalised = images.normalised_by(mean, std)
        scored.append((attempt, score_net(net, normalised)))
    return sort_attempts(scored, len(images))


# ours: smaller losses, summed over the images, count as equal. A net that is sure of all images has
# hardly a loss by several readings, and then the most usual one is taken.
LEAST_LOSS = 0.1


def sort_attempts(
    scored: list[tuple[Attempt, AttemptScore]], image_count: int
) -> list[tuple[Attempt, AttemptScore]]:
    """The attempts, the best first, by their scores on so many images.

    Attempts whose batch norms match best (`find_matching`) come before all others. What decides, in
    this order:

    - Of those that match: a usual activation before a rare one; the smaller loss; the higher
      accuracy; the more usual attempt.
    - Of the others: the higher accuracy, less `Attempt.handicap`; the smaller loss; the more usual
      attempt.

    Losses below LEAST_LOSS count as equal. Below POOR_ACCURACY no loss counts.
    """
    matching = find_matching([score for _, score in scored])

    def sort_key(pair):
        attempt, score = pair
        accuracy = score.accuracy - attempt.handicap(image_count)
        counts_loss = score.accuracy >= POOR_ACCURACY
        loss = max(score.loss, LEAST_LOSS) if counts_loss else math.inf
        if score in matching:
            return 0, attempt.is_rare, loss, -accuracy, attempt.rank
        return 1, -accuracy, loss, attempt.rank

    return sorted(scored, key=sort_key)


# ours: up to this mismatch (`measure_norm_mismatch`) batch norms match. In 60 small nets, trained
# for some seconds each, right readings had 0.003 to 0.05, but for two.
MAX_MATCHING_MISMATCH = 0.05
# ours: mismatches up to this many times the smallest one count as equal to it. One net trained with
# relu had, by chance, 1.3 times the mismatch with relu that it had with leaky relu. The public
# ResNet-56 has 0.0004, and at least four times that with a wrong normalisation or shortcut.
MAX_MISMATCH_RATIO = 1.5


def find_matching(scores: list[AttemptScore]) -> list[AttemptScore]:
    """The scores whose batch norms match best.

    First, scores are left out that are clearly less accurate than the most accurate one. Of the
    rest, those are returned whose norm mismatch is at most MAX_MISMATCH_RATIO times the smallest.

    Empty if no mismatch is at most MAX_MATCHING_MISMATCH. The norms then say nothing, for example
    because the weights were averaged after the training and the norms were not.
    """
    most_accurate = max(scores, key=lambda score: score.accuracy)
    accurate = [
        score
        for score in scores
        if score.norm_mismatch is not None and not is_clearly_less_accurate(score, most_accurate)
    ]
    smallest_mismatch = min((score.norm_mismatch for score in accurate), default=math.inf)
    if smallest_mismatch > MAX_MATCHING_MISMATCH:
        return []
    limit = MAX_MISMATCH_RATIO * smallest_mismatch
    return [score for score in accurate if score.norm_mismatch <= limit]


def is_clearly_less_accurate(score: AttemptScore, best: AttemptScore) -> bool:
    """Whether `score` is less accurate than `best` by more than chance explains (McNemar's test).

    Only the images that exactly one of the two gets right are counted. `best` must get more of them
    right than `score`, by more than two standard deviations.
    """
    only_best = int((best.is_right & ~score.is_right).sum())
    only_score = int((score.is_right & ~best.is_right).sum())
    return only_best - only_score > 2 * (only_best + only_score) ** 0.5


# ours: the norm mismatch is measured on this many images, or on this share of the images of the
# round if that is less. Few images are enough, because each map has many positions.
NORM_IMAGES = 128
NORM_SHARE = 1 / 4
# ours: in a round with fewer images than this, the norm mismatch is not measured. So it is not
# measured in the first round, where that would take too much time: there are too many attempts.
FEWEST_IMAGES_FOR_NORMS = 80


@torch.no_grad()
def score_net(net: Net, images: Images) -> AttemptScore:
    """How good a net is on some images; the worst score where it cannot take them.

    In float32: the choice is not to depend on whether a machine has bfloat16 or TF32.
    """
    net.eval()
    is_right, loss = [], 0.0
    chunks = split_into_chunks(images)
    mismatch = None
    try:
        with float32_for(images.device):
            for index, x in zip(chunks, images.batches(chunks)):
                logits, labels = net(x), images.labels[index]
                is_right.append((logits.argmax(1) == labels).cpu())
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            if net.gates is None and len(images) >= FEWEST_IMAGES_FOR_NORMS:
                mismatch = measure_least_norm_mismatch(net, images)
    except RuntimeError as error:
        if is_out_of_memory(error) or is_gpu_error(error):
            raise
        # Most likely strides and poolings leave nothing of the map.
        return AttemptScore(torch.zeros(len(images), dtype=torch.bool), math.inf, None)
    loss = loss if math.isfinite(loss) else math.inf
    return AttemptScore(torch.cat(is_right), loss, mismatch)


@torch.no_grad()
def measure_least_norm_mismatch(net: Net, images: Images) -> float | None:
    """The smaller `measure_norm_mismatch` for some of the images: as they are, and as a training
    augments them. None where no batch norm tells.

    Nobody knows which of the two the batch norms have read. Crops with black borders change much.
    """
    count = min(NORM_IMAGES, int(NORM_SHARE * len(images)))
    index = torch.arange(count, device=images.device)
    chunks = index.split(chunk_size_for(images))
    all_crops = [None]
    if images.is_augmented:
        all_crops.append(images.draw_epoch(0, 0)[1])
    mismatches = []
    for crops in all_crops:
        with float32_for(images.device), record_norm_inputs(net) as norm_inputs:
            for x in images.batches(chunks, crops):
                net(x)
        mismatches.append(measure_norm_mismatch(norm_inputs))
    return min((each for each in mismatches if each is not None), default=None)


def choose_norm_place(net: Net, images: Images) -> Net:
    """`net`, or a copy whose batch norms stand at the other place: after the poolings if they stood
    after the activations, and the reverse. The one with the smaller norm mismatch is returned.

    If no norm has a negative scale, both nets compute the same outputs, but in training their norms
    have read different maps. `net` itself is returned if the outputs differ, if the norms stand
    before the activations, or if no norm has learned anything.
    """
    other = move_late_norms(net)
    if other is None:
        return net
    nets = [net.to(images.device).eval(), other.to(images.device).eval()]
    # Shuffled, for files in folders come class by class. The seed does not matter.
    images = images.select(shuffle_for_split(images, 0)[: round(NORM_IMAGES / NORM_SHARE)])
    if not have_equal_logits(nets, [images, images]):
        return net
    mismatch, other_mismatch = [measure_least_norm_mismatch(each, images) for each in nets]
    if mismatch is None or other_mismatch is None:  # the norms have learned nothing
        return net
    return other if other_mismatch < mismatch else net


def move_late_norms(net: Net) -> Net | None:
    """A copy of `net` with its late batch norms on the other side of the poolings. None where it
    has no late norm at a pooling."""
    other_place = {
        models.AFTER_ACTIVATION: models.AFTER_POOLING,
        models.AFTER_POOLING: models.AFTER_ACTIVATION,
    }
    convolutions = getattr(net.architecture, "convolutions", ())  # only chains have them
    if not any(each.pooling and each.norm_place in other_place for each in convolutions):
        return None
    changed = tuple(
        replace(each, norm_place=other_place.get(each.norm_place, each.norm_place))
        for each in convolutions
    )
    moved = models.build_net(replace(net.architecture, convolutions=changed), net.widths)
    models.load_weights(moved, net.state_dict())
    return moved


class NormInputs:
    """The mean and variance of all that a batch norm has read: per channel, (C,)."""

    def __init__(self):
        self.count = 0
        self.total = self.total_of_squares = 0.0

    def add(self, x: torch.Tensor) -> None:
        """x (B, C) or (B, C, H, W)."""
        other_dimensions = [0, *range(2, x.dim())]
        self.count += x.numel() // x.shape[1]
        self.total += x.sum(other_dimensions, dtype=torch.float64)
        self.total_of_squares += x.square().sum(other_dimensions, dtype=torch.float64)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def variance(self) -> torch.Tensor:
        return (self.total_of_squares / self.count - self.mean.square()).clamp(min=0)


@contextmanager
def record_norm_inputs(net: Net):
    """Yields {batch norm: NormInputs}, which is filled as the net runs.

    Norms with the same variance in all channels are left out: they have learned nothing.
    """
    recorded = {}

    def record(norm, inputs):
        recorded.setdefault(norm, NormInputs()).add(inputs[0])

    norms = [
        module
        for module in net.modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        and not torch.equal(module.running_var.min(), module.running_var.max())
    ]
    handles = [norm.register_forward_pre_hook(record) for norm in norms]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def measure_norm_mismatch(norm_inputs: dict) -> float | None:
    """How far the inputs of batch norms are from the norms' running means and variances. None
    without norms, or where it is no finite number.

    Of each channel it is the Kullback-Leibler divergence of two normal distributions: one with the
    mean and variance that were read now, one with the running mean and variance of the training.
    Of a norm it is the median of its channels, of the net the geometric mean of its norms (ours).
    """
    divergences = []
    for norm, inputs in norm_inputs.items():
        variance = inputs.variance + norm.eps
        known_variance = norm.running_var.double() + norm.eps
        shift = inputs.mean - norm.running_mean.double()
        ratio = variance / known_variance
        divergence = 0.5 * (ratio + shift.square() / known_variance - 1 - ratio.log())
        # At least a millionth, for 0 has no logarithm.
        divergences.append(max(float(divergence.median()), 1e-6))
    if not divergences:
        return None
    mismatch = math.exp(sum(map(math.log, divergences)) / len(divergences))
    return mismatch if math.isfinite(mismatch) else None


def is_near_guessing(accuracy: float, classes: int) -> bool:
    """ours: whether an accuracy is at most a little better than guessing: by less than a tenth of
    what is missing to 1."""
    guessing = 1 / classes
    return accuracy < guessing + 0.1 * (1 - guessing)


# ---- timing ------------------------------------------------------------------------------------


@torch.no_grad()
def measure_latencies(nets: list, images: Images, batch_size: int) -> list[float]:
    """Of each net the median seconds of a forward pass of so many images, warm, in float32; on a
    GPU convolutions may use TF32, as PyTorch does by default.

    The nets run in turns, on other images each time, so that a busy moment hits them all.
    """
    warm_up, rounds = 10, 20
    times = [[] for _ in nets]
    for net in nets:
        net.eval()
    first_batch = torch.arange(batch_size, device=images.device)
    for n in range(warm_up + rounds):
        x = images.batch((n * batch_size + first_batch) % len(images))
        for net, seconds in zip(nets, times):
            start = read_clock(images.device)
            net(x)
            seconds.append(read_clock(images.device) - start)
    return [sorted(seconds[warm_up:])[rounds // 2] for seconds in times]


def read_clock(device: torch.device) -> float:
    """Seconds, when the work given to the device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_training_speed(net: Net, device: torch.device) -> float:
    """Images per second that `fit` trains `net` at, measured on random images. Spoils `net`, whose
    batch norms read these images."""
    steps = 64 if device.type == "cuda" else 3
    shape = (BATCH_SIZE * steps, net.size, net.size, net.channels)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    statistics = {"mean": (0.5,) * net.channels, "std": (0.25,) * net.channels}
    images = Images(pixels, torch.zeros(len(pixels)), **statistics).to(device)
    net = net.to(device).to(memory_format=torch.channels_last)
    times = []

    def record_times(steps):
        for step in steps:
            times.append(time.perf_counter())
            yield step

    optimizer = make_optimizer(net, 0.0)
    plan = TrainingPlan(1, 0.0)
    for _ in fit(net, images, plan, optimizer=optimizer, seed=0, wrap_steps=record_times):
        times.append(time.perf_counter())
    # The first step is longer than the others.
    return BATCH_SIZE * (steps - 1) / (times[-1] - times[1])


# ---- structures --------------------------------------------------------------------------------
#
# A structure is a tuple with the number of channels that each prunable layer uses for an image. The
# widths of a net are the channels that its layers have. In a plain net both are the same. A gated
# layer has always-on kernels and several groups of kernels; for an image it uses the always-on
# kernels and one group (see sep.py).
#
# In this section `widths` are the baseline's, and `reduction_of(structure)` is the share of the
# baseline's MACs that a structure removes.


def structure_name(structure) -> str:
    """A structure as a name for files and trainings: its widths, or a hash where they are many."""
    name = "-".join(str(width) for width in structure)
    return name if len(name) < 100 else f"{seed_for(name):x}"


def add_at(numbers, index: int, amount: int = 1) -> tuple[int, ...]:
    """The numbers with `amount` added to one of them."""
    changed = list(numbers)
    changed[index] += amount
    return tuple(changed)


def shrink(structure, actions, rate: float) -> tuple[int, ...]:
    """The structure after one step: a layer with action 1 keeps int((1 - rate) * width) channels,
    at least one (paper)."""
    return tuple(
        max(1, int((1 - rate) * width + 1e-9)) if action else width
        for width, action in zip(structure, actions)
    )


def actions_between(parent, child) -> tuple[int, ...]:
    """1 for each layer that is narrower in `child` than in `parent`, 0 for the others."""
    return tuple(int(after < before) for before, after in zip(parent, child))


def shrink_all(structure, rate: float) -> tuple[int, ...]:
    """The structure after one step in every layer."""
    return shrink(structure, [1] * len(structure), rate)


def prune_to_target(parent, child, reduction_of, target: float) -> tuple[int, ...]:
    """The first structure on the way from `parent` to `child` that removes at least `target`.

    Channels go one at a time, each layer at an even pace, so that all reach `child` together. Then
    channels come back wherever the target is reached with them, too. Returns `child` where even
    that does not reach the target.
    """
    # Every channel to remove, as (share of its layer's removals that is done with it, layer).
    # Sorted, this is the order of removal: all layers are at about the same share at any time.
    removals = [
        (step / (before - after), layer)
        for layer, (before, after) in enumerate(zip(parent, child))
        for step in range(1, before - after + 1)
    ]
    order = [layer for _, layer in sorted(removals)]

    def remove_first(count: int) -> tuple[int, ...]:
        removed = Counter(order[:count])
        return tuple(width - removed[layer] for layer, width in enumerate(parent))

    def reduction_after(count: int) -> float:
        return reduction_of(remove_first(count))

    # The binary search assumes that each removal saves MACs. With gates a removal may add some,
    # because a narrower layer can have room for a larger gate. The search may then remove a few
    # channels too many, and `give_channels_back` gives these back.
    removed_count = bisect_left(range(len(order)), target, key=reduction_after)
    structure = remove_first(removed_count)
    if reduction_of(structure) < target:
        return structure
    # The last removal may have overshot the target. So each layer that lost channels may get some
    # back, the layer of the last removal first. (dict.fromkeys keeps each layer once, in order.)
    layers = dict.fromkeys(reversed(order[:removed_count]))
    return give_channels_back(structure, parent, layers, reduction_of, target)


def give_channels_back(
    structure, limits, layers: Iterable[int], reduction_of, target: float
) -> tuple:
    """The structure with channels given back, as long as it removes at least `target`.

    Each of the `layers`, in their order, gets as many as it can, at most its number in `limits`.
    """
    for layer in layers:
        while structure[layer] < limits[layer]:
            wider = add_at(structure, layer)
            if reduction_of(wider) < target:
                break
            structure = wider
    return structure


def prune_further(structure, widths, reduction_of, target: float, rate: float) -> tuple[int, ...]:
    """The structure, made smaller until it reaches the target; unchanged where it does already.

    First it tries to narrow one layer that is pruned already (`narrow_one_layer`). If that is not
    enough, all pruned layers lose channels, step by step. If none of them can, or none is pruned,
    all layers do. Raises UserError where no structure reaches the target.
    """
    check_reachable(widths, reduction_of, target)
    if reduction_of(structure) < target:
        structure = narrow_one_layer(structure, widths, reduction_of, target) or structure
    # This ends: each step makes the structure smaller, and one channel in every layer is enough.
    while reduction_of(structure) < target:
        smaller = shrink(structure, actions_between(widths, structure), rate)
        if smaller == structure:
            smaller = shrink_all(structure, rate)
        structure = prune_to_target(structure, smaller, reduction_of, target)
    return structure


def narrow_one_layer(structure, widths, reduction_of, target: float) -> tuple[int, ...] | None:
    """The structure with one pruned layer narrower, so that it reaches the target: the layer that
    loses the smallest share of its channels, at most half. None where no layer can do that."""
    options = []  # (share lost, surplus over the target, structure), one per layer
    for layer, is_pruned in enumerate(actions_between(widths, structure)):
        if not is_pruned:
            continue
        width = structure[layer]
        for lost in range(1, width // 2 + 1):
            narrower = add_at(structure, layer, -lost)
            surplus = reduction_of(narrower) - target
            if surplus >= 0:
                options.append((lost / width, surplus, narrower))
                break
    if not options:
        return None
    _, _, narrowest_loss = min(options)
    return narrowest_loss


# ours: a layer may get back this share of its channels, and one more channel that rounding took, so
# that a uniform structure comes nearer to its target.
UNIFORM_TOLERANCE = 0.03
# ours: the first structure that removes so much more than the target ends the search for a uniform
# one, for smaller shares only lead further away.
UNIFORM_EXCESS = 0.05
# ours: where few channels are left, one channel is a large share. The largest share that a layer
# keeps is to be at most so many times the smallest.
UNIFORM_MAX_RATIO = 3


def uniform_structure(widths, reduction_of, target: float) -> tuple[int, ...]:
    """The structure that keeps nearly the same share of channels in every layer and whose MACs
    reduction is nearest to `target`.

    It reaches the target, or it is `widths` themselves if these are nearest. Layers may get some
    channels back (UNIFORM_TOLERANCE). A structure whose shares differ much (`has_similar_shares`)
    is taken only if no other was found.
    """
    found = []
    # Layers whose channels cost the most MACs get theirs back first.
    costliest_first = sorted(
        range(len(widths)), key=lambda layer: -reduction_of(add_at(widths, layer, -1))
    )
    for share in (n / 1000 for n in range(1000, 0, -1)):
        structure = tuple(max(1, int(share * width)) for width in widths)
        if reduction_of(structure) < target:
            continue
        limits = [
            min(width, kept + 1 + int(UNIFORM_TOLERANCE * width))
            for kept, width in zip(structure, widths)
        ]
        structure = give_channels_back(structure, limits, costliest_first, reduction_of, target)
        if found and reduction_of(structure) - target > UNIFORM_EXCESS:
            break
        found.append(structure)
    similar = [structure for structure in found if has_similar_shares(structure, widths)]
    return min(
        [tuple(widths), *(similar or found)],
        key=lambda structure: abs(reduction_of(structure) - target),
    )


def has_similar_shares(structure, widths) -> bool:
    """Whether the largest share of channels that a layer keeps is at most UNIFORM_MAX_RATIO times
    the smallest. A layer with one channel left may have a larger share, because its last channel
    has to stay."""
    shares = [width / full_width for width, full_width in zip(structure, widths)]
    reducible = [share for share, width in zip(shares, structure) if width > 1]
    return max(reducible, default=0) <= UNIFORM_MAX_RATIO * min(shares)


def largest_reduction(widths, reduction_of, multiple: int = 1) -> float:
    """What the smallest structure at multiples of `multiple` removes; a layer that is narrower than
    that keeps all its channels."""
    return reduction_of([min(width, multiple) for width in widths])


def check_multiple(widths, multiple: int) -> None:
    """Raise UserError (status 2) where no layer has so many channels."""
    if multiple > max(widths):
        raise UserError(
            f"no layer of this net is {multiple} wide, {max(widths)} at most; "
            "give a smaller --round-to",
            2,
        )


def check_reachable(widths, reduction_of, target: float | None, multiple: int = 1) -> None:
    """Raise UserError (status 2) where no structure at multiples of `multiple` removes `target`.

    A layer may also keep all its channels.
    """
    check_multiple(widths, multiple)
    most = largest_reduction(widths, reduction_of, multiple)
    if target is None or most >= target:
        return
    condition = "with one channel left in every layer"
    advice = "give a smaller --target"
    if multiple > 1:
        condition = f"with widths at multiples of {multiple}"
        advice = "give a smaller --round-to, or ask for a smaller cut"
    raise UserError(
        f"{condition} this net cannot cut {100 * target:.6g}%, {most:.1%} at most; {advice}",
        2,
    )


def round_structure(
    structure, widths, reduction_of, target: float | None, multiple: int
) -> tuple[int, ...]:
    """A structure near `structure`, with all widths at multiples of `multiple`.

    A layer may also keep all its channels. Without a `target` each layer goes to its nearest
    multiple. With a `target` layers are then narrowed until the structure reaches it, and layers
    that are narrower than in `structure` get wider again where the target allows it. There are two
    orders of narrowing. Neither is always better, so both are tried, and the result with the
    smaller `Rounding.distance` is taken. Raises UserError where no structure reaches the target.
    """
    check_reachable(widths, reduction_of, target, multiple)
    choices = [sorted({width, *range(multiple, width + 1, multiple)}) for width in widths]
    rounding = Rounding(structure, choices, cache(reduction_of), target)
    if target is None:
        return rounding.round_each_layer()
    orders = (rounding.distance_per_reduction, rounding.widest_first)
    return min(map(rounding.reach_target, orders), key=rounding.distance)


@dataclass(frozen=True)
class Rounding:
    """Structures whose widths are of given `choices`, and how near they are to the one wanted."""

    wanted: tuple[int, ...]
    choices: list[list[int]]  # per layer its widths, ascending
    reduction_of: Callable
    target: float | None

    def round_each_layer(self) -> tuple[int, ...]:
        """Each layer at its nearest choice; of two at the wider, which can still be narrowed."""
        return tuple(
            min(choice, key=lambda width: (abs(width - wanted_width), -width))
            for choice, wanted_width in zip(self.choices, self.wanted)
        )

    def distance(self, structure) -> float:
        """How far a structure is from the one wanted, by ratios: half a layer's width counts as
        much as twice its width."""
        return sum(math.log(width / wanted) ** 2 for width, wanted in zip(structure, self.wanted))

    def reach_target(self, order: Callable) -> tuple[int, ...]:
        """`round_each_layer`, narrowed until it reaches the target: at each step the layer with
        the lowest order(structure, layer). The last steps may have removed more than needed, so
        layers that are narrower than wanted grow again while the target is still reached."""
        layers = range(len(self.wanted))
        structure = self.round_each_layer()
        while self.reduction_of(structure) < self.target:
            reducible = [layer for layer in layers if structure[layer] > self.choices[layer][0]]
            first = min(reducible, key=partial(order, structure))
            structure = self.move_to_next_choice(structure, first, -1)
        growing = self.list_growable_layers(structure)
        while growing:
            narrowest = min(growing, key=partial(self.relative_width, structure))
            structure = self.move_to_next_choice(structure, narrowest, 1)
            growing = self.list_growable_layers(structure)
        return structure

    def move_to_next_choice(self, structure, layer: int, direction: int) -> tuple[int, ...]:
        """The structure with one layer at its next wider (1) or narrower (-1) choice."""
        choice = self.choices[layer]
        width = choice[choice.index(structure[layer]) + direction]
        return add_at(structure, layer, width - structure[layer])

    def distance_per_reduction(self, structure, layer: int) -> float:
        """The distance that one step of this layer adds, per reduction of the MACs that it gains.
        What goes beyond the target is no gain. Negative where the step leads nearer."""
        narrower = self.move_to_next_choice(structure, layer, -1)
        removed = min(self.reduction_of(narrower), self.target) - self.reduction_of(structure)
        # A narrower layer of `sep` may have room for a larger gate, and so cost more.
        if removed <= 0:
            return math.inf
        return (self.distance(narrower) - self.distance(structure)) / removed

    def relative_width(self, structure, layer: int) -> float:
        """The layer's width over the one wanted."""
        return structure[layer] / self.wanted[layer]

    def widest_first(self, structure, layer: int) -> float:
        """An order for `reach_target`: the relatively widest layer comes first."""
        return -self.relative_width(structure, layer)

    def list_growable_layers(self, structure) -> list[int]:
        """The layers that are narrower than wanted, and whose next choice still reaches the
        target."""
        return [
            layer
            for layer, width in enumerate(structure)
            if width < self.wanted[layer]
            and self.reduction_of(self.move_to_next_choice(structure, layer, 1)) >= self.target
        ]


# ---- the LSTM ----------------------------------------------------------------------------------


class Policy(nn.Module):
    """An LSTM that reads a net layer by layer: (L, inputs) or (L, B, inputs) -> (L, outputs) or
    (L, B, outputs)."""

    def __init__(self, inputs: int = 4, outputs: int = 2, dropout: float = LSTM_DROPOUT):
        super().__init__()
        self.lstm = nn.LSTM(inputs, LSTM_HIDDEN, LSTM_LAYERS, dropout=dropout)
        self.head = nn.Linear(LSTM_HIDDEN, outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(features)[0])


# The script's codes of the types of layers.
CONVOLUTION_CODE, LINEAR_CODE, POOLING_CODE = 0, 1, 2
LAYER_FEATURES = 4  # of each layer, see `layer_features`


def layer_features(net: Net, structure) -> torch.Tensor:
    """What the LSTM reads, (L, 4): type, size, next layer's type, next layer's size (script).

    The size of a layer is its width divided by the width of the widest prunable layer (ours: the
    script's raw widths saturate an LSTM). The next layer's size is above 1 if that layer is a
    block's output and wider than all prunable layers. The size of a pooling is the side of its
    window in pixels, divided by the same width.
    """
    widest = max(net.widths)
    width_of = {p.layer_name: width for p, width in zip(net.prunable, structure)}

    def type_code(name):
        is_linear = isinstance(net.get_submodule(name), nn.Linear)
        return LINEAR_CODE if is_linear else CONVOLUTION_CODE

    rows = []
    for prunable, width in zip(net.prunable, structure):
        next_layer = prunable.next_layer_name
        if prunable.pooling:
            next_type, next_size = POOLING_CODE, models.POOLINGS[prunable.pooling].kernel
        else:
            next_type = type_code(next_layer)
            outputs = net.get_submodule(next_layer).weight.shape[0]
            next_size = width_of.get(next_layer, outputs)
        rows.append((type_code(prunable.layer_name), width / widest, next_type, next_size / widest))
    return torch.tensor(rows, dtype=torch.float)


def sample_actions(policy: Policy, features: torch.Tensor, seed: int, *, is_random=False):
    """(logits (L, 2) of the policy, actions (L,) sampled from them): 0 keeps, 1 prunes.

    `is_random`: sampled from even odds instead.
    """
    # The global generator, because the LSTM's dropout draws from it, too.
    torch.manual_seed(seed)
    logits = policy(features)
    if is_random:
        probabilities = torch.full_like(logits, 0.5)
    else:
        probabilities = logits.detach().softmax(1)
    return logits, torch.multinomial(probabilities, 1)[:, 0]


def take_reinforce_step(optimizer, logits, actions, advantage: float) -> None:
    """One REINFORCE step of the policy whose weights `optimizer` has.

    logits (L, 2) of that policy, with their graph; actions (L,) sampled from them; the advantage is
    the child's reward less its parent's (paper).
    """
    log_probs = F.log_softmax(logits, 1).gather(1, actions[:, None])
    optimizer.zero_grad()
    (-ADVANTAGE_SCALE * advantage * log_probs.mean()).backward()
    optimizer.step()


# ---- searching: what a search tries and knows --------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The numbers of a run. They are kept in its folder: other numbers are another run."""

    baseline: TrainingPlan
    recovery: TrainingPlan  # of each candidate
    final: TrainingPlan  # of the net that a row ends with
    pruning_rate: float  # share of a layer's channels that one step removes
    target: float | None  # the MACs reduction that the user or the paper asks for
    # ReinforceSearch: how many parents get a child in an LSTM epoch. RegressionSearch: how many
    # walks an LSTM epoch has; those to known structures count, too.
    candidates_per_lstm_epoch: int
    # ReinforceSearch: it ends after so many LSTM epochs in a row without a larger reward.
    # RegressionSearch: it ends after `idle_walks_per_patience` times as many walks in a row that
    # led to known structures.
    patience: int
    # A RegressionSearch ends after so many candidates. None: every search is a ReinforceSearch.
    max_candidates: int | None
    seed: int

    def searches_by_regression(self, target: float | None) -> bool:
        """Whether a search for `target` is a RegressionSearch; else the papers' ReinforceSearch.

        A walk needs a target above 0 to go to. A pruned row without one is searched by REINFORCE.
        Later rows then take its cut as their target, so they may be searched by regression.
        """
        return self.max_candidates is not None and target is not None and target > 0


@dataclass
class ScoredStructure:
    """A structure and how good a net of it is: the baseline, or a candidate."""

    structure: tuple[int, ...]
    validation_accuracy: float
    macs: int
    macs_reduction: float
    reward: float
    # The loss on the validation images after a trial, by the loss function of the final training
    # (see `run_trials`). None: the structure had no trial, or its trial diverged.
    trial_loss: float | None = field(default=None, kw_only=True)

    def reaches(self, target: float | None) -> bool:
        return target is None or self.macs_reduction >= target


@dataclass
class Candidate(ScoredStructure):
    """A structure that was tried. `parent` and `actions` are what first led to it."""

    parent: tuple[int, ...]
    actions: tuple[int, ...]
    lstm_epoch: int
    seconds: float  # of its recovery and its trial


@dataclass(frozen=True, eq=False)
class Proposal:
    """A structure that a search wants tried: `parent` loses channels where `actions` is 1."""

    parent: tuple[int, ...]
    actions: tuple[int, ...]
    structure: tuple[int, ...]
    logits: torch.Tensor | None = None  # (L, 2) of the LSTM, for REINFORCE


def compute_reward(accuracy: float, macs_reduction: float, target: float | None) -> float:
    """accuracy - 0.16 * MACs / MACs of the baseline (script).

    ours: with a target, removing more than that earns nothing more.
    """
    remaining_macs = 1 - macs_reduction
    if target is not None:
        remaining_macs = max(remaining_macs, 1 - target)
    return accuracy - COMPLEXITY_WEIGHT * remaining_macs


def rank_by_reward(scored: Iterable[ScoredStructure], count: int) -> list[ScoredStructure]:
    """The `count` structures of the largest rewards."""
    return sorted(scored, key=lambda item: -item.reward)[:count]


def choose_best(scored: Iterable[ScoredStructure], target: float | None) -> ScoredStructure:
    """The structure that a search ends with.

    Where there were trials, it is that of the lowest loss in them. Else it is that of the largest
    reward among those that reach the target; where none does, the one that removes the most.
    """
    scored = list(scored)
    finalists = [item for item in scored if item.trial_loss is not None]
    if finalists:
        return min(finalists, key=lambda item: item.trial_loss)
    reached = [item for item in scored if item.reaches(target)]
    if reached:
        return max(reached, key=lambda item: item.reward)
    return max(scored, key=lambda item: item.macs_reduction)


# ---- searching: what both searches share -------------------------------------------------------


class Search:
    """What both searches share. `propose()` returns what to try next, None at the end; `record()`
    takes the proposal and what came of it.

    `baseline_score` is the baseline's, `reduction_of` gives the MACs reduction of a structure.
    With `is_random` chance decides instead of the LSTM, and nothing is learned.
    """

    rule = ""  # the kind of search, as results.json names it
    policy_lr = POLICY_LR
    layer_score_label = ""  # what the numbers of `score_layers` are, for the report
    # The attributes that `state_dict` saves, besides policy, optimizer and candidates.
    state_keys = ("lstm_epoch", "layer_scores")

    def __init__(
        self,
        net: Net,
        baseline_score: ScoredStructure,
        settings: Settings,
        target: float | None,
        reduction_of: Callable,
        *,
        method: str,
        is_random: bool = False,
    ):
        self.net = net
        self.baseline_score = baseline_score
        self.settings = settings
        self.target = target
        self.reduction_of = reduction_of
        self.method = method
        self.is_random = is_random
        # The policy's first weights are drawn by the global generator.
        torch.manual_seed(seed_for(settings.seed, method, "policy"))
        self.policy = self.make_policy()
        self.optimizer = torch.optim.Adam(self.policy.parameters(), self.policy_lr)
        self.candidates: dict[tuple, Candidate] = {}
        self.lstm_epoch = 1
        # After each LSTM epoch what it thinks of each layer: for the report alone.
        self.layer_scores: list[list[float]] = []

    def make_policy(self) -> Policy:
        return Policy()

    def propose(self) -> Proposal | None:
        raise NotImplementedError

    def record(self, proposal: Proposal, score: ScoredStructure) -> None:
        raise NotImplementedError

    def score_layers(self) -> list[float]:
        """What the LSTM thinks of each layer of the baseline, (L,); see `layer_score_label`."""
        raise NotImplementedError

    def structures_in_use(self) -> set:
        """The structures whose weights are still needed: parents of later proposals, finalists, the
        best."""
        raise NotImplementedError

    def list_finalists(self) -> list[Candidate]:
        """The candidates among which trials decide at the end; none where the reward decides."""
        return []

    def describe_end(self) -> str:
        """What ends the search, and how near that is, for the user."""
        raise NotImplementedError

    @property
    def known_scores(self) -> dict[tuple, ScoredStructure]:
        """The baseline and all candidates, by structure."""
        return {self.baseline_score.structure: self.baseline_score} | self.candidates

    @property
    def best(self) -> ScoredStructure:
        """What the search would end with now; see `choose_best`."""
        return choose_best(self.known_scores.values(), self.target)

    def add_candidate(self, score: Candidate | ScoredStructure) -> None:
        """Keep a scored candidate. The baseline may be proposed, too; it is not a candidate."""
        if score.structure != self.baseline_score.structure:
            self.candidates[score.structure] = score

    def finish_lstm_epoch(self) -> None:
        self.lstm_epoch += 1
        if not self.is_random:
            self.layer_scores.append([round(score, 5) for score in self.score_layers()])

    def state_dict(self) -> dict:
        """All that a later process goes on with."""
        state = {key: getattr(self, key) for key in self.state_keys}
        return state | {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "candidates": [asdict(candidate) for candidate in self.candidates.values()],
        }

    def load_state_dict(self, state: dict) -> None:
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        candidates = [Candidate(**values) for values in state["candidates"]]
        self.candidates = {candidate.structure: candidate for candidate in candidates}
        for key in self.state_keys:
            setattr(self, key, state[key])


# ---- searching: by REINFORCE -------------------------------------------------------------------


class ReinforceSearch(Search):
    """The papers' search. An LSTM epoch samples a child of each of the nets with the largest
    rewards. After each child the LSTM learns from the child's reward less its parent's. The search
    ends after some epochs without a larger reward."""

    rule = "reinforce"
    layer_score_label = "probability of pruning"
    state_keys = (*Search.state_keys, "waiting_parents", "best_reward", "idle_epochs")

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.waiting_parents = []  # whose children this LSTM epoch still has to try
        self.best_reward = -math.inf  # before this LSTM epoch; `start_lstm_epoch` sets it
        self.idle_epochs = 0

    def propose(self) -> Proposal | None:
        if not self.waiting_parents:
            if self.idle_epochs >= self.settings.patience:
                return None
            self.start_lstm_epoch()
        parent = self.waiting_parents[0]
        logits, actions = sample_actions(
            self.policy,
            layer_features(self.net, parent),
            seed_for(self.settings.seed, self.method, "decisions", self.lstm_epoch, parent),
            is_random=self.is_random,
        )
        actions = tuple(actions.tolist())
        structure = shrink(parent, actions, self.settings.pruning_rate)
        return Proposal(parent, actions, structure, logits)

    def start_lstm_epoch(self) -> None:
        parents = self.rank_parents()
        self.waiting_parents = [parent.structure for parent in parents]
        self.best_reward = parents[0].reward

    def record(self, proposal: Proposal, score: ScoredStructure) -> None:
        self.add_candidate(score)
        if not self.is_random:
            actions = torch.tensor(proposal.actions)
            advantage = score.reward - self.known_scores[proposal.parent].reward
            take_reinforce_step(self.optimizer, proposal.logits, actions, advantage)
        self.waiting_parents.remove(proposal.parent)
        if not self.waiting_parents:
            is_better = max(item.reward for item in self.known_scores.values()) > self.best_reward
            self.idle_epochs = 0 if is_better else self.idle_epochs + 1
            self.finish_lstm_epoch()

    @torch.no_grad()
    def score_layers(self) -> list[float]:
        self.policy.eval()  # without dropout, and so without a random number
        logits = self.policy(layer_features(self.net, self.net.widths))
        self.policy.train()
        return logits.softmax(1)[:, 1].tolist()

    def structures_in_use(self) -> set:
        next_parents = {parent.structure for parent in self.rank_parents()}
        return {*next_parents, *self.waiting_parents, self.best.structure}

    def rank_parents(self) -> list[ScoredStructure]:
        """The nets of the largest rewards, whose children an LSTM epoch tries."""
        return rank_by_reward(self.known_scores.values(), self.settings.candidates_per_lstm_epoch)

    def describe_end(self) -> str:
        return f"{self.idle_epochs} of {self.settings.patience} epochs without a larger reward"


# ---- searching: by regression ------------------------------------------------------------------


class RegressionSearch(Search):
    """ours, for `fast`: the LSTM learns from every candidate so far. The first candidate has the
    same share of every layer. Every other one is the end of a walk from the baseline to the target.

    A *step* of a layer removes `pruning_rate` of its channels. For each layer of a structure the
    LSTM predicts how much accuracy such a step costs, compared with the other layers: only ratios
    count. An LSTM epoch is a few walks, at least one of them to a new structure. After each LSTM
    epoch the LSTM is trained again on all candidates. For each candidate, the predicted cost of a
    step times the number of steps, summed over the layers, shall equal the accuracy that the
    candidate lost. This assumes that all steps of a layer on the way to a candidate cost the same.

    A walk consists of *moves*. A move is one step in each of a few layers. Layers that save many
    MACs for little predicted cost are likely to take part, and this becomes more likely as the
    search goes on.

    A recovery is too short to tell which of the best candidates ends as the best. So the best few
    and the first one, the *finalists*, have a trial when the search is done.
    """

    rule = "regression"
    layer_score_label = "predicted cost of a step (relative)"
    state_keys = (*Search.state_keys, "walks", "idle_walks")

    # ours: these numbers were chosen on made-up problems (RESULTS.md, section 5).
    policy_lr = 0.003  # of Adam
    adam_steps = 60  # after each LSTM epoch
    # The temperatures at the start and at the end of a search. If a layer saves twice the MACs for
    # the same predicted cost, its odds to be pruned in a move are 2^(1 / temperature) times those.
    odds_temperatures = (0.5, 0.1)
    share_of_layers = 0.25  # about the share of the layers that a move prunes
    idle_walks_per_patience = 10  # a walk is cheap where its structure is known already
    finalists_by_reward = 4  # the first candidate is a finalist, too

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.walks = 0
        self.idle_walks = 0  # that led to structures known before, in a row

    def make_policy(self) -> Policy:
        # It also reads which layer it is at, because many layers have the same sizes.
        return Policy(LAYER_FEATURES + len(self.net.widths), 1, dropout=0.0)

    def read_layers(self, structure) -> torch.Tensor:
        """What the LSTM reads, (L, 4 + L)."""
        which_layer = torch.eye(len(structure))
        return torch.cat([layer_features(self.net, structure), which_layer], 1)

    def count_steps(self, structure) -> torch.Tensor:
        """(L,): how many steps each layer has taken from the baseline to the structure; a fraction
        where rounding took more or less than the pruning rate."""
        ratio = torch.tensor(self.net.widths) / torch.tensor(structure)
        return ratio.log() / -math.log1p(-self.settings.pruning_rate)

    def predict_costs(self, features: torch.Tensor) -> torch.Tensor:
        """What a step of each layer costs: (L, 4 + L) -> (L,), or (L, B, 4 + L) -> (L, B)."""
        return F.softplus(self.policy(features)[..., 0])

    def propose(self) -> Proposal | None:
        if len(self.candidates) >= self.settings.max_candidates:
            return None
        if self.idle_walks >= self.max_idle_walks:
            return None
        if self.walks == 0:
            structure = uniform_structure(self.net.widths, self.reduction_of, self.target)
        else:
            structure = self.walk_to_target()
        parent = self.baseline_score.structure
        return Proposal(parent, actions_between(parent, structure), structure)

    @property
    def max_idle_walks(self) -> int:
        """After so many walks in a row that led to known structures, the search ends."""
        return self.idle_walks_per_patience * self.settings.patience

    def walk_to_target(self) -> tuple[int, ...]:
        """The structure at the end of the next walk."""
        seed = seed_for(self.settings.seed, self.method, "decisions", self.walks)
        generator = torch.Generator().manual_seed(seed)
        structure = self.baseline_score.structure
        while self.reduction_of(structure) < self.target:
            smaller = self.take_move(structure, generator)
            if smaller is None:
                break
            structure = smaller
        # The last channel may have overshot the target. So channels are given back while the target
        # is still reached. The last layers come first: in most nets their channels have the fewest
        # MACs.
        last_layers_first = range(len(structure) - 1, -1, -1)
        return give_channels_back(
            structure, self.net.widths, last_layers_first, self.reduction_of, self.target
        )

    def take_move(self, structure, generator) -> tuple[int, ...] | None:
        """A smaller structure on the walk to the target; None where no step removes MACs.

        The random numbers may choose no layer: then the structure stays, and the next move draws
        again.
        """
        rate = self.settings.pruning_rate
        smaller = shrink_all(structure, rate)
        one_layer_smaller = [
            add_at(structure, layer, after - before)
            for layer, (before, after) in enumerate(zip(structure, smaller))
        ]
        reductions = torch.tensor([self.reduction_of(widths) for widths in one_layer_smaller])
        macs_saved = reductions - self.reduction_of(structure)
        if not (macs_saved > 0).any():
            return None
        probabilities = self.move_probabilities(structure, smaller, macs_saved)
        actions = torch.bernoulli(probabilities, generator=generator).tolist()
        child = shrink(structure, actions, rate)
        return prune_to_target(structure, child, self.reduction_of, self.target)

    @torch.no_grad()
    def move_probabilities(self, structure, smaller, macs_saved: torch.Tensor) -> torch.Tensor:
        """(L,): the probability that a move prunes each layer, from its width in `structure` to
        that in `smaller`. `macs_saved` (L,) is what that would remove, as a share of the baseline's
        MACs."""
        chance_probabilities = torch.where(macs_saved > 0, self.share_of_layers, 0.0)
        if self.is_random:
            return chance_probabilities
        # The smallest values keep logarithms finite.
        cost_per_step = self.predict_costs(self.read_layers(structure)).clamp_min(1e-3)
        steps = (self.count_steps(smaller) - self.count_steps(structure)).clamp_min(1e-3)
        log_saved_per_cost = macs_saved.clamp_min(1e-9).log() - (cost_per_step * steps).log()
        # A layer at the threshold is pruned with probability 1/2; a `share_of_layers` lies above.
        threshold = log_saved_per_cost[macs_saved > 0].quantile(1 - self.share_of_layers)
        start_temperature, end_temperature = self.odds_temperatures
        share_done = (len(self.candidates) + 1) / self.settings.max_candidates
        temperature = start_temperature * (end_temperature / start_temperature) ** share_done
        lstm_probabilities = torch.sigmoid((log_saved_per_cost - threshold) / temperature)
        # The longer walks have found nothing new, the more chance decides in place of the LSTM.
        share_of_chance = self.idle_walks / self.max_idle_walks
        return torch.lerp(
            torch.where(macs_saved > 0, lstm_probabilities, 0.0),
            chance_probabilities,
            share_of_chance,
        )

    def record(self, proposal: Proposal, score: ScoredStructure) -> None:
        is_known = score.structure in self.known_scores
        self.walks += 1
        self.idle_walks = self.idle_walks + 1 if is_known else 0
        self.add_candidate(score)
        walks_per_epoch = self.settings.candidates_per_lstm_epoch
        has_all_walks = self.walks % walks_per_epoch == 0
        # Fewer idle walks than an epoch has walks: one of the last walks led to a new structure.
        has_found_new = self.idle_walks < walks_per_epoch
        if has_all_walks and has_found_new:
            if not self.is_random:
                self.fit_policy()
            self.finish_lstm_epoch()

    def fit_policy(self) -> None:
        """Train the LSTM on all candidates: predicted costs of all steps against accuracy lost."""
        candidates = self.candidates.values()
        features = torch.stack([self.read_layers(c.structure) for c in candidates], 1)
        steps = torch.stack([self.count_steps(c.structure) for c in candidates], 1)  # (L, B)
        accuracies = torch.tensor([c.validation_accuracy for c in candidates])
        accuracy_lost = self.lost_accuracies(accuracies)
        if not accuracy_lost.any():
            return  # all are as good as the baseline: nothing tells the layers apart
        # An untrained LSTM predicts about softplus(0) = log 2 for each step, so for a candidate
        # about log 2 times its steps. The lost accuracies are scaled to the mean of these costs.
        mean_accuracy_lost = accuracy_lost.mean().clamp_min(1e-6)
        accuracy_lost = accuracy_lost / mean_accuracy_lost * steps.sum(0).mean() * math.log(2)
        variance = accuracy_lost.var(correction=0).clamp_min(1e-3)
        for _ in range(self.adam_steps):
            predicted = (self.predict_costs(features) * steps).sum(0)
            loss = (predicted - accuracy_lost).square().mean() / variance
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def lost_accuracies(self, accuracies: torch.Tensor) -> torch.Tensor:
        """How much accuracy each candidate lost, (B,), from validation accuracies (B,).

        This is how far the candidate is below the best one, plus what the best one lost against the
        baseline. The second term is at least the standard deviation of the candidates' accuracies:
        even if the best one is as good as the baseline, pruning has a cost.
        """
        below_best = accuracies.max() - accuracies
        lost_by_best = self.baseline_score.validation_accuracy - accuracies.max()
        return below_best + torch.maximum(lost_by_best, below_best.std(correction=0))

    @torch.no_grad()
    def score_layers(self) -> list[float]:
        return self.predict_costs(self.read_layers(self.net.widths)).tolist()

    def structures_in_use(self) -> set:
        return {self.best.structure, *(finalist.structure for finalist in self.list_finalists())}

    def list_finalists(self) -> list[Candidate]:
        candidates = self.candidates.values()
        reached = [candidate for candidate in candidates if candidate.reaches(self.target)]
        best = rank_by_reward(reached, self.finalists_by_reward)
        first = [candidate for candidate in reached[:1] if candidate not in best]
        return best + first

    def describe_end(self) -> str:
        return (
            f"{len(self.candidates)} of at most {self.settings.max_candidates} candidates, "
            f"{self.idle_walks} of {self.max_idle_walks} walks in a row without a new structure"
        )


# ---- the run: its methods ----------------------------------------------------------------------
#
# A run calls, each from the one above it. In this file they stand the other way round: what is
# called comes before its caller.
#
#   Run.make_baseline()         the teacher, trained or given
#   Run.make_row(method, goal)  a row of the table: its structure, then the final training
#   SepRow                      what is special about the row of `sep`
#   run_search()                proposes structures until the search ends, and scores each
#   Trainer.make_candidate()    prunes a parent to a structure, and trains it a little
#   Trainer.train()             any training, going on where it was stopped
#
# RunFolder keeps what each of them has done, RowCheckpoints the trained net of each row. The facts
# of a net are what its checkpoint says beside its weights.


# The methods, in the order in which their rows are made: `static` needs `sep`, and `uniform` takes
# the cut of the first row.
METHODS = ("lstm", "sep", "static", "random", "uniform")


# The methods whose structures leave room for the MACs of gates; `static` is made of `sep`'s net.
GATED_METHODS = ("sep", "static")


def count_macs_by(method: str, net: Net, structure) -> int:
    """The MACs of `net` pruned to a structure by a method. For `sep` and `static` a gate counts in
    every layer that has room; the row may get fewer gates."""
    count_macs = sep.count_macs if method in GATED_METHODS else models.count_macs
    return count_macs(net, structure)


def make_reduction_of(method: str, net: Net) -> Callable:
    """A function of a structure: the share of `net`'s MACs that pruning to it by a method
    removes."""
    macs_before = models.count_macs(net)

    def reduction_of(structure) -> float:
        return 1 - count_macs_by(method, net, structure) / macs_before

    return reduction_of


@dataclass(frozen=True)
class Goal:
    """The MACs reduction that a row aims at. None: there is no target, and the reward decides.

    `is_required`: the user or the paper asks for it, and a net that cannot reach it is refused.
    Else it is the cut of another row, so that rows can be compared. Then a method that cannot reach
    it goes as far as it can (`limit_goal`).
    """

    target: float | None
    is_required: bool = False


# ---- the run: what it reports ------------------------------------------------------------------


class Reporter:
    """What a run tells while it works; the command line shows it. This one is silent."""

    def say(self, text: str) -> None:
        """A line for the user."""

    def start_training(self, title: str, epochs: int, first_epoch: int) -> None:
        """A training begins, or goes on at `first_epoch`."""

    def wrap_steps(self, steps):
        """The steps of an epoch, shown as they are taken."""
        return steps

    def finish_epoch(self, title, epoch, epochs, loss, accuracy, seconds_per_epoch) -> None:
        """The epoch of that number, from 0 on, is done; `accuracy` is None where it is not
        measured. `seconds_per_epoch`: the mean so far."""


# ---- the run: its folder -----------------------------------------------------------------------

# The rows of results.json; each has a checkpoint ROW.pt.
ROWS = ("baseline", *METHODS)
# The other files of a run. results.json is removed last: without it an interrupted removal could
# not tell whose files are left.
RUN_FILES = ("report.svg", "sep-usage.json", "results.json")
# What must be equal where a run goes on (see `identity_of`).
IDENTITY = (
    "experiment",
    "schedule",
    "seed",
    "data",
    "train_images",
    "test_images",
    "images",
    "settings",
    "source",
    "normalisation",
    "round_to",
)


# What differs as a consequence where a run has other images, or reads them with another net.
OF_IMAGES = ("data", "images", "train_images", "test_images", "normalisation")


def kind_of_data(data: str) -> str:
    """The name of a data set, or OWN_IMAGES for a user's own images in any folder.

    The folder of a user's own images may have been moved, so it does not count. `fingerprint` tells
    whether the images are the same.
    """
    return OWN_IMAGES if str(data).startswith(OWN_IMAGES) else data


def identity_of(run_description: dict) -> dict:
    """What of the description of a run must be equal where it goes on."""
    identity = {key: run_description[key] for key in IDENTITY}
    return identity | {"data": kind_of_data(run_description["data"])}


def other_run_error(folder: Path, different: list[str]) -> UserError:
    """For a folder that holds a run with another identity; `different` are keys of IDENTITY."""
    words = {
        "source": "another checkpoint (source)",
        "images": "other images, or the same at another size",
    }
    names = [words.get(key, f"other {key}") for key in different]
    return UserError(
        f"{folder} holds a run with {' and '.join(names)}; give another --out, or --fresh to "
        "remove that run",
        2,
    )


def check_source(folder: Path, source: str) -> None:
    """Raise UserError (status 2) where a run folder holds a run with another checkpoint."""
    results = read_results(folder, missing_ok=True)
    if results is not None and results["source"] != source:
        raise other_run_error(folder, ["source"])


class RunFolder:
    """The files of a run: locks its folder, keeps results.json, refuses the folder of another run.

    baseline.pt, lstm.pt, ...   a checkpoint per row
    results.json                the rows, every candidate of every search, learning curves
    sep-usage.json              for the pictures: which kernels `sep` uses for which class
    ROW-pool/                   what an unfinished row has: progress.pt, the training under way;
                                search.pt, the state of the search; the weights of candidates;
                                what was trained in trials
    lock                        held by the process that works here
    """

    def __init__(self, path: Path, reporter: Reporter):
        self.path = Path(path)
        self.say = reporter.say
        self.results: dict = {}
        self.start_time = time.time()
        self.seconds_before = 0.0

    def checkpoint_path(self, row: str) -> Path:
        return self.path / f"{row}.pt"

    def pool_path(self, row: str) -> Path:
        return self.path / f"{row}-pool"

    def progress_path(self, title: str) -> Path:
        """The file that keeps the progress of the training of that title.

        A title begins with the name of its row, so each row has its own file: a row that is made
        before an unfinished one does not overwrite the progress of the unfinished one.
        """
        row = title.split(":")[0]
        return self.pool_path(row) / "progress.pt"

    def claim(self, *, is_fresh: bool) -> None:
        """Make the folder and keep other processes out of it. Raises UserError.

        With `is_fresh` all that a run left in it is removed, and nothing else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = (self.path / "lock").open("w")
            self.take_lock()
            if is_fresh:
                self.remove_run()
        except BlockingIOError as error:
            raise UserError(
                f"{self.path} is in use by another process; wait for it, or give another --out, "
                "and another --output where both write one"
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; give another --out"
            ) from error

    def take_lock(self) -> None:
        """Raises BlockingIOError where another process has it."""
        if not fcntl:
            return
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks.
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            self.say(
                f"the file system of {self.path} has no locks: let no other process work there"
            )

    def remove_run(self) -> None:
        rows = [method for method in METHODS if self.checkpoint_path(method).exists()]
        if rows:
            self.say(f"{self.path} starts over, without its rows {', '.join(rows)}")
        for row in ROWS:
            self.remove_pool(row)
        checkpoint_names = [self.checkpoint_path(row).name for row in ROWS]
        for name in (*checkpoint_names, *RUN_FILES):
            for path in (self.path / f"{name}.part", self.path / name):
                path.unlink(missing_ok=True)

    def remove_pool(self, row: str) -> None:
        pool = self.pool_path(row)
        for path in pool.glob("*.pt*"):  # also what a kill left half written
            path.unlink()
        if pool.is_dir() and not any(pool.iterdir()):
            pool.rmdir()

    def open_results(self, description: dict) -> None:
        """Go on with results.json, or begin it with the run's `description`.

        Raises UserError where it is another run's, or not what a run writes.
        """
        # As JSON reads it back: lists for tuples.
        description = json.loads(json.dumps(description))
        results = read_results(self.path, missing_ok=True)
        if results is None:
            self.remove_unfinished_work()
            results = description | {"rows": [], "search": {}, "curves": {}, "rounded": {}}
        else:
            self.check_identity(results, description)
            results["data"] = description["data"]  # where the user's own images are now
        self.results = results
        self.seconds_before = results["seconds"]
        self.save_results()

    def remove_unfinished_work(self) -> None:
        """Remove the pools of a folder that has lost its results.json.

        The checkpoint of a row says which run made it, so it stays. A pool does not say that, so it
        may belong to another baseline.
        """
        kept = [row for row in ROWS if self.checkpoint_path(row).exists()]
        unfinished = [row for row in ROWS if self.pool_path(row).exists()]
        notes = []
        if kept:
            notes.append("rows come from the checkpoints, what the searches tried is gone")
        if unfinished:
            notes.append("what was unfinished begins anew")
        if notes:
            self.say(f"{self.path} has lost its results.json: {'; '.join(notes)}")
        for row in unfinished:
            self.remove_pool(row)

    def check_identity(self, results: dict, description: dict) -> None:
        """Raise UserError (status 2) where `results` are of a run with another description."""
        expected = identity_of(description)
        found = identity_of(results)
        different = [key for key in IDENTITY if found[key] != expected[key]]
        # The first of these that differs is the cause of those after it, so it is named alone.
        for cause in ("source", "data", "images"):
            if cause in different:
                different = [key for key in different if key not in OF_IMAGES or key == cause]
                break
        if "source" in different:
            different = ["source"]
        if different:
            raise other_run_error(self.path, different)

    def save_results(self) -> None:
        seconds = self.seconds_before + time.time() - self.start_time
        self.results["seconds"] = round(seconds, 1)
        models.write_text(self.path / "results.json", json.dumps(self.results, indent=1) + "\n")

    def save_usage(self, usage: dict) -> None:
        models.write_text(self.path / "sep-usage.json", json.dumps(usage) + "\n")

    def find_row(self, name: str) -> dict | None:
        """The finished row of that name."""
        for row in self.results["rows"]:
            if row["method"] == name:
                return row
        return None

    def set_search_results(
        self, method: str, rule: str, target: float | None, candidates, **more
    ) -> None:
        """Put into the results what a search tried; `rule` says how it searched."""
        self.results["search"][method] = {
            "rule": rule,
            "target": target,
            "candidates": [asdict(candidate) for candidate in candidates],
            **more,
        }

    def searched_candidates(self, method: str) -> list[Candidate]:
        """What `set_search_results` kept of a method's candidates."""
        log = self.results["search"].get(method, {"candidates": []})
        return [read_candidate(values) for values in log["candidates"]]

    def search_seconds(self, method: str) -> float:
        """How long the recoveries and trials of a method's candidates took."""
        return sum(candidate.seconds for candidate in self.searched_candidates(method))


def read_candidate(values: dict) -> Candidate:
    """A candidate of results.json, whose tuples JSON made lists."""
    candidate = Candidate(**values)
    candidate.structure = tuple(candidate.structure)
    candidate.parent = tuple(candidate.parent)
    candidate.actions = tuple(candidate.actions)
    return candidate


RESULTS_HINT = (
    "; --fresh starts the run over, or move that file away: finished rows come back from their "
    "checkpoints"
)


def read_results(
    folder: Path, *, missing_ok: bool = False, hint: str = RESULTS_HINT
) -> dict | None:
    """The results.json of a run folder. Raises UserError where it is not what a run writes."""
    path = Path(folder) / "results.json"
    # os.path: Path.exists raises where a folder is not to be read.
    if missing_ok and not os.path.exists(path):
        return None
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError:  # no JSON, or no text
        results = None
    if not follows_results_schema(results):
        raise UserError(
            f"{path} is damaged, or was edited, or is of another version: "
            f"it is not what a run writes{hint}"
        )
    return results


def read_usage(folder: Path, say: Callable) -> dict | None:
    """What `measure_usage_by_class` found for a run's `sep`. None where there is none, or a damaged
    one, which `say` tells."""
    path = Path(folder) / "sep-usage.json"
    if not path.exists():
        return None
    try:
        usage = json.loads(path.read_text())
        if is_usage_by_class(usage):
            return usage
    except (OSError, ValueError, AttributeError, KeyError, TypeError, OverflowError):
        pass
    say(
        f"{path} is damaged; the pictures of what the gates choose are left out, and only a run "
        "made anew draws them"
    )
    return None


def is_usage_by_class(usage: dict) -> bool:
    """Whether it has shares in [0, 1]: of each layer a list for each class, one per kernel, and
    some kernel serves an image."""
    if not isinstance(usage["classes"], list):
        return False
    classes = len(usage["classes"])
    layers = usage["layers"].values()
    return all(
        len(shares) == classes
        and any(map(any, shares))
        and len({len(kernels) for kernels in shares}) == 1
        and all(are_numbers(kernels) and all(0 <= v <= 1 for v in kernels) for kernels in shares)
        for shares in layers
    )


ROW_NUMBERS = (
    "test_accuracy",
    "validation_accuracy",
    "macs",
    "params",
    "macs_reduction",
    "seconds",
)


def follows_results_schema(results: dict) -> bool:
    """Whether these are the results of a run, as far as the commands read them."""
    try:
        return (
            has_valid_facts(results)
            and has_valid_rows(results)
            and all(is_valid_search(log, results["layers"]) for log in results["search"].values())
            and all(
                is_valid_rounding(side)
                for sides in results["rounded"].values()
                for side in (sides["before"], sides["after"])
            )
        )
    # Of something of another type, or of a number that is too large.
    except (ValueError, AttributeError, KeyError, TypeError, OverflowError):
        return False


def has_valid_facts(results: dict) -> bool:
    settings = results["settings"]
    return (
        {*IDENTITY, "device", "versions", "seconds"} <= results.keys()
        and {"target", "candidates_per_lstm_epoch"} <= settings.keys()
        and isinstance(settings["final"]["epochs"], int)
        and (settings["target"] is None or are_numbers([settings["target"]]))
        and are_numbers([results["seconds"], results["train_images"], results["test_images"]])
        and isinstance(results["layers"], list)
    )


def has_valid_rows(results: dict) -> bool:
    rows = results["rows"]
    names = [row["method"] for row in rows]
    points = [point for curve in results["curves"].values() for point in curve]
    return (
        isinstance(rows, list)
        and set(names) <= set(ROWS)
        and (bool(rows) or not results["search"])  # a search comes after the baseline's row
        and all(are_numbers(row[key] for key in ROW_NUMBERS) for row in rows)
        and all(has_number_per_layer(row["widths"], results["layers"]) for row in rows)
        and all(is_valid_point(point) for point in points)
    )


def is_valid_point(point: list) -> bool:
    """Whether it is [loss, validation accuracy or None] of an epoch."""
    loss, accuracy = point
    return are_numbers([loss]) and (accuracy is None or are_numbers([accuracy]))


def is_valid_search(log: dict, layers: list) -> bool:
    candidates = [read_candidate(values) for values in log["candidates"]]
    layer_scores = []
    if log["rule"] in (ReinforceSearch.rule, RegressionSearch.rule):
        layer_scores = log["layer_scores"]
        if not isinstance(log["layer_score"], str):
            return False
    return (
        isinstance(log["rule"], str)
        and (log["target"] is None or are_numbers([log["target"]]))
        and all("trial_loss" in values for values in log["candidates"])
        and all(has_number_per_layer(candidate.structure, layers) for candidate in candidates)
        and all(has_number_per_layer(candidate.actions, layers) for candidate in candidates)
        and all(
            are_numbers([item.validation_accuracy, item.macs_reduction, item.reward, item.seconds])
            and (item.trial_loss is None or are_numbers([item.trial_loss]))
            for item in candidates
        )
        and all(has_number_per_layer(scores, layers) for scores in layer_scores)
        and all(
            are_numbers([trial["gates"]])
            and (trial["validation_loss"] is None or are_numbers([trial["validation_loss"]]))
            for trial in log.get("gate_trials", [])
        )
    )


def is_valid_rounding(side: dict) -> bool:
    numbers = [side["validation_accuracy"], side["macs_reduction"], *side["widths"]]
    latencies = side["latencies"]
    return are_numbers(numbers) and len(latencies) == 2 and are_numbers(latencies)


def has_number_per_layer(numbers, layers: list) -> bool:
    return len(numbers) == len(layers) and are_numbers(numbers)


def are_numbers(values) -> bool:
    """Whether all are finite numbers."""
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


# ---- the run: its trainer ----------------------------------------------------------------------


@dataclass
class TrainedNet:
    """A net after its training; the curve has [loss, validation accuracy or None] of each epoch."""

    net: Net
    # After this training; None where it was not measured. Of a whole row it is that after the
    # recovery, because no images are left to validate the final training.
    validation_accuracy: float | None
    seconds: float
    curve: list = field(default_factory=list)
    validation_loss: float | None = None  # where trainings are compared by it


@dataclass(frozen=True)
class RecoveredNet:
    """A pruned net after its recovery, before its final training."""

    net: Net
    score: ScoredStructure
    seconds: float  # that it took to find its structure, with all recoveries and trials


@dataclass
class TrainingState:
    """How far a training is. It is kept in its row's progress.pt after every epoch."""

    epochs: int = 0  # that are finished
    accuracy: float | None = None  # on the validation images, of the weights that are kept
    best_weights: dict | None = None  # where the best epoch is kept, not the last one
    seconds: float = 0.0
    curve: list = field(default_factory=list)  # [loss, validation accuracy or None] of each epoch

    def add_epoch(self, net: Net, loss: float, accuracy: float | None, *, keeps_best: bool) -> None:
        self.epochs += 1
        self.curve.append([round(loss, 5), accuracy])
        if not keeps_best:
            self.accuracy = accuracy
        elif self.accuracy is None or accuracy > self.accuracy:
            self.accuracy = accuracy
            self.best_weights = deepcopy(net.state_dict())

    def load_best_weights(self, net: Net, first_weights: dict, validation: Images) -> None:
        """Give `net` the weights of its best epoch. If it diverged at once it gets its first ones,
        and `accuracy` is measured."""
        if self.best_weights is not None:
            net.load_state_dict(self.best_weights)
            return
        net.load_state_dict(first_weights)
        self.accuracy = measure_accuracy(net, validation)


class DivergenceError(UserError):
    """The loss or weights of a training are no longer finite numbers. `seconds`: how long it was
    trained."""

    def __init__(self, message: str, *, seconds: float):
        super().__init__(message)
        self.seconds = seconds


def explain_divergence(title: str, epoch_number: int, plan: TrainingPlan) -> str:
    advice = "another --seed may do"
    if plan.temperature is not None:  # a final training of ours, not of `published`
        advice = "--schedule published has a lower one, or another --seed may do"
    return (
        f"{title}: the training diverged in epoch {epoch_number}, its loss or weights are no "
        f"longer finite numbers: the learning rate is too high for this net; {advice}"
    )


# ours: a trial takes a tenth of the final training's epochs, at most 10. With many images, several
# trials together then take less time than the final training. With few images a trial takes more
# epochs, until it has 400 steps: in fewer a small net learns nothing that could be compared.
TRIAL_SHARE = 0.1
MAX_TRIAL_EPOCHS = 10
MIN_TRIAL_STEPS = 400
# ours: so that a trial of `sep` has an epoch without and one with gates. Where the final training
# has one epoch (`smoke`), the trial has this one, with gates.
MIN_TRIAL_EPOCHS = 2


def plan_trial(final: TrainingPlan, image_count: int) -> TrainingPlan:
    """The plan of a trial on so many images: that of the final training with fewer epochs (see
    TRIAL_SHARE), and never with more."""
    epochs = min(MAX_TRIAL_EPOCHS, round(TRIAL_SHARE * final.epochs))
    steps_per_epoch = max(1, image_count // BATCH_SIZE)
    fewest_epochs = max(MIN_TRIAL_EPOCHS, math.ceil(MIN_TRIAL_STEPS / steps_per_epoch))
    return replace(final, epochs=min(max(epochs, fewest_epochs), final.epochs))


class Trainer:
    """Trains the nets of a run, each from where it was stopped. The baseline is their teacher."""

    def __init__(self, folder: RunFolder, settings: Settings, data: DataSplit, reporter: Reporter):
        self.folder = folder
        self.settings = settings
        self.data = data
        self.reporter = reporter
        # `Run.make_baseline` sets it. All but `load` and a training without a teacher need it.
        self.baseline: Net | None = None
        self.teachers: dict[Images, Teacher] = {}

    @property
    def device(self) -> torch.device:
        return self.data.train.device

    def teacher_for(self, images: Images) -> Teacher:
        """The baseline's outputs on these images."""
        if images not in self.teachers:
            self.teachers[images] = Teacher(self.baseline, images, self.settings.seed)
        return self.teachers[images]

    def load(self, path: Path) -> tuple[Net, dict]:
        """(net, facts) of a checkpoint in the run folder, on the device. Raises UserError.

        Callers read a net back from its file even where they still hold it in memory: so a stopped
        run and an undisturbed one compute the same to the last bit.
        """
        try:
            net, facts = sep.load(path)
        except UserError as error:
            advice = "--fresh starts the run over"
            if path.parent != self.folder.path:
                advice = f"remove {path.parent}, and what it keeps is made anew"
            raise UserError(f"{error}; {advice}") from error
        return net.to(self.device).to(memory_format=torch.channels_last), facts

    def load_baseline(self) -> Net:
        """A fresh copy of the baseline."""
        return self.load(self.folder.checkpoint_path("baseline"))[0]

    def train(
        self,
        title: str,
        net: Net,
        images: Images,
        plan: TrainingPlan,
        *,
        validation: Images | None = None,
        has_teacher: bool = True,
        keeps_best: bool = False,
        epoch_range: range | None = None,
    ) -> TrainedNet:
        """Train `net` in place, going on where an earlier process was stopped in this training.

        `title` tells trainings apart. `epoch_range` has the epochs of the plan to train, by default
        all of them. With `validation` the accuracy on these images is measured after each epoch.
        With `keeps_best`, which needs `validation`, the weights are those of the best epoch by that
        accuracy, else of the last one.

        A training diverges where its loss or its weights are no longer finite numbers.
        With `keeps_best` it then ends with its best weights so far, or with those that it began
        with. Else it raises DivergenceError.
        """
        net = net.to(self.device).to(memory_format=torch.channels_last)
        first_weights = deepcopy(net.state_dict()) if keeps_best else None
        optimizer = make_optimizer(net, plan.lr)
        state = self.load_progress(title, net, optimizer)
        epoch_range = range(plan.epochs) if epoch_range is None else epoch_range
        self.reporter.start_training(title, len(epoch_range), state.epochs)
        # The seconds of earlier processes count, too.
        start = time.time() - state.seconds
        epochs = fit(
            net,
            images,
            plan,
            optimizer=optimizer,
            seed=self.settings.seed,
            teacher=self.teacher_for(images) if has_teacher else None,
            epochs=epoch_range[state.epochs :],  # less those that are finished
            wrap_steps=self.reporter.wrap_steps,
        )
        for _, loss in epochs:  # each step of this loop trains one epoch
            # The loss is that before an epoch's last step, after which weights may be infinite.
            if not math.isfinite(loss) or models.find_infinite(net.state_dict()):
                if not keeps_best:
                    message = explain_divergence(title, state.epochs + 1, plan)
                    raise DivergenceError(message, seconds=time.time() - start)
                break
            accuracy = None if validation is None else measure_accuracy(net, validation)
            state.add_epoch(net, loss, accuracy, keeps_best=keeps_best)
            state.seconds = time.time() - start
            self.save_progress(title, state, net, optimizer)
            self.folder.save_results()  # the seconds so far
            self.report_epoch(title, state, len(epoch_range))
        if keeps_best:
            state.load_best_weights(net, first_weights, validation)
        return TrainedNet(net, state.accuracy, time.time() - start, state.curve)

    def report_epoch(self, title: str, state: TrainingState, epoch_count: int) -> None:
        """Tell the user what the epoch that has just ended came to, of `epoch_count` epochs."""
        loss, accuracy = state.curve[-1]
        seconds_per_epoch = state.seconds / state.epochs
        self.reporter.finish_epoch(
            title, state.epochs - 1, epoch_count, loss, accuracy, seconds_per_epoch
        )

    def load_progress(self, title: str, net: Net, optimizer) -> TrainingState:
        """How far the training of that title is; `net` and `optimizer` go on from there."""
        keys = {item.name for item in fields(TrainingState)}
        content = models.read_unfinished_work(
            self.folder.progress_path(title), title, keys | {"net", "optimizer"}
        )
        if content is None or models.find_mismatch(net, content["net"]):
            return TrainingState()
        net.load_state_dict(content["net"])
        optimizer.load_state_dict(content["optimizer"])
        return TrainingState(**{key: content[key] for key in keys})

    def save_progress(self, title: str, state: TrainingState, net: Net, optimizer) -> None:
        weights = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
        content = vars(state) | weights | {"title": title}
        models.write_tensors(self.folder.progress_path(title), content)

    def make_reduction_of(self, method: str) -> Callable:
        """A function of a structure: the share of the baseline's MACs that pruning to it by that
        method removes."""
        return make_reduction_of(method, self.baseline)

    def make_baseline_score(self, target: float | None) -> ScoredStructure:
        """The baseline as a search sees it."""
        row = self.folder.find_row("baseline")
        accuracy = row["validation_accuracy"]
        reward = compute_reward(accuracy, 0.0, target)
        return ScoredStructure(
            structure=self.baseline.structure,
            validation_accuracy=accuracy,
            macs=row["macs"],
            macs_reduction=0.0,
            reward=reward,
        )

    def make_candidate(
        self,
        method: str,
        parent_net: Net,
        structure,
        *,
        actions: tuple[int, ...],
        target: float | None,
        lstm_epoch: int,
        number: int,
        row_name: str | None = None,
    ) -> tuple[Net, Candidate]:
        """Prune a parent to a structure, recover it with the teacher, and score it.

        `method` says how its MACs are counted (`count_macs_by`). `row_name` is the row that it is
        for, by default that of the method.
        """
        trained = self.train(
            f"{row_name or method}: candidate {number}, {structure_name(structure)}",
            models.prune_channels(parent_net, structure),
            self.data.train,
            self.settings.recovery,
            validation=self.data.validation,
            keeps_best=True,
        )
        macs = count_macs_by(method, self.baseline, structure)
        macs_reduction = self.make_reduction_of(method)(structure)
        accuracy = trained.validation_accuracy
        candidate = Candidate(
            structure=structure,
            validation_accuracy=accuracy,
            macs=macs,
            macs_reduction=macs_reduction,
            reward=compute_reward(accuracy, macs_reduction, target),
            parent=parent_net.structure,
            actions=actions,
            lstm_epoch=lstm_epoch,
            seconds=round(trained.seconds, 2),
        )
        return trained.net, candidate

    def load_or_make_candidate(
        self,
        path: Path,
        method: str,
        parent_net: Net,
        structure,
        *,
        target: float | None,
        lstm_epoch: int,
        number: int,
        row_name: str | None = None,
    ) -> tuple[Net, Candidate]:
        """`make_candidate`, kept in a file of the pool: both come from there if it exists."""
        if not path.exists():
            net, candidate = self.make_candidate(
                method,
                parent_net,
                structure,
                actions=actions_between(parent_net.structure, structure),
                target=target,
                lstm_epoch=lstm_epoch,
                number=number,
                row_name=row_name,
            )
            models.save_checkpoint(path, net, asdict(candidate))
        net, facts = self.load(path)
        return net, Candidate(**facts)

    def load_or_train(
        self,
        path: Path,
        title: str,
        net: Net,
        images: Images,
        plan: TrainingPlan,
        epoch_range: range,
        *,
        may_diverge: bool = False,
    ) -> TrainedNet:
        """Train a copy of `net` by `train`, and measure its loss on the validation images.

        The trained net and the loss are kept in the file `path` of the pool, and are read from
        there the next time. If the loss were measured again on another machine, another net might
        have the lowest one.

        With `may_diverge` a training that diverges is kept, too, as `net` without training and with
        the loss None. Without it a training that diverges raises DivergenceError.
        """
        if not path.exists():
            try:
                trained = self.train(title, deepcopy(net), images, plan, epoch_range=epoch_range)
                trained.validation_loss = self.measure_validation_loss(trained.net)
            except DivergenceError as error:
                if not may_diverge:
                    raise
                trained = TrainedNet(net, validation_accuracy=None, seconds=error.seconds)
            facts = {
                "seconds": trained.seconds,
                "curve": trained.curve,
                "validation_loss": trained.validation_loss,
            }
            models.save_checkpoint(path, trained.net, facts)
        trained_net, facts = self.load(path)
        return TrainedNet(
            trained_net,
            validation_accuracy=None,
            seconds=facts["seconds"],
            curve=facts["curve"],
            validation_loss=facts["validation_loss"],
        )

    @cached_property
    def validation_probabilities(self) -> torch.Tensor:
        """The baseline's softmax outputs (N, classes) for the validation images."""
        return compute_logits(self.baseline, self.data.validation).softmax(1)

    def measure_validation_loss(self, net: Net) -> float | None:
        """What the final training minimises, of `net` on the validation images; None where it is
        no number."""
        images = self.data.validation
        logits = compute_logits(net, images)
        temperature = self.settings.final.temperature
        loss = float(
            distillation_loss(logits, images.labels, self.validation_probabilities, temperature)
        )
        return round(loss, 5) if math.isfinite(loss) else None


# ---- the run: the search loop ------------------------------------------------------------------


def run_search(trainer: Trainer, method: str, target: float | None) -> tuple[Net, ScoredStructure]:
    """Run the search of a method, and its trials: (best net, its score).

    A structure that is proposed again is not trained again: its score is reused. Raises UserError
    where one channel in every layer does not reach the target. A ReinforceSearch may end before any
    structure has reached it.
    """
    folder = trainer.folder
    search = make_search(trainer, method, target)
    load_search(search, folder)
    update_search_results(search, folder)  # also where the search has ended already
    reported_best = None
    has_proposed = False
    while (proposal := search.propose()) is not None:
        has_proposed = True
        score = search.known_scores.get(proposal.structure)
        if score is None:
            score = make_proposed_candidate(trainer, search, proposal)
        lstm_epoch = search.lstm_epoch
        search.record(proposal, score)
        if search.lstm_epoch > lstm_epoch and search.best is not reported_best:
            folder.say(describe_search(search, lstm_epoch))
            reported_best = search.best
        save_search(search, folder)
        update_search_results(search, folder)
        folder.save_results()
        remove_unused_weights(search, folder)
    if has_proposed:
        folder.say(f"{method}: the search has ended; {search.describe_end()}")
    # Trials give the finalists losses, and from there on these decide which one is the best.
    run_trials(trainer, search)
    best_net, _ = trainer.load(weights_path_for(search, search.best.structure, folder))
    return best_net, search.best


def weights_path_for(search: Search, structure, folder: RunFolder) -> Path:
    """The file with the weights of a structure. The baseline's are in the checkpoint of its row."""
    if structure == search.baseline_score.structure:
        return folder.checkpoint_path("baseline")
    return folder.pool_path(search.method) / f"{structure_name(structure)}.pt"


def make_proposed_candidate(trainer: Trainer, search: Search, proposal: Proposal) -> Candidate:
    """What a search has proposed, pruned from its parent and recovered; its weights are kept."""
    folder = trainer.folder
    parent_net, _ = trainer.load(weights_path_for(search, proposal.parent, folder))
    net, candidate = trainer.make_candidate(
        search.method,
        parent_net,
        proposal.structure,
        actions=proposal.actions,
        target=search.target,
        lstm_epoch=search.lstm_epoch,
        number=len(search.candidates) + 1,
    )
    models.save_checkpoint(weights_path_for(search, proposal.structure, folder), net, {})
    warn_of_strange_gain(trainer, search, candidate)
    return candidate


# ours: a pruned net that is so much more accurate than its baseline says that something is wrong
# with the baseline.
STRANGE_GAIN = 0.1


def warn_of_strange_gain(trainer: Trainer, search: Search, candidate: Candidate) -> None:
    """Say so where this candidate of a search is the first with a STRANGE_GAIN."""
    baseline_accuracy = search.baseline_score.validation_accuracy
    limit = baseline_accuracy + STRANGE_GAIN
    was_said = any(known.validation_accuracy > limit for known in search.candidates.values())
    if candidate.validation_accuracy > limit and not was_said:
        trainer.folder.say(
            f"{search.method}: a pruned net gets {candidate.validation_accuracy:.2%} of the "
            f"validation images right, the baseline {baseline_accuracy:.2%}; most likely the "
            "baseline is read wrongly (docs/your-net.md), or hardly trained"
        )


def remove_unused_weights(search: Search, folder: RunFolder) -> None:
    """Remove what neither a later proposal nor a trial nor the result starts from.

    progress.pt is of a training that has ended, and goes, too.
    """
    pool = folder.pool_path(search.method)
    structures = search.structures_in_use()
    in_use = {weights_path_for(search, structure, folder) for structure in structures}
    for path in set(pool.glob("*.pt")) - in_use - {pool / "search.pt"}:
        path.unlink()


def run_trials(trainer: Trainer, search: Search) -> None:
    """ours: a trial for each finalist of a search. Sets the candidate's `trial_loss`, its loss on
    the validation images.

    A trial trains the recovered net some more, on the images that do not validate. The loss after a
    trial predicts the loss after the final training. The accuracy after the recovery, which gives
    the reward, often does not predict it (RESULTS.md, section 5). The net of a trial is not used
    further, so that the nets of all rows have had the same trainings. After a trial that diverges
    the loss is None.
    """
    finalists = search.list_finalists()
    if len(finalists) < 2:
        return
    folder = trainer.folder
    images = trainer.data.train
    plan = plan_trial(trainer.settings.final, len(images))
    is_new = False
    for number, finalist in enumerate(finalists, 1):
        name = structure_name(finalist.structure)
        path = folder.pool_path(search.method) / f"trial-{name}.pt"
        is_new = is_new or not path.exists()
        trained = trainer.load_or_train(
            path,
            f"{search.method}: trial {number} of {len(finalists)}, {name}",
            trainer.load(weights_path_for(search, finalist.structure, folder))[0],
            images,
            plan,
            range(plan.epochs),
            may_diverge=True,
        )
        # Not saved in search.pt: a run that goes on reads both from the trial's file.
        finalist.trial_loss = trained.validation_loss
        finalist.seconds = round(finalist.seconds + trained.seconds, 2)
        update_search_results(search, folder)
        folder.save_results()
    if is_new:
        folder.say(describe_trials(search, finalists))


def make_search(trainer: Trainer, method: str, target: float | None) -> Search:
    """The search that the settings ask for. Raises UserError where the target is out of reach."""
    baseline = trainer.baseline
    reduction_of = trainer.make_reduction_of(method)
    check_reachable(baseline.widths, reduction_of, target)
    by_regression = trainer.settings.searches_by_regression(target)
    search_class = RegressionSearch if by_regression else ReinforceSearch
    return search_class(
        baseline,
        trainer.make_baseline_score(target),
        trainer.settings,
        target,
        reduction_of,
        method=method,
        is_random=method == "random",
    )


def title_of(search: Search) -> str:
    """The title under which a search is saved. It has the target, because rewards depend on the
    target: a search for another target begins anew."""
    return f"{search.method}, target {search.target}"


def load_search(search: Search, folder: RunFolder) -> None:
    """Go on with what `save_search` kept of this search, if it did."""
    path = folder.pool_path(search.method) / "search.pt"
    keys = search.state_dict().keys()
    state = models.read_unfinished_work(path, title_of(search), keys)
    if state and not models.find_mismatch(search.policy, state["policy"]):
        search.load_state_dict(state)
    elif path.exists():
        folder.say(
            f"{path} is damaged, or was for another target or version: that search begins anew"
        )


def save_search(search: Search, folder: RunFolder) -> None:
    path = folder.pool_path(search.method) / "search.pt"
    models.write_tensors(path, search.state_dict() | {"title": title_of(search)})


def update_search_results(search: Search, folder: RunFolder) -> None:
    """Put into the results how far a search is."""
    folder.set_search_results(
        search.method,
        search.rule,
        search.target,
        search.candidates.values(),
        layer_score=search.layer_score_label,
        layer_scores=search.layer_scores,
    )


def describe_search(search: Search, lstm_epoch: int) -> str:
    """How far a search is, in one line for the user."""
    best = search.best
    epoch = f"round {lstm_epoch}" if search.is_random else f"LSTM epoch {lstm_epoch}"
    criterion = "largest reward" if best.reaches(search.target) else "largest cut"
    return (
        f"{search.method}: {epoch}, {len(search.candidates)} candidates, {criterion}: accuracy "
        f"{best.validation_accuracy:.2%}, cut {best.macs_reduction:.1%} "
        f"({structure_name(best.structure)}); {search.describe_end()}"
    )


def describe_trials(search: Search, finalists: list[Candidate]) -> str:
    """What the trials of the finalists came to, in one line for the user."""
    losses = sorted(item.trial_loss for item in finalists if item.trial_loss is not None)
    if not losses:
        return f"{search.method}: all trials diverged, so the largest reward decides"
    chosen = structure_name(search.best.structure)
    lowest, *others = (f"{loss:.4f}" for loss in losses)
    text = f"{search.method}: trials choose {chosen}, with a validation loss of {lowest}"
    return f"{text}; others {', '.join(others)}" if others else text


# ---- the run: the checkpoints of its rows ------------------------------------------------------


def describe_machine(device: torch.device) -> dict:
    """The device (a CPU with its threads and precision) and the versions: accuracies and times
    depend on them."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = "cpu, 1 thread" if threads == 1 else f"cpu, {threads} threads"
        name += ", bfloat16" if has_bfloat16(device) else ", float32"
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {"device": name, "versions": versions}


class RowCheckpoints:
    """The checkpoints of a run's rows, each written before its row is added to the results.

    A checkpoint is used for a row only if its facts say that this run made it as that row. Another
    net at the same path would give the table a false row. Only the baseline may come from a run
    with other settings, of the same schedule and seed.
    """

    def __init__(self, trainer: Trainer, round_to: int | None):
        self.trainer = trainer
        self.folder = trainer.folder
        self.round_to = round_to

    def save(self, row_name: str, trained: TrainedNet) -> None:
        data = self.trainer.data
        facts = self.identify(row_name, trained.net) | {
            "mean": list(data.train.mean),
            "std": list(data.train.std),
            "names": data.train.class_names,
            "split": data.seed,
            "test_images": len(data.test),
            "validation_accuracy": trained.validation_accuracy,
            "seconds": round(trained.seconds, 1),
            "curve": trained.curve,
            "baseline": self.folder.find_row("baseline"),
            **describe_machine(self.trainer.device),
        }
        models.save_checkpoint(self.folder.checkpoint_path(row_name), trained.net, facts)

    def load(self, row_name: str, architecture=None) -> tuple[Net, dict]:
        """(net, facts) of a row's checkpoint. Raises UserError unless this run made it as that row,
        of that architecture (default: the baseline's)."""
        path = self.folder.checkpoint_path(row_name)
        net, facts = self.trainer.load(path)
        architecture = architecture or self.trainer.baseline.architecture
        if net.architecture != architecture or not self.is_own(row_name, net, facts):
            raise UserError(
                f"{path} is no net that this run made as its {row_name}, by the results.json "
                "beside it; move it away to go on, or --fresh starts the run over without it"
            )
        return net, facts

    def identify(self, row_name: str, net: Net) -> dict:
        """What the checkpoint of a row says of its run and its net."""
        results = self.folder.results
        keys = ("data", "images", "normalisation", "source", "schedule", "seed", "settings")
        return {key: results[key] for key in keys} | {
            "method": row_name,
            "round_to": self.round_to or 1,
            "macs": sep.count_macs(net),
            "parameters": models.count_parameters(net),
        }

    def is_own(self, row_name: str, net: Net, facts: dict) -> bool:
        """Whether this run wrote these facts for that row."""
        if not {"validation_accuracy", "seconds", "curve", "device", "versions"} <= facts.keys():
            return False  # `add_row` needs them
        identity = self.identify(row_name, net)
        # The folder of a user's own images does not count, but the fingerprint in `images` does.
        own_data = identity.pop("data")
        if kind_of_data(facts.get("data")) != kind_of_data(own_data):
            return False
        if row_name == "baseline":
            # How it is pruned later does not matter to a baseline.
            del identity["settings"], identity["round_to"]
        elif not self.agrees_with_row("baseline", facts.get("baseline") or {}):
            return False
        has_identity = all(facts.get(key) == value for key, value in identity.items())
        return has_identity and self.agrees_with_row(row_name, facts)

    def agrees_with_row(self, row_name: str, facts: dict) -> bool:
        """Whether the facts have the accuracy and the MACs of the row in the results; True where
        the results have no such row yet."""
        row = self.folder.find_row(row_name)
        if row is None:
            return True
        return all(facts.get(key) == row[key] for key in ("validation_accuracy", "macs"))

    def check_finished_row(self, row_name: str) -> None:
        """Check the checkpoint of a finished row. Raises UserError where it is another net's. A
        missing or damaged file is only reported."""
        path = self.folder.checkpoint_path(row_name)
        if models.is_intact(path):
            self.load(row_name)  # raises where it is another net's
        else:
            self.folder.say(
                f"{path} is gone or damaged; its row stays; only --fresh makes it anew, and all "
                "rows with it"
            )


# ---- the run: the row of sep -------------------------------------------------------------------

# ours: the share of a training that `sep` spends without gates (RESULTS.md, section 6).
SHARE_WITHOUT_GATES = 0.3
# ours: gates find their clusters on so many training images. It takes a few seconds, and leaves
# hundreds of images to each group.
CLUSTERED_IMAGES = 5000


def split_epochs(plan: TrainingPlan) -> tuple[range, range]:
    """The epochs of a plan (before gates are put on, with gates)."""
    first_gated_epoch = round(SHARE_WITHOUT_GATES * plan.epochs)
    return range(first_gated_epoch), range(first_gated_epoch, plan.epochs)


def list_gate_counts(gate_sizes) -> list[int]:
    """How many gates to try: 1, 2, 4, ..., and all that have room."""
    room = sum(size is not None for size in gate_sizes)
    counts = []
    count = 1
    while count < room:
        counts.append(count)
        count *= 2
    return [*counts, room]


def keep_last_gates(gate_sizes, count: int) -> list[sep.GateSize | None]:
    """The last `count` of the gates in `gate_sizes`, all if they are fewer; None for all other
    layers."""
    gated_layers = [i for i, size in enumerate(gate_sizes) if size is not None]
    kept = gated_layers[max(0, len(gated_layers) - count) :]
    return [size if i in kept else None for i, size in enumerate(gate_sizes)]


def best_gate_count(trials: list[dict]) -> int:
    """The number of gates with the lowest validation loss; 0 where no trial has one."""
    finished = [trial for trial in trials if trial["validation_loss"] is not None]
    best = min(finished, key=lambda trial: trial["validation_loss"], default={"gates": 0})
    return best["gates"]


def describe_gate_trials(trials: list[dict]) -> str:
    """What the trials of gates came to, in one line for the user."""
    count = best_gate_count(trials)
    if count:
        layers = "layer" if count == 1 else f"{count} layers"
        text = f"gates go on the last {layers} of those that have room"
    elif all(trial["validation_loss"] is None for trial in trials if trial["gates"]):
        text = "all trials with gates diverged, so none is put on"
    else:
        text = "gates in the last layers do not help, so none is put on"
    losses = ", ".join(
        f"{trial['gates']}: {trial['validation_loss']:.4f}"
        for trial in trials
        if trial["validation_loss"] is not None
    )
    return f"sep: {text} (validation loss by number of gates: {losses})"


def make_static(gated: Net, images: Images) -> Net:
    """ours: a plain small net of a gated one, of the mean of its groups of kernels.

    `images` are those that the gates choose for. Callers train the net some more, and keep that
    where it helps: where all images choose alike, the plain net computes what the gated one does,
    and more training may only harm it.
    """
    if gated.gates is None:
        return gated
    batches = (images.batch(index) for index in split_into_chunks(images))
    return sep.to_static(gated, batches)


class SepRow:
    """Makes the row of `sep`.

    First a structure is found. Then two nets compete: a net with gates in its last layers, and a
    net without gates. Short trainings of both are compared on the validation images. They choose
    between the two nets, and choose how many layers have gates. The winner gets the final training.

                       searches by regression (ours)      by the papers' rules
    its structure      that of `lstm`'s search, less      that of a search of its own
                       some kernels: they make room
                       for the gates' MACs
    net without gates  `lstm`'s net: it pays for no       the net of that structure, before
                       gates, so it may have more         gates are put on
                       kernels

    A search of `sep`'s own would only try the hard-pruned candidates of `lstm`'s search again.

    If `lstm`'s net wins, and has had its final training already, it is taken as it is. If widths
    are rounded (`round_to`), it is the net before gates are put on in both cases, because `lstm`'s
    net has another structure then.
    """

    def __init__(self, trainer: Trainer, checkpoints: RowCheckpoints, round_to: int | None):
        self.trainer = trainer
        self.checkpoints = checkpoints
        self.round_to = round_to
        self.folder = trainer.folder
        self.settings = trainer.settings
        self.data = trainer.data

    # -- its structure

    def find_recovered_net(self, target: float) -> RecoveredNet:
        """A net of `lstm`'s structure, pruned until the gates that it may get fit into the target,
        and recovered."""
        trainer = self.trainer
        structure = prune_further(
            self.find_lstm_structure(target),
            trainer.baseline.widths,
            trainer.make_reduction_of("sep"),
            target,
            self.settings.pruning_rate,
        )
        net, candidate = self.recover(structure, target, counted_as="sep", number=1)
        self.folder.set_search_results("sep", "shared", target, [candidate])
        self.folder.save_results()
        return RecoveredNet(net, candidate, self.folder.search_seconds("lstm") + candidate.seconds)

    def find_lstm_structure(self, target: float) -> tuple[int, ...]:
        """The structure that `lstm`'s search chooses. It searches, or goes on searching, where
        that is not known. A search that has ended is read from its files."""
        row = self.folder.find_row("lstm")
        if row is not None and not self.round_to:
            return tuple(row["widths"])
        rounding = self.folder.results["rounded"].get("lstm")
        if row is not None and rounding is not None:
            return tuple(rounding["before"]["widths"])
        # `lstm` has no row yet. Or it has one, but results.json was lost, and the row alone does
        # not say what the widths were before they were rounded.
        return run_search(self.trainer, "lstm", target)[1].structure

    def recover(
        self, structure, target: float, *, counted_as: str, number: int
    ) -> tuple[Net, Candidate]:
        """Prune the baseline to a structure, and recover it; kept in `sep`'s pool. The MACs are
        counted as those of the method `counted_as`: of `sep` with gates, of `lstm` without."""
        return self.trainer.load_or_make_candidate(
            self.folder.pool_path("sep") / f"shared-{structure_name(structure)}.pt",
            counted_as,
            self.trainer.load_baseline(),
            structure,
            target=target,
            lstm_epoch=1,
            number=number,
            row_name="sep",
        )

    # -- its final training

    def train(self, recovered: RecoveredNet, target: float | None) -> TrainedNet:
        """Let `recovered` with gates compete with a net without gates, and give the winner the
        final training.

        The validation accuracy is that after the recovery, the seconds are those of the whole row.
        """
        without_gates = self.find_net_without_gates(recovered, target)
        gate_sizes, trial_seconds = self.choose_gates(recovered.net, without_gates.net)
        if any(gate_sizes):
            trained = self.train_with_gates(recovered, gate_sizes)
        else:
            trained = self.train_without_gates(without_gates, target)
        # Those of `without_gates` include those of `recovered`: both had to be found, whichever
        # won.
        seconds = without_gates.seconds + trial_seconds + trained.seconds
        return replace(trained, seconds=seconds)

    def competes_with_lstm(self, target: float | None) -> bool:
        """Whether the net without gates is `lstm`'s; else it is the net before gates are put on."""
        return self.settings.searches_by_regression(target) and not self.round_to

    def find_net_without_gates(self, recovered: RecoveredNet, target: float | None) -> RecoveredNet:
        """The net that competes with `recovered` and its gates; see the table of this class."""
        if not self.competes_with_lstm(target):
            return recovered
        structure = self.find_lstm_structure(target)
        if structure == recovered.score.structure:
            return recovered
        net, candidate = self.recover(structure, target, counted_as="lstm", number=2)
        # The trials of gates are added to this entry, so it has to be complete before them.
        self.folder.set_search_results("sep", "shared", target, [recovered.score, candidate])
        return RecoveredNet(net, candidate, recovered.seconds + candidate.seconds)

    def train_without_gates(self, recovered: RecoveredNet, target: float | None) -> TrainedNet:
        """The final training of the net without gates, or `lstm`'s net, if that is the same net and
        is trained already. The seconds are those of this training."""
        structure = recovered.net.structure
        if self.competes_with_lstm(target) and self.has_lstm_net_of(structure):
            return self.load_lstm_net()
        trained = self.trainer.train(
            "sep: final", recovered.net, self.data.all, self.settings.final
        )
        return replace(trained, validation_accuracy=recovered.score.validation_accuracy)

    def has_lstm_net_of(self, structure) -> bool:
        """Whether the folder has `lstm`'s trained net, of that structure."""
        row = self.folder.find_row("lstm")
        if row is None or tuple(row["widths"]) != tuple(structure):
            return False
        return models.is_intact(self.folder.checkpoint_path("lstm"))

    def load_lstm_net(self) -> TrainedNet:
        """`lstm`'s trained net, which is the net of `sep`, too, if no gates are put on.

        It has the structure and the final training that `sep`'s net would get, but its recovery may
        have been another one. The seconds are only those of `lstm`'s final training.
        """
        net, facts = self.checkpoints.load("lstm")
        # Where results.json was lost, the search may have been made anew, and taken longer.
        training_seconds = max(0.0, facts["seconds"] - self.folder.search_seconds("lstm"))
        self.folder.say("sep has no gates, so it is lstm's net")
        return TrainedNet(net, facts["validation_accuracy"], training_seconds, facts["curve"])

    def train_with_gates(self, recovered: RecoveredNet, gate_sizes) -> TrainedNet:
        """ours: the final training in two parts of one schedule. The first trains the pruned net as
        it is; then come the gates that `gate_sizes` names. The seconds are those of both parts.

        If gates come at the start, each group has fewer images to learn from. In one run this gave
        a lower accuracy than gates that come later, but chance may explain the difference
        (RESULTS.md, section 6). The optimizer's momentum starts from zero when gates are put on.
        """
        images, plan = self.data.all, self.settings.final
        epochs_before_gates, epochs_with_gates = split_epochs(plan)
        title = "sep: final, without gates"
        first_part = self.train_in_pool(title, recovered.net, images, plan, epochs_before_gates)
        gated = self.put_gates_on(first_part.net, gate_sizes)
        second_part = self.trainer.train(
            "sep: final", gated, images, plan, epoch_range=epochs_with_gates
        )
        return replace(
            second_part,
            validation_accuracy=recovered.score.validation_accuracy,
            seconds=first_part.seconds + second_part.seconds,
            curve=first_part.curve + second_part.curve,
        )

    # -- which layers get gates, if any

    def choose_gates(
        self, net: Net, net_without_gates: Net
    ) -> tuple[list[sep.GateSize | None], float]:
        """Which layers of the pruned `net` get gates: (the size of each layer's gate, None for no
        gate; seconds spent). Without any gate `net_without_gates` has won.

        To choose kernels by the image helps most in the last layers, if at all. A layer has room
        for a gate if it lost enough kernels. A few short trainings have gates in the last 1, 2, 4,
        ... of these layers, and one training is of `net_without_gates`. The training with the
        lowest loss on the validation images wins.
        """
        gate_sizes = sep.choose_gate_sizes(self.trainer.baseline.widths, net.structure)
        if not any(gate_sizes):
            self.folder.say("sep: no layer lost enough kernels to have room for a gate")
            return gate_sizes, 0.0
        trials, seconds = self.try_gates(net, net_without_gates, gate_sizes)
        self.folder.results["search"]["sep"]["gate_trials"] = trials
        self.folder.save_results()
        self.folder.say(describe_gate_trials(trials))
        return keep_last_gates(gate_sizes, best_gate_count(trials)), seconds

    def try_gates(self, net: Net, net_without_gates: Net, gate_sizes) -> tuple[list[dict], float]:
        """Short trainings of `net_without_gates`, and of `net` with several numbers of gates, on
        the images that do not validate: (of each the number of gates and the validation loss,
        seconds spent).

        A trial with gates that diverges has the loss None. Raises DivergenceError where the nets
        without gates diverge.
        """
        images = self.data.train
        plan = plan_trial(self.settings.final, len(images))
        epochs_before_gates, epochs_with_gates = split_epochs(plan)
        title = "sep: gates, trial without"
        without_gates = self.train_in_pool(
            title, net_without_gates, images, plan, range(plan.epochs)
        )
        # All trials with gates go on from here.
        title = "sep: gates, before the trials"
        first_part = self.train_in_pool(title, net, images, plan, epochs_before_gates)
        seconds = without_gates.seconds + first_part.seconds
        trials = [{"gates": 0, "validation_loss": without_gates.validation_loss}]
        for count in list_gate_counts(gate_sizes):
            gated = self.put_gates_on(first_part.net, keep_last_gates(gate_sizes, count))
            title = f"sep: gates, trial with {count}"
            second_part = self.train_in_pool(
                title, gated, images, plan, epochs_with_gates, may_diverge=True
            )
            seconds += second_part.seconds
            trials.append({"gates": count, "validation_loss": second_part.validation_loss})
        return trials, seconds

    def train_in_pool(self, title: str, net: Net, *arguments, **options) -> TrainedNet:
        """`Trainer.load_or_train` with a file in `sep`'s pool, named by title and structure."""
        name = re.sub(r"[:,]? ", "-", title)
        path = self.folder.pool_path("sep") / f"{name}-{structure_name(net.structure)}.pt"
        return self.trainer.load_or_train(path, title, net, *arguments, **options)

    def put_gates_on(self, net: Net, gate_sizes) -> Net:
        """A copy of `net` with these gates; they divide some of the training images among their
        groups."""
        images = self.data.train
        generator = torch.Generator().manual_seed(seed_for(self.settings.seed, "clusters"))
        order = torch.randperm(len(images), generator=generator)[:CLUSTERED_IMAGES]
        chunks = order.to(images.device).split(chunk_size_for(images))
        return sep.add_gates(net, gate_sizes, images.batches(chunks))


# ---- the run: its rows -------------------------------------------------------------------------


class Run:
    """A run folder, and the rows that fill it. Every step picks up what the folder holds already.

    `make_baseline` comes first, then `make_row(method, goal_for(method))` for each row.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        description: dict,
        data: DataSplit,
        reporter: Reporter | None = None,
        *,
        is_fresh: bool = False,
        round_to: int | None = None,
    ):
        """`description`: the entries experiment, schedule, data and source (of a given checkpoint)
        of results.json; `make_description` adds the others.

        Raises UserError where the folder is in use, is another run's, or cannot be written.
        """
        self.settings = settings
        self.data = data
        self.reporter = reporter or Reporter()
        self.round_to = round_to
        self.folder = RunFolder(path, self.reporter)
        self.folder.claim(is_fresh=is_fresh)
        self.trainer = Trainer(self.folder, settings, data, self.reporter)
        self.checkpoints = RowCheckpoints(self.trainer, round_to)
        self.sep_row = SepRow(self.trainer, self.checkpoints, round_to)
        self.folder.open_results(description | self.make_description())

    def make_description(self) -> dict:
        """What results.json says of a run before it begins."""
        return {
            "train_images": len(self.data.all),
            "test_images": len(self.data.test),
            "images": fingerprint(self.data.all, self.data.test),
            "normalisation": [self.data.all.mean, self.data.all.std],
            "seed": self.settings.seed,
            "round_to": self.round_to,
            "seconds": 0.0,
            "settings": asdict(self.settings),
            "layers": [],
            **describe_machine(self.trainer.device),
        }

    @property
    def results(self) -> dict:
        return self.folder.results

    def find_row(self, name: str) -> dict | None:
        return self.folder.find_row(name)

    def goal_for(self, method: str) -> Goal:
        """The cut that a row aims at.

        It is the target that the user or the paper asks for. Where there is none, and for
        `uniform`, it is the cut of the row that was made first: all rows of a table are compared at
        one cut. Without either, a search goes as far as the reward finds worth it, and `uniform` is
        refused.
        """
        pruned_rows = [row for row in self.results["rows"] if row["method"] != "baseline"]
        target = self.settings.target
        if target is not None and (method != "uniform" or not pruned_rows):
            return Goal(target, is_required=True)
        if pruned_rows:
            return Goal(pruned_rows[0]["macs_reduction"])
        return Goal(None)

    # -- making rows

    def make_baseline(self, net: Net, *, is_trained: bool = False) -> Net:
        """The trained baseline: from the folder where it has one, else of `net`, which a user may
        have trained already."""
        path = self.folder.checkpoint_path("baseline")
        if not path.exists():
            if self.find_row("baseline") and not is_trained:
                raise UserError(
                    f"{path} is gone, and another training would give another net; put it back, or "
                    "--fresh starts the run over"
                )
            if is_trained:
                net = net.to(self.trainer.device)
                accuracy = measure_accuracy(net, self.data.validation)
                trained = TrainedNet(net, accuracy, seconds=0.0)
            else:
                trained = self.trainer.train(
                    "baseline",
                    net,
                    self.data.train,
                    self.settings.baseline,
                    validation=self.data.validation,
                    has_teacher=False,
                )
            self.checkpoints.save("baseline", trained)
        baseline, facts = self.checkpoints.load("baseline", net.architecture)
        self.trainer.baseline = baseline
        if not self.find_row("baseline"):
            self.add_row("baseline", baseline, facts)
        self.folder.remove_pool("baseline")
        return baseline

    def make_row(self, method: str, goal: Goal) -> None:
        """The whole of a row: structure, final training, test accuracy. For `static` the row of
        `sep` is made first."""
        if method == "static":
            self.make_row("sep", goal)
        if self.find_row(method):
            self.checkpoints.check_finished_row(method)
            # A process that was killed between `add_row` and `remove_pool` has left it.
            self.folder.remove_pool(method)
            return
        if not self.folder.checkpoint_path(method).exists():
            if method == "static":
                trained = self.make_static_net()
            else:
                trained = self.make_pruned_net(method, goal)
            self.checkpoints.save(method, trained)
        self.add_row(method, *self.checkpoints.load(method))
        self.folder.remove_pool(method)

    def make_pruned_net(self, method: str, goal: Goal) -> TrainedNet:
        """Find the structure, round it if asked to, and train it to the end.

        No image is left to validate the final training, so the accuracy is the recovered net's. The
        seconds are those of the whole row.
        """
        goal = self.limit_goal(method, goal)
        recovered = self.find_recovered_net(method, goal.target)
        if self.round_to:
            recovered = self.round_widths(method, recovered, goal)
        if method == "sep":
            return self.sep_row.train(recovered, goal.target)
        trained = self.trainer.train(
            f"{method}: final", recovered.net, self.data.all, self.settings.final
        )
        return replace(
            trained,
            validation_accuracy=recovered.score.validation_accuracy,
            seconds=recovered.seconds + trained.seconds,
        )

    def make_static_net(self) -> TrainedNet:
        """`sep`'s net made plain, with a recovery where that makes it more accurate on all training
        images. Its validation accuracy is that of `sep`'s candidate, its seconds include those of
        `sep`."""
        gated, facts = self.trainer.load(self.folder.checkpoint_path("sep"))
        accuracy, seconds = facts["validation_accuracy"], facts["seconds"]
        if gated.gates is None:
            self.reporter.say("sep has no gates, so static is the same net")
            return TrainedNet(gated, accuracy, seconds)
        images = self.data.all
        static = make_static(gated, images)
        try:
            trained = self.trainer.train(
                "static: recovery", deepcopy(static), images, self.settings.recovery
            )
        except DivergenceError as error:
            self.reporter.say("static: its recovery diverged, so the net stays as it was before")
            return TrainedNet(static, accuracy, seconds + error.seconds)
        seconds += trained.seconds
        if measure_accuracy(trained.net, images) > measure_accuracy(static, images):
            return TrainedNet(trained.net, accuracy, seconds, trained.curve)
        return TrainedNet(static, accuracy, seconds)

    def add_row(self, name: str, net: Net, facts: dict) -> None:
        """Add the row of a trained net. In a run nets are measured on the test images only here."""
        baseline = self.find_row("baseline") or facts
        row = {
            "method": name,
            "test_accuracy": measure_accuracy(net, self.data.test, in_float32=True),
            "validation_accuracy": facts["validation_accuracy"],
            "macs": facts["macs"],
            "params": facts["parameters"],
            "macs_reduction": 1 - facts["macs"] / baseline["macs"],
            "widths": list(net.structure),  # the kernels at work for an image
            "seconds": facts["seconds"],
            # A run may go on elsewhere: these are of the process that ended the row's training.
            "device": facts["device"],
            "versions": facts["versions"],
        }
        if net.gates is not None:
            self.folder.save_usage(measure_usage_by_class(net, self.data.test))
        self.results["rows"].append(row)
        self.results["curves"][name] = facts["curve"]
        self.results["layers"] = [prunable.layer_name for prunable in net.prunable]
        self.folder.save_results()

    # -- finding structures

    def limit_goal(self, method: str, goal: Goal) -> Goal:
        """The goal. If it is not required, its target is at most what this method can remove."""
        if goal.target is None or goal.is_required:
            return goal
        widths = self.trainer.baseline.widths
        largest_cut = largest_reduction(widths, self.trainer.make_reduction_of(method))
        if largest_cut >= goal.target:
            return goal
        self.reporter.say(
            f"{method} cannot cut {goal.target:.2%} as the rows before it do; it cuts "
            f"{largest_cut:.2%}, with one channel left in every layer"
        )
        return replace(goal, target=largest_cut)

    def find_recovered_net(self, method: str, target: float | None) -> RecoveredNet:
        """A net of the structure that a method finds, recovered."""
        if method == "sep" and self.settings.searches_by_regression(target):
            return self.sep_row.find_recovered_net(target)
        if method == "uniform":
            net, score = self.find_uniform(target)
        else:
            net, score = run_search(self.trainer, method, target)
        return RecoveredNet(net, score, self.folder.search_seconds(method))

    def find_uniform(self, target: float | None) -> tuple[Net, ScoredStructure]:
        """(recovered net, its score) with the same share of every layer, at a cut of `target`.

        Where a search by REINFORCE made the first row, `uniform` gets there as that search does: in
        steps of the pruning rate, with a recovery each. Else it gets there in one step. Raises
        UserError without a target.
        """
        if target is None:
            raise UserError(
                "uniform needs a cut to land on: run it with, or after, another method", 2
            )
        final_structure = uniform_structure(
            self.trainer.baseline.widths, self.trainer.make_reduction_of("uniform"), target
        )
        # `target` may be the cut of the first row. That row was searched for the target that the
        # user gave, if any.
        is_one_step = self.settings.searches_by_regression(self.settings.target)
        net = self.trainer.load_baseline()
        score = self.trainer.make_baseline_score(target)
        candidates = []
        while net.structure != final_structure:
            structure = final_structure
            if not is_one_step:
                smaller = shrink_all(net.structure, self.settings.pruning_rate)
                structure = tuple(map(max, smaller, final_structure))
            number = len(candidates) + 1
            path = (
                self.folder.pool_path("uniform") / f"{number}-{structure_name(final_structure)}.pt"
            )
            # Each step counts as an LSTM epoch of its own.
            net, score = self.trainer.load_or_make_candidate(
                path, "uniform", net, structure, target=target, lstm_epoch=number, number=number
            )
            candidates.append(score)
        self.folder.set_search_results("uniform", "uniform", target, candidates)
        self.folder.save_results()
        return net, score

    def round_widths(self, method: str, recovered: RecoveredNet, goal: Goal) -> RecoveredNet:
        """Round the widths that were found to multiples of `round_to` (ours: many machines compute
        channels in blocks).

        If the structure changes, the baseline is pruned to it and recovered. The results keep
        accuracy, cut and latency before and after. A target that is not required is dropped where
        multiples cannot reach it: then the structure goes to the nearest multiples.
        """
        trainer = self.trainer
        widths = trainer.baseline.widths
        reduction_of = trainer.make_reduction_of(method)
        largest_cut = largest_reduction(widths, reduction_of, self.round_to)
        target = goal.target
        if target is not None and target > largest_cut and not goal.is_required:
            target = None
        structure = round_structure(
            recovered.score.structure, widths, reduction_of, target, self.round_to
        )
        rounded = recovered
        if structure != recovered.score.structure:
            candidates = self.folder.searched_candidates(method)
            net, candidate = trainer.load_or_make_candidate(
                self.folder.pool_path(method) / f"rounded-{structure_name(structure)}.pt",
                method,
                trainer.load_baseline(),
                structure,
                target=goal.target,
                lstm_epoch=candidates[-1].lstm_epoch if candidates else 0,
                number=len(candidates) + 1,
            )
            rounded = RecoveredNet(net, candidate, recovered.seconds + candidate.seconds)
        self.results["rounded"][method] = {
            "before": self.measure_rounding(recovered),
            "after": self.measure_rounding(rounded),
        }
        self.folder.save_results()
        return rounded

    def measure_rounding(self, recovered: RecoveredNet) -> dict:
        """What the report says of a net before or after rounding; latencies in seconds, of 1 and of
        128 images."""
        net, score = recovered.net, recovered.score
        images = self.data.validation
        single = sep.tune(net) if self.trainer.device.type == "cpu" else net
        return {
            "widths": list(score.structure),
            "validation_accuracy": score.validation_accuracy,
            "macs_reduction": score.macs_reduction,
            "latencies": [
                *measure_latencies([single], images, 1),
                *measure_latencies([net], images, 128),
            ],
        }
