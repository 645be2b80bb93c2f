"""What a network is: LeNet-5, VGG and CIFAR ResNet built from their widths, pruning by removal, MACs, checkpoints.

The *structure* of a net is the tuple of the widths of its prunable layers. `prune(net, structure)` removes channels
as the IJCAI 2018 paper's released script chooses them: channel i of layer l counts as much as the sum of the squared
weights that the next layer applies to it.
"""
import json
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO, StringIO
from itertools import pairwise
from math import prod
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

FORMAT = 1  # of the checkpoint files
CONV, LINEAR, POOL = 0, 1, 2  # the script's codes for what the LSTM reads


class Failure(Exception):
    """What went wrong, in one line that a user understands: exit status 1, or 2 for a wrong call."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(" ".join(str(message).split()))
        self.status = status


@dataclass(frozen=True)
class Prunable:
    """A group of channels that can be pruned: the outputs of `layer`, normalised by `norm`, read by `next`."""

    layer: str  # the convolution or linear layer that makes the channels
    norm: str | None  # their batch normalisation
    next: str  # the layer that reads them
    pool: bool = False  # a 2x2 max-pooling stands in between


class Net(nn.Module):
    """A network of prunable layers. `gates` holds one SEP gate (sep.py) or None for each of them."""

    side = 1  # places (side x side) of each of the last convolution's channels that the first linear layer reads, where they vary

    def __init__(self, arch: str, widths, classes: int, channels: int, size: int):
        super().__init__()
        self.arch, self.widths, self.classes, self.channels, self.size = arch, tuple(widths), classes, channels, size
        self.prunable: list[Prunable] = []
        self.gates: nn.ModuleList | None = None
        self.quick: list | None = None  # how `unit` runs each prunable layer on single images (sep.py), of a net that does nothing else

    def unit(self, i: int, x: torch.Tensor, at: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """relu(norm(layer(x))) of prunable layer i, pooled where it pools, and which channels those are.

        (B, C_in, H, W) -> (B, C, H', W'), None; a gate leaves out channels that no image of the batch uses and returns the
        indices of the others, the next layer's `at`: the channels that its x holds.
        """
        if self.quick is not None:
            return self.quick[i](x, at)
        p, gate = self.prunable[i], None if self.gates is None else self.gates[i]
        layer, norm = attrgetter(p.layer)(self), attrgetter(p.norm)(self) if p.norm else None  # an eighth of get_submodule's time
        if gate is not None:
            return gate(x, at, layer, norm, p.pool)
        y = apply(layer, x, at)
        return activate(y if norm is None else norm(y), p.pool), None

    @property
    def structure(self) -> tuple[int, ...]:
        """The number of channels at work in each prunable layer: of a gated layer, as many as its gate keeps."""
        return tuple(g.keep if g is not None else w for g, w in zip(self.gates or [None] * len(self.widths), self.widths))

    def initialise(self):
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)


def part(weight: torch.Tensor, reads: int, inputs: torch.Tensor | None, outputs: torch.Tensor | None) -> torch.Tensor:
    """The weights of a layer from its channels `inputs` (`reads` numbers in all: a linear layer may read several of each) to `outputs`."""
    if inputs is None:
        return weight if outputs is None else weight.index_select(0, outputs)
    width = weight.shape[1] * len(inputs) // reads
    if outputs is not None and weight.is_contiguous() and not torch.is_grad_enabled():  # kernel by kernel, in one go
        kernels = (outputs[:, None] * width + inputs).flatten()
        return weight.view(len(weight) * width, -1).index_select(0, kernels).view(len(outputs), -1, *weight.shape[2:])
    weight = weight if outputs is None else weight.index_select(0, outputs)
    return per_channel(weight, width).index_select(1, inputs).reshape(len(weight), -1, *weight.shape[2:])


def parts(layer: "nn.Module | Kernels", reads: int, inputs: torch.Tensor | None, outputs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) of a layer from its channels `inputs` to `outputs`."""
    bias = layer.bias if layer.bias is None or outputs is None else layer.bias.index_select(0, outputs)
    return part(layer.weight, reads, inputs, outputs), bias


