"""What a network is. In this order:

layers        running a convolution or linear layer on some of its channels
nets          LeNet-5, VGG and CIFAR ResNet, each built from the widths of its prunable layers
pruning       which channels matter least, and removing them (IJCAI 2018)
cost          multiply-accumulates and parameters
checkpoints   writing and reading them; recognising the state dicts of other people
export        the net for use without this project, as .pt2 or .onnx

The *structure* of a net is the tuple of the widths of its prunable layers.
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

# A filter of the next layer is compensated where it loses a channel that holds more than
# 0.8 / C_in of its energy (script).
COMPENSATED_SHARE = 0.8
CHECKPOINT_FORMAT = 1
# ours: an exported file whose logits differ by more than this share of the largest is refused.
EXPORT_TOLERANCE = 1e-2


class UserError(Exception):
    """What went wrong, in one line for the user; exit status 1, or 2 for a wrong call."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(" ".join(str(message).split()))
        self.status = status


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is at least `number`."""
    return -(-number // multiple) * multiple


# ---- layers ------------------------------------------------------------------------------------


def run_layer(
    layer,
    x: torch.Tensor,
    input_channels: torch.Tensor | None = None,
    output_channels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a convolution or linear layer on some of its input channels, for some of its outputs.

    x (B, C_in', H, W) or (B, features) holds only the `input_channels` of what the layer reads;
    the result (B, C_out', ...) only the `output_channels`. Both are index tensors; None: all.
    """
    if not isinstance(layer, nn.Module):
        # A single-image layer of sep.py, which selects its kernels itself.
        return layer(x, input_channels, output_channels)
    is_linear = isinstance(layer, nn.Linear)
    takes_all = input_channels is None and output_channels is None
    if is_linear and x.dim() > 2:
        x = x.flatten(1)
    if is_linear and takes_all:
        return layer(x)
    weight, bias = select_weight_and_bias(layer, x.shape[1], input_channels, output_channels)
    if is_linear:
        return F.linear(x, weight, bias)
    if is_slow_in_bfloat16(layer, x):
        return convolve_by_matrix_product(x, weight, bias)
    if takes_all:
        return layer(x)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding)


def select_weight_and_bias(layer, features: int, input_channels, output_channels):
    """(weight, bias) of a layer from its `input_channels` to its `output_channels`.

    `features` is the number of inputs that x holds: a linear layer may read several per channel.
    """
    bias = layer.bias
    if bias is not None and output_channels is not None:
        bias = bias.index_select(0, output_channels)
    return select_kernels(layer.weight, features, input_channels, output_channels), bias


def select_kernels(weight, features: int, input_channels, output_channels) -> torch.Tensor:
    """The kernels of `weight` (C_out, C_in x r, ...) between the channels given."""
    if input_channels is None:
        return weight if output_channels is None else weight.index_select(0, output_channels)
    channels = weight.shape[1] * len(input_channels) // features
    if output_channels is not None and weight.is_contiguous() and not torch.is_grad_enabled():
        # Kernel by kernel in one go: half the time of two selections.
        kernels = (output_channels[:, None] * channels + input_channels).flatten()
        rows = weight.view(len(weight) * channels, -1).index_select(0, kernels)
        return rows.view(len(output_channels), -1, *weight.shape[2:])
    if output_channels is not None:
        weight = weight.index_select(0, output_channels)
    selected = group_by_input_channel(weight, channels).index_select(1, input_channels)
    return selected.reshape(len(weight), -1, *weight.shape[2:])


