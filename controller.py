"""Finding and training the small net: data in memory, the teacher-student loop, the LSTM policy, the search, the run.

One `fit` serves the baseline (no teacher), every recovery and the final training. One `Run.search` serves hard pruning
(IJCAI 2018) and SEP (TIP 2021): they differ in how a net is brought to a structure, see METHODS. Everything random is
drawn from a stream named by the seed and the place (`stream`), so that a run that was stopped goes on with the same numbers.
"""
import hashlib
import json
import math
import platform
import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from io import StringIO
from pathlib import Path

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
from models import Failure, Net

VALIDATION = 0.1  # of the training images; used for the rewards (paper)
MOMENTUM, DECAY, BATCH = 0.9, 5e-4, 128  # SGD of every training (script)
HARD_LABELS = 0.1  # weight of the cross-entropy beside the teacher's MSE (script)
COMPLEXITY = 0.16  # reward = accuracy - 0.16 * MACs / MACs of the baseline (script: 4e-10 a MAC on VGG-19)
ADVANTAGE, POLICY_LR = 10, 0.001  # scale of the advantage, Adam (script)
HIDDEN, LAYERS, DROPOUT = 100, 2, 0.8  # of the LSTM (script)
TEACHER_BYTES = 1 << 30  # ours: outputs of the teacher kept at most; beyond, they are computed epoch by epoch

# How a method brings a net to a structure, and what that will cost.
METHODS = dict.fromkeys(("lstm", "random", "uniform"), (models.prune, models.macs)) | {"sep": (sep.soften, sep.macs)}
NETS = ("baseline", "static", *METHODS)  # of a run folder: each has a checkpoint and a row
FILES = ("progress.pt", "report.svg", "results.json")  # beside them; results last: they tell whose all is


def stream(*where) -> int:
    """A seed for a random stream, named by the run's seed and the place where it is drawn."""
    return int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:7], "big")


# ---- data -------------------------------------------------------------------------------------------------------------