class Kernels:
    """A convolution or linear layer as it computes one image on a CPU, for inference alone: the kernels from chosen inputs to chosen
    outputs, gathered, and kept while the same are chosen (the very same tensors of indices). No module: a module's call takes as long
    as a small operator."""

    def __init__(self, layer: nn.Conv2d | nn.Linear):
        self.whole, self.bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        self.places = (layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else None
        self.ready(False)

    def ready(self, gathers: bool) -> None:
        """Forget what was kept; kernels that are to be gathered lie together."""
        self.weight, self.last = self.whole.contiguous() if gathers else self.whole, None

    def __call__(self, x: torch.Tensor, inputs: torch.Tensor | None = None, outputs: torch.Tensor | None = None) -> torch.Tensor:
        """(1, C_in', H, W) -> (1, C', H', W'); of a linear layer (1, C_in', ...) -> (1, C')."""
        last = self.last
        if last is None or last[0] is not inputs or last[1] is not outputs:
            self.last = last = [inputs, outputs, *parts(self, x.numel() if self.places is None else x.shape[1], inputs, outputs), self.places is not None]
            # as the kernels lie this time: else it is they who are laid out anew
            x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 and last[2] is self.whole else torch.contiguous_format)
        elif last[4]:  # met again: as they compute the fastest from now on, which takes as long to make as to gather
            last[2], last[4] = last[2].contiguous(memory_format=torch.channels_last), False
        weight, bias = last[2], last[3]
        if self.places is None:
            return torch.addmv(bias, weight, x.flatten())[None]
        return torch.conv2d(x, weight, bias, *self.places)