def group_by_input_channel(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """The weights of a layer by input channel: (out, channels x r, ...) -> (out, channels, r')."""
    return weight.reshape(weight.shape[0], channels, -1)


def is_slow_in_bfloat16(layer: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether this is a 3 x 3 convolution of a small map, in bfloat16 training on a CPU.

    There oneDNN's convolutions, the gradient of the weights above all, take up to twice as long
    as one matrix product. In float32 they do not.
    """
    geometry = (layer.kernel_size, layer.stride, layer.padding)
    is_small = max(x.shape[2:]) <= 4 and geometry == ((3, 3), (1, 1), (1, 1))
    return is_small and not x.is_cuda and layer.training and torch.is_autocast_enabled("cpu")


def convolve_by_matrix_product(x: torch.Tensor, weight: torch.Tensor, bias) -> torch.Tensor:
    """A 3 x 3 convolution, stride 1, padding 1: (B, C_in, H, W) -> (B, C_out, H, W)."""
    height, width = x.shape[2:]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    shifted_maps = [
        padded[:, top : top + height, left : left + width] for top in range(3) for left in range(3)
    ]
    neighbourhoods = torch.cat(shifted_maps, 3)  # (B, H, W, 9 C_in)
    matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (C_out, 9 C_in)
    return F.linear(neighbourhoods, matrix, bias).permute(0, 3, 1, 2)


def pool_and_relu(y: torch.Tensor, is_pooled: bool) -> torch.Tensor:
    """relu, behind a 2 x 2 max-pooling where the net pools.

    The two commute; pooling first spares three quarters of the relu.
    """
    return F.relu(F.max_pool2d(y, 2) if is_pooled else y)


# ---- nets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrunableLayer:
    """A group of channels that can be pruned, by the names of the modules around it."""

    layer: str  # the convolution or linear layer that computes the channels
    norm: str | None  # their batch normalisation
    next_layer: str  # the layer that reads them
    is_pooled: bool = False  # a 2 x 2 max-pooling stands in between


class Net(nn.Module):
    """A network with prunable layers, for `channels` x `size` x `size` images.

    `widths` are the widths of the prunable layers, in the order of `prunable`. sep.py may put a
    gate on each of them (`gates`), or replace how each is run on single images (`layer_runners`).
    """

    # The first linear layer reads head_size x head_size places of each channel.
    head_size = 1

    def __init__(self, arch: str, widths, classes: int, channels: int, size: int):
        super().__init__()
        self.arch = arch
        self.widths = tuple(widths)
        self.classes = classes
        self.channels = channels
        self.size = size
        self.prunable: list[PrunableLayer] = []
        self.gates: nn.ModuleList | None = None
        self.layer_runners: list | None = None

    def run_prunable(self, index: int, x: torch.Tensor, input_channels=None):
        """relu(norm(layer(x))) of a prunable layer, pooled where the net pools.

        x (B, C_in', H, W) holds the `input_channels`. Returns y (B, C', H', W') and the indices of
        its channels, None for all: a gate leaves out those that no image of the batch uses.
        """
        if self.layer_runners is not None:
            return self.layer_runners[index](x, input_channels)
        prunable = self.prunable[index]
        # attrgetter takes an eighth of get_submodule's time.
        layer = attrgetter(prunable.layer)(self)
        norm = attrgetter(prunable.norm)(self) if prunable.norm else None
        gate = self.gates[index] if self.gates is not None else None
        if gate is not None:
            return gate(x, input_channels, layer, norm, prunable.is_pooled)
        y = run_layer(layer, x, input_channels)
        if norm is not None:
            y = norm(y)
        return pool_and_relu(y, prunable.is_pooled), None

    @property
    def structure(self) -> tuple[int, ...]:
        """The channels at work in each prunable layer: of a gated one as many as its gate keeps."""
        if self.gates is None:
            return self.widths
        return tuple(
            width if gate is None else gate.k for gate, width in zip(self.gates, self.widths)
        )

    def initialise_weights(self) -> None:
        """He initialisation of all convolutions and linear layers; biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class LeNet5(Net):
    """Caffe's LeNet 20-50-500-10 (431,080 parameters at 28 x 28), a relu behind each hidden layer.

    Raises UserError for images of fewer than 16 x 16 pixels.
    """

    def __init__(self, arch, widths, classes, channels, size):
        super().__init__(arch, widths, classes, channels, size)
        map_size = ((size - 4) // 2 - 4) // 2  # behind two convolutions of 5 x 5, each pooled
        if map_size < 1:
            raise UserError(f"{arch} needs images of at least 16 x 16 pixels, not {size} x {size}")
        first, second, hidden = self.widths
        self.conv1 = nn.Conv2d(channels, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * map_size * map_size, hidden)
        self.fc2 = nn.Linear(hidden, classes)
        self.prunable = [
            PrunableLayer("conv1", None, "conv2", is_pooled=True),
            PrunableLayer("conv2", None, "fc1", is_pooled=True),
            PrunableLayer("fc1", None, "fc2"),
        ]
        self.initialise_weights()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, size, size) -> (B, classes)."""
        x, channels = self.run_prunable(0, x)
        x, channels = self.run_prunable(1, x, channels)
        # Behind a gate no shape would tell that the images have another size.
        if x.shape[2] * x.shape[3] * self.widths[1] != self.fc1.weight.shape[1]:
            raise RuntimeError(f"this LeNet-5 takes images of {self.size} x {self.size} pixels")
        x, channels = self.run_prunable(2, x, channels)
        return run_layer(self.fc2, x, channels)


# Convolutions per stage; a pooling ends each stage.
VGG_STAGES = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
VGG_STAGE_WIDTHS = (64, 128, 256, 512, 512)


class VGG(Net):
    """VGG with batch normalisation, keys `features.N` and `classifier`.

    With as many widths as convolutions it ends in one linear layer (the script's net). With one or
    two more it has torchvision's head: linear layers `classifier.0`, `.3`, `.6`, which read
    head_size x head_size places of each channel. Raises UserError for images below 32 x 32 pixels.
    """

    def __init__(self, arch, widths, classes, channels, size, head_size=1):
        super().__init__(arch, widths, classes, channels, size)
        if size < 32:
            raise UserError(f"{arch} needs images of at least 32 x 32 pixels, not {size} x {size}")
        self.head_size = head_size
        self.convolutions = sum(VGG_STAGES[arch])
        self.add_features(channels)
        head_names = self.add_head(classes)
        self.prunable = self.list_prunable(head_names)
        self.initialise_weights()

    def add_features(self, channels: int) -> None:
        """Convolution, batch norm and relu for each width, and a pooling behind each stage."""
        stages = VGG_STAGES[self.arch]
        stage_ends = {sum(stages[: stage + 1]) for stage in range(len(stages))}
        modules = []
        self.convolution_places = []  # (index in features, whether a pooling follows)
        inputs = channels
        for number, width in enumerate(self.widths[: self.convolutions], 1):
            is_pooled = number in stage_ends
            self.convolution_places.append((len(modules), is_pooled))
            modules.append(nn.Conv2d(inputs, width, 3, padding=1, bias=False))
            modules.append(nn.BatchNorm2d(width))
            modules.append(nn.ReLU())
            if is_pooled:
                modules.append(nn.MaxPool2d(2))
            inputs = width
        self.features = nn.Sequential(*modules)

    def add_head(self, classes: int) -> list[str]:
        """The linear layers; returns their names."""
        hidden_widths = self.widths[self.convolutions :]
        inputs = self.widths[self.convolutions - 1] * self.head_size * self.head_size
        sizes = [inputs, *hidden_widths, classes]
        layers = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes)]
        if len(layers) == 1:
            self.classifier = layers[0]
            return ["classifier"]
        # torchvision's numbers: a relu and a dropout stand between two linear layers.
        named = {str(3 * position): layer for position, layer in enumerate(layers)}
        self.classifier = nn.Sequential(OrderedDict(named))
        return [f"classifier.{key}" for key in named]

    def list_prunable(self, head_names: list[str]) -> list[PrunableLayer]:
        names = [f"features.{place}" for place, _ in self.convolution_places] + head_names
        prunable = [
            PrunableLayer(names[i], f"features.{place + 1}", names[i + 1], is_pooled)
            for i, (place, is_pooled) in enumerate(self.convolution_places)
        ]
        hidden = [PrunableLayer(name, None, after) for name, after in pairwise(head_names)]
        return prunable + hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        channels = None
        for index in range(len(self.prunable)):
            x, channels = self.run_prunable(index, x, channels)
            if index == self.convolutions - 1:
                x = F.adaptive_avg_pool2d(x, self.head_size)  # 1 x 1 already at 32 x 32 pixels
        last_layer = attrgetter(self.prunable[-1].next_layer)(self)
        return run_layer(last_layer, x, channels)


class BasicBlock(nn.Module):
    """Two convolutions beside an option-A shortcut. Only the inner width can be pruned."""

    def __init__(self, inputs: int, inner: int, outputs: int):
        super().__init__()
        self.has_wider_output = outputs > inputs
        self.padding_channels = (outputs - inputs) // 2
        stride = 2 if self.has_wider_output else 1
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        """x itself or, where the block gets wider, every second pixel and channels of zeros."""
        if not self.has_wider_output:
            return x
        padding = (0, 0, 0, 0, self.padding_channels, self.padding_channels)
        return F.pad(x[:, :, ::2, ::2], padding)


class ResNet(Net):
    """CIFAR ResNet of depth 6n + 2 (He et al. 2016), keys as in akamaster/pytorch_resnet_cifar10.

    Its prunable layers are the inner widths of its blocks, 27 in ResNet-56.
    """

    STAGE_WIDTHS = (16, 32, 64)

    def __init__(self, arch, widths, classes, channels, size):
        super().__init__(arch, widths, classes, channels, size)
        blocks_per_stage = len(self.widths) // 3
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inner_widths = iter(self.widths)
        stages = []
        inputs = 16
        for outputs in self.STAGE_WIDTHS:
            blocks = []
            for _ in range(blocks_per_stage):
                blocks.append(BasicBlock(inputs, next(inner_widths), outputs))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, classes)
        names = [
            f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(blocks_per_stage)
        ]
        self.prunable = [
            PrunableLayer(f"{name}.conv1", f"{name}.bn1", f"{name}.conv2") for name in names
        ]
        self.initialise_weights()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for index, block in enumerate([*self.layer1, *self.layer2, *self.layer3]):
            inner, channels = self.run_prunable(index, x)
            outer = block.bn2(run_layer(block.conv2, inner, channels))
            x = F.relu(outer + block.shortcut(x))
        return self.linear(x.mean((2, 3)))


def default_widths(arch: str) -> tuple[int, ...]:
    """The widths of the unpruned net. Raises UserError for an unknown arch."""
    if arch == "lenet5":
        return (20, 50, 500)
    if arch in VGG_STAGES:
        stages = zip(VGG_STAGE_WIDTHS, VGG_STAGES[arch])
        return tuple(width for width, count in stages for _ in range(count))
    depth = int(arch[6:]) if re.fullmatch(r"resnet\d{1,4}", str(arch)) else 0
    if depth >= 8 and depth % 6 == 2:
        return tuple(width for width in ResNet.STAGE_WIDTHS for _ in range(depth // 6))
    raise UserError(
        f"unknown network '{arch}': lenet5, vgg11, 13, 16, 19 or resnetN with N = 6n + 2"
    )


def build(arch: str, widths=None, *, classes=10, channels=3, size=32, head_size=1) -> Net:
    """A new net of that arch for `channels` x `size` x `size` images.

    `widths` are those of its prunable layers, by default the unpruned ones. A VGG may have up to
    two more, the hidden linear layers of torchvision's head. Raises UserError where they do not
    fit the arch, or the images are too small for it.
    """
    unpruned = default_widths(arch)
    widths = unpruned if widths is None else tuple(widths)
    most = len(unpruned) + 2 if arch in VGG_STAGES else len(unpruned)
    if not len(unpruned) <= len(widths) <= most or min(widths) < 1:
        raise UserError(
            f"{arch} has {len(unpruned)} prunable layers, each at least 1 wide, not {list(widths)}"
        )
    if arch in VGG_STAGES:
        return VGG(arch, widths, classes, channels, size, head_size)
    net_class = LeNet5 if arch == "lenet5" else ResNet
    return net_class(arch, widths, classes, channels, size)


def build_like(net: Net, widths, size: int | None = None) -> Net:
    """A new net as `net` but for its widths (and the pixels of its images); without gates."""
    return build(
        net.arch,
        widths,
        classes=net.classes,
        channels=net.channels,
        size=size or net.size,
        head_size=net.head_size,
    )


# ---- pruning -----------------------------------------------------------------------------------


def channel_importance(net: Net, used_filters=None) -> list[torch.Tensor]:
    """Per prunable layer (C,): the sum of squared weights that the next layer applies to each
    channel (script).

    `used_filters`: per prunable layer the indices of the filters that count (a gated net's);
    by default all of them do.
    """
    filters_of = {}
    if used_filters is not None:
        filters_of = {p.layer: index for p, index in zip(net.prunable, used_filters)}
    importance = []
    for prunable, width in zip(net.prunable, net.widths):
        weight = net.get_submodule(prunable.next_layer).weight.detach()
        weight = weight[filters_of.get(prunable.next_layer, slice(None))]
        importance.append(group_by_input_channel(weight, width).square().sum((0, 2)))
    return importance


def most_important_channels(net: Net, structure) -> list[torch.Tensor]:
    """Per prunable layer the indices, ascending, of the channels that `structure` keeps."""
    return [
        importance.topk(count).indices.sort().values
        for importance, count in zip(channel_importance(net), structure)
    ]


@torch.no_grad()
def compensate(net: Net, kept_channels, previous_channels=None) -> None:
    """Scale filters that lose a strong channel so that they keep their energy, in place (script).

    A filter counts where it loses a channel with more than 0.8 / C_in of its energy. Both lists
    hold indices per prunable layer: the channels that stay and those at work before, by default
    all of them.
    """
    for i, (prunable, width, kept) in enumerate(zip(net.prunable, net.widths, kept_channels)):
        weight = net.get_submodule(prunable.next_layer).weight
        energy = group_by_input_channel(weight, width).square().sum(2)  # (out, C)
        is_lost = torch.zeros(width, dtype=torch.bool, device=weight.device)
        is_lost[slice(None) if previous_channels is None else previous_channels[i]] = True
        count = is_lost.sum()
        energy_before = energy[:, is_lost].sum(1)
        is_lost[kept] = False
        energy_after = energy[:, kept].sum(1)
        threshold = COMPENSATED_SHARE / count * energy_before[:, None]
        loses_strong_channel = (energy[:, is_lost] > threshold).any(1) & (energy_after > 0)
        gain = (energy_before / energy_after.clamp_min(1e-30)).sqrt()
        scale = torch.where(loses_strong_channel, gain, 1.0)
        weight.mul_(scale.reshape(-1, *[1] * (weight.dim() - 1)))


def remove_channels(net: Net, kept_channels) -> Net:
    """A new, smaller net with only the channels kept (ascending indices per prunable layer).

    Gates are left out.
    """
    small = build_like(net, [len(kept) for kept in kept_channels])
    state = net.state_dict()
    for prunable, width, kept in zip(net.prunable, net.widths, kept_channels):
        for name in (prunable.layer, prunable.norm):
            keys = [key for key in state if name and key.rpartition(".")[0] == name]
            for key in keys:
                if state[key].dim():
                    state[key] = state[key][kept]
        key = prunable.next_layer + ".weight"
        weight = state[key]
        fewer = group_by_input_channel(weight, width)[:, kept]
        state[key] = fewer.reshape(weight.shape[0], -1, *weight.shape[2:])
    small.load_state_dict({k: v for k, v in state.items() if not k.startswith("gates.")})
    return small.to(next(net.parameters()).device)


def prune_channels(net: Net, structure) -> Net:
    """Hard pruning (IJCAI 2018): a new net of that structure, without the least important channels.

    The filters that read the removed channels are compensated.
    """
    net = deepcopy(net)
    kept_channels = most_important_channels(net, structure)
    compensate(net, kept_channels)
    return remove_channels(net, kept_channels)


# ---- cost --------------------------------------------------------------------------------------


@lru_cache
def macs_per_kernel(arch: str, layers: int, channels: int, size: int) -> dict[str, int]:
    """For each convolution and linear layer, by name, the MACs between one input channel and one
    output channel: the kernel's area times the places where it is applied."""
    net = build(arch, [1] * layers, channels=channels, size=size).eval()
    macs = {}

    def make_hook(name):
        def record(module, _, output):
            macs[name] = prod(module.weight.shape[2:]) * prod(output.shape[2:])

        return record

    hooks = [
        module.register_forward_hook(make_hook(name))
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        net(torch.zeros(1, channels, size, size))
    for hook in hooks:
        hook.remove()
    return macs


def count_macs(net: Net, structure=None) -> int:
    """Multiply-accumulates for one image if `net` had that structure (default: its own).

    All convolutions and linear layers count. It is half of what torch's FlopCounterMode counts.
    Gates come on top: see sep.count_macs.
    """
    structure = net.structure if structure is None else structure
    outputs_of = {p.layer: count for p, count in zip(net.prunable, structure)}
    inputs_of = {
        p.next_layer: (count, width) for p, count, width in zip(net.prunable, structure, net.widths)
    }
    total = 0
    kernels = macs_per_kernel(net.arch, len(net.widths), net.channels, net.size)
    for name, macs in kernels.items():
        outputs, inputs = attrgetter(name)(net).weight.shape[:2]
        count, width = inputs_of.get(name, (1, 1))
        total += macs * outputs_of.get(name, outputs) * (inputs * count // width)
    return total


def count_parameters(net: Net) -> int:
    """The number of weights, those of gates included."""
    return sum(parameter.numel() for parameter in net.parameters())


# ---- checkpoints: files ------------------------------------------------------------------------


def temporary_path(path: Path) -> Path:
    """Where a user's file is written before it takes its name: beside it, never over another."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def refuse_existing(path: Path, advice: str) -> None:
    """Raise UserError (status 2) where there is something at `path`, a dangling link included."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists already and is kept; {advice}", 2)


def write_atomically(path: Path, write, temporary: Path | None = None, hint: str = "") -> None:
    """Make a file by `write(temporary)`; the old one stays until the new one is complete.

    Raises UserError where that fails, with `hint` at the end of its line.
    """
    path = Path(path)
    temporary = temporary or path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {reason_of_failed_write(error)}{hint}") from error
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


def reason_of_failed_write(error: Exception) -> str:
    """torch reports a full disk as a RuntimeError about its own C++ file."""
    if "inline_container" in str(error) or "unexpected pos" in str(error):
        return "the disk may be full"
    return getattr(error, "strerror", None) or str(error)


def write_tensors(path: Path, content: dict) -> None:
    """Save tensors and plain values. Raises UserError."""
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def write_text(path: Path, text: str) -> None:
    """Save a text. Raises UserError."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def is_intact(path: Path) -> bool:
    """Whether a file that `write_tensors` made is there and undamaged: torch.load does not look at
    the checksums in it."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # zipfile raises many kinds
        return False


def read_unfinished_work(path: Path, title: str, keys: set[str]) -> dict | None:
    """What `write_tensors` left at `path` for the work of that `title`; None if nothing.

    Nor is it read where it lacks one of `keys`: then another version wrote it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # not there, or not readable: that work starts over
        return None
    if not isinstance(content, dict) or content.get("title") != title:
        return None
    return content if keys <= content.keys() and is_intact(path) else None


# ---- checkpoints: our own ----------------------------------------------------------------------

# What a checkpoint holds, and of which type. `side` is the net's head_size.
CHECKPOINT_TYPES = {
    "arch": str,
    "widths": list,
    "classes": int,
    "channels": int,
    "size": int,
    "side": int,
    "gates": list | None,
    "state": dict,
    "facts": dict,
}


def save_checkpoint(path: Path, net: Net, facts: dict) -> None:
    """Write all that rebuilds the net, and `facts` about it (plain values). Raises UserError."""
    gates = None
    if net.gates is not None:
        gates = [None if gate is None else gate.k for gate in net.gates]
    content = {
        "format": CHECKPOINT_FORMAT,
        "arch": net.arch,
        "widths": list(net.widths),
        "classes": net.classes,
        "channels": net.channels,
        "size": net.size,
        "side": net.head_size,
        "gates": gates,
        "state": {key: value.detach().cpu() for key, value in net.state_dict().items()},
        "facts": facts,
    }
    write_tensors(path, content)


def read_checkpoint(path: Path) -> dict:
    """A checkpoint as `save_checkpoint` wrote it, or anybody's state dict brought into that form.

    Tensors are on the CPU. Code in the file is never run. Raises UserError (status 2 where there is
    no such file).
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a checkpoint", 2)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; give the path of a .pt or .pth file", 2)
    if path.suffix.lower() in (".pt2", ".onnx"):
        raise UserError(
            f"{path} is an export, not a checkpoint; give the file that it was made from", 2
        )
    content = read_tensors(path)
    if not isinstance(content, dict) or "format" not in content:
        return recognise_state_dict(content, path)
    check_checkpoint(content, path)
    return content


# The first byte of PyTorch's pickles, which old versions wrote without a zip file around them.
PICKLE_START = b"\x80"


def starts_as_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(1) == PICKLE_START
    except OSError:
        return False


def read_tensors(path: Path):
    """torch.load of weights alone, checksums included. Raises UserError."""
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:
        is_pickle = zipfile.is_zipfile(path) or starts_as_pickle(path)
        if is_pickle and "weights_only" in str(error):
            raise UserError(
                f"{path} is not a file of weights alone (reading it could run code); "
                "save the state dict and try again"
            ) from error
        raise UserError(
            f"{path} is not a checkpoint that torch can read; "
            "torch.save(net.state_dict(), FILE) makes one"
        ) from error
    # Files older than PyTorch 1.6 are no zip files and have no checksums.
    if zipfile.is_zipfile(path) and not is_intact(path):
        raise UserError(f"{path} is damaged: its checksums are wrong")
    return content


def check_checkpoint(content: dict, path: Path) -> None:
    """Raise UserError unless `content` has all that a checkpoint has, each of its type."""
    if type(content["format"]) is not int or content["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} has another checkpoint format; this version reads {CHECKPOINT_FORMAT}"
        )
    missing = CHECKPOINT_TYPES.keys() - content.keys()
    if missing:
        raise UserError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    for key in ("arch", "widths", "classes", "channels", "size", "side", "gates", "state"):
        if not isinstance(content[key], CHECKPOINT_TYPES[key]):
            raise UserError(f"{path} is damaged: {key} in it is of the wrong type")
    sizes = [content[key] for key in ("classes", "channels", "size", "side")]
    if not all(type(size) is int and size > 0 for size in [*sizes, *content["widths"]]):
        raise UserError(f"{path} is damaged: its widths and sizes are no whole numbers")
    if not all(isinstance(value, torch.Tensor) for value in content["state"].values()):
        raise UserError(f"{path} is damaged: its state is no state dict")
    facts = content["facts"]
    if not are_facts(facts) or not are_facts(facts.get("baseline") or {}):
        raise UserError(f"{path} is damaged: its facts are no facts")


def are_facts(facts) -> bool:
    """Whether these are plain values, with numbers where the commands compute with them."""
    if not isinstance(facts, dict):
        return False
    try:
        json.dumps(facts)
    except (TypeError, ValueError):
        return False
    numbers = (facts.get(key, 0) for key in ("test_accuracy", "macs", "params"))
    return all(isinstance(number, int | float) for number in numbers)


def build_from_checkpoint(checkpoint: dict) -> Net:
    """The net of a checkpoint, with fresh weights and no gates. Raises UserError."""
    return build(
        checkpoint["arch"],
        checkpoint["widths"],
        classes=checkpoint["classes"],
        channels=checkpoint["channels"],
        size=checkpoint["size"],
        head_size=checkpoint["side"],
    )


def load_weights(net: Net, state: dict) -> None:
    """Load a state dict into `net`. Raises UserError where it does not fit, or is not finite."""
    mismatch = find_mismatch(net, state)
    if mismatch:
        raise UserError(f"its weights do not fit a {net.arch} of the widths they name: {mismatch}")
    net.load_state_dict(state)
    floats = [value for value in state.values() if value.is_floating_point()]
    if not all(value.isfinite().all() for value in floats):
        raise UserError("some of its weights are not finite numbers")


def find_mismatch(net: Net, state: dict) -> str:
    """The first difference between the state that `net` has and `state`; "" if there is none."""
    wanted = net.state_dict()
    for key, value in wanted.items():
        if key not in state:
            # Files of a PyTorch before 0.4.1 do not count batches.
            if key.endswith("num_batches_tracked"):
                continue
            return f"{key} is missing"
        if state[key].shape != value.shape or state[key].is_complex():
            return f"{key} is {describe_shape(state[key])}, not {describe_shape(value)}"
    for key in state:
        if key not in wanted:
            return f"{key} is not in this net"
    return ""


def describe_shape(tensor: torch.Tensor) -> str:
    return " x ".join(str(size) for size in tensor.shape) or "a number"


# ---- checkpoints: state dicts of other people --------------------------------------------------

KNOWN_NETS = (
    "LeNet-5 (conv1, conv2, fc1, fc2), "
    "VGG with batch norm (features.N, classifier, as in torchvision), "
    "CIFAR ResNets of depth 6n + 2 and widths 16, 32, 64 with option-A shortcuts "
    "(conv1, bn1, layer1.0.conv1, ..., linear)"
)
# DataParallel's, Lightning's and torch.compile's prefixes.
KEY_PREFIXES = re.compile(r"^((module|model|net|_orig_mod)\.)+")


def recognise_state_dict(content, path: Path) -> dict:
    """A state dict as a checkpoint: arch and widths follow from names and shapes.

    Raises UserError where it is of no net that this tool knows.
    """
    state = unwrap_state_dict(content, path)
    if any(key.startswith("gates.") for key in state):
        raise UserError(
            f"{path}: weights alone of a gated net do not say how many kernels its gates keep; "
            "give the checkpoint that they are from"
        )
    for key in state:
        if ".shortcut." in key or ".downsample." in key:
            raise UserError(
                f"{path}: a ResNet whose shortcuts are convolutions ({key}); known are {KNOWN_NETS}"
            )
    checkpoint = {"format": CHECKPOINT_FORMAT, "size": 32, "side": 1, "gates": None, "facts": {}}
    try:
        checkpoint |= recognise_architecture(state)
        fold_biases(state, build_from_checkpoint(checkpoint))
    except (KeyError, IndexError, ZeroDivisionError, RuntimeError, UserError) as error:
        missing = ""
        if isinstance(error, KeyError) and state.keys() & {"conv1.weight", "features.0.weight"}:
            missing = f" (it lacks {error.args[0]})"
        raise UserError(
            f"{path}: its names and shapes are of no net that this tool knows{missing}: "
            f"{KNOWN_NETS}"
        ) from error
    return checkpoint | {"state": state}


def unwrap_state_dict(content, path: Path) -> OrderedDict:
    """The state dict in what torch.load found, keys without prefixes, numbers in float32."""
    if isinstance(content, dict) and {"title", "epoch"} <= content.keys():
        raise UserError(f"{path} is the state of unfinished work, not a checkpoint")
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    is_state_dict = isinstance(content, dict) and content
    if not is_state_dict or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UserError(
            f"{path} holds no state dict (bare, or under state_dict, model_state_dict, "
            "model or net); torch.save(net.state_dict(), FILE) makes such a file"
        )
    state = OrderedDict()
    for key, value in content.items():
        bare_key = KEY_PREFIXES.sub("", str(key))
        state[bare_key] = value.float() if value.is_floating_point() else value
    return state


def recognise_architecture(state: dict) -> dict:
    """arch, widths, classes, channels and what else rebuilds the net, by names and shapes.

    Brings the names of `state` into our form, in place. Raises KeyError where one is missing.
    """
    if "layer1.0.conv1.weight" in state:
        return recognise_resnet(state)
    if "features.0.weight" in state:
        return recognise_vgg(state)
    return recognise_lenet(state)


def output_widths(state: dict, layers: list[str]) -> list[int]:
    return [state[f"{layer}.weight"].shape[0] for layer in layers]


def find_layers(state: dict, pattern: str, dimensions: int) -> list[str]:
    """The layers whose name matches and whose weight has so many dimensions, by their numbers."""
    layers = [
        key.removesuffix(".weight")
        for key, value in state.items()
        if re.fullmatch(pattern + r"\.weight", key) and value.dim() == dimensions
    ]
    return sorted(layers, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def recognise_resnet(state: dict) -> dict:
    for part in ("weight", "bias"):
        if f"fc.{part}" in state:  # torchvision's name
            state[f"linear.{part}"] = state.pop(f"fc.{part}")
    blocks = find_layers(state, r"layer\d\.\d+\.conv1", dimensions=4)
    return {
        "arch": f"resnet{2 * len(blocks) + 2}",
        "widths": output_widths(state, blocks),
        "classes": state["linear.weight"].shape[0],
        "channels": state["conv1.weight"].shape[1],
    }


def recognise_vgg(state: dict) -> dict:
    convolutions = find_layers(state, r"features\.\d+", dimensions=4)
    linear_layers = find_layers(state, r"classifier(\.\d+)?", dimensions=2)
    last_width = state[f"{convolutions[-1]}.weight"].shape[0]
    places = state[f"{linear_layers[0]}.weight"].shape[1] / last_width
    found = {
        "arch": f"vgg{len(convolutions) + 3}",
        "widths": output_widths(state, convolutions + linear_layers[:-1]),
        "classes": state[f"{linear_layers[-1]}.weight"].shape[0],
        "channels": state[f"{convolutions[0]}.weight"].shape[1],
        "side": round(places**0.5),
    }
    rename_linear_layers(state, linear_layers)
    return found


def rename_linear_layers(state: dict, linear_layers: list[str]) -> None:
    """Give a VGG's linear layers torchvision's numbers: more dropouts in between shift them."""
    renamed = {}
    for position, name in enumerate(linear_layers):
        own_name = f"classifier.{3 * position}" if len(linear_layers) > 1 else "classifier"
        for part in ("weight", "bias"):
            if f"{name}.{part}" in state:
                renamed[f"{own_name}.{part}"] = state.pop(f"{name}.{part}")
    state.update(renamed)


def recognise_lenet(state: dict) -> dict:
    widths = output_widths(state, ["conv1", "conv2", "fc1"])
    # fc1 reads map_size x map_size places of each channel: LeNet5's arithmetic, backwards.
    map_size = round((state["fc1.weight"].shape[1] / widths[1]) ** 0.5)
    return {
        "arch": "lenet5",
        "widths": widths,
        "classes": state["fc2.weight"].shape[0],
        "channels": state["conv1.weight"].shape[1],
        "size": (map_size * 2 + 4) * 2 + 4,
    }


def fold_biases(state: dict, net: Net) -> None:
    """Move each convolution's bias into the batch norm behind it, in place:
    norm(y + b) has the running mean less b."""
    for prunable in net.prunable:
        if prunable.norm is None:
            continue
        bias = state.pop(f"{prunable.layer}.bias", None)
        if bias is not None:
            key = f"{prunable.norm}.running_mean"
            state[key] = state[key] - bias


# ---- export ------------------------------------------------------------------------------------


class NormalisedNet(nn.Module):
    """A net with its normalisation: images (B, C, H, W) in [0, 1] -> logits (B, classes)."""

    def __init__(self, net: Net, mean, std):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # Traced with the net, so an exported file refuses uint8 images instead of reading 255s.
        torch.ops.aten._assert_tensor_metadata(images, dtype=torch.float32)
        x = (images - self.mean) / self.std
        return self.net(x.contiguous(memory_format=torch.channels_last))


@torch.no_grad()
def fold_batch_norms(net: Net) -> Net:
    """A copy of `net` for inference, each batch norm folded into the convolution before it."""
    net = deepcopy(net).eval()
    layers = [
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    for (layer_name, layer), (norm_name, norm) in pairwise(layers):
        if isinstance(norm, nn.BatchNorm2d):
            net.set_submodule(layer_name, fuse_conv_bn_eval(layer, norm))
            net.set_submodule(norm_name, nn.Identity())
    net.prunable = [replace(prunable, norm=None) for prunable in net.prunable]
    return net


@torch.no_grad()
def check_image_size(net: Net, size: int) -> None:
    """Raise UserError (status 2) where `net` cannot take images of `size` x `size` pixels."""
    try:
        deepcopy(net).cpu().eval()(torch.zeros(2, net.channels, size, size))
    except RuntimeError as error:
        raise UserError(
            f"this {net.arch} cannot take images of {size} x {size} pixels; give another --size", 2
        ) from error


@torch.no_grad()
def export_net(net: Net, path: Path, mean, std, size: int, *, may_replace: bool = False) -> float:
    """Write `net` for inference without this project: .pt2 (torch.export) or .onnx.

    Normalisation is included, batch norms are folded, any batch size is taken. The file is read
    back and run before it takes its name. Returns the largest difference of its logits from the
    net's on random `size` x `size` images, as a share of the largest logit. Raises UserError, also
    where `path` exists unless `may_replace`.
    """
    path = Path(path)
    temporary = temporary_path(path)
    check_image_size(net, size)
    plain, folded = (
        NormalisedNet(copy(net).cpu().to(memory_format=torch.channels_last), mean, std)
        .eval()
        .requires_grad_(False)
        for copy in (deepcopy, fold_batch_norms)
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, net.channels, size, size, generator=generator)
    expected = plain(images)
    try:
        run_file = write_program(folded, temporary, images[:2], path.suffix.lower() == ".onnx")
        found = torch.cat([run_file(images[:1]), run_file(images[1:])])
        largest_logit = expected.abs().max().clamp_min(1e-9)
        difference = ((found - expected).abs().max() / largest_logit).item()
        if not difference < EXPORT_TOLERANCE:
            raise UserError(
                f"the exported net differs from the original, by {difference:.1e} of the largest "
                "logit; nothing was written"
            )
        if not may_replace:
            refuse_existing(path, "--force overwrites it")
        os.replace(temporary, path)
    except ImportError as error:
        package = error.name or "other packages"
        raise UserError(
            f".onnx needs {package}: pip install onnx onnxscript onnxruntime"
        ) from error
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise UserError(f"cannot write {path}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return difference


def write_program(net: nn.Module, path: Path, images: torch.Tensor, is_onnx: bool):
    """Trace `net` on `images`, write it to `path`, and return a function that runs the file.

    The libraries print and warn a good deal; none of it is for the user.
    """
    quiet = (redirect_stdout(StringIO()), redirect_stderr(StringIO()))
    with warnings.catch_warnings(action="ignore"), quiet[0], quiet[1]:
        any_batch = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(net, (images,), dynamic_shapes=any_batch)
        if is_onnx:
            return write_onnx(program, path)
        content = BytesIO()  # in memory first: torch dies of a disk that is full
        torch.export.save(program, content)
        path.write_bytes(content.getvalue())
        with path.open("rb") as file:
            return torch.export.load(file).module()


def write_onnx(program, path: Path):
    """Write a traced program as .onnx and return a function that runs it by onnxruntime."""
    import onnxruntime

    torch.onnx.export(
        program,
        f=str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),  # the axis's name in the file
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path))

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    return run