class Images:
    """A labelled set of images in memory: pixels (N, H, W, C) uint8, labels (N,) int64; crop in pixels, flip or not; the classes'
    `names` where a user gave them."""

    def __init__(self, pixels, labels, *, mean, std, crop: int = 0, flip: bool = False, names=()):
        self.pixels, self.labels, self.crop, self.flip, self.names = pixels.contiguous(), labels.long(), crop, flip, list(names)
        self.mean, self.std = mean, std
        self.shift = torch.tensor(mean, device=pixels.device).reshape(-1, 1, 1) / torch.tensor(std, device=pixels.device).reshape(-1, 1, 1)
        self.factor = 1 / (255 * torch.tensor(std, device=pixels.device).reshape(-1, 1, 1))

    @cached_property
    def padded(self) -> torch.Tensor:
        """The pixels with a black border to crop from; made where somebody crops, not for every copy or part."""
        return F.pad(self.pixels, (0, 0, *[self.crop] * 4)) if self.crop else self.pixels

    def __len__(self):
        return len(self.labels)

    def new(self, pixels, labels, mean=None, std=None) -> "Images":
        """Other images, or other statistics, treated as these are."""
        return Images(pixels, labels, mean=mean or self.mean, std=std or self.std, crop=self.crop, flip=self.flip, names=self.names)

    def part(self, index) -> "Images":
        return self.new(self.pixels[index], self.labels[index])

    def to(self, device) -> "Images":
        return self.new(self.pixels.to(device), self.labels.to(device))

    def normalised(self, mean, std) -> "Images":
        return self.new(self.pixels, self.labels, mean, std)

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def augmented(self) -> bool:
        return bool(self.crop or self.flip)

    def view(self, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The order (N,) of an epoch, and each image's crop and flip (N, 3) in it: common random numbers, per seed and epoch."""
        g = torch.Generator().manual_seed(stream(seed, "images", epoch))
        order = torch.randperm(len(self), generator=g)
        place = torch.randint(0, 2 * self.crop + 1, (len(self), 3), generator=g)
        place[:, 2] = torch.randint(0, 2, (len(self),), generator=g) * self.flip
        return order.to(self.labels.device), place.to(self.labels.device) if self.augmented else None

    def batch(self, index, place=None) -> torch.Tensor:
        """The images `index` (B,), normalised, float32 (B, C, H, W) channels-last; cropped and flipped as `place` says."""
        if place is None:
            x = self.pixels[index]
        else:
            top, left, flip = place[index].unbind(1)
            h, w = self.pixels.shape[1:3]
            rows = top[:, None] + torch.arange(h, device=index.device)
            columns = torch.arange(w, device=index.device).expand(len(index), -1)
            columns = left[:, None] + torch.where(flip[:, None] > 0, w - 1 - columns, columns)
            x = self.padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return x.permute(0, 3, 1, 2).float().mul_(self.factor).sub_(self.shift)


STATISTICS = {  # mean and standard deviation of the training pixels, in units of 255
    "mnist": ((0.1307,), (0.3081,)), "digits": ((0.16,), (0.33,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
FOREIGN = {  # what other people's nets were trained with, per channel count
    3: {"ImageNet's mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "mean and std 0.5": ((0.5,) * 3, (0.5,) * 3),
        "pixels in [0, 1]": ((0.0,) * 3, (1.0,) * 3)},
    1: {"mean and std 0.5": ((0.5,), (0.5,)), "pixels in [0, 1]": ((0.0,), (1.0,))},
}


OWN = "images in "  # begins the name of a data set of the user's own; its folder follows


def load_data(name: str, folder: Path, *, crop: int = 0, flip: bool = False) -> tuple[Images, Images, str]:
    """(training, test, what it is) of a data set; downloads what `folder` lacks. Raises Failure.

    A `folder` with train/CLASS and test/CLASS in it is the user's own data set and goes before `name`, whose statistics
    (mean, std) then serve it.
    """
    folder, own = Path(folder), is_own(folder)
    keep = dict(zip(("mean", "std"), STATISTICS[name]))
    if name == "digits":
        if own:
            raise Failure(f"digits are drawn and read no folder; {folder} serves the other experiments, mnist (gray) and those of CIFAR (RGB); "
                          "name another --data-dir", 2)
        train, test = (digits(n, stream("digits", n)) for n in (6000, 2000))
        return Images(*train, **keep), Images(*test, **keep), "digits"
    gray = name == "mnist"
    if own:
        train, test, keep["names"] = own_images(folder, gray)
        what = f"{OWN}{folder.resolve()}"
    else:
        train, test, what = from_torchvision(name, folder, "train"), from_torchvision(name, folder, "test"), name
    return Images(*train, crop=crop, flip=flip, **keep), Images(*test, **keep), what


def is_own(folder: Path) -> bool:
    """Whether `folder` is a user's own data set: train/CLASS/images and test/CLASS/images. Raises Failure if it is half of one."""
    there = [part for part in ("train", "test") if (Path(folder) / part).is_dir()]
    if len(there) == 1:
        raise Failure(f"{folder} has {there[0]}/ alone; a data set of your own has train/CLASS/images and test/CLASS/images")
    return bool(there)


def from_torchvision(name: str, folder: Path, part: str):
    """(pixels, labels) of MNIST, CIFAR-10 or CIFAR-100."""
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    new = [d for d in (folder / "MNIST" / "raw", folder / "MNIST", folder, *folder.parents) if not d.exists()]
    try:
        try:
            found = kind(folder, train=part == "train")
        except RuntimeError:  # not there, or not complete
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                found = kind(folder, train=part == "train", download=True)
        pixels, labels = torch.as_tensor(found.data), torch.as_tensor(found.targets)
    except Exception as e:
        for empty in new:
            with suppress(OSError):
                empty.rmdir()
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        inside = " (the folder above that one)" * (folder.name in ("MNIST", "raw", "cifar-10-batches-py", "cifar-100-python"))
        raise Failure(f"{folder} has no complete {name} data, or damaged files of it, and it could not be downloaded; name its folder{inside} with "
                      f"--data-dir ({reason[:200]})") from e
    return pixels.reshape(*pixels.shape[:3], -1), labels


def own_images(folder: Path, gray: bool):
    """(pixels, labels) of the image files in folder/train/CLASS, and of those in folder/test/CLASS; the classes' names, sorted."""
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS
    from torchvision.transforms.functional import pil_to_tensor

    class Shown(ImageFolder):  # without what file managers and notebooks hide there
        def find_classes(self, directory):
            names = [n for n in super().find_classes(directory)[0] if not n.startswith(".")]
            if not names:
                raise FileNotFoundError("it has no folder of a class")
            return names, {n: i for i, n in enumerate(names)}

    hidden = lambda f, top: any(name.startswith(".") for name in Path(f).relative_to(top).parts)
    parts, sets = [], []
    for part in ("train", "test"):
        try:
            found = Shown(folder / part, is_valid_file=lambda f, top=folder / part: f.lower().endswith(IMG_EXTENSIONS) and not hidden(f, top))
        except OSError as e:
            raise Failure(f"{folder / part}: {str(e)[:200]}") from e
        pixels = []
        for path, _ in found.samples:
            try:
                with Image.open(path) as image:
                    if image.mode[0] in "IF":
                        raise ValueError(image.mode)
                    pixels.append(pil_to_tensor(image.convert("L" if gray else "RGB")).permute(1, 2, 0))
            except Exception as e:
                raise Failure(f"{path} cannot be read as an image of 8 bits a channel") from e
            height, width = pixels[-1].shape[:2]
            side = len(parts[0][0][0]) if parts else len(pixels[0])
            if (height, width) != (side, side):
                before = f", and {side} x {side} came before" if height == width else ""
                raise Failure(f"{path} has {width} x {height} pixels; all images must be squares of one size{before}")
        parts.append((torch.stack(pixels), torch.tensor(found.targets)))
        sets.append(found.classes)
    if len(sets[0]) < 2:
        raise Failure(f"{folder / 'train'} has one class alone, {sets[0][0]}; there is nothing to tell apart")
    if sets[0] != sets[1]:
        raise Failure(f"{folder}: train and test have different classes ({', '.join(sorted(set(sets[0]) ^ set(sets[1])))})")
    return *parts, sets[0]


# Ten classes of strokes, as corner points (x, y) in [-1, 1], y downwards.
STROKES = ["-6-9 6-9 8 0 6 9 -6 9 -8 0 -6-9", "-4-6 0-9 0 9", "-7-5 0-9 7-5 -7 9 7 9", "-6-9 6-9 0-1 6 4 0 9 -6 7", "3 9 3-9 -7 3 8 3",
           "7-9 -6-9 -6-1 4-2 7 4 2 9 -7 8", "5-9 -5 0 -6 6 0 9 6 5 3 0 -5 2", "-7-9 7-9 -2 9", "0 0 5-5 0-9 -5-5 0 0 6 5 0 9 -6 5 0 0",
           "5-2 -3 0 -6-5 0-9 6-6 5-2 3 9"]


def digits(count: int, seed: int):
    """(pixels (N, 28, 28, 1) uint8, labels): strokes whose thickness, slant, scale, shift and noise vary. Not MNIST."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=g)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(count, *shape, generator=g)
    lines = [torch.tensor([int(n) for n in re.findall(r"-?\d", s)]).reshape(-1, 2) / 9.0 for s in STROKES]
    longest = max(map(len, lines))
    corners = torch.stack([torch.cat([p, p[-1:].expand(longest - len(p), 2)]) for p in lines])[labels]  # (N, P, 2)
    corners = corners + 0.09 * torch.randn(corners.shape, generator=g)
    slant, turn, scale = uniform(-0.4, 0.4), uniform(-0.3, 0.3), uniform(0.5, 0.85, 2)
    x, y = (corners * scale[:, None]).unbind(2)
    x = x - slant[:, None] * y
    x, y = x * turn.cos()[:, None] - y * turn.sin()[:, None], x * turn.sin()[:, None] + y * turn.cos()[:, None]
    p = torch.stack([x, y], 2) + uniform(-0.18, 0.18, 1, 2)  # (N, P, 2)
    axis = (torch.arange(28) - 13.5) / 13.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), 2).reshape(1, -1, 2)  # (1, 784, 2)
    nearest = torch.full((count, 784), 9.0)
    for a, b in zip(p.unbind(1)[:-1], p.unbind(1)[1:]):  # the distance of each pixel from the stroke a to b
        d = (b - a)[:, None]
        t = (((grid - a[:, None]) * d).sum(2) / d.square().sum(2).clamp_min(1e-9)).clamp(0, 1)
        nearest = torch.minimum(nearest, (a[:, None] + t[..., None] * d - grid).norm(dim=2))
    ink = torch.sigmoid((uniform(0.05, 0.14, 1) - nearest) * 30) * uniform(0.6, 1.0, 1)
    ink = ink + uniform(0.0, 0.25, 1) * torch.randn(ink.shape, generator=g)
    return (ink.clamp(0, 1) * 255).to(torch.uint8).reshape(-1, 28, 28, 1), labels


def fingerprint(*sets: Images) -> str:
    """A name for their pixels and labels: others have another."""
    found = hashlib.sha256()
    for images in sets:
        for v in (images.pixels, images.labels):
            found.update(v.cpu().numpy())
    return found.hexdigest()[:16]


def order_of(images: Images, seed: int) -> torch.Tensor:
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(stream(seed, "split")))


def split(images: Images, seed: int) -> tuple[Images, Images]:
    """(training, validation): 10 % of the training images validate, chosen by `seed`."""
    order = order_of(images, seed)
    count = int(VALIDATION * len(images))
    if count < 10:
        raise Failure(f"{len(images)} training images are too few: {VALIDATION:.0%} of them validate, so at least {10 / VALIDATION:.0f} are needed")
    return images.part(order[count:]), images.part(order[:count])


def statistics_of(net: Net, train: Images, seed: int) -> tuple[str, tuple, tuple]:
    """(what they are, mean, std) under which `net` gets the most of the validation images right: the data set's own, or FOREIGN."""
    images, best = train.part(order_of(train, seed)[: max(100, int(VALIDATION * len(train)))]), (-1.0, "", None, None)
    for what, (mean, std) in ({"the data set's own mean and std": (train.mean, train.std)} | FOREIGN[net.channels]).items():
        found = accuracy(net, images.normalised(mean, std))
        best = max(best, (found, what, mean, std), key=lambda b: b[0])
    return f"images normalised with {best[1]}, with which it gets the most validation images right: {best[0]:.2%}", *best[2:]


# ---- the teacher-student loop -------------------------------------------------------------------------------------------


def half(device: torch.device) -> torch.autocast:
    """bfloat16 autocast where the machine computes it natively, else float32."""
    cuda = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


class Teacher:
    """The softmax outputs of a net on a set of images, computed once per view of them and kept."""

    def __init__(self, net: Net, images: Images, seed: int):
        self.net, self.images, self.seed, self.kept = net, images, seed, {}

    @torch.no_grad()
    def probabilities(self, epoch: int, count: int) -> torch.Tensor:
        """(N, classes) float32 for the first `count` images that epoch `epoch` shows, in the images' own order, 0 for the others."""
        epoch, count = (epoch, count) if self.images.augmented else (0, len(self.images))
        if (epoch, count) not in self.kept:
            order, place = self.images.view(self.seed, epoch)
            self.net.eval()
            with half(self.images.labels.device):
                parts = [(i, self.net(self.images.batch(i, place)).float().softmax(1)) for i in order[:count].sort().values.split(len(chunks(self.images)[0]))]
            found = torch.zeros(len(self.images), parts[0][1].shape[1], device=order.device)
            for i, part in parts:
                found[i] = part
            if found.nbytes * (len(self.kept) + 1) > TEACHER_BYTES:
                return found
            self.kept[epoch, count] = found
        return self.kept[epoch, count]


def chunks(images: Images):
    """Indices (N,) in parts of 500 images of 32 x 32 pixels (on a GPU 2,000), or of fewer larger ones."""
    most = 2000 if images.labels.is_cuda else 500
    return torch.arange(len(images), device=images.labels.device).split(max(1, min(most, most * 32 * 32 // images.pixels.shape[1] ** 2)))


@torch.no_grad()
def accuracy(net: Net, images: Images, exact: bool = False) -> float:
    """Share of `images` that `net` classifies right, in [0, 1]; `exact`: in float32."""
    net.eval()
    with torch.autocast(images.labels.device.type, enabled=False) if exact else half(images.labels.device):
        right = sum((net(images.batch(i)).argmax(1) == images.labels[i]).sum() for i in chunks(images))
    return int(right) / len(images)


def loss_of(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None, temperature: float | None = None) -> torch.Tensor:
    """Cross-entropy; with the teacher's softmax (B, classes): MSE between the softmaxes + 0.1 * cross-entropy (script).

    With a temperature T (ours, for `fast`) T^2 * KL between the softmaxes of logits / T instead of the MSE (Hinton et al. 2015): a
    teacher that is sure of its training images still tells which classes are like which.
    """
    hard = F.cross_entropy(logits, labels)
    if teacher is None:
        return hard
    if temperature is None:
        return F.mse_loss(logits.softmax(1), teacher) + HARD_LABELS * hard
    soft = (teacher.clamp_min(1e-30).log() / temperature).softmax(1)
    return temperature**2 * F.kl_div((logits / temperature).log_softmax(1), soft, reduction="batchmean") + HARD_LABELS * hard


@dataclass(frozen=True)
class Plan:
    """How long and how fast a net is trained: a fixed learning rate, or one cycle (a fifth up, then down to 0, linearly)."""

    epochs: int
    lr: float
    cycle: bool = False
    steps: int | None = None  # of an epoch, at most; None: all of its images are shown
    temperature: float | None = None  # of the distillation; None: the papers' MSE

    def rate(self, progress: float) -> float:
        """The learning rate at `progress` in [0, 1] of the training."""
        return self.lr * min(progress / 0.2, (1 - progress) / 0.8) if self.cycle else self.lr


def sgd(net: Net, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr, momentum=MOMENTUM, weight_decay=DECAY)


class Step:
    """A training step: (x (B, C, H, W) normalised, labels (B,), teacher's softmax (B, classes) or None, learning rate) -> loss.

    On a GPU all of it (forward, backward, optimizer) is captured in one CUDA graph by the first call, and replayed by all: the
    hundreds of small kernels of a narrow net then cost no Python. Its inputs keep their shapes and their places in memory.
    """

    def __init__(self, net: Net, optimizer, temperature: float | None = None):
        self.net, self.optimizer, self.temperature = net, optimizer, temperature
        self.graph, self.apart, self.held, self.loss = None, None, (), None

    def __call__(self, x, labels, soft, lr: float) -> torch.Tensor:
        if not x.is_cuda:
            self.optimizer.param_groups[0]["lr"] = lr
            return self.run(x, labels, soft)
        inputs = x, labels, soft, torch.full((), lr, device=x.device)
        if self.graph is None:
            self.held = [None if v is None else v.clone() for v in inputs]
            self.optimizer.param_groups[0].update(lr=self.held[3], fused=True)  # the fused kernel reads the rate where it lies
            self.capture()
        for held, v in zip(self.held, inputs):
            if v is not None:
                held.copy_(v)
        self.graph.replay()
        return self.loss

    def run(self, x, labels, soft, apart: "Apart | None" = None) -> torch.Tensor:
        with half(x.device), apart or nullcontext():
            logits = self.net(x)
        loss = loss_of(logits.float(), labels, soft, self.temperature)
        self.optimizer.zero_grad()
        try:
            loss.backward()
        finally:
            if apart:
                apart.join()  # also where Ctrl-C comes: a graph cannot be left with a stream apart
        if apart:
            apart.hand_over()
        self.optimizer.step()
        return loss.detach()

    def capture(self) -> None:
        """Three steps aside, as a graph's libraries want to be warm, then the one that is kept; nothing of them stays in the net."""
        before, self.apart = deepcopy(self.net.state_dict()), Apart(self.net)  # kept: the graph writes into its tensors
        moved = {p: s["momentum_buffer"].clone() for p, s in self.optimizer.state.items()}
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.run(*self.held[:3], self.apart)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.run(*self.held[:3], self.apart)
        self.net.load_state_dict(before)  # in place
        for p, s in self.optimizer.state.items():
            s["momentum_buffer"].copy_(moved[p]) if p in moved else s["momentum_buffer"].zero_()


class Convolution(torch.autograd.Function):
    """conv2d without a bias; the gradient of its weights is computed in the stream of an `Apart`, and left there."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding, apart):
        ctx.save_for_backward(x, weight)
        ctx.how, ctx.apart = (None, stride, padding, [1, 1], False, [0, 0], 1), apart
        return torch.ops.aten.convolution(x, weight, *ctx.how)

    @staticmethod
    def backward(ctx, grad):
        def gradient(which):
            return torch.ops.aten.convolution_backward(grad, *ctx.saved_tensors, *ctx.how, [which == 0, which == 1, False])[which]

        if ctx.apart.stream:
            ctx.apart.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(ctx.apart.stream):
            of_weight = gradient(1)
        # none of these may be used for something else before that stream is done; autograd, which waits for none, gets no gradient
        ctx.apart.busy.append((grad, *ctx.saved_tensors, of_weight))
        return gradient(0) if ctx.needs_input_grad[0] else None, None, None, None, None


class Apart(TorchFunctionMode):
    """A context for a forward pass whose convolutions a GPU computes faster, to the same numbers: all their weights are cast to
    bfloat16 by one kernel, the gradients back by another, and these gradients are computed beside the rest of the backward pass,
    for the kernels of a narrow net leave most of a GPU idle. `join` waits for them, `hand_over` gives them to the net."""

    def __init__(self, net: Net):
        super().__init__()
        device = next(net.parameters()).device
        self.stream, self.busy = torch.cuda.Stream() if device.type == "cuda" else None, []
        kind = torch.bfloat16 if half(device)._enabled else torch.float32
        self.cast = {m.weight: m.weight.detach().to(kind, copy=True).requires_grad_() for m in net.modules() if isinstance(m, nn.Conv2d)}

    def __enter__(self):
        with torch.no_grad():
            torch._foreach_copy_(list(self.cast.values()), list(self.cast))
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.conv2d or args[1] not in self.cast:
            return func(*args, **(kwargs or {}))
        x, weight, bias, stride, padding = args[:5]
        weight = self.cast[weight]
        y = Convolution.apply(x.to(weight.dtype), weight, stride, padding, self)
        return y if bias is None else y + bias.to(y.dtype).reshape(-1, 1, 1)

    def join(self) -> None:
        if self.stream and self.busy:
            torch.cuda.current_stream().wait_stream(self.stream)

    def hand_over(self) -> None:
        found = {weight: gradient for *_, weight, gradient in self.busy}
        for weight in self.cast:
            weight.grad = torch.empty_like(weight)
        torch._foreach_copy_([w.grad for w in self.cast], [found[w] for w in self.cast.values()])
        self.busy.clear()


def filled(net: Net, optimizer) -> tuple[Net, torch.optim.SGD]:
    """The two with channels of zeros up to multiples of 8, which a GPU trains faster than any other number; zeros they stay, for
    nothing comes from them, gradients neither. The very same two where the net has such widths, or gates (which choose among all)."""
    widths = tuple(-(-w // 8) * 8 for w in net.widths)
    if net.gates is not None or widths == net.widths:
        return net, optimizer
    with next(net.parameters()).device:
        wide = models.like(net, widths).to(memory_format=torch.channels_last)
    carry(net, optimizer, wide, own := sgd(wide, optimizer.defaults["lr"]))
    return wide, own


@torch.no_grad()
def carry(net: Net, optimizer, other: Net, others) -> None:
    """Give the net `other` and its optimizer the state of `net` and of its: what both have room for, zeros elsewhere."""
    def state(net, optimizer):
        for p in net.parameters():
            if not optimizer.state[p]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return [*net.state_dict().values(), *(optimizer.state[p]["momentum_buffer"] for p in net.parameters())]

    for a, b in zip(state(net, optimizer), state(other, others)):
        room = tuple(slice(min(sizes)) for sizes in zip(a.shape, b.shape))
        b.zero_()[room] = a[room]


def fit(net: Net, images: Images, plan: Plan, *, optimizer, seed: int, teacher: Teacher | None = None, start: int = 0, track=lambda steps: steps):
    """Train `net` in place; after each epoch, from epoch `start` on, yield (epoch, mean loss). A generator: iterate it."""
    device, batch = images.labels.device, min(BATCH, len(images))
    steps = min(plan.steps or len(images), len(images) // batch)  # ours: the last, smaller batch is left out; another one each epoch
    cuda = device.type == "cuda"
    wide, own = filled(net, optimizer) if cuda else (net, optimizer)
    take = Step(wide, own, plan.temperature)
    ahead = batch * (max(1, 16 * 32 * 32 // images.pixels.shape[1] ** 2) if cuda else 1)  # drawn at once: a dozen small kernels less a step
    for epoch in range(start, plan.epochs):
        wide.train()
        order, place = images.view(seed, epoch)
        soft = teacher.probabilities(epoch, steps * batch if plan.steps else len(images)) if teacher else None
        total = torch.zeros((), device=device)
        for step in track(range(steps)):
            if not step * batch % ahead:
                index = order[step * batch : min(step * batch + ahead, steps * batch)]
                drawn = zip(*(v.split(batch) for v in (images.batch(index, place), images.labels[index], soft[index] if teacher else index)))
            lr = plan.rate((epoch * steps + step + 0.5) / (plan.epochs * steps))
            x, labels, outputs = next(drawn)
            total += take(x, labels, outputs if teacher else None, lr)
        if wide is not net:
            carry(wide, own, net, optimizer)
        yield epoch, total.item() / steps


def tuned(net: Net, images: Images) -> sep.Tuned:
    """sep.tune by the first of `images`, which are on the CPU."""
    return sep.tune(net, images.batch(torch.arange(min(32, len(images)))))


def latency(net: Net | sep.Tuned, images: Images, batch: int) -> float:
    """Median seconds of a forward pass of so many images in float32, warm; other images each time."""
    times, every = [], torch.arange(batch, device=images.labels.device)
    net.eval()
    with torch.no_grad():
        for n in range(30):
            x = images.batch((n * batch + every) % len(images))
            torch.cuda.synchronize() if x.is_cuda else None
            began = time.perf_counter()
            net(x)
            torch.cuda.synchronize() if x.is_cuda else None
            times.append(time.perf_counter() - began)
    return sorted(times[10:])[10]


def speed(net: Net, device: torch.device) -> float:
    """Images per second that `fit` trains `net` at, with a teacher's outputs at hand, measured on random images."""
    steps = 64 if device.type == "cuda" else 3
    pixels = torch.randint(0, 256, (BATCH * steps, net.size, net.size, net.channels), dtype=torch.uint8)
    images = Images(pixels, torch.zeros(len(pixels)), mean=(0.5,) * net.channels, std=(0.25,) * net.channels).to(device)
    net, marks = net.to(device).to(memory_format=torch.channels_last), []
    for _ in fit(net, images, Plan(1, 0.0), optimizer=sgd(net, 0.0), seed=0, track=lambda s: (marks.append(time.perf_counter()) or n for n in s)):
        marks.append(time.perf_counter())
    return BATCH * (steps - 1) / (marks[-1] - marks[1])


# ---- the LSTM -----------------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """An LSTM that reads a net layer by layer: (L, inputs) or (L, B, inputs) -> (L, outputs) or (L, B, outputs)."""

    def __init__(self, inputs: int = 4, outputs: int = 2, dropout: float = DROPOUT):
        super().__init__()
        self.lstm, self.head = nn.LSTM(inputs, HIDDEN, LAYERS, dropout=dropout), nn.Linear(HIDDEN, outputs)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(cells)[0])


def cells(net: Net, structure) -> torch.Tensor:
    """What the LSTM reads, (L, 4): type, size, next layer's type, next layer's size. Sizes are widths over the widest
    (ours: the script's raw sizes saturate an LSTM); a pooling's size is its 2 pixels."""
    full, rows = max(net.widths), []
    width = dict(zip((p.layer for p in net.prunable), structure))
    kind = lambda name: models.LINEAR if isinstance(net.get_submodule(name), nn.Linear) else models.CONV
    for p, k in zip(net.prunable, structure):
        following = (models.POOL, 2) if p.pool else (kind(p.next), width.get(p.next, net.get_submodule(p.next).weight.shape[0]))
        rows.append((kind(p.layer), k / full, following[0], following[1] / full))
    return torch.tensor(rows, dtype=torch.float)


def shrink(structure, scheme, rate: float) -> tuple[int, ...]:
    """The structure after one step: a chosen layer keeps int((1 - rate) * width) channels, at least one (paper)."""
    return tuple(max(1, int((1 - rate) * w + 1e-9)) if d else w for w, d in zip(structure, scheme))


def trim(parent, child, cut, target: float) -> tuple[int, ...]:
    """The smallest part of the step from `parent` to `child` that still cuts `target`; `cut` gives a structure's cut."""
    removals = [i for _, i in sorted(((p - n) / (p - c), i) for i, (p, c) in enumerate(zip(parent, child)) for n in range(c, p))]

    def after(n: int) -> tuple[int, ...]:
        gone = Counter(removals[:n])
        return tuple(k - gone[i] for i, k in enumerate(parent))

    count = bisect_left(range(len(removals)), target, key=lambda n: cut(after(n)))  # channel by channel, all layers in step
    now = after(count)
    for i in dict.fromkeys(reversed(removals[:count])) if cut(now) >= target else ():  # the last one may cut much: what it makes up for comes back
        while now[i] < parent[i] and cut(more := (*now[:i], now[i] + 1, *now[i + 1 :])) >= target:
            now = more
    return now


def landed(structure, widths, cut, target: float, rate: float) -> tuple[int, ...]:
    """`structure`, or with as little less as cuts `target`: from layers that have less than their `widths` already, while they have any."""
    check_reach(widths, cut, target)
    while cut(structure) < target:
        smaller = shrink(structure, [k < w for k, w in zip(structure, widths)], rate)
        smaller = smaller if smaller != structure else shrink(structure, [1] * len(widths), rate)
        structure = trim(structure, smaller, cut, target)
    return structure


def uniform(widths, cut, target: float) -> tuple[int, ...]:
    """The structure with the same share of channels in every layer, to a channel or 3 %, whose cut is nearest to `target`."""
    best = tuple(widths)
    step = [cut([k - (i == j) for j, k in enumerate(widths)]) for i in range(len(widths))]
    coarse = sorted(range(len(widths)), key=lambda i: -step[i])  # a channel of some layers cuts much more than one of others
    for share in (n / 1000 for n in range(1000, 0, -1)):
        now = [max(1, int(share * k)) for k in widths]
        if cut(now) < target:
            continue
        for i in coarse:
            for _ in range(1 + int(0.03 * widths[i])):
                up = [k + (i == j) for j, k in enumerate(now)]
                if up[i] > widths[i] or cut(up) < target:
                    break
                now = up
        best = min(best, tuple(now), key=lambda w: abs(cut(w) - target))
        if cut(now) - target > 0.05:
            break
    return best


def reach(widths, cut, multiple: int = 1) -> float:
    """What the smallest structure at multiples of `multiple` (or whole `widths`) cuts: no other one cuts more."""
    return cut([min(w, multiple) for w in widths])


def check_reach(widths, cut, target: float | None, multiple: int = 1) -> None:
    """Raise Failure where no structure at multiples of `multiple` (or whole `widths`) cuts `target`, or none but the whole net is one."""
    if multiple > max(widths):
        raise Failure(f"no layer of this net is {multiple} wide, {max(widths)} at most; give a smaller --round-to", 2)
    if target is not None and (most := reach(widths, cut, multiple)) < target:
        raise Failure(f"{f'with widths at multiples of {multiple}' if multiple > 1 else 'with one channel left in every layer'} this net cannot cut "
                      f"{100 * target:.6g}%, {most:.1%} at most; give a smaller {'--round-to' if multiple > 1 else '--target'}", 2)


def rounded(structure, widths, cut, target: float | None, multiple: int) -> tuple[int, ...]:
    """The structure of multiples (or whole `widths`) nearest to `structure`; with a `target`, one that still cuts it. Raises Failure
    where there is none."""
    check_reach(widths, cut, target, multiple)
    choices = [sorted({w, *range(multiple, w + 1, multiple)}) for w in widths]
    at = [min(range(len(c)), key=lambda n: abs(c[n] - k)) for c, k in zip(choices, structure)]
    now = lambda steps: tuple(c[n] for c, n in zip(choices, steps))
    if target is None:
        return now(at)
    excess = lambda i: choices[i][at[i]] / structure[i]
    step = lambda i, by: [n + by * (i == j) for j, n in enumerate(at)]
    while cut(now(at)) < target:  # down where rounding added the most
        at = step(max((i for i in range(len(at)) if at[i]), key=excess), -1)
    while larger := [i for i in range(len(at)) if at[i] + 1 < len(choices[i]) and excess(i) < 1 and cut(now(step(i, 1))) >= target]:
        at = step(min(larger, key=excess), 1)  # and up where it took the most, while that layer has less than it should
    return now(at)


@dataclass
class Candidate:
    """A structure that was tried, and how it did. `scheme` and `parent` are what first led to it."""

    structure: tuple[int, ...]
    scheme: tuple[int, ...]
    parent: tuple[int, ...] | None
    epoch: int  # of the LSTM
    validation_accuracy: float
    macs: int
    cut: float
    reward: float
    seconds: float


def name_of(structure) -> str:
    """A structure as a name for files and trainings: its widths, or a hash where there are too many of them."""
    name = "-".join(map(str, structure))
    return name if len(name) < 100 else f"{stream(name):x}"


def reward(accuracy: float, cut: float, target: float | None) -> float:
    """accuracy - 0.16 * MACs / MACs0 (script), where going past the `target` cut earns nothing more."""
    return accuracy - COMPLEXITY * max(1 - cut, 0.0 if target is None else 1 - target)


def best_of(tried: dict, count: int) -> list[Candidate]:
    """The `count` candidates of the largest rewards."""
    return sorted(tried.values(), key=lambda c: -c.reward)[:count]


def choose(candidates: Iterable[Candidate], target: float | None) -> Candidate:
    """The best network: the largest reward, at or past the target where one got there, else the largest cut."""
    there = [c for c in candidates if target is None or c.cut >= target]
    return max(there, key=lambda c: c.reward) if there else max(candidates, key=lambda c: c.cut)


def decide(policy: Policy, cells: torch.Tensor, seed: int, dice: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits (L, 2) of the policy, decisions (L,) sampled from them, or from even odds where dice decide): 0 keeps, 1 prunes."""
    torch.manual_seed(seed)
    logits = policy(cells)
    odds = torch.full_like(logits, 0.5) if dice else logits.detach().softmax(1)
    return logits, torch.multinomial(odds, 1)[:, 0]


def learn(policy: Policy, adam, logits: torch.Tensor, scheme: torch.Tensor, advantage: float) -> None:
    """One REINFORCE step: logits (L, 2), decisions (L,); the advantage is the child's reward less the parent's."""
    chosen = F.log_softmax(logits, 1).gather(1, scheme[:, None])
    adam.zero_grad()
    (-ADVANTAGE * advantage * chosen.mean()).backward()
    adam.step()


class Search:
    """The papers' search: a child of each of the nets with the largest rewards, decisions sampled, REINFORCE, an end after idle epochs.

    `next()` names what to try, (parent, scheme, structure), until it is None; `tell()` takes how the structure did. `net` is
    the baseline and `start` what is known of it, `cut` gives the cut of a structure; `dice` decide instead of the LSTM.
    """

    def __init__(self, net: Net, start: "Candidate", settings: "Settings", target: float | None, cut, name: str = "", dice: bool = False):
        self.net, self.settings, self.target, self.cut, self.name, self.dice = net, settings, target, cut, name, dice
        torch.manual_seed(stream(settings.seed, name, "policy"))
        self.policy = self.new_policy()
        self.adam = torch.optim.Adam(self.policy.parameters(), self.rate)
        self.tried, self.start = {start.structure: start}, start.structure
        self.epoch, self.idle, self.queue, self.bar, self.walks = 1, 0, [], start.reward, 0

    new_policy, rate = Policy, POLICY_LR

    def next(self):
        if not self.queue:
            if self.idle >= self.settings.patience:
                return None
            self.queue = [c.structure for c in best_of(self.tried, self.settings.parents)]
            self.bar = max(c.reward for c in self.tried.values())
        parent = self.queue[0]
        seed = stream(self.settings.seed, self.name, "decisions", self.epoch, parent)
        self.logits, self.scheme = decide(self.policy, cells(self.net, parent), seed, dice=self.dice)
        return parent, tuple(self.scheme.tolist()), shrink(parent, self.scheme.tolist(), self.settings.rate)

    def tell(self, candidate: "Candidate") -> None:
        """What came of the structure that `next` named; its memory, where that had been tried before."""
        self.tried[candidate.structure] = candidate
        if not self.dice:
            learn(self.policy, self.adam, self.logits, self.scheme, candidate.reward - self.tried[self.queue[0]].reward)
        self.queue = self.queue[1:]
        if not self.queue:
            better = max(c.reward for c in self.tried.values()) > self.bar
            self.epoch, self.idle = self.epoch + 1, 0 if better else self.idle + 1

    @property
    def best(self) -> "Candidate":
        return choose(self.tried.values(), self.target)

    def needed(self) -> set:
        """The structures whose weights may still be asked for."""
        return {c.structure for c in best_of(self.tried, self.settings.parents)} | {*self.queue, self.best.structure}

    def told(self) -> str:
        return f"{self.idle} of {self.settings.patience} epochs without a larger reward"

    def state(self) -> dict:
        found = dict(policy=self.policy.state_dict(), adam=self.adam.state_dict(), tried=[asdict(c) for c in self.tried.values()])
        return found | {k: getattr(self, k) for k in ("epoch", "idle", "queue", "bar", "walks")}

    def load(self, state: dict) -> None:
        self.policy.load_state_dict(state["policy"])
        self.adam.load_state_dict(state["adam"])
        self.tried = {c["structure"]: Candidate(**c) for c in state["tried"]}
        self.__dict__.update({k: state[k] for k in ("epoch", "idle", "queue", "bar", "walks")})


class Guided(Search):
    """ours, for `fast`: the LSTM learns from every candidate so far, and every candidate is a whole walk from the baseline to the target.

    For a structure the LSTM says what a step costs in each layer. The steps of all layers together should cost the accuracy
    that was lost: on this it is trained again after each LSTM epoch, on all candidates, so each layer gets its share of the credit.
    The first candidate has the same share of every layer. On a walk, layers whose cost is small beside the MACs that they save are
    pruned, with odds that sharpen as the search goes on.
    """

    rate, steps = 0.003, 60  # Adam's learning rate, and its steps after each LSTM epoch
    heat = 0.5, 0.1  # first and last: a layer that is twice as good has 2^(1 / heat) times the odds
    part = 0.25  # of the layers a step prunes, about

    def new_policy(self) -> Policy:
        return Policy(4 + len(self.net.widths), 1, dropout=0.0)  # it also reads which layer it is at: many have the same sizes

    def read(self, structure) -> torch.Tensor:
        return torch.cat([cells(self.net, structure), torch.eye(len(structure))], 1)

    def taken(self, structure) -> torch.Tensor:
        """(L,): how many steps lead from the baseline to the structure, in each layer."""
        return (torch.tensor(self.net.widths) / torch.tensor(structure)).log() / -math.log1p(-self.settings.rate)

    def next(self):
        if len(self.tried) > self.settings.candidates or self.idle >= 5 * self.settings.patience:  # idle: walks to known structures
            return None
        g = torch.Generator().manual_seed(stream(self.settings.seed, self.name, "decisions", self.walks))
        hot, cold = self.heat
        heat = hot * (cold / hot) ** min(1, len(self.tried) / self.settings.candidates)
        now = self.start if self.walks else uniform(self.net.widths, self.cut, self.target)  # the first: the same share everywhere
        while self.cut(now) < self.target:
            smaller = shrink(now, [1] * len(now), self.settings.rate)
            alone = [now[:i] + smaller[i : i + 1] + now[i + 1 :] for i in range(len(now))]
            saved = torch.tensor([self.cut(w) for w in alone]) - self.cut(now)
            if not (saved > 0).any():
                break
            with torch.no_grad():
                cost = F.softplus(self.policy(self.read(now))[:, 0]).clamp_min(1e-3) * (self.taken(smaller) - self.taken(now)).clamp_min(1e-3)
            worth = saved.clamp_min(1e-9).log() - cost.log()
            bar = worth[saved > 0].quantile(1 - self.part)
            odds = torch.where(saved > 0, torch.full_like(worth, self.part) if self.dice else torch.sigmoid((worth - bar) / heat), 0)
            now = trim(now, shrink(now, torch.bernoulli(odds, generator=g).tolist(), self.settings.rate), self.cut, self.target)
        return self.start, tuple(int(a < b) for a, b in zip(now, self.start)), now

    def tell(self, candidate: "Candidate") -> None:
        self.walks, self.idle = self.walks + 1, self.idle + 1 if candidate.structure in self.tried else 0
        self.tried[candidate.structure] = candidate
        known = [c for c in self.tried.values() if c.structure != self.start]
        if self.walks % self.settings.parents or not known:
            return
        self.epoch += 1
        if self.dice:
            return
        inputs = torch.stack([self.read(c.structure) for c in known], 1)
        steps = torch.stack([self.taken(c.structure) for c in known], 1)
        found = torch.tensor([c.validation_accuracy for c in known])
        lost = found.max() - found  # beside the best; and where the baseline is better than that (or than luck), beside the baseline
        lost = lost + torch.maximum(self.tried[self.start].validation_accuracy - found.max(), lost.std(correction=0))
        lost = lost / lost.mean().clamp_min(1e-6) * steps.sum(0).mean() * math.log(2)  # a fresh LSTM says softplus(0) for a step
        for _ in range(self.steps):
            said = (F.softplus(self.policy(inputs)[..., 0]) * steps).sum(0)
            loss = (said - lost).square().mean() / lost.var(correction=0).clamp_min(1e-3)
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()

    def needed(self) -> set:
        return {self.best.structure}

    def told(self) -> str:
        return f"at most {self.settings.candidates} candidates"


# ---- a run and its folder -----------------------------------------------------------------------------------------------


class Watch:
    """What a run tells while it works; the command line shows it. This one is silent."""

    def say(self, text: str) -> None: ...

    def stage(self, title: str, epochs: int, start: int) -> None: ...

    def steps(self, steps):
        return steps

    def epoch(self, title: str, epoch: int, epochs: int, loss: float, accuracy: float | None, seconds: float) -> None: ...


@dataclass(frozen=True)
class Settings:
    """The numbers of a run. They are kept in its folder: other numbers are another run."""

    baseline: Plan
    recovery: Plan
    final: Plan
    rate: float
    target: float | None
    parents: int
    patience: int
    candidates: int | None  # of a search that learns from all of them (Guided), where there is a target
    seed: int

    def guided(self, target: float | None) -> bool:
        """Whether a search for `target` learns from every candidate so far (Guided), and by the papers' rules (Search) else."""
        return bool(self.candidates and target)


class Run:
    """A run folder, and the work that fills it. Every method picks up what the folder already holds."""

    def __init__(self, folder: Path, settings: Settings, head: dict, train: Images, test: Images, watch: Watch | None = None, fresh: bool = False,
                 round_to: int | None = None, split_seed: int | None = None):
        self.folder, self.settings, self.test, self.watch, self.round_to = Path(folder), settings, test, watch or Watch(), round_to
        self.split_seed = settings.seed if split_seed is None else split_seed
        self.all, (self.train, self.validation) = train, split(train, self.split_seed)
        self.claim(fresh)
        self.device, self.teachers, self.began = train.labels.device, {}, time.time()
        head = head | dict(train_images=len(train), test_images=len(test), images=fingerprint(train, test), statistics=[train.mean, train.std],
                           seed=settings.seed, round_to=round_to, device=describe(self.device), versions=versions(), seconds=0.0)
        self.results = head | dict(settings=asdict(settings), rows=[], search={}, curves={})
        if (found := read_results(self.folder, missing_ok=True)) is not None:
            known = ("experiment", "schedule", "seed", "data", "train_images", "test_images", "images", "settings", "source", "statistics", "round_to")
            ours = json.loads(json.dumps({k: self.results[k] for k in known if k in found}))
            if differing := [k for k, v in ours.items() if said(found[k]) != said(v)]:
                what = " and ".join("checkpoint (source)" if k == "source" else k for k in differing)
                raise Failure(f"{self.folder} holds a run with other {what}; give another --out, or --fresh to start over", 2)
            self.results = found
        elif any((self.folder / f"{m}.pt").exists() for m in NETS):
            self.watch.say(f"{self.folder} has lost its results.json: rows come from the checkpoints, what the searches tried is gone")
        self.before = self.results["seconds"]
        self.keep_results()

    def claim(self, fresh: bool) -> None:
        """Make the folder; if `fresh`, remove what a run left in it, and nothing else; keep other processes out of it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = (self.folder / "lock").open("w")
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if gone := [m for m in NETS[1:] if fresh and (self.folder / f"{m}.pt").exists()]:
                self.watch.say(f"{self.folder} starts over, without its rows {', '.join(gone)}")
            for method in NETS if fresh else ():
                self.drop_pool(method)
                (self.folder / f"{method}.pt").unlink(missing_ok=True)
            for name in FILES if fresh else ():
                for path in (self.folder / f"{name}.part", self.folder / name):
                    path.unlink(missing_ok=True)
        except BlockingIOError as e:
            raise Failure(f"{self.folder} is in use by another process") from e
        except OSError as e:
            raise Failure(f"cannot write {self.folder}: {e.strerror}") from e

    def drop_pool(self, method: str) -> None:
        pool = self.folder / f"{method}-pool"
        for path in pool.glob("*.pt*"):  # and what a kill left half written
            path.unlink()
        if pool.is_dir() and not any(pool.iterdir()):
            pool.rmdir()

    def keep_results(self) -> None:
        self.results["seconds"] = round(self.before + time.time() - self.began, 1)
        models.write_text(self.folder / "results.json", json.dumps(self.results, indent=1) + "\n")

    def complete(self, title: str, net: Net, images: Images, plan: Plan, *, teacher: Net | None = None, choose_best: bool = False):
        """Train `net` to the end of its plan, going on where an earlier run was stopped in it.

        Returns (net, validation accuracy, seconds, curve): the last epoch's, or with `choose_best` the best epoch's by
        validation accuracy; the curve has (loss, validation accuracy or None) of each epoch. Trainings are told apart by `title`.
        """
        path, best, spent, start, curve = self.folder / "progress.pt", (-1.0, None), 0.0, 0, []
        net = net.to(self.device).to(memory_format=torch.channels_last)
        optimizer = sgd(net, plan.lr)
        state = models.read_progress(path, title)
        if state:
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            best, spent, start, curve = (state["accuracy"], state["best"]), state["seconds"], state["epoch"] + 1, state.get("curve", [])
        self.watch.stage(title, plan.epochs, start)
        began = time.time()
        guide = self.teacher(teacher, images) if teacher else None
        for epoch, loss in fit(net, images, plan, optimizer=optimizer, seed=self.settings.seed, teacher=guide, start=start, track=self.watch.steps):
            found = accuracy(net, self.validation) if images is self.train else None
            if not choose_best or found > best[0]:
                best = (found if found is not None else -1.0, deepcopy(net.state_dict()) if choose_best else None)
            seconds, curve = spent + time.time() - began, [*curve, [round(loss, 5), found]]
            models.write(path, dict(title=title, epoch=epoch, net=net.state_dict(), optimizer=optimizer.state_dict(),
                                    accuracy=best[0], best=best[1], seconds=seconds, curve=curve))
            self.watch.epoch(title, epoch, plan.epochs, loss, found, (time.time() - began) / (epoch + 1 - start))
        if best[1] is not None:
            net.load_state_dict(best[1])
        return net, best[0], spent + time.time() - began, curve

    def teacher(self, net: Net, images: Images) -> Teacher:
        if images not in self.teachers:
            self.teachers[images] = Teacher(net, images, self.settings.seed)
        return self.teachers[images]

    def baseline(self, fresh: Net | None = None, given: Net | None = None) -> Net:
        """The trained baseline: from the folder, or `given` by the user, or the net `fresh` trained on the training part."""
        path = self.folder / "baseline.pt"
        if not path.exists():
            net, seconds, curve = given, 0.0, []
            if net is None:
                net, _, seconds, curve = self.complete("baseline", fresh, self.train, self.settings.baseline)
            net = net.to(self.device)
            self.save(path, net, "baseline", accuracy(net, self.validation), seconds, curve)
        net, facts = self.made("baseline", given or fresh)
        if not self.row("baseline"):
            self.report("baseline", net, facts)
        return net

    def load(self, path: Path) -> tuple[Net, dict]:
        """(net, facts) of a checkpoint. Nets go on from their files even where they are at hand, so that a stopped run and
        an undisturbed one compute the same to the last bit."""
        try:
            net, facts = sep.load(path)
        except Failure as e:
            pool = path.parent != self.folder
            raise Failure(f"{e}; {f'remove {path.parent} and that search begins anew' if pool else '--fresh starts the run over'}") from e
        return net.to(self.device).to(memory_format=torch.channels_last), facts

    def made(self, method: str, baseline: Net) -> tuple[Net, dict]:
        """`load` of a row's checkpoint, which must be one that this run made: another net that came to lie there would make a false row."""
        path = self.folder / f"{method}.pt"
        net, facts = self.load(path)
        silent = [k for k in ("settings", "round_to") if method == "baseline" or k not in facts]  # it hangs on neither; older files do not say
        same = net.arch == baseline.arch and {"validation_accuracy", "seconds"} <= facts.keys()
        same &= all(said(facts.get(k)) == said(v) for k, v in self.facts_of(method, net).items() if k not in silent)
        for other, found in {"baseline": facts.get("baseline") or {}, method: facts}.items():
            same &= all(found.get(k) == v for k, v in (self.row(other) or {}).items() if k in ("validation_accuracy", "macs"))
        if not same:
            raise Failure(f"{path} is no net that this run made as its {method}; move it away to go on, or --fresh starts the run over without it")
        return net, facts

    def facts_of(self, method: str, net: Net) -> dict:
        """What the checkpoints of a run say of it and of their net."""
        run = {k: self.results[k] for k in ("data", "schedule", "seed", "settings")}
        return run | dict(method=method, round_to=self.round_to or 1, macs=sep.macs(net), parameters=models.parameters(net))

    def save(self, path: Path, net: Net, method: str, validation_accuracy: float, seconds: float, curve: list) -> None:
        facts = self.facts_of(method, net) | dict(
            versions=self.results["versions"], mean=list(self.train.mean), std=list(self.train.std), names=self.train.names, split=self.split_seed,
            test_images=len(self.test), validation_accuracy=validation_accuracy, seconds=round(seconds, 1), curve=curve, baseline=self.row("baseline"))
        models.save(path, net, facts)

    def row(self, method: str) -> dict | None:
        return next((r for r in self.results["rows"] if r["method"] == method), None)

    def report(self, method: str, net: Net, facts: dict) -> None:
        """Add the row of a finished net. This alone reads the test images, once per row."""
        cut = 1 - facts["macs"] / (self.row("baseline") or facts)["macs"]
        self.results["rows"].append(dict(
            method=method, test_accuracy=accuracy(net, self.test, exact=True), validation_accuracy=facts["validation_accuracy"],
            macs=facts["macs"], params=facts["parameters"], cut=cut, widths=list(net.structure), seconds=facts["seconds"]))
        self.results.setdefault("curves", {})[method] = facts.get("curve", [])
        self.results["layers"] = [p.layer for p in net.prunable]
        self.keep_results()

    def cut(self, macs: int) -> float:
        return 1 - macs / self.row("baseline")["macs"]

    def cuts(self, method: str, baseline: Net):
        """What a structure of `baseline` cuts as a net of that method: a function of the structure."""
        return lambda structure: self.cut(METHODS[method][1](baseline, structure))

    def there(self, method: str, baseline: Net) -> bool:
        """Whether a row is there; then no other net may lie where its own was."""
        path = self.folder / f"{method}.pt"
        if self.row(method) and models.sound(path):
            self.made(method, baseline)
        elif self.row(method):
            self.watch.say(f"{path} is gone or damaged; its row stays; only --fresh makes it anew, and all rows with it")
        return bool(self.row(method))

    def method(self, method: str, baseline: Net, target: float | None) -> None:
        """The whole of a row: search (or the uniform steps), final training, test; nothing where the row is there."""
        if method == "static":
            self.method("sep", baseline, target)
            return self.static(baseline)
        path = self.folder / f"{method}.pt"
        if self.there(method, baseline):
            return
        if not path.exists():
            if target and not self.settings.target and (most := reach(baseline.widths, self.cuts(method, baseline))) < target:
                self.watch.say(f"{method} cannot cut {target:.2%} as the rows before it do: {most:.2%} with one channel left in every layer, and goes there")
                target = most  # nobody asked for that cut, so nobody is refused
            shared = method == "sep" and self.settings.guided(target)
            find = self.uniform if method == "uniform" else self.share if shared else partial(self.search, method)
            found, chosen = find(baseline, target)
            spent = sum(c["seconds"] for m in (method, *["lstm"] * bool(shared)) for c in self.results["search"][m])
            if self.round_to:
                found, chosen = self.round(method, baseline, found, chosen, target)
                spent += self.results["rounded"][method]["seconds"]
            net, _, seconds, curve = self.complete(f"{method}: final", found, self.all, self.settings.final, teacher=baseline)
            self.save(path, net, method, chosen.validation_accuracy, seconds + spent, curve)
        self.report(method, *self.made(method, baseline))
        self.drop_pool(method)

    def start(self, baseline: Net, target: float | None) -> Candidate:
        """The baseline as the first candidate of a search."""
        row = self.row("baseline")
        return Candidate(baseline.structure, (), None, 0, row["validation_accuracy"], row["macs"], 0.0, reward(row["validation_accuracy"], 0.0, target), 0.0)

    def recover(self, method: str, baseline: Net, parent: Net, structure, scheme, epoch: int, number: int, target) -> tuple[Net, Candidate]:
        """Bring a parent to a structure, train it with the teacher, and say how good it is."""
        torch.manual_seed(stream(self.settings.seed, method, structure))  # for the weights of fresh gates
        child = METHODS[method][0](parent, structure)
        title = f"{method}: candidate {number}, {name_of(structure)}"
        net, found, seconds, _ = self.complete(title, child, self.train, self.settings.recovery, teacher=baseline, choose_best=True)
        macs = sep.macs(net)
        return net, Candidate(structure, scheme, parent.structure, epoch, found, macs, self.cut(macs), reward(found, self.cut(macs), target), round(seconds, 2))

    def step(self, path: Path, method: str, baseline: Net, parent: Net, structure, epoch: int, number: int, target) -> tuple[Net, Candidate]:
        """`parent` brought to a structure by `recover`, kept in a file of the pool: it is made where that is not there."""
        if not path.exists():
            scheme = tuple(int(a != b) for a, b in zip(structure, parent.structure))
            net, candidate = self.recover(method, baseline, parent, structure, scheme, epoch, number, target)
            models.save(path, net, asdict(candidate))
        net, facts = self.load(path)
        return net, Candidate(**facts)

    def round(self, method: str, baseline: Net, found: Net, chosen: Candidate, target: float | None) -> tuple[Net, Candidate]:
        """The chosen net with its widths at multiples (ours: as machines like them), made from the baseline with a recovery of its
        own; tells cost and gain. The settings' target is kept; a cut to compare with another row only where that can be."""
        cut = self.cuts(method, baseline)
        goal = target if self.settings.target or (target and target <= reach(baseline.widths, cut, self.round_to)) else None
        structure, candidate, net = rounded(chosen.structure, baseline.widths, cut, goal, self.round_to), chosen, found
        if structure != chosen.structure:
            path, log = self.folder / f"{method}-pool" / f"rounded-{name_of(structure)}.pt", self.results["search"][method]
            net, candidate = self.step(path, method, baseline, self.load(self.folder / "baseline.pt")[0], structure, log[-1]["epoch"], len(log), target)
        few = len(structure) <= 8  # else the widths would fill lines
        one = lambda n: latency(tuned(n, self.validation) if self.device.type == "cpu" else n, self.validation, 1)
        told = [f"{name_of(c.structure) + ', ' if few else ''}validation accuracy {c.validation_accuracy:.2%}, cut {c.cut:.1%}, "
                f"{one(n) * 1e3:.2f} ms an image, {latency(n, self.validation, 128) * 1e3:.1f} ms for 128"
                for n, c in ((found, chosen), (net, candidate))]
        self.results.setdefault("rounded", {})[method] = dict(before=told[0], after=told[1], seconds=0.0 if candidate is chosen else candidate.seconds)
        self.keep_results()
        return net, candidate

    def static(self, baseline: Net) -> None:
        """ours: the row of `sep`'s net made plain: the kernels that its gates choose most often on the training images, and a recovery, on
        all images as the final training before it, where that gets more of them right; the validation accuracy is that of `sep`'s candidate."""
        path = self.folder / "static.pt"
        if self.there("static", baseline):
            return
        if not path.exists():
            gated, facts = self.load(self.folder / "sep.pt")
            small = sep.harden(gated, (self.all.batch(i) for i in chunks(self.all))) if gated.gates else gated
            net, _, seconds, curve = self.complete("static: recovery", deepcopy(small), self.all, self.settings.recovery, teacher=baseline)
            if accuracy(net, self.all) <= accuracy(small, self.all):  # where choices hang on no image, nothing was lost that could be recovered
                net, curve = small, []
            self.save(path, net, "static", facts["validation_accuracy"], seconds + facts["seconds"], curve)
        self.report("static", *self.made("static", baseline))

    def uniform(self, baseline: Net, target: float | None) -> tuple[Net, Candidate]:
        """The same share of every layer, in steps of the pruning rate with a recovery each, as the search goes."""
        if target is None:
            raise Failure("uniform needs a cut to land on: run it with, or after, another method", 2)
        end = uniform(baseline.widths, self.cuts("uniform", baseline), target)
        folder, net, log = self.folder / "uniform-pool", self.load(self.folder / "baseline.pt")[0], [self.start(baseline, target)]
        while net.structure != end:
            structure = tuple(max(e, w) for e, w in zip(end, shrink(net.structure, [1] * len(end), self.settings.rate)))
            if self.settings.guided(self.settings.target):
                structure = end  # in one step, as the others go
            net, candidate = self.step(folder / f"{name_of((len(log), *end))}.pt", "uniform", baseline, net, structure, len(log), len(log), target)
            log.append(candidate)
        self.results["search"]["uniform"] = [asdict(c) for c in log]
        self.keep_results()
        return net, log[-1]

    def share(self, baseline: Net, target: float) -> tuple[Net, Candidate]:
        """ours, for `fast`: `sep` gates the scheme of `lstm`'s search, for a fresh gate is what hard pruning is, and costs more to train."""
        log = [Candidate(**c) for c in self.results["search"].get("lstm", ())] if self.row("lstm") else []
        scheme = (choose(log, self.settings.target) if log else self.search("lstm", baseline, target)[1]).structure
        structure = landed(tuple(scheme), baseline.widths, self.cuts("sep", baseline), target, self.settings.rate)
        path, whole = self.folder / "sep-pool" / f"shared-{name_of(structure)}.pt", self.load(self.folder / "baseline.pt")[0]
        net, candidate = self.step(path, "sep", baseline, whole, structure, 1, 1, target)
        self.results["search"]["sep"] = [asdict(c) for c in (self.start(baseline, target), candidate)]
        self.keep_results()
        return net, candidate

    def search(self, method: str, baseline: Net, target: float | None) -> tuple[Net, Candidate]:
        """The search for where to prune: (best network, what is known of it).

        A structure is trained once: who meets it again takes its reward from memory.
        """
        folder, cut = self.folder / f"{method}-pool", self.cuts(method, baseline)
        check_reach(baseline.widths, cut, target)
        kind = Guided if self.settings.guided(target) else Search
        search = kind(baseline, self.start(baseline, target), self.settings, target, cut, method, dice=method == "random")
        title = f"{method}, target {target}"  # rewards hang on the target: with another one, the search begins anew
        if state := models.read_progress(folder / "search.pt", title):
            search.load(state)
        elif (folder / "search.pt").exists():
            self.watch.say(f"{folder / 'search.pt'} is damaged, or was for another target: that search begins anew")
        path_of = lambda w: self.folder / "baseline.pt" if w == baseline.structure else folder / f"{name_of(w)}.pt"
        log = lambda: [asdict(c) for c in search.tried.values()]
        self.results["search"][method] = log()
        while (step := search.next()) is not None:
            parent, scheme, structure = step
            if structure not in search.tried:
                net, child = self.recover(method, baseline, self.load(path_of(parent))[0], structure, scheme, search.epoch, len(search.tried), target)
                models.save(path_of(structure), net, {})
            before = search.epoch
            search.tell(search.tried.get(structure) or child)
            if search.epoch > before:
                best = search.best
                self.watch.say(f"{method}: LSTM epoch {before}, {len(search.tried) - 1} candidates, best by reward {best.validation_accuracy:.2%} at a cut "
                               f"of {best.cut:.1%} ({name_of(best.structure)}); {search.told()}")
            models.write(folder / "search.pt", search.state() | dict(title=title))
            self.results["search"][method] = log()
            self.keep_results()
            for old in set(folder.glob("*.pt")) - {folder / "search.pt"} - set(map(path_of, search.needed())):
                old.unlink()
        return self.load(path_of(search.best.structure))[0], search.best


def said(value):
    """A setting without what is None in it: a run begun before a setting came to be has no word of it, and goes on."""
    return {k: said(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def read_results(folder: Path, missing_ok: bool = False, hint: str = "; --fresh starts the run over") -> dict | None:
    """The results.json of a run folder. Raises Failure where it is not what a run writes."""
    path = Path(folder) / "results.json"
    if missing_ok and not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        keys = ("test_accuracy", "validation_accuracy", "macs", "params", "cut", "seconds")
        numbers = all(isinstance(r[k], int | float) for r in found["rows"] for k in keys)
        widths = [Candidate(**c).structure for log in found["search"].values() for c in log] + [r["widths"] for r in found["rows"]]
        whole = {"experiment", "schedule", "data", "seed", "device", "settings"} <= found.keys() and {"target", "parents"} <= found["settings"].keys()
        named = all(r["method"] in NETS for r in found["rows"])
        lists = all(isinstance(v, list) for v in (found["rows"], *found["search"].values()))
        if not (numbers and whole and named and lists) or not all(isinstance(k, int) for w in widths for k in w) or len({len(w) for w in widths}) > 1:
            raise ValueError
        return found | dict(seconds=float(found["seconds"]))
    except OSError as e:
        raise Failure(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, AttributeError, KeyError, TypeError) as e:
        raise Failure(f"{path} is damaged, or was edited: it is not what a run writes{hint}") from e


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def versions() -> dict:
    return dict(python=platform.python_version(), torch=str(torch.__version__))