def apply(layer: nn.Module, x: torch.Tensor, inputs: torch.Tensor | None = None, outputs: torch.Tensor | None = None) -> torch.Tensor:
    """layer(x) of a convolution or linear layer, where x holds its channels `inputs` alone, for the channels `outputs` alone
    (indices; None: all of them)."""
    if isinstance(layer, Kernels):
        return layer(x, inputs, outputs)
    linear, whole = isinstance(layer, nn.Linear), inputs is None and outputs is None
    x = x.flatten(1) if linear and x.dim() > 2 else x
    if linear and whole:
        return layer(x)
    weight, bias = parts(layer, x.shape[1], inputs, outputs)
    if linear:
        return F.linear(x, weight, bias)
    small = max(x.shape[2:]) <= 4 and (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (1, 1), (1, 1)) and not x.is_cuda
    if not small or not (layer.training and torch.is_autocast_enabled("cpu")):
        return layer(x) if whole else F.conv2d(x, weight, bias, layer.stride, layer.padding)
    # in bfloat16 training on a CPU, small maps as one matrix product of the nine shifted maps: there oneDNN's convolutions, most
    # of all the weights' gradient, take up to twice the time (float32 ones do not)
    h, w = x.shape[2:]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    shifted = torch.cat([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], 3)  # (B, H, W, 9 C_in)
    return F.linear(shifted, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


def activate(y: torch.Tensor, pool: bool) -> torch.Tensor:
    return F.relu(F.max_pool2d(y, 2) if pool else y)  # relu and max commute: pooling first spares 3/4 of the relu


class LeNet5(Net):
    """Caffe's LeNet 20-50-500-10 (431,080 parameters at 28 x 28), with a relu behind each hidden layer."""

    def __init__(self, arch, widths, classes, channels, size):
        super().__init__(arch, widths, classes, channels, size)
        a, b, c = self.widths
        side = ((size - 4) // 2 - 4) // 2
        if side < 1:
            raise Failure(f"{arch} needs images of at least 16 x 16 pixels, not {size} x {size}")
        self.conv1, self.conv2 = nn.Conv2d(channels, a, 5), nn.Conv2d(a, b, 5)
        self.fc1, self.fc2 = nn.Linear(b * side * side, c), nn.Linear(c, classes)
        self.prunable = [Prunable("conv1", None, "conv2", True), Prunable("conv2", None, "fc1", True), Prunable("fc1", None, "fc2")]
        self.initialise()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = None
        for i in range(3):
            if i == 2 and x.shape[2] * x.shape[3] * self.widths[1] != self.fc1.weight.shape[1]:  # behind a gate no shape would tell
                raise RuntimeError(f"this LeNet-5 takes images of {self.size} x {self.size} pixels")
            x, at = self.unit(i, x, at)
        return apply(self.fc2, x, at)


# convolutions per stage; a pooling ends each stage
VGG_STAGES = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


class VGG(Net):
    """VGG with batch normalisation and one linear layer (the script's), keys `features.N`, `classifier`; or, with more widths than
    convolutions, with torchvision's head: linear layers `classifier.0`, `.3`, `.6` that read side x side places of each channel."""

    def __init__(self, arch, widths, classes, channels, size, side=1):
        super().__init__(arch, widths, classes, channels, size)
        if size < 32:
            raise Failure(f"{arch} needs images of at least 32 x 32 pixels, not {size} x {size}")
        self.side, self.convs = side, sum(VGG_STAGES[arch])
        last, ends = channels, {sum(VGG_STAGES[arch][: i + 1]) for i in range(5)}
        features, places = [], []
        for n, width in enumerate(self.widths[: self.convs], 1):
            places.append((len(features), n in ends))
            features += [nn.Conv2d(last, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            features += [nn.MaxPool2d(2)] if n in ends else []
            last = width
        self.features, sizes = nn.Sequential(*features), [last * side * side, *self.widths[self.convs :], classes]
        linear = {str(3 * i): nn.Linear(a, b) for i, (a, b) in enumerate(pairwise(sizes))}
        self.classifier = nn.Sequential(OrderedDict(linear)) if len(linear) > 1 else linear["0"]
        heads = [f"classifier.{k}" for k in linear] if len(linear) > 1 else ["classifier"]
        names = [f"features.{k}" for k, _ in places] + heads
        self.prunable = [Prunable(names[j], f"features.{k + 1}", names[j + 1], pool) for j, (k, pool) in enumerate(places)]
        self.prunable += [Prunable(a, None, b) for a, b in pairwise(heads)]
        self.initialise()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = None
        for i in range(len(self.prunable)):
            x, at = self.unit(i, x, at)
            if i == self.convs - 1:
                x = F.adaptive_avg_pool2d(x, self.side)  # 1 x 1 already at 32 x 32 pixels
        return apply(attrgetter(self.prunable[-1].next)(self), x, at)


class Block(nn.Module):
    """A basic block; its inner width can be pruned, its option-A shortcut (subsample, pad with zeros) stays."""

    def __init__(self, inputs: int, inner: int, outputs: int):
        super().__init__()
        self.stride, self.pad = (1, 0) if inputs == outputs else (2, (outputs - inputs) // 2)
        self.conv1 = nn.Conv2d(inputs, inner, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x


class ResNet(Net):
    """CIFAR ResNet of depth 6n + 2 (He et al. 2016), keys as in akamaster/pytorch_resnet_cifar10."""

    def __init__(self, arch, widths, classes, channels, size):
        super().__init__(arch, widths, classes, channels, size)
        n = len(self.widths) // 3
        self.conv1, self.bn1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        stages, last = [], 16
        for s, width in enumerate((16, 32, 64)):
            stages.append(nn.Sequential(*(Block(last if b == 0 else width, self.widths[s * n + b], width) for b in range(n))))
            last = width
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, classes)
        names = [f"layer{s}.{b}" for s in (1, 2, 3) for b in range(n)]
        self.prunable = [Prunable(f"{k}.conv1", f"{k}.bn1", f"{k}.conv2") for k in names]
        self.initialise()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for i, block in enumerate([*self.layer1, *self.layer2, *self.layer3]):
            x = F.relu(block.bn2(apply(block.conv2, *self.unit(i, x))) + block.shortcut(x))
        return self.linear(x.mean((2, 3)))


def default_widths(arch: str) -> tuple[int, ...]:
    """The widths of the unpruned net; raises Failure for an unknown arch."""
    if arch == "lenet5":
        return (20, 50, 500)
    if arch in VGG_STAGES:
        return tuple(w for w, n in zip((64, 128, 256, 512, 512), VGG_STAGES[arch]) for _ in range(n))
    depth = int(arch[6:]) if re.fullmatch(r"resnet\d{1,4}", str(arch)) else 0
    if depth >= 8 and depth % 6 == 2:
        return tuple(w for w in (16, 32, 64) for _ in range(depth // 6))
    raise Failure(f"unknown network '{arch}': lenet5, vgg11, 13, 16, 19 or resnetN with N = 6n + 2")


def build(arch: str, widths=None, *, classes: int = 10, channels: int = 3, size: int = 32, side: int = 1) -> Net:
    """A new net of that arch; `widths` of its prunable layers (default: unpruned), for `channels` x `size` x `size` images.

    A VGG may have up to two widths more: the hidden linear layers of torchvision's head, which reads `side` x `side` places.
    """
    full = default_widths(arch)
    widths = full if widths is None else tuple(widths)
    if not len(full) <= len(widths) <= len(full) + 2 * (arch in VGG_STAGES) or min(widths) < 1:
        raise Failure(f"{arch} has {len(full)} prunable layers, each at least 1 wide, not {list(widths)}")
    if arch in VGG_STAGES:
        return VGG(arch, widths, classes, channels, size, side)
    return (LeNet5 if arch == "lenet5" else ResNet)(arch, widths, classes, channels, size)


def like(net: Net, widths, size: int | None = None) -> Net:
    """A new net as `net` but for its widths (and the side of its images, in pixels); no gates."""
    return build(net.arch, widths, classes=net.classes, channels=net.channels, size=size or net.size, side=net.side)


# ---- MACs -----------------------------------------------------------------------------------------------------------


@lru_cache
def positions(arch: str, layers: int, channels: int, size: int) -> dict[str, int]:
    """For each convolution and linear layer, by name: MACs per pair of one input and one output (kernel area x places)."""
    net, found = build(arch, [1] * layers, channels=channels, size=size).eval(), {}

    def look(name):
        return lambda m, x, y: found.update({name: prod(m.weight.shape[2:]) * prod(y.shape[2:])})

    hooks = [m.register_forward_hook(look(n)) for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        net(torch.zeros(1, channels, size, size))
    for h in hooks:
        h.remove()
    return found


def macs(net: Net, structure=None) -> int:
    """Multiply-accumulates for one image, all convolutions and linear layers, if `net` had that structure (default: its
    own). Half of what `torch.utils.flop_counter.FlopCounterMode` counts. Gates come on top: see sep.macs."""
    structure = net.structure if structure is None else structure
    out = {p.layer: k for p, k in zip(net.prunable, structure)}
    into = {p.next: (k, w) for p, k, w in zip(net.prunable, structure, net.widths)}
    total = 0
    for name, area in positions(net.arch, len(net.widths), net.channels, net.size).items():
        outputs, inputs = attrgetter(name)(net).weight.shape[:2]
        k, w = into.get(name, (1, 1))
        total += area * out.get(name, outputs) * (inputs * k // w)
    return total


def parameters(net: Net) -> int:
    return sum(p.numel() for p in net.parameters())


# ---- removing channels ------------------------------------------------------------------------------------------------


def per_channel(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """The weights of a layer by input channel: (out, channels x r, ...) -> (out, channels, r x ...)."""
    return weight.reshape(weight.shape[0], channels, -1)


def importance(net: Net, at_work: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Per prunable layer (C,): the sum of squared weights that the next layer applies to each channel (script).

    `at_work`: per prunable layer the filters that count, where they are not all (a gated net's).
    """
    filters = {p.layer: index for p, index in zip(net.prunable, at_work or ())}
    found = []
    for p, w in zip(net.prunable, net.widths):
        weight = net.get_submodule(p.next).weight.detach()
        found.append(per_channel(weight[filters.get(p.next, slice(None))], w).square().sum((0, 2)))
    return found


def most_important(net: Net, structure) -> list[torch.Tensor]:
    """Per prunable layer the indices, ascending, of the channels that stay."""
    return [s.topk(k).indices.sort().values for s, k in zip(importance(net), structure)]


@torch.no_grad()
def compensate(net: Net, kept: list[torch.Tensor], had: list[torch.Tensor] | None = None) -> None:
    """Scale, in place, each filter that loses a channel holding more than 0.8 / C_in of its energy to its old energy (script).

    `kept` are the channels that stay, `had` those at work before (default: all), indices per prunable layer.
    """
    for i, (p, w, stay) in enumerate(zip(net.prunable, net.widths, kept)):
        weight = net.get_submodule(p.next).weight
        energy = per_channel(weight, w).square().sum(2)  # (out, C)
        lost = torch.zeros(w, dtype=torch.bool, device=weight.device)
        lost[slice(None) if had is None else had[i]] = True
        count, before = lost.sum(), energy[:, lost].sum(1)
        lost[stay] = False
        after = energy[:, stay].sum(1)
        hurt = (energy[:, lost] > 0.8 / count * before[:, None]).any(1) & (after > 0)
        scale = torch.where(hurt, (before / after.clamp_min(1e-30)).sqrt(), 1.0)
        weight.mul_(scale.reshape(-1, *[1] * (weight.dim() - 1)))


def remove(net: Net, kept: list[torch.Tensor]) -> Net:
    """A new, smaller net that has only the channels `kept` (ascending indices per prunable layer); no gates."""
    small = like(net, [len(s) for s in kept])
    state = net.state_dict()
    for p, w, stay in zip(net.prunable, net.widths, kept):
        for name in (p.layer, p.norm):
            for key in [k for k in state if name and k.rpartition(".")[0] == name and state[k].dim()]:
                state[key] = state[key][stay]
        key = p.next + ".weight"
        weight = state[key]
        state[key] = per_channel(weight, w)[:, stay].reshape(weight.shape[0], -1, *weight.shape[2:])
    small.load_state_dict({k: v for k, v in state.items() if not k.startswith("gates.")})
    return small.to(next(net.parameters()).device)


def prune(net: Net, structure) -> Net:
    """Hard pruning (IJCAI 2018): a new net of that structure, without the least important channels, compensated."""
    net, kept = deepcopy(net), most_important(net, structure)
    compensate(net, kept)
    return remove(net, kept)


# ---- checkpoints ------------------------------------------------------------------------------------------------------


def part_of(path: Path) -> Path:
    """Where a file is written before it takes its name: beside it, and never over a file of the user's."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def replaced(path: Path, make, part: Path | None = None, hint: str = "") -> None:
    """Write a file with `make(part)`; the old one stays until the new one is complete. Raises Failure."""
    path = Path(path)
    part = part or path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        why = "the disk may be full" if "inline_container" in str(e) or "unexpected pos" in str(e) else getattr(e, "strerror", None) or e
        raise Failure(f"cannot write {path}: {why}{hint}") from e
    finally:
        part.unlink(missing_ok=True) if path.parent.is_dir() else None


def write(path: Path, content: dict) -> None:
    """Save tensors and plain values."""
    replaced(path, lambda part: torch.save(content, part))


def write_text(path: Path, text: str) -> None:
    replaced(path, lambda part: part.write_text(text, encoding="utf-8"))


def save(path: Path, net: Net, facts: dict) -> None:
    """Write a checkpoint: all that rebuilds the net, and `facts` about it (plain values)."""
    gates = [None if g is None else g.keep for g in net.gates] if net.gates is not None else None
    state = {k: v.detach().cpu() for k, v in net.state_dict().items()}
    write(path, dict(format=FORMAT, arch=net.arch, widths=list(net.widths), classes=net.classes, channels=net.channels,
                     size=net.size, side=net.side, gates=gates, state=state, facts=facts))


def read(path: Path) -> dict:
    """A checkpoint as `save` wrote it, or anybody's state dict brought into that form; tensors on the CPU.

    Never runs code from the file. Raises Failure (status 2 where there is no such file).
    """
    if not Path(path).is_file():
        raise Failure(f"{path} is a folder, not a checkpoint" if Path(path).is_dir() else f"there is no checkpoint {path}", 2)
    if Path(path).suffix.lower() in (".pt2", ".onnx"):
        raise Failure(f"{path} is an export, not a checkpoint; give the file that it was made from", 2)
    try:
        with warnings.catch_warnings(action="ignore"):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as e:
        raise Failure(f"cannot read {path}: {e.strerror}") from e
    except Exception as e:
        if "Weights only load failed" in str(e) or "weights_only" in str(e):
            raise Failure(f"{path} is not a file of weights alone (reading it could run code); save the state dict and try again") from e
        raise Failure(f"{path} is not a checkpoint that torch can read") from e
    if zipfile.is_zipfile(path) and not sound(path):  # files older than PyTorch 1.6 are none, and have no checksums
        raise Failure(f"{path} is damaged: its checksums are wrong")
    if not isinstance(found, dict) or "format" not in found:
        return recognise(found, path)
    if type(found["format"]) is not int or found["format"] != FORMAT:
        raise Failure(f"{path} has another checkpoint format; this version reads {FORMAT}")
    if lacking := {"arch", "widths", "classes", "channels", "size", "gates", "state", "facts"} - found.keys():
        raise Failure(f"{path} is damaged: it lacks {', '.join(sorted(lacking))}")
    plain = lambda facts: isinstance(facts, dict) and all(isinstance(facts.get(k, 0), int | float) for k in ("test_accuracy", "macs", "params"))
    try:
        json.dumps(found["facts"])  # no tensors in them
        if not plain(found["facts"]) or not plain(found["facts"].get("baseline") or {}):
            raise ValueError
    except (TypeError, ValueError) as e:
        raise Failure(f"{path} is damaged: its facts are no facts") from e
    return found


def sound(path: Path) -> bool:
    """Whether a file that `write` made is there and whole (torch.load does not look at the checksums in it)."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # zipfile raises many kinds
        return False


def restore(checkpoint: dict, path: Path, attach=None) -> Net:
    """The net of a checkpoint that was read from `path`; `attach(net, gates)` puts its gates on. Raises Failure."""
    try:
        c = checkpoint
        net = build(c["arch"], c["widths"], classes=c["classes"], channels=c["channels"], size=c["size"], side=c.get("side", 1))
        if c["gates"] is not None:
            attach(net, c["gates"])
        if difference := misfit(net, c["state"]):
            raise Failure(f"its weights do not fit a {c['arch']} of the widths they name: {difference}")
        net.load_state_dict(c["state"])
    except Failure as e:
        raise Failure(f"{path}: {e}") from e
    except Exception as e:
        raise Failure(f"{path}: its weights do not fit a {c['arch']} of the widths it names") from e
    if not all(v.isfinite().all() for v in c["state"].values() if v.is_floating_point()):
        raise Failure(f"{path}: some of its weights are not finite numbers")
    return net


def misfit(net: Net, state: dict) -> str:
    """The first difference between the state that `net` has and the one it should take; empty where there is none."""
    shape = lambda v: " x ".join(map(str, v.shape)) or "a number"
    wanted = net.state_dict()
    for key, value in wanted.items():
        if key not in state and not key.endswith("num_batches_tracked"):  # older files than PyTorch 0.4.1 have none
            return f"{key} is missing"
        if key in state and (state[key].shape != value.shape or state[key].is_complex()):
            return f"{key} is {shape(state[key])}, not {shape(value)}"
    return next((f"{key} is not in this net" for key in state if key not in wanted), "")


KNOWN = ("LeNet-5 (conv1, conv2, fc1, fc2), VGG with batch norm (features.N, classifier, as in torchvision), "
         "CIFAR ResNets of depth 6n + 2 with option-A shortcuts (conv1, bn1, layer1.0.conv1, ..., linear)")


def recognise(found, path) -> dict:
    """Somebody else's state dict as a checkpoint: arch and widths follow from names and shapes."""
    if isinstance(found, dict) and {"title", "epoch"} <= found.keys():
        raise Failure(f"{path} is the state of unfinished work, not a checkpoint")
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise Failure(f"{path} holds no state dict (bare, or under state_dict, model_state_dict, model or net)")
    bare = lambda key: re.sub(r"^((module|model|net|_orig_mod)\.)+", "", str(key))  # DataParallel's, Lightning's, torch.compile's
    state = OrderedDict((bare(k), v.float() if v.is_floating_point() else v) for k, v in found.items())
    if any(k.startswith("gates.") for k in state):
        raise Failure(f"{path}: weights alone of a gated net do not say how many kernels its gates keep; give the checkpoint that they are from")
    if convolution := next((k for k in state if ".shortcut." in k or ".downsample." in k), None):
        raise Failure(f"{path}: a ResNet whose shortcuts are convolutions ({convolution}); known are {KNOWN}")
    try:
        checkpoint = dict(format=FORMAT, size=32, side=1, gates=None, facts={}) | shape_of(state)
        fold_biases(state, build(**{k: checkpoint[k] for k in ("arch", "widths", "classes", "channels", "size", "side")}))
    except (KeyError, IndexError, StopIteration, ZeroDivisionError, RuntimeError, Failure) as e:
        lacks = f" (it lacks {e.args[0]})" if isinstance(e, KeyError) and state.keys() & {"conv1.weight", "features.0.weight"} else ""
        raise Failure(f"{path}: its names and shapes are of no net that this tool knows{lacks}: {KNOWN}") from e
    return checkpoint | dict(state=state)


def shape_of(state) -> dict:
    """arch, widths, classes, input channels and what else rebuilds the net, by names and shapes; brings the names into our form."""
    outputs = lambda *keys: [state[k + ".weight"].shape[0] for k in keys]
    number = lambda key: [int(n) for n in re.findall(r"\d+", key)]
    if "layer1.0.conv1.weight" in state:
        for part in ("weight", "bias"):
            if f"fc.{part}" in state:  # torchvision's name
                state[f"linear.{part}"] = state.pop(f"fc.{part}")
        blocks = sorted((k[:-7] for k in state if re.fullmatch(r"layer\d\.\d+\.conv1\.weight", k)), key=number)
        return dict(arch=f"resnet{2 * len(blocks) + 2}", widths=outputs(*blocks), classes=outputs("linear")[0], channels=state["conv1.weight"].shape[1])
    if "features.0.weight" in state:
        convs = sorted((k[:-7] for k in state if re.fullmatch(r"features\.\d+\.weight", k) and state[k].dim() == 4), key=number)
        heads = sorted((k[:-7] for k in state if re.fullmatch(r"classifier(\.\d+)?\.weight", k)), key=number)
        width, first = state[convs[-1] + ".weight"].shape[0], state[heads[0] + ".weight"]
        widths, classes = outputs(*convs, *heads[:-1]), outputs(heads[-1])[0]
        for i, name in enumerate(heads):  # dropouts in between shift the numbers
            target = f"classifier.{3 * i}" if len(heads) > 1 else "classifier"
            for part in ("weight", "bias"):
                if f"{name}.{part}" in state:
                    state[f"{target}.{part}+"] = state.pop(f"{name}.{part}")
        for key in [k for k in state if k.endswith("+")]:
            state[key[:-1]] = state.pop(key)
        return dict(arch=f"vgg{len(convs) + 3}", widths=widths, classes=classes, channels=state[convs[0] + ".weight"].shape[1],
                    side=round((first.shape[1] / width) ** 0.5))
    widths = outputs("conv1", "conv2", "fc1")
    side = round((state["fc1.weight"].shape[1] / widths[1]) ** 0.5)  # fc1 sees side x side places: invert LeNet5's arithmetic
    return dict(arch="lenet5", widths=widths, classes=outputs("fc2")[0], channels=state["conv1.weight"].shape[1], size=(side * 2 + 4) * 2 + 4)


def fold_biases(state, net: Net) -> None:
    """Move each convolution's bias into the batch norm behind it: norm(y + b) has the running mean less b."""
    for p in net.prunable:
        bias = state.pop(p.layer + ".bias", None) if p.norm else None
        if bias is not None:
            state[p.norm + ".running_mean"] = state[p.norm + ".running_mean"] - bias


def read_progress(path: Path, title: str) -> dict | None:
    """What `write` left at `path` for the work of that `title`; None where there is nothing of it."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # not there, or not readable: that work starts over
        return None
    return found if isinstance(found, dict) and found.get("title") == title and sound(path) else None


# ---- export -----------------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """A net with its normalisation: images (B, C, H, W) in [0, 1] -> logits (B, classes)."""

    def __init__(self, net: Net, mean, std):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images - self.mean) / self.std
        return self.net(x.contiguous(memory_format=torch.channels_last))


@torch.no_grad()
def folded(net: Net) -> Net:
    """A copy of `net` for inference alone: each batch norm is folded into the convolution before it, which then computes both."""
    net = deepcopy(net).eval()
    layers = [(k, m) for k, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    for (name, layer), (behind, norm) in pairwise(layers):
        if isinstance(norm, nn.BatchNorm2d):
            net.set_submodule(name, fuse_conv_bn_eval(layer, norm))
            net.set_submodule(behind, nn.Identity())
    net.prunable = [replace(p, norm=None) for p in net.prunable]
    return net


@torch.no_grad()
def check_size(net: Net, size: int) -> None:
    """Raise Failure (status 2) where `net` cannot take images of `size` x `size` pixels."""
    try:
        deepcopy(net).cpu().eval()(torch.zeros(2, net.channels, size, size))
    except RuntimeError as e:
        raise Failure(f"this {net.arch} cannot take images of {size} x {size} pixels", 2) from e


@torch.no_grad()
def export(net: Net, path: Path, mean, std, size: int, ready=lambda: None) -> float:
    """Write `net` for inference without this project, normalisation included, batch norms folded, any batch size: .pt2 (torch.export) or .onnx.

    The file is read back and run before it takes its name; `ready` is called between and may refuse. Returns the largest
    difference of its logits from the net's on random `size` x `size` images, as a share of the largest logit. Raises Failure.
    """
    path = Path(path)
    part, onnx = part_of(path), path.suffix.lower() == ".onnx"
    whole, small = (Whole(f(net).cpu().to(memory_format=torch.channels_last), mean, std).eval().requires_grad_(False) for f in (deepcopy, folded))
    images = torch.rand(5, net.channels, size, size, generator=torch.Generator().manual_seed(0))
    check_size(net, size)
    expected = whole(images)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            program = torch.export.export(small, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
            if onnx:
                import onnxruntime

                torch.onnx.export(program, f=str(part), input_names=["images"], output_names=["logits"], external_data=False, verbose=False)
                session = onnxruntime.InferenceSession(str(part))
                run = lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
            else:
                torch.export.save(program, content := BytesIO())  # in memory first: torch dies of a disk that is full
                part.write_bytes(content.getvalue())
                with part.open("rb") as file:
                    run = torch.export.load(file).module()
            found = torch.cat([run(images[:1]), run(images[1:])])
        difference = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9)).item()
        if not difference < 1e-2:
            raise Failure(f"the exported net differs from the original, by {difference:.1e} of the largest logit; nothing was written")
        ready()
        os.replace(part, path)
    except ImportError as e:
        raise Failure(f".onnx needs {e.name or 'other packages'}: pip install onnx onnxscript onnxruntime") from e
    except (OSError, RuntimeError) as e:
        raise Failure(f"cannot write {path}: {getattr(e, 'strerror', None) or str(e)[:200]}") from e
    finally:
        part.unlink(missing_ok=True)
    return difference
