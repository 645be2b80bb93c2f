"""What a network is. In this order:

layers        running a convolution or linear layer; its weights by input channel
nets          chains (LeNet, VGG, perceptrons) and residual nets, each built from an architecture
              and the widths of its prunable layers
pruning       which channels matter least, and removing them (IJCAI 2018)
cost          multiply-accumulates and parameters
checkpoints   writing and reading them; recognising foreign state dicts, which this tool has not
              written
export        the net for use without this project, as .pt2 or .onnx

The *structure* of a net says how many channels are at work in each prunable layer: its width or,
in a gated net, what its gate keeps.

Numbers marked `script` are from the authors' released script, `paper` from their papers ("Where to
Prune: Using LSTM to Guide End-to-end Pruning", IJCAI 2018, and "... Data-Dependent Soft Pruning",
IEEE TIP 2021); `ours` were chosen here.
"""

import difflib
import json
import math
import os
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from io import BytesIO, StringIO
from itertools import accumulate, chain, groupby, pairwise, product
from math import prod
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

COMPENSATED_SHARE = 0.8  # (script) see `rescale_next_filters`
# The formats of checkpoints:
# 3: today's.
# 2: as 3, but with gates of another kind, which cannot be read any more.
# 1: the nets of this tool alone, by their names (OLD_CHECKPOINT_TYPES); gates as in 2.
CHECKPOINT_FORMAT = 3
FIRST_FORMAT_OF_TODAYS_GATES = 3
# ours: an exported file whose logits differ by more than this share of the largest is refused.
EXPORT_TOLERANCE = 1e-2
EXPORT_ENDINGS = (".pt2", ".onnx")


class UserError(Exception):
    """What went wrong, in one line for the user; exit status 1, or 2 for a wrong call."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(" ".join(str(message).split()))
        self.status = status


# ---- layers ------------------------------------------------------------------------------------


def run_layer(layer, x: torch.Tensor, previous_group=None) -> torch.Tensor:
    """Run a convolution or a linear layer on x (B, C, H, W). A linear layer flattens x, and also
    takes (B, features).

    `previous_group` is None in ordinary nets; see Net.run_prunable.
    """
    if not isinstance(layer, nn.Module):
        # `sep.tune` has replaced this layer by a sep.GatheringLayer, a callable that is no module.
        return layer(x, previous_group)
    if isinstance(layer, nn.Linear):
        return layer(x.flatten(1))
    if is_slow_in_bfloat16(layer, x):
        # The module itself is not called, so its hooks do not run. In evaluation mode they do.
        return convolve_by_matrix_product(x, layer.weight, layer.bias)
    return layer(x)


def group_by_input_channel(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """The weights of a layer by input channel.

    A convolution (out, channels, k, k) -> (out, channels, k * k). A linear layer that reads a
    flattened map of p places, (out, channels * p) -> (out, channels, p).
    """
    return weight.reshape(weight.shape[0], channels, -1)


def select_input_channels(weight: torch.Tensor, channels: int, index) -> torch.Tensor:
    """The part of a layer's weights that reads the input channels in `index`.

    `channels` is the number of input channels of the whole layer, and `index` has n entries.
    A convolution (out, channels, k, k) -> (out, n, k, k). A linear layer that reads p places of
    each channel (out, channels * p) -> (out, n * p).
    """
    selected = group_by_input_channel(weight, channels)[:, index]
    return selected.reshape(len(weight), -1, *weight.shape[2:])


def is_slow_in_bfloat16(layer: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether the layer is a 3 x 3 convolution that oneDNN runs slowly here.

    So it is on maps of at most 4 x 4 places, in bfloat16 training on a CPU: oneDNN's convolution
    takes up to twice as long as one matrix product, above all for the gradient of the weights. In
    float32 it does not.
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


# ---- nets --------------------------------------------------------------------------------------
#
# An Architecture says all of a net but the widths of its prunable layers and its weights. There are
# two kinds: chains of layers (LeNet, VGG, perceptrons) and residual nets.


@dataclass(frozen=True)
class Pooling:
    """A pooling over kernel x kernel places: their maximum, or their average."""

    is_max: bool
    kernel: int = 2
    stride: int = 2
    padding: int = 0

    def map_size(self, size: int) -> int:
        """The side of the output map for an input map of side `size`; 0 if no output is left."""
        return max(0, (size + 2 * self.padding - self.kernel) // self.stride + 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        pool = F.max_pool2d if self.is_max else F.avg_pool2d
        return pool(x, self.kernel, self.stride, self.padding)


POOLINGS = {
    "max": Pooling(True),
    "average": Pooling(False),
    "max 3 x 3": Pooling(True, 3),
    "padded max 3 x 3": Pooling(True, 3, padding=1),
    "average 3 x 3": Pooling(False, 3),
    "padded average 3 x 3": Pooling(False, 3, padding=1),
    "max 3 x 3, stride 3": Pooling(True, 3, 3),
    "max 4 x 4": Pooling(True, 4, 4),
    "average 4 x 4": Pooling(False, 4, 4),
}
# Where the batch norm of a convolution may stand. Nearly all nets have it before the activation.
BEFORE_ACTIVATION = "before activation"
AFTER_ACTIVATION = "after activation"
AFTER_POOLING = "after pooling"
NORM_PLACES = (BEFORE_ACTIVATION, AFTER_ACTIVATION, AFTER_POOLING)


@dataclass(frozen=True)
class Convolution:
    """A convolution of a chain, and what follows it."""

    kernel: int = 3
    padding: int = 1
    has_bias: bool = False
    has_norm: bool = True
    pooling: str = ""  # one of POOLINGS, or none
    stride: int = 1
    norm_place: str = BEFORE_ACTIVATION  # one of NORM_PLACES

    def map_size(self, size: int) -> int:
        """The side of the map after convolution and pooling, for an input map of side `size`."""
        size = max(0, (size + 2 * self.padding - self.kernel) // self.stride + 1)
        return POOLINGS[self.pooling].map_size(size) if self.pooling else size


@dataclass(frozen=True)
class ChainArchitecture:
    """Convolutions, then linear layers; LeNet, VGG and perceptrons are such chains.

    The first linear layer reads head_size x head_size places of each channel.
    """

    name: str
    classes: int
    channels: int
    size: int  # of the images, in pixels
    convolutions: tuple[Convolution, ...]
    hidden_norms: tuple[bool, ...]  # of each hidden linear layer, whether a batch norm follows
    head_size: int
    # Whether larger maps are averaged to head_size; else the last map has to have that side.
    is_averaged: bool
    activation: str = "relu"  # one of ACTIVATIONS
    has_flat_names: bool = False  # conv1, fc1, ... as LeNets have; else features.N, classifier.N

    @property
    def prunable_count(self) -> int:
        return len(self.convolutions) + len(self.hidden_norms)

    @property
    def smallest_size(self) -> int:
        """The smallest side of images, in pixels, for which the convolutions leave a map."""
        size = 1
        while self.map_size(size) < 1:
            size += 1
        return size

    def map_size(self, size: int) -> int:
        """The side of the last map, for images of that side, in pixels."""
        for convolution in self.convolutions:
            size = convolution.map_size(size)
        return size

    def in_words(self) -> str:
        """What the user is told about how a net is read."""
        poolings = [
            f"{convolution.pooling} pooling after convolution {number}"
            for number, convolution in enumerate(self.convolutions, 1)
            if convolution.pooling
        ]
        strides = [
            f"stride {convolution.stride} in convolution {number}"
            for number, convolution in enumerate(self.convolutions, 1)
            if convolution.stride > 1
        ]
        paddings = sorted({convolution.padding for convolution in self.convolutions})
        late_norms = sorted(
            {
                f"batch norms {convolution.norm_place}"
                for convolution in self.convolutions
                if convolution.has_norm and convolution.norm_place != BEFORE_ACTIVATION
            }
        )
        words = [self.name, *strides, *poolings, *late_norms]
        if paddings:
            words.append(f"padding {' and '.join(map(str, paddings))}")
        return ", ".join([*words, self.activation])

    def fits_size(self, size: int) -> bool:
        """Whether the first linear layer can read the last map of images of that size."""
        if self.is_averaged:
            return self.map_size(size) >= 1
        return self.map_size(size) == self.head_size

    def check_size(self, size: int) -> None:
        """Raise UserError where images of that size are too small for the poolings. Larger ones may
        still not fit the first linear layer: see `fits_size`."""
        smallest = self.smallest_size
        if size < smallest:
            raise UserError(
                f"{self.name} needs images of at least {smallest} x {smallest} pixels, "
                f"not {size} x {size}"
            )


@dataclass(frozen=True)
class Block:
    """A residual block: the channels that it puts out, and its stride."""

    outputs: int
    stride: int = 1
    # Whether a 1 x 1 convolution and a batch norm bring its input into the shape of its output
    # (option B of He et al. 2016); else channels of zeros are added where it gets wider (option A).
    has_convolution: bool = False
    # Of a pre-activated block, whether the shortcut begins after the first norm and relu.
    is_shortcut_activated: bool = False


@dataclass(frozen=True)
class ResNetArchitecture:
    """A residual net: a first convolution, stages of blocks, one linear layer or more."""

    name: str
    classes: int
    channels: int
    size: int  # of the images, in pixels
    stem_width: int
    stages: tuple[tuple[Block, ...], ...]
    # Of a block's convolutions: (3, 3) of a basic block, (1, 3, 1) of a bottleneck.
    kernels: tuple[int, ...] = (3, 3)
    stem_kernel: int = 3
    stem_stride: int = 1
    has_stem_norm: bool = True
    has_stem_pooling: bool = False  # a max-pooling with stride 2 after the first convolution
    stem_pooling_kernel: int = 3  # of 3 x 3 places (ImageNet's nets), or of 2 x 2
    is_preactivated: bool = False  # batch norms and relus stand before the convolutions
    has_last_norm: bool = False  # after the blocks, of pre-activated nets
    hidden_widths: tuple[int, ...] = ()  # of linear layers before the last one; never pruned
    strided_convolution: int = 0  # index of the convolution in a block that has the block's stride
    activation: str = "relu"  # one of ACTIVATIONS
    # Option A: how places and channels are brought into shape.
    is_shortcut_averaged: bool = False  # the mean of 2 x 2 places; else every second place
    has_zeros_behind: bool = False  # all zeros after the channels; else half of them before
    # Option B: whether a convolution of stride 2 reads the mean of 2 x 2 places (ResNet-D of He et
    # al. 2019); else it reads every second place.
    is_projection_averaged: bool = False

    @property
    def prunable_count(self) -> int:
        return sum(len(stage) for stage in self.stages) * (len(self.kernels) - 1)

    @property
    def hidden_names(self) -> list[str]:
        """The names of the linear layers before the last one."""
        return [f"hidden{number}" for number, _ in enumerate(self.hidden_widths, 1)]

    def in_words(self) -> str:
        """What the user is told about how a net is read."""
        words = [self.name]
        if self.stem_stride > 1:
            words.append(f"stride {self.stem_stride} in its first convolution")
        if self.has_stem_pooling:
            kernel = self.stem_pooling_kernel
            words.append(f"a pooling of {kernel} x {kernel} after its first convolution")
        if self.stages[0][0].stride > 1:
            words.append("stride 2 in its first block")
        blocks = [block for stage in self.stages for block in stage]
        places = "averaged places" if self.is_shortcut_averaged else "every second place"
        if any(not block.has_convolution and block.stride > 1 for block in blocks):
            zeros = "after" if self.has_zeros_behind else "around"
            words.append(f"shortcuts of {places} with zeros {zeros} the channels")
        if self.is_projection_averaged:
            words.append("averages before the convolutions of its shortcuts")
        words.append(f"stride in convolution {self.strided_convolution + 1} of a block")
        if self.is_preactivated:
            activated = sum(block.is_shortcut_activated for stage in self.stages for block in stage)
            words.append(f"{activated} shortcuts after a norm")
        if self.hidden_widths:
            words.append(f"{len(self.hidden_widths) + 1} linear layers")
        return ", ".join([*words, self.activation])

    def count_zeros_around(self, count: int) -> tuple[int, int]:
        """Option A: how many of the `count` channels of zeros stand (before, after) the others."""
        before = 0 if self.has_zeros_behind else count // 2
        return before, count - before

    def fits_size(self, size: int) -> bool:
        """Whether shortcuts and convolutions give equal maps for images of that size.

        An averaged shortcut rounds half of an odd side down, and the convolutions beside it round
        it up. Other residual nets take images of any size.
        """
        if not self.is_shortcut_averaged:
            return True
        side = math.ceil(size / self.stem_stride)
        if self.has_stem_pooling:
            side = side // 2 if self.stem_pooling_kernel == 2 else (side + 1) // 2
        for block in chain.from_iterable(self.stages):
            if block.stride > 1:
                if side % 2 and not block.has_convolution:
                    return False
                side = (side + 1) // 2
        return True

    def check_size(self, size: int) -> None:
        """For chains alone. The smallest size of a residual net is not known beforehand."""


@dataclass(frozen=True)
class PrunableLayer:
    """A layer whose output channels can be pruned, and the modules that change with it, by name.

    To remove a channel is to remove a row of the layer's weight, an entry of its norm, and a column
    of the next layer's weight.
    """

    layer_name: str  # the convolution or linear layer
    norm_name: str | None  # its batch norm; None: it has none, or it is folded into the layer
    next_layer_name: str  # the layer that reads its output
    pooling: str = ""  # before the next layer: one of POOLINGS, or "" for none
    activation: str = "relu"
    norm_place: str = BEFORE_ACTIVATION  # one of NORM_PLACES


# An activation by its name. The number in the name of a leaky relu is its slope below 0.
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu_0.01": partial(F.leaky_relu, negative_slope=0.01),
    "leaky_relu_0.1": partial(F.leaky_relu, negative_slope=0.1),
    "leaky_relu_0.2": partial(F.leaky_relu, negative_slope=0.2),
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu6": F.relu6,
    "selu": F.selu,
    "hardswish": F.hardswish,
    "mish": F.mish,
}
# The rare activations that controller.find_reading tries on images, where a foreign state dict does
# not say its activation. It takes one only where the batch norms show it, or where the net is much
# more accurate with it. relu6, selu, hardswish and mish are not tried. They are found only if the
# file holds inputs and outputs of the net (the class Example, below).
RARE_ACTIVATIONS = ("leaky_relu_0.01", "leaky_relu_0.1", "leaky_relu_0.2", "elu", "gelu", "silu")
# These are not monotone, so max-pooling before such an activation gives another result than after.
NON_MONOTONE_ACTIVATIONS = ("gelu", "silu", "hardswish", "mish")


def activate(y: torch.Tensor, activation: str, *, inplace=False) -> torch.Tensor:
    """Apply one of ACTIVATIONS. `inplace` saves time in inference; only relu heeds it."""
    if activation == "relu":
        return F.relu(y, inplace)
    return ACTIVATIONS[activation](y)


def finish_layer(y: torch.Tensor, norm, prunable: PrunableLayer, *, inplace=False) -> torch.Tensor:
    """Apply the batch norm, activation and pooling of a prunable layer, in their order.

    y (B, C, H, W) -> (B, C, H', W'), or (B, C) -> (B, C). `norm` is a module or a function of y;
    None where the layer has none, or where it is folded into the layer.
    """
    if norm is None:
        return pool_and_activate(y, prunable, inplace=inplace)
    if prunable.norm_place == AFTER_POOLING:
        return norm(pool_and_activate(y, prunable, inplace=inplace))
    if prunable.norm_place == AFTER_ACTIVATION:
        y = norm(activate(y, prunable.activation, inplace=inplace))
        return POOLINGS[prunable.pooling](y) if prunable.pooling else y
    return pool_and_activate(norm(y), prunable, inplace=inplace)


def pool_and_activate(y: torch.Tensor, prunable: PrunableLayer, *, inplace=False) -> torch.Tensor:
    """Activation, then pooling if the layer has one.

    A monotone activation gives the same result after a max-pooling as before it. So it comes after,
    where the map is smaller.
    """
    if not prunable.pooling:
        return activate(y, prunable.activation, inplace=inplace)
    pool = POOLINGS[prunable.pooling]
    if pool.is_max and prunable.activation not in NON_MONOTONE_ACTIVATIONS:
        return activate(pool(y), prunable.activation, inplace=inplace)
    return pool(activate(y, prunable.activation, inplace=inplace))


class Net(nn.Module):
    """A network with prunable layers.

    `widths` are the widths of the prunable layers, in the order of `prunable`. sep.py may put a
    gate on each of them (`gates`), or replace how each is run on single images (`layer_runners`).
    """

    def __init__(self, architecture, widths):
        super().__init__()
        self.architecture = architecture
        self.widths = tuple(widths)
        self.prunable: list[PrunableLayer] = []
        self.gates: nn.ModuleList | None = None
        self.layer_runners: list | None = None

    @property
    def arch(self) -> str:
        """The name of the architecture."""
        return self.architecture.name

    @property
    def classes(self) -> int:
        return self.architecture.classes

    @property
    def channels(self) -> int:
        """The number of channels of an image."""
        return self.architecture.channels

    @property
    def size(self) -> int:
        """The side of the square images, in pixels."""
        return self.architecture.size

    def run_prunable(self, index: int, x: torch.Tensor, previous_group=None):
        """Run a prunable layer with its norm, activation and pooling; returns (y, group).

        x (B, C_in, H, W) -> y (B, C, H', W'). Of a linear layer, x may also be (B, features), and
        y is (B, C).

        In a plain net, and in a gated net that runs batches, `group` is always None: ignore it.

        Only a net of `sep.tune` uses groups. It runs one image at a time (`layer_runners`), and
        each gated layer computes only the channels that its gate has chosen for this image. `group`
        is the sep.KernelGroup of these channels. The next layer needs it as its `previous_group`,
        to select the weights that read them.
        """
        if self.layer_runners is not None:
            return self.layer_runners[index](x, previous_group)
        prunable = self.prunable[index]
        # attrgetter takes an eighth of get_submodule's time.
        layer = attrgetter(prunable.layer_name)(self)
        norm = attrgetter(prunable.norm_name)(self) if prunable.norm_name else None
        gate = self.gates[index] if self.gates is not None else None
        if gate is not None:
            return gate(x, layer, norm, prunable), None
        return finish_layer(run_layer(layer, x), norm, prunable), None

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
        if next(self.parameters()).is_meta:
            return  # meta tensors have shapes and no values, and initialising them is slow
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def list_foldable_norms(self) -> list[tuple[str, str]]:
        """The pairs of names (layer, batch norm) where the norm can be folded into the layer.

        This needs a norm that reads the output of this layer alone. Some norms of a pre-activated
        net read a sum of blocks, and are not listed.
        """
        raise NotImplementedError


class ChainNet(Net):
    """Convolutions, then linear layers, an activation after each but the last.

    Keys as in torchvision's VGG, `features.N` and `classifier.N` (one linear layer is `classifier`
    itself), or as in Caffe's LeNet, `conv1`, ..., `fc1`, ...
    """

    def __init__(self, architecture: ChainArchitecture, widths):
        super().__init__(architecture, widths)
        if architecture.has_flat_names:
            names = self.add_flat_layers()
        else:
            names = self.add_features() + self.add_classifier()
        self.set_prunable(names)
        self.initialise_weights()

    @property
    def head_size(self) -> int:
        return self.architecture.head_size

    def make_convolutions(self) -> Iterator[tuple[Convolution, nn.Conv2d, int]]:
        """Yield (architecture of the convolution, its module, its width), in their order."""
        inputs = self.channels
        for convolution, width in zip(self.architecture.convolutions, self.widths):
            layer = nn.Conv2d(
                inputs,
                width,
                convolution.kernel,
                convolution.stride,
                convolution.padding,
                bias=convolution.has_bias,
            )
            yield convolution, layer, width
            inputs = width

    def make_linear_layers(self) -> list[nn.Linear]:
        count = len(self.architecture.convolutions)
        inputs = self.widths[count - 1] if count else self.channels
        sizes = [inputs * self.head_size**2, *self.widths[count:], self.classes]
        return [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes)]

    def add_flat_layers(self) -> list[tuple[str, str | None]]:
        """conv1, bn1, conv2, ..., fc1, ...; returns the names of layers and norms."""
        names = []
        for number, (convolution, layer, width) in enumerate(self.make_convolutions(), 1):
            self.add_module(f"conv{number}", layer)
            if convolution.has_norm:
                self.add_module(f"bn{number}", nn.BatchNorm2d(width))
            names.append((f"conv{number}", f"bn{number}" if convolution.has_norm else None))
        norms = (*self.architecture.hidden_norms, False)
        for number, (layer, has_norm) in enumerate(zip(self.make_linear_layers(), norms), 1):
            self.add_module(f"fc{number}", layer)
            if has_norm:
                self.add_module(f"fc_bn{number}", nn.BatchNorm1d(layer.out_features))
            names.append((f"fc{number}", f"fc_bn{number}" if has_norm else None))
        return names

    def add_features(self) -> list[tuple[str, str | None]]:
        """Add convolutions, norms and placeholders, numbered as in torchvision's VGG.

        The placeholders (nn.Identity) stand for activations and poolings, so that the numbers are
        torchvision's. They never run: run_prunable runs layers and norms only, and applies the
        activation and the pooling itself. Returns the names of each layer and of its norm.
        """
        modules, names = [], []
        for convolution, layer, width in self.make_convolutions():
            index = len(modules)
            modules.append(layer)
            if convolution.has_norm:
                modules.append(nn.BatchNorm2d(width))
            modules.append(nn.Identity())  # the activation
            if convolution.pooling:
                modules.append(nn.Identity())
            norm = f"features.{index + 1}" if convolution.has_norm else None
            names.append((f"features.{index}", norm))
        self.features = nn.Sequential(*modules)
        return names

    def add_classifier(self) -> list[tuple[str, str | None]]:
        """The linear layers; returns their names, and those of their norms."""
        layers = self.make_linear_layers()
        if len(layers) == 1:
            self.classifier = layers[0]
            return [("classifier", None)]
        # torchvision's numbers: linear layer, relu, dropout. Relus and dropouts have no weights and
        # are left out. A norm, which torchvision's VGGs do not have here, gets the relu's number.
        modules, names = OrderedDict(), []
        norms = (*self.architecture.hidden_norms, False)
        for number, (layer, has_norm) in enumerate(zip(layers, norms)):
            modules[str(3 * number)] = layer
            norm = None
            if has_norm:
                modules[str(3 * number + 1)] = nn.BatchNorm1d(layer.out_features)
                norm = f"classifier.{3 * number + 1}"
            names.append((f"classifier.{3 * number}", norm))
        self.classifier = nn.Sequential(modules)
        return names

    def switch_architecture(self, architecture: ChainArchitecture) -> None:
        """Turn this net into the chain that `architecture` describes; the weights stay.

        Thousands of chains may be tried, and to build a new net for each would take longer. Both
        chains must have the same layers, widths, biases, norms and names of layers. (In a VGG the
        numbers in the names depend on where poolings stand, so they must stand after the same
        convolutions: `make_readings` sees to it.)
        """
        self.architecture = architecture
        for convolution, prunable in zip(architecture.convolutions, self.prunable):
            layer = self.get_submodule(prunable.layer_name)
            layer.stride = (convolution.stride, convolution.stride)
            layer.padding = (convolution.padding, convolution.padding)
        names = [(prunable.layer_name, prunable.norm_name) for prunable in self.prunable]
        self.set_prunable([*names, (self.prunable[-1].next_layer_name, None)])

    def set_prunable(self, names: list[tuple[str, str | None]]) -> None:
        """Set `prunable` by the (layer name, norm name) of all layers, the last one included."""
        convolutions = self.architecture.convolutions
        self.prunable = []
        for index, ((layer_name, norm_name), (next_layer_name, _)) in enumerate(pairwise(names)):
            pooling, norm_place = "", BEFORE_ACTIVATION
            if index < len(convolutions):
                pooling = convolutions[index].pooling
                norm_place = convolutions[index].norm_place
            activation = self.architecture.activation
            self.prunable.append(
                PrunableLayer(
                    layer_name, norm_name, next_layer_name, pooling, activation, norm_place
                )
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        convolutions = len(self.architecture.convolutions)
        previous_group = None
        for index in range(len(self.prunable)):
            if index == convolutions:
                x = self.fit_to_head(x)
            x, previous_group = self.run_prunable(index, x, previous_group)
        if convolutions == len(self.prunable):
            x = self.fit_to_head(x)
        last_layer = attrgetter(self.prunable[-1].next_layer_name)(self)
        return run_layer(last_layer, x, previous_group)

    def fit_to_head(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C', H, W) -> (B, C', head_size, head_size); of a perceptron (B, features)."""
        if not self.architecture.convolutions:
            return x.flatten(1)
        if self.architecture.is_averaged:
            return F.adaptive_avg_pool2d(x, self.head_size)
        # A RuntimeError, as the next linear layer would raise, with words that say more.
        if tuple(x.shape[2:]) != (self.head_size, self.head_size):
            raise RuntimeError(f"this {self.arch} takes images of {self.size} x {self.size} pixels")
        return x

    def list_foldable_norms(self) -> list[tuple[str, str]]:
        return [
            (prunable.layer_name, prunable.norm_name)
            for prunable in self.prunable
            if prunable.norm_name and prunable.norm_place == BEFORE_ACTIVATION
        ]


class ResidualBlock(nn.Module):
    """Two or three convolutions beside a shortcut. Only the inner widths can be pruned.

    It has no forward: ResNet.run_block and run_preactivated_block run its modules.
    Modules: conv1, bn1, conv2, ...; downsample.0, downsample.1 of a shortcut with weights.
    """

    def __init__(self, inputs: int, inner_widths, block: Block, architecture: ResNetArchitecture):
        super().__init__()
        self.architecture = architecture
        self.spec = block
        self.padding_channels = block.outputs - inputs
        widths = [inputs, *inner_widths, block.outputs]
        is_preactivated = architecture.is_preactivated
        for index, (kernel, (before, after)) in enumerate(
            zip(architecture.kernels, pairwise(widths))
        ):
            stride = block.stride if index == architecture.strided_convolution else 1
            layer = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
            if is_preactivated:
                self.add_module(f"bn{index + 1}", nn.BatchNorm2d(before))
            self.add_module(f"conv{index + 1}", layer)
            if not is_preactivated:
                self.add_module(f"bn{index + 1}", nn.BatchNorm2d(after))
        if block.has_convolution:
            stride = 1 if architecture.is_projection_averaged else block.stride
            modules = [nn.Conv2d(inputs, block.outputs, 1, stride, bias=False)]
            if not is_preactivated:
                modules.append(nn.BatchNorm2d(block.outputs))
            self.downsample = nn.Sequential(*modules)

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        """The block's input in the shape of its output: x itself where no shape changes."""
        stride = self.spec.stride
        if self.spec.has_convolution:
            if stride > 1 and self.architecture.is_projection_averaged:
                # At an odd side the last windows are cut off at the edge. Their mean is that of
                # the places inside the map.
                x = F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False)
            # Not self.downsample(x): sep.py may put layers here that nn.Sequential cannot run.
            x = getattr(self.downsample, "0")(x)
            norm = getattr(self.downsample, "1", None)  # a pre-activated block has none
            return x if norm is None else norm(x)
        if stride > 1 and self.architecture.is_shortcut_averaged:
            x = F.avg_pool2d(x, stride)
        elif stride > 1:
            # The same as x[:, :, ::stride, ::stride]. But slicing gives its gradient another memory
            # layout, and adding that gradient to others is slower.
            x = F.avg_pool2d(x, 1, stride)
        if not self.padding_channels:
            return x
        zeros = self.architecture.count_zeros_around(self.padding_channels)
        return F.pad(x, (0, 0, 0, 0, *zeros))


class ResNet(Net):
    """A residual net (He et al. 2016), keys as in torchvision but for the last layer, `linear`.

    Its prunable layers are the inner widths of its blocks: one each in basic blocks, 27 in
    ResNet-56, two in bottlenecks.
    """

    def __init__(self, architecture: ResNetArchitecture, widths):
        super().__init__(architecture, widths)
        self.add_stem()
        block_names = self.add_stages()
        outputs = architecture.stages[-1][-1].outputs
        if architecture.has_last_norm:
            self.bn = nn.BatchNorm2d(outputs)
        self.add_linear_layers(outputs)
        # In a pre-activated block the norm after conv1 is bn2, the next convolution's.
        shift = 1 if architecture.is_preactivated else 0
        self.prunable = [
            PrunableLayer(
                f"{name}.conv{i}",
                f"{name}.bn{i + shift}",
                f"{name}.conv{i + 1}",
                activation=architecture.activation,
            )
            for name in block_names
            for i in range(1, len(architecture.kernels))
        ]
        self.initialise_weights()

    def add_stem(self) -> None:
        architecture = self.architecture
        kernel, width = architecture.stem_kernel, architecture.stem_width
        self.conv1 = nn.Conv2d(
            self.channels, width, kernel, architecture.stem_stride, kernel // 2, bias=False
        )
        if architecture.has_stem_norm:
            self.bn1 = nn.BatchNorm2d(width)

    def add_stages(self) -> list[str]:
        """layer1.0, layer1.1, ...; returns their names."""
        architecture = self.architecture
        inner_widths = iter(self.widths)
        inputs = architecture.stem_width
        names = []
        for number, stage in enumerate(architecture.stages, 1):
            blocks = []
            for block in stage:
                inner = [next(inner_widths) for _ in architecture.kernels[1:]]
                names.append(f"layer{number}.{len(blocks)}")
                blocks.append(ResidualBlock(inputs, inner, block, architecture))
                inputs = block.outputs
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        return names

    def add_linear_layers(self, inputs: int) -> None:
        """hidden1, hidden2, ..., then `linear`, the last one."""
        architecture = self.architecture
        for name, width in zip(architecture.hidden_names, architecture.hidden_widths):
            self.add_module(name, nn.Linear(inputs, width))
            inputs = width
        self.linear = nn.Linear(inputs, self.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        x = self.run_stem(x)
        run_block = self.run_block
        if self.architecture.is_preactivated:
            run_block = self.run_preactivated_block
        stages = (getattr(self, f"layer{n}") for n in range(1, len(self.architecture.stages) + 1))
        index = 0
        for block in chain.from_iterable(stages):
            x = run_block(block, index, x)
            index += len(self.architecture.kernels) - 1
        if self.architecture.has_last_norm:
            x = self.activate(self.bn(x))
        x = x.mean((2, 3))
        for name in self.architecture.hidden_names:
            x = self.activate(getattr(self, name)(x))
        return self.linear(x)

    def run_stem(self, x: torch.Tensor) -> torch.Tensor:
        """The first convolution with its norm, activation and pooling, as far as it has them."""
        architecture = self.architecture
        x = self.conv1(x)
        if architecture.has_stem_norm:
            x = self.bn1(x)
        # Without a norm here, a pre-activated net has its first activation in its first block.
        is_convolution_alone = architecture.is_preactivated and not architecture.has_stem_norm
        if not is_convolution_alone:
            x = self.activate(x)
        if architecture.has_stem_pooling:
            kernel = architecture.stem_pooling_kernel  # 2 or 3
            x = F.max_pool2d(x, kernel, stride=2, padding=1 if kernel == 3 else 0)
        return x

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return activate(x, self.architecture.activation)

    def run_convolutions(self, block: ResidualBlock, index: int, x: torch.Tensor) -> torch.Tensor:
        """All convolutions of a block: the prunable ones, then the last one.

        `index` is that of the block's first prunable layer in `self.prunable`.
        """
        previous_group = None
        inner = len(self.architecture.kernels) - 1
        for i in range(inner):
            x, previous_group = self.run_prunable(index + i, x, previous_group)
        return run_layer(getattr(block, f"conv{inner + 1}"), x, previous_group)

    def run_block(self, block: ResidualBlock, index: int, x: torch.Tensor) -> torch.Tensor:
        residual = self.run_convolutions(block, index, x)
        residual = getattr(block, f"bn{len(self.architecture.kernels)}")(residual)
        return self.activate(residual + block.shortcut(x))

    def run_preactivated_block(self, block: ResidualBlock, index: int, x: torch.Tensor):
        activated = self.activate(block.bn1(x))
        shortcut = block.shortcut(activated if block.spec.is_shortcut_activated else x)
        return self.run_convolutions(block, index, activated) + shortcut

    def list_foldable_norms(self) -> list[tuple[str, str]]:
        if self.architecture.is_preactivated:
            # Not the first norm of a block, nor the last one of the net: they read sums.
            names = [(prunable.layer_name, prunable.norm_name) for prunable in self.prunable]
            has_stem_norm = self.architecture.has_stem_norm
            return [("conv1", "bn1"), *names] if has_stem_norm else names
        # Every convolution has its norm right behind it, but for a stem without one.
        modules = dict(self.named_modules())
        names = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
        return [(name, norm_name_of(name)) for name in names if norm_name_of(name) in modules]


def norm_name_of(convolution: str) -> str:
    """conv2 -> bn2; downsample.0 -> downsample.1."""
    if convolution.endswith("downsample.0"):
        return convolution.removesuffix("0") + "1"
    return re.sub(r"conv(\d+)$", r"bn\1", convolution)


# ---- nets: the usual ones ----------------------------------------------------------------------

# Convolutions per stage; a pooling ends each stage.
VGG_STAGES = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
VGG_STAGE_WIDTHS = (64, 128, 256, 512, 512)
# torchvision's, for large images: the kernels of a block, and its blocks per stage.
LARGE_RESNETS = {
    "resnet18": ((3, 3), (2, 2, 2, 2)),
    "resnet34": ((3, 3), (3, 4, 6, 3)),
    "resnet50": ((1, 3, 1), (3, 4, 6, 3)),
    "resnet101": ((1, 3, 1), (3, 4, 23, 3)),
}
LARGE_STAGE_WIDTHS = (64, 128, 256, 512)
BOTTLENECK_EXPANSION = 4
# Of the CIFAR ResNets of depth 6n + 2 (He et al. 2016).
CIFAR_STAGE_WIDTHS = (16, 32, 64)
KNOWN_ARCHS = "lenet5, vgg11, 13, 16, 19, resnet18, 34, 50, 101 or resnetN with N = 6n + 2"


def blocks_per_cifar_stage(arch: str) -> int:
    """The n of a CIFAR ResNet of depth 6n + 2; 0 if `arch` is no such name.

    resnet50 would be one, of n = 8, but means torchvision's, as all LARGE_RESNETS.
    """
    depth = int(arch[6:]) if re.fullmatch(r"resnet\d{1,4}", str(arch)) else 0
    return depth // 6 if depth % 6 == 2 and arch not in LARGE_RESNETS else 0


def default_widths(arch: str) -> tuple[int, ...]:
    """The widths of the prunable layers of an unpruned net. Raises UserError (status 2) for an
    unknown name."""
    if arch == "lenet5":
        return (20, 50, 500)
    if arch in VGG_STAGES:
        stages = zip(VGG_STAGE_WIDTHS, VGG_STAGES[arch])
        return tuple(width for width, count in stages for _ in range(count))
    if arch in LARGE_RESNETS:
        kernels, counts = LARGE_RESNETS[arch]
        stages = zip(LARGE_STAGE_WIDTHS, counts)
        return tuple(width for width, n in stages for _ in range(n * (len(kernels) - 1)))
    count = blocks_per_cifar_stage(arch)
    if count:
        return tuple(width for width in CIFAR_STAGE_WIDTHS for _ in range(count))
    raise UserError(f"unknown network '{arch}': {KNOWN_ARCHS}", 2)


def lenet5_architecture(classes: int, channels: int, size: int) -> ChainArchitecture:
    """Caffe's LeNet 20-50-500-10 (431,080 parameters at 28 x 28), a relu after each hidden layer.

    Raises UserError for images of fewer than 16 x 16 pixels.
    """
    convolution = Convolution(5, padding=0, has_bias=True, has_norm=False, pooling="max")
    architecture = ChainArchitecture(
        "lenet5",
        classes,
        channels,
        size,
        convolutions=(convolution, convolution),
        hidden_norms=(False,),
        head_size=1,
        is_averaged=False,
        has_flat_names=True,
    )
    architecture.check_size(size)
    return replace(architecture, head_size=architecture.map_size(size))


def vgg_architecture(
    arch: str, classes: int, channels: int, size: int, hidden: int = 0, head_size: int = 1
) -> ChainArchitecture:
    """VGG with batch normalisation.

    Without `hidden` linear layers it ends in one (the script's net); with one or two it has
    torchvision's head. Raises UserError for images below 32 x 32 pixels.
    """
    convolutions = []
    for count in VGG_STAGES[arch]:
        convolutions += [Convolution()] * (count - 1) + [Convolution(pooling="max")]
    architecture = ChainArchitecture(
        arch,
        classes,
        channels,
        size,
        convolutions=tuple(convolutions),
        hidden_norms=(False,) * hidden,
        head_size=head_size,
        is_averaged=True,
    )
    architecture.check_size(size)
    return architecture


def cifar_resnet_architecture(
    arch: str, classes: int, channels: int, size: int
) -> ResNetArchitecture:
    """A CIFAR ResNet of depth 6n + 2 (He et al. 2016), option-A shortcuts."""
    count = blocks_per_cifar_stage(arch)
    stages = []
    for number, outputs in enumerate(CIFAR_STAGE_WIDTHS):
        first = Block(outputs, stride=2 if number else 1)
        stages.append((first, *[Block(outputs)] * (count - 1)))
    return ResNetArchitecture(
        arch, classes, channels, size, stem_width=CIFAR_STAGE_WIDTHS[0], stages=tuple(stages)
    )


def large_resnet_architecture(
    arch: str, classes: int, channels: int, size: int
) -> ResNetArchitecture:
    """torchvision's ResNets: option-B shortcuts, a first convolution of 7 x 7 and a pooling."""
    kernels, counts = LARGE_RESNETS[arch]
    expansion = BOTTLENECK_EXPANSION if len(kernels) == 3 else 1
    stages = []
    inputs = LARGE_STAGE_WIDTHS[0]
    for number, (width, count) in enumerate(zip(LARGE_STAGE_WIDTHS, counts)):
        outputs = expansion * width
        first = Block(outputs, stride=2 if number else 1, has_convolution=outputs != inputs)
        stages.append((first, *[Block(outputs)] * (count - 1)))
        inputs = outputs
    return ResNetArchitecture(
        arch,
        classes,
        channels,
        size,
        stem_width=LARGE_STAGE_WIDTHS[0],
        stages=tuple(stages),
        kernels=kernels,
        stem_kernel=7,
        stem_stride=2,
        has_stem_pooling=True,
        strided_convolution=1 if len(kernels) == 3 else 0,
    )


def named_architecture(arch: str, *, classes=10, channels=3, size=32, hidden=0, head_size=1):
    """The architecture of that name for `channels` x `size` x `size` images.

    `hidden` and `head_size` are for the linear layers of a VGG. Raises UserError for an unknown
    name, or where the images are too small.
    """
    default_widths(arch)  # raises where the name is unknown
    if arch == "lenet5":
        return lenet5_architecture(classes, channels, size)
    if arch in VGG_STAGES:
        return vgg_architecture(arch, classes, channels, size, hidden, head_size)
    if arch in LARGE_RESNETS:
        return large_resnet_architecture(arch, classes, channels, size)
    return cifar_resnet_architecture(arch, classes, channels, size)


def build(arch: str, widths=None, *, classes=10, channels=3, size=32, head_size=1) -> Net:
    """A new net of that name for `channels` x `size` x `size` images.

    `widths` are those of its prunable layers, by default the unpruned ones. A VGG may have up to
    two more, the hidden linear layers of torchvision's head. Raises UserError where they do not
    fit the arch, or the images are too small for it.
    """
    unpruned = default_widths(arch)
    widths = unpruned if widths is None else tuple(widths)
    hidden = 0
    if arch in VGG_STAGES:
        # Widths beyond the usual ones are of hidden linear layers; build_net counts them again.
        hidden = max(0, min(2, len(widths) - len(unpruned)))
    architecture = named_architecture(
        arch, classes=classes, channels=channels, size=size, hidden=hidden, head_size=head_size
    )
    return build_net(architecture, widths)


def build_net(architecture, widths) -> Net:
    """A new net of that architecture and those widths. Raises UserError where they do not fit."""
    count = architecture.prunable_count
    if len(widths) != count or min(widths) < 1:
        raise UserError(
            f"{architecture.name} has {count} prunable layers, each at least 1 wide, "
            f"not {list(widths)}"
        )
    if architecture.activation not in ACTIVATIONS:
        raise UserError(f"unknown activation '{architecture.activation}'")
    if isinstance(architecture, ResNetArchitecture):
        return ResNet(architecture, widths)
    for convolution in architecture.convolutions:
        if convolution.pooling not in ("", *POOLINGS):
            raise UserError(f"unknown pooling '{convolution.pooling}'")
        if convolution.norm_place not in NORM_PLACES:
            raise UserError(f"unknown place of a batch norm '{convolution.norm_place}'")
    return ChainNet(architecture, widths)


def build_like(net: Net, widths) -> Net:
    """A new net as `net` but for its widths; without gates."""
    return build_net(net.architecture, widths)


# ---- pruning -----------------------------------------------------------------------------------


def channel_importance(net: Net) -> list[torch.Tensor]:
    """Per prunable layer (C,): the sum of squared weights that the next layer applies to each
    channel (script)."""
    importance = []
    for prunable, width in zip(net.prunable, net.widths):
        weight = net.get_submodule(prunable.next_layer_name).weight.detach()
        importance.append(group_by_input_channel(weight, width).square().sum((0, 2)))
    return importance


def most_important_channels(net: Net, structure) -> list[torch.Tensor]:
    """Per prunable layer the indices, ascending, of the channels that `structure` keeps."""
    return [
        importance.topk(count).indices.sort().values
        for importance, count in zip(channel_importance(net), structure)
    ]


@torch.no_grad()
def rescale_next_filters(net: Net, kept_channels) -> None:
    """Rescale, in place, filters of the next layers, so that pruning does not weaken them (after
    the script; docs/differences.md says what is ours).

    The energy of a filter is the sum of its squared weights. A channel that goes is strong for a
    filter if more than COMPENSATED_SHARE / C_in of the filter's energy is on it. A filter that
    loses a strong channel is multiplied, so that its kept weights have the energy that all its
    weights had. A filter that keeps no energy stays as it is. `kept_channels` holds, per prunable
    layer, the indices of the channels that stay.
    """
    for prunable, width, kept in zip(net.prunable, net.widths, kept_channels):
        weight = net.get_submodule(prunable.next_layer_name).weight
        energy = group_by_input_channel(weight, width).square().sum(2)  # (out, C)
        is_lost = torch.ones(width, dtype=torch.bool, device=weight.device)
        is_lost[kept] = False
        energy_before = energy.sum(1)
        energy_after = energy[:, kept].sum(1)
        threshold = COMPENSATED_SHARE / width * energy_before[:, None]
        loses_strong_channel = (energy[:, is_lost] > threshold).any(1) & (energy_after > 0)
        gain = (energy_before / energy_after.clamp_min(1e-30)).sqrt()
        scale = torch.where(loses_strong_channel, gain, 1.0)
        weight.mul_(scale.reshape(-1, *[1] * (weight.dim() - 1)))


def remove_channels(net: Net, kept_channels) -> Net:
    """A new plain net, in training mode, that has only the channels in `kept_channels`.

    `kept_channels` holds, per prunable layer, the indices of these channels, in the order in which
    the new net has them. An index may come several times. Then the channel and the weights that
    read it are copied, and the next layer adds the channel once per copy. sep.py uses this where a
    gate lets only one of the copies through.
    """
    small = build_like(net, [len(kept) for kept in kept_channels])
    state = net.state_dict()
    for prunable, width, kept in zip(net.prunable, net.widths, kept_channels):
        # A layer between two prunable ones is cut twice: its inputs in the round of the layer
        # before it, its outputs in its own round.
        for name in filter(None, (prunable.layer_name, prunable.norm_name)):
            for parameter in ("weight", "bias", "running_mean", "running_var"):
                key = f"{name}.{parameter}"
                if key in state:
                    state[key] = state[key][kept]
        key = prunable.next_layer_name + ".weight"
        state[key] = select_input_channels(state[key], width, kept)
    plain_state = {key: value for key, value in state.items() if not key.startswith("gates.")}
    small.load_state_dict(plain_state)
    return small.to(next(net.parameters()).device)


def prune_channels(net: Net, structure) -> Net:
    """Hard pruning (IJCAI 2018): a new net of that structure, without the least important channels.

    See `rescale_next_filters` for the filters that read the removed channels.
    """
    net = deepcopy(net)
    kept_channels = most_important_channels(net, structure)
    rescale_next_filters(net, kept_channels)
    return remove_channels(net, kept_channels)


# ---- cost --------------------------------------------------------------------------------------


@lru_cache
def macs_per_channel_pair(architecture) -> dict[str, int]:
    """For each convolution and linear layer, by name, the MACs of one input and one output channel.

    Of a convolution: the kernel's area times the places where it is applied. Of a linear layer: 1,
    and its input channels are its inputs. The result is cached: do not change it.
    """
    with torch.device("meta"):  # shapes alone: nothing is computed
        net = build_net(architecture, [1] * architecture.prunable_count).eval()
        images = torch.zeros(1, net.channels, net.size, net.size)
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
        net(images)
    for hook in hooks:
        hook.remove()
    return macs


def count_macs(net: Net, structure=None) -> int:
    """Multiply-accumulates for one image if `net` had that structure (default: its own).

    All convolutions and linear layers count. It is half of what torch's FlopCounterMode counts.
    Gates come on top: see sep.count_macs.
    """
    structure = net.structure if structure is None else structure
    outputs_of = {p.layer_name: count for p, count in zip(net.prunable, structure)}
    # Of each layer that reads prunable channels: (how many are at work, how many there are).
    read_channels = {
        p.next_layer_name: (count, width)
        for p, count, width in zip(net.prunable, structure, net.widths)
    }
    total = 0
    for name, macs in macs_per_channel_pair(net.architecture).items():
        outputs, inputs = attrgetter(name)(net).weight.shape[:2]
        if name in read_channels:
            count, width = read_channels[name]
            inputs = inputs // width * count  # a linear layer reads several places of a channel
        total += macs * outputs_of.get(name, outputs) * inputs
    return total


def count_parameters(net: Net) -> int:
    """The number of parameters: weights, biases and those of norms and gates."""
    return sum(parameter.numel() for parameter in net.parameters())


# ---- checkpoints: files ------------------------------------------------------------------------


def has_export_ending(path: Path) -> bool:
    """Whether the file name ends as those that `export` writes, in small or capital letters."""
    return path.suffix.lower() in EXPORT_ENDINGS


def temporary_path(path: Path) -> Path:
    """Where a user's file is written before it gets its name: in the same folder, under a name
    with the process's number, so that it replaces no other file."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def refuse_existing(path: Path, advice: str) -> None:
    """Raise UserError (status 2) where there is something at `path`, a dangling link included."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists already and is kept; {advice}", 2)


def write_atomically(path: Path, write, temporary: Path | None = None, hint: str = ""):
    """Write a file by `write(temporary)`, and only then give it the name `path`.

    Until then an older file at `path` stays as it is. Returns what `write` returns. Raises
    UserError where writing fails, with `hint` at the end of its message.

    For a file that the user has named, give `temporary_path(path)` as `temporary`: two processes
    then write to different files. By default the name is fixed, which is safe in a run folder,
    because only one process uses it.
    """
    path = Path(path)
    temporary = temporary or path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        result = write(temporary)
        os.replace(temporary, path)
        return result
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {reason_of_failed_write(error)}{hint}") from error
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


def reason_of_failed_write(error: Exception) -> str:
    """Why a file could not be written, in a few words. torch reports a full disk as a RuntimeError
    about its own C++ file."""
    if "inline_container" in str(error) or "unexpected pos" in str(error):
        return "the disk may be full"
    return getattr(error, "strerror", None) or str(error)[:200]


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
    """The state of an interrupted training or search, as `write_tensors` saved it.

    `title` names the work: a file with another title belongs to other work. None where the file is
    missing, damaged or of another title, or lacks one of `keys`, for then another version of this
    tool wrote it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # not there, or not readable: that work starts over
        return None
    if not isinstance(content, dict) or content.get("title") != title:
        return None
    return content if keys <= content.keys() and is_intact(path) else None


# ---- checkpoints: our own ----------------------------------------------------------------------

# What a checkpoint holds, and of which type.
CHECKPOINT_TYPES = {
    "architecture": dict,
    "widths": list,
    "gates": list | None,
    "state": dict,
    # Plain values about the net: its test accuracy, data set, mean and std and more; under
    # "baseline" the same about the net before pruning.
    "facts": dict,
}
# Format 1 has these entries in place of "architecture"; `side` is now called head_size.
OLD_CHECKPOINT_TYPES = {
    "arch": str,
    "classes": int,
    "channels": int,
    "size": int,
    "side": int,
    **{key: CHECKPOINT_TYPES[key] for key in ("widths", "gates", "state", "facts")},
}


def save_checkpoint(path: Path, net: Net, facts: dict) -> None:
    """Write all that rebuilds the net, and `facts` about it (plain values). Raises UserError."""
    gates = None
    if net.gates is not None:
        gates = [None if gate is None else gate.describe() for gate in net.gates]
    content = {
        "format": CHECKPOINT_FORMAT,
        "architecture": asdict(net.architecture),
        "widths": list(net.widths),
        "gates": gates,
        "state": {key: value.detach().cpu() for key, value in net.state_dict().items()},
        "facts": facts,
    }
    write_tensors(path, content)


def read_checkpoint(path: Path) -> dict:
    """The content of a checkpoint: a dict with the keys of CHECKPOINT_TYPES and "format".

    Anybody's state dict is brought into that form, with more entries: see `recognise_state_dict`.
    No net is built here: sep.load_checkpoint does that. Tensors are on the CPU. Code in the file is
    never run. Raises UserError (status 2 where there is no such file).
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a checkpoint; name a file in it", 2)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; {suggest_file(path)}", 2)
    if has_export_ending(path):
        raise UserError(
            f"{path} is an export, not a checkpoint; give the file that it was made from", 2
        )
    content = read_tensors(path)
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        return recognise_state_dict(content, path)
    check_checkpoint(content, path)
    if content["format"] < FIRST_FORMAT_OF_TODAYS_GATES and content["gates"] is not None:
        raise UserError(
            f"{path} has gates of an earlier version, which are read no more; make the net anew "
            "from its baseline, by prune --method sep"
        )
    if content["format"] == 1:
        return translate_old_checkpoint(content, path)
    return content


def suggest_file(path: Path) -> str:
    """The advice where a checkpoint is not there: the file of the most similar name, if any."""
    if path.parent.is_dir():
        names = [file.name for file in path.parent.iterdir() if file.is_file()]
        nearest = difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
        if nearest:
            return f"did you mean {path.with_name(nearest[0])}?"
    return "give the path of a .pt, .pth or .safetensors file"


# The first byte of PyTorch's pickles, which old versions wrote without a zip file around them.
PICKLE_START = b"\x80"
# The first bytes of a zip file, as torch.save writes them.
ZIP_START = b"PK\x03\x04"


def starts_with(path: Path, start: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False


def is_torchscript(path: Path) -> bool:
    """Whether torch.jit.save wrote a file: its constants are in a file of their own."""
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/constants.pkl") for name in file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def list_harmless_globals() -> list:
    """What stands in checkpoints beside tensors and runs nothing: numpy's numbers and arrays,
    options, paths."""
    import argparse
    import pathlib

    import numpy

    scalar, reconstruct = numpy.float64(0).__reduce__()[0], numpy.zeros(0).__reduce__()[0]
    # The same functions, under the names of numpy 1 and of numpy 2.
    renamed = [
        (function, f"numpy.{package}.multiarray.{function.__name__}")
        for function in (scalar, reconstruct)
        for package in ("core", "_core")
    ]
    dtypes = {type(numpy.dtype(kind)) for kind in numpy.sctypeDict.values()}
    # Python 3.13 has paths in a module of another name.
    paths = [(pathlib.PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]
    plain = [numpy.ndarray, numpy.dtype, argparse.Namespace]
    return [*renamed, *dtypes, *paths, *plain]


def read_tensors(path: Path):
    """torch.load of weights alone, checksums included. Raises UserError."""
    if path.suffix.lower() == ".safetensors":
        return read_safetensors(path)
    harmless = torch.serialization.safe_globals(list_harmless_globals())
    try:
        with warnings.catch_warnings(action="ignore"), harmless:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:
        raise UserError(explain_unreadable_file(path, error)) from error
    # Files older than PyTorch 1.6 are no zip files and have no checksums.
    if zipfile.is_zipfile(path) and not is_intact(path):
        raise UserError(f"{path} is damaged: its checksums are wrong; copy it, or save it, again")
    return content


def explain_unreadable_file(path: Path, error: Exception) -> str:
    """Why torch.load could not read a file, and what to do."""
    saves = f"torch.save(net.state_dict(), '{path.stem}-state.pt')"
    if is_torchscript(path):
        return f"{path} is a TorchScript program; run: net = torch.jit.load('{path}'); {saves}"
    is_torch_file = zipfile.is_zipfile(path) or starts_with(path, PICKLE_START)
    if is_torch_file and "weights_only" in str(error):
        return (
            f"{path} is not a file of weights alone (reading it could run code); if you trust it "
            f"and it holds a module, run where its code is: net = torch.load('{path}', "
            f"weights_only=False); {saves}; if it holds a dict, save the state dict in it alone"
        )
    damage = ""
    if path.stat().st_size == 0:
        damage = " (it is empty)"
    elif starts_with(path, ZIP_START) and not zipfile.is_zipfile(path):
        # The table of contents stands at the end of a zip file.
        damage = " (its end is missing: was it copied or written to the end?)"
    return (
        f"{path} is not a checkpoint that torch can read{damage}; "
        "torch.save(net.state_dict(), FILE) makes one"
    )


def read_safetensors(path: Path) -> dict:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        tensors = load_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged, or no safetensors file: {error}") from error
    # These are no parts of the net, so they are not sorted with its tensors.
    others = {key: tensors.pop(key) for key in EXAMPLE_KEYS + NORMALISATION_KEYS if key in tensors}
    return restore_order(tensors) | others


def parent_of(name: str) -> str:
    """What a tensor or module is in: features.0 of features.0.weight; "" of a name without dots."""
    return name.rpartition(".")[0]


def restore_order(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in the order of the net's modules, as far as names and shapes tell it.

    This is for files that list their tensors alphabetically.

    Modules with numbers in their names are sorted by these numbers, and a norm comes after the
    layer with the same number. The module that reads the images comes first. Linear layers come
    after the convolutions.
    """
    # Buffers of a net that normalises its inputs may have four dimensions, too, and so have the
    # masks of torch.nn.utils.prune.
    convolutions = [
        key
        for key, value in tensors.items()
        if value.dim() == 4 and key.endswith(("weight", "weight_orig"))
    ]
    first_prefix = None
    linear_layers, linear_sequences = set(), set()
    if convolutions:
        first_prefix = find_prefix_of_first_module(convolutions, tensors)
        linear_layers = {
            parent_of(key)
            for key, value in tensors.items()
            if key.endswith("weight") and value.dim() == 2
        }
        # A batch norm belongs to the linear layers if it stands in one sequence with some of them,
        # and if this sequence has no convolutions.
        linear_sequences = {parent_of(name) for name in linear_layers if "." in name}
        linear_sequences -= {parent_of(parent_of(key)) for key in convolutions}

    def sort_key(key):
        module = parent_of(key)
        is_in_module = "." in key  # tensors of the net itself come first
        is_in_linear_part = module in linear_layers or parent_of(module) in linear_sequences
        is_in_first_module = first_prefix is not None and f"{key}.".startswith(first_prefix)
        # False comes before True.
        return (
            is_in_module,
            is_in_linear_part,
            not is_in_first_module,
            sort_key_by_numbers(key, tensors),
        )

    return {key: tensors[key] for key in sorted(tensors, key=sort_key)}


def sort_key_by_numbers(key: str, tensors: dict[str, torch.Tensor]) -> list[tuple]:
    """A key that sorts the names of tensors by the numbers in them: conv2 before conv10. With the
    same number a norm comes after its layer (conv1, bn1). Parts without a number come last."""
    parts = key.split(".")
    sort_key = []
    for count, part in enumerate(parts, 1):
        numbers = [int(digits) for digits in re.findall(r"\d+", part)]
        module = ".".join(parts[:count])
        is_norm = f"{module}.running_mean" in tensors
        sort_key.append((not numbers, numbers, is_norm, part))
    return sort_key


def find_prefix_of_first_module(
    convolutions: list[str], tensors: dict[str, torch.Tensor]
) -> str | None:
    """The prefix of the names of all tensors in the module that reads the images.

    `convolutions` are the names of the convolutions' weights. The first convolution is taken to be
    the only one with 1 or 3 input channels; None if there is no such convolution, or more than one.
    The prefix ends with the first part that not all convolutions share: "model.conv1." where the
    names are model.conv1.weight, model.layer1.0.conv1.weight and so on.
    """
    readers = [key for key in convolutions if tensors[key].shape[1] in (1, 3)]
    if len(readers) != 1:
        return None
    parts_of_all = [key.split(".") for key in convolutions]
    common = 0
    for parts in zip(*parts_of_all):
        if len(set(parts)) > 1:
            break
        common += 1
    return ".".join(readers[0].split(".")[: common + 1]) + "."


def check_checkpoint(content: dict, path: Path) -> None:
    """Raise UserError unless `content` has all that a checkpoint has, each of its type."""
    version = content["format"]
    if not 1 <= version <= CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} has another checkpoint format; this version reads 1 to {CHECKPOINT_FORMAT}"
        )
    types = OLD_CHECKPOINT_TYPES if version == 1 else CHECKPOINT_TYPES
    missing = types.keys() - content.keys()
    if missing:
        raise UserError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    for key in types.keys() - {"facts"}:  # `are_facts` looks at these, below
        if not isinstance(content[key], types[key]):
            raise UserError(f"{path} is damaged: {key} in it is of the wrong type")
    # Format 1 has these three numbers at the top.
    architecture = content if version == 1 else content["architecture"]
    sizes = [architecture.get(key) for key in ("classes", "channels", "size")]
    if version == 1:
        sizes.append(content["side"])
    if not all(type(size) is int and size > 0 for size in [*sizes, *content["widths"]]):
        raise UserError(
            f"{path} is damaged: a width, or the classes, channels or size, is no positive whole "
            "number"
        )
    if not all(isinstance(value, torch.Tensor) for value in content["state"].values()):
        raise UserError(f"{path} is damaged: its state is no state dict")
    facts = content["facts"]
    if not are_facts(facts) or not are_facts(facts.get("baseline") or {}):
        raise UserError(f"{path} is damaged: its facts are not the values that this tool writes")


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


def translate_old_checkpoint(content: dict, path: Path) -> dict:
    """A checkpoint of format 1 in today's format. Raises UserError."""
    try:
        layers = len(default_widths(content["arch"]))
        architecture = named_architecture(
            content["arch"],
            classes=content["classes"],
            channels=content["channels"],
            size=content["size"],
            hidden=len(content["widths"]) - layers,
            head_size=content["side"],
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error  # the file is wrong, not the call
    return content | {"format": CHECKPOINT_FORMAT, "architecture": asdict(architecture)}


def build_from_checkpoint(checkpoint: dict) -> Net:
    """An untrained net of a checkpoint's architecture and widths; sep.load_checkpoint puts gates on
    it and loads the weights. Raises UserError."""
    return build_net(read_architecture(checkpoint["architecture"]), checkpoint["widths"])


def read_architecture(values: dict):
    """The architecture of which dataclasses.asdict made `values`."""
    if "stages" in values:
        stages = tuple(tuple(Block(**block) for block in stage) for stage in values["stages"])
        changes = {"stages": stages, "kernels": tuple(values["kernels"])}
        if "hidden_widths" in values:  # older files do not have it
            changes["hidden_widths"] = tuple(values["hidden_widths"])
        return ResNetArchitecture(**(values | changes))
    convolutions = tuple(Convolution(**convolution) for convolution in values["convolutions"])
    changes = {"convolutions": convolutions, "hidden_norms": tuple(values["hidden_norms"])}
    return ChainArchitecture(**(values | changes))


def load_weights(net: Net, state: dict, *, assign: bool = False) -> None:
    """Load a state dict into `net`: copy its values or, with `assign`, make its tensors those of
    the net. Raises UserError where it does not fit."""
    mismatch = find_mismatch(net, state)
    if mismatch:
        raise UserError(f"its weights do not fit a {net.arch} of the widths they name: {mismatch}")
    net.load_state_dict(state, assign=assign)


def find_infinite(state: dict) -> str | None:
    """The first key of a state dict whose tensor has infinite numbers, or NaNs."""
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            return key
    return None


def check_is_finite(state: dict) -> None:
    """Raise UserError where the tensors of a state dict have infinite numbers, or NaNs."""
    key = find_infinite(state)
    if key is not None:
        raise UserError(
            f"some of its weights are not finite numbers, in {key}: take an earlier checkpoint"
        )


def find_mismatch(module: nn.Module, state: dict) -> str:
    """The first key of `state` that is missing, unknown or of another shape, in words; "" if the
    state fits the module."""
    wanted = module.state_dict()
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


# ---- checkpoints: foreign state dicts ----------------------------------------------------------
#
# A state dict lists its tensors in the order in which the modules were registered. Shapes say what
# each module is and how it is chained to the next one. The calls:
#
#   recognise_state_dict
#     take_example, take_normalisation   what the owner put into the file beside the weights
#     read_first_net                     the first state dict in the file that is a known net
#       find_state_dicts                   candidates, averaged copies first, names without wrappers
#       split_inner_normalisation          mean and std that the net itself applies
#       read_state                         without an example: all readings, the likeliest first
#         list_modules                       convolutions, linear layers and batch norms, in order
#         read_modules                       group_blocks, then read_chain or read_residual_net
#       find_reading_by_example            with an example: the reading that computes it; tries
#                                          those of read_state, then read_unusual_chains
#
# What shapes and names do not say (where poolings stand, which kind of shortcut it is) has several
# readings. Without an example nothing here knows which is right: controller.find_reading tries them
# on images.

KNOWN_NETS = (
    "LeNets and perceptrons, VGGs, ResNets of basic blocks, bottlenecks and pre-activated blocks"
)
# Parts of the names of averaged copies of a net.
AVERAGE_WORDS = re.compile(r"(^|[._-])(ema|swa|avg|averaged?|shadow)($|[._\d-])")
# Parts of names under which a training keeps tensors that are not the weights of a net.
OPTIMIZER_WORDS = re.compile(
    r"optimi[sz]er|(^|[._-])optim($|[._\d-])|scheduler|(^|[._-])scaler|momentum"
)
# Parts of names that wrappers add.
WRAPPER_PARTS = {"module", "_orig_mod", "_fsdp_wrapped_module"}
# Parts of the names of a block's shortcut.
SHORTCUT_WORDS = re.compile(r"short|down|skip|proj|identity|convdim|residual_conv|resample")
# Parts of names that no chain has.
RESIDUAL_WORDS = re.compile(r"\bres\d|residual|shortcut|skip|projection|idconv|downsample")
# From this kernel size on, a first convolution usually has a stride, as in ImageNet's nets.
STRIDED_KERNEL = 7
# From this kernel size on, a last convolution usually sees the whole map.
WHOLE_MAP_KERNEL = 7


@dataclass(eq=False)
class Reading:
    """One way to read a state dict: an architecture, and the weights under this net's names.

    Several readings of one state dict share their weight tensors.
    """

    architecture: ChainArchitecture | ResNetArchitecture
    widths: list[int]
    state: dict[str, torch.Tensor]

    def build(self) -> Net:
        """The net, which shares the reading's weights. Raises UserError."""
        with torch.device("meta"):
            net = build_net(self.architecture, self.widths)
        load_weights(net, self.state, assign=True)
        return net

    def for_size(self, size: int) -> "Reading | None":
        """The reading for images of that size; None where they do not fit."""
        if not self.architecture.fits_size(size):
            return None
        return replace(self, architecture=replace(self.architecture, size=size))

    def with_activation(self, activation: str) -> "Reading":
        """The same with another of ACTIVATIONS."""
        return replace(self, architecture=replace(self.architecture, activation=activation))


def change_activation(readings: list[Reading], activation: str) -> list[Reading]:
    """The readings with `activation` in place of their own.

    Readings that differ only in their activation become one.
    """
    # Every other choice is listed once for each activation that is tried. So the readings with the
    # activation of the first one have all these choices.
    first_activation = readings[0].architecture.activation
    kept = [reading for reading in readings if reading.architecture.activation == first_activation]
    return [reading.with_activation(activation) for reading in kept]


@dataclass
class FoundModule:
    """A module of a foreign net: its name and tensors."""

    name: str
    tensors: dict[str, torch.Tensor]

    @property
    def weight(self) -> torch.Tensor:
        return self.tensors["weight"]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.tensors.get("bias")

    @property
    def is_norm(self) -> bool:
        return "running_mean" in self.tensors

    @property
    def is_convolution(self) -> bool:
        return not self.is_norm and self.weight.dim() == 4

    @property
    def is_linear(self) -> bool:
        return not self.is_norm and self.weight.dim() == 2

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        return len(self.tensors["running_mean"] if self.is_norm else self.weight)

    @property
    def kernel(self) -> int:
        return self.weight.shape[2]


class UnreadableError(Exception):
    """Why a state dict cannot be read as one particular kind of net."""


class UnusualError(UnreadableError):
    """Why a chain cannot be read from its weights alone; with an Example it may still be read."""


# What reading a state dict raises if it is of another net than expected.
READING_ERRORS = (
    UnreadableError,
    # Half a batch norm, tensors of odd kinds and the like.
    KeyError,
    IndexError,
    ValueError,
    TypeError,
    RuntimeError,
    ArithmeticError,
)


def recognise_state_dict(content, path: Path) -> dict:
    """A state dict of any origin, as a checkpoint.

    The checkpoint has three more entries than one that `save_checkpoint` wrote:

    readings     every Reading that fits, the likeliest first; with an Example in the file only the
                 one that computes the Example
    has_example  whether the file has an Example
    notes        sentences for the user about what was taken from the file

    `facts` has the mean and std of the images where the file has them.
    Raises UserError where the state dict is of no net that this tool knows.
    """
    entries = content if isinstance(content, dict) else {}
    example = take_example(entries, path)
    normalisation = take_normalisation(entries)
    rest = content
    if entries:
        taken_keys = set(normalisation)
        if example is not None:
            taken_keys |= set(EXAMPLE_KEYS)
        rest = {key: value for key, value in content.items() if key not in taken_keys}
    readings, notes, inner = read_first_net(rest, path, example)
    first = readings[0]
    facts = {}
    try:
        facts = read_normalisation(normalisation, first.architecture.channels, path)
    except UserError as error:
        if example is not None:
            raise
        # These may be something else, such as mean and std of an accuracy over several trainings.
        notes.append(f"{error}; so they are ignored")
    if inner:
        facts = combine_normalisations(facts, inner)
        notes.append(f"{path}: the net normalises its inputs itself, by its own mean and std")
    if example is not None:
        notes.append(f"{path}: {describe_match(first, example.normalised_by(inner))}")
    return {
        "format": CHECKPOINT_FORMAT,
        "architecture": asdict(first.architecture),
        "widths": first.widths,
        "gates": None,
        "state": first.state,
        "facts": facts,
        "readings": readings,
        "has_example": example is not None,
        "notes": notes,
    }


def read_first_net(
    content, path: Path, example: "Example | None"
) -> tuple[list[Reading], list[str], dict]:
    """(readings, notes, the net's own normalisation) of the first state dict in a file that is a
    known net; with an `example` the one reading that computes it. Raises UserError."""
    errors = []  # (number of tensors, what is wrong with them)
    for state, notes in find_state_dicts(content, path):
        try:
            state, inner = split_inner_normalisation(state)
            if example is not None:
                reading = find_reading_by_example(state, example.normalised_by(inner))
                return [reading], notes, inner
            return read_state(state), notes, inner
        except READING_ERRORS as error:
            errors.append((len(state), error))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    # What has the most tensors is most likely the net; of equals the first one.
    _, main_error = max(errors, key=lambda item: item[0])
    reason = str(main_error)
    if not isinstance(main_error, UnreadableError):
        reason = f"its tensors are of no net that this tool knows ({main_error!r})"
    if isinstance(main_error, UnusualError) and example is None:
        reason += "; some such nets are taken where the file holds inputs and outputs, too"
    raise UserError(f"{path}: {reason}; known are {KNOWN_NETS} (docs/your-net.md)") from main_error


# ---- checkpoints: an example of what a foreign net computes

# A file has an example where it holds both, beside the state dict.
EXAMPLE_KEYS = ("inputs", "outputs")
# A file may say how images are normalised, with an example or without.
NORMALISATION_KEYS = ("mean", "std")
# ours: only so many inputs of an example are used. Each has one output per class to compare.
MAX_EXAMPLE_INPUTS = 4
# ours: a reading is accepted up to this difference (`Example.difference_of`). Of the usual readings
# the nearest one is taken. An unusual one is taken if no usual one is accepted, or if it alone
# differs by less than STRANGE_DIFFERENCE. The outputs of four trained nets in float16, which rounds
# as a GPU's TF32 does, had differences of up to 0.006.
EXAMPLE_TOLERANCE = 0.02
# ours: the user is told of a difference from here on.
STRANGE_DIFFERENCE = 1e-3
# ours: below this difference no nearer reading is looked for.
ROUNDING_DIFFERENCE = 1e-4


@dataclass(frozen=True, eq=False)
class Example:
    """Some inputs of a foreign net and what it puts out for them: this tells what weights do not.

    The outputs may be logits, the logarithms of probabilities, or probabilities, which are kept as
    their logarithms.
    """

    inputs: torch.Tensor  # (N, C, H, H), float32
    outputs: torch.Tensor  # (N, classes), float32
    # For probabilities: the logarithm of the smallest positive normal number of their type (or of
    # float32, if that is larger). Smaller logarithms are raised to it. None for other outputs.
    least_log: float | None = None

    def normalised_by(self, normalisation: dict) -> "Example":
        """The example with inputs that are normalised already, as what comes behind the net's own
        normalisation reads them.

        `normalisation` holds its mean and std, from `split_inner_normalisation`; {} if it has none.
        """
        if not normalisation:
            return self
        mean, std = (
            torch.tensor(normalisation[key]).reshape(-1, 1, 1) for key in NORMALISATION_KEYS
        )
        return replace(self, inputs=(self.inputs - mean) / std)

    @property
    def channels(self) -> int:
        return self.inputs.shape[1]

    @property
    def size(self) -> int:
        """The side of the square images, in pixels."""
        return self.inputs.shape[2]

    @property
    def classes(self) -> int:
        return self.outputs.shape[1]

    def difference_of(self, logits: torch.Tensor) -> float:
        """How far the logits (M, classes) of the first M inputs are from the example's outputs.

        The root mean square of their differences, divided by the root mean square of how far each
        input's outputs are from the mean over all inputs. 0 means equal.

        A number that is added to all logits of one image does not count,
        because softmax ignores it.
        """
        if self.least_log is not None:
            logits = logits.log_softmax(1).clamp(min=self.least_log)
        outputs = centre(self.outputs)
        difference = centre(logits) - outputs[: len(logits)]
        spread = outputs - outputs.mean(0)
        return float((difference.square().mean() / spread.square().mean()).sqrt())

    def difference_of_net(self, net: Net, tolerance: float) -> float:
        """The difference between what `net` computes and the example's outputs.

        If the first input alone shows that the difference is above `tolerance`, the difference of
        this input is returned. Most wrong nets are found so, in less time.
        """
        difference = self.difference_of(net(self.inputs[:1]))
        # The squared difference over all N inputs is the mean of those of each input. So it is at
        # least 1 / N of the first input's. Above this limit it exceeds the tolerance.
        if difference > tolerance * len(self.inputs) ** 0.5:
            return difference
        return self.difference_of(net(self.inputs))


def centre(outputs: torch.Tensor) -> torch.Tensor:
    """Outputs (N, classes) less their mean for each input."""
    return outputs - outputs.mean(1, keepdim=True)


ADVICE_ON_EXAMPLES = (
    f"make them by: inputs = torch.randn({MAX_EXAMPLE_INPUTS}, channels, pixels, pixels); "
    "outputs = net.eval()(inputs)"
)


def take_example(content: dict, path: Path) -> Example | None:
    """The example in the content of a file; None where there is none. Raises UserError where it
    tells nothing."""
    values = [content.get(key) for key in EXAMPLE_KEYS]
    are_arrays = [hasattr(value, "__array__") for value in values]  # tensors, or numpy's arrays
    if not any(are_arrays):
        return None
    for key in EXAMPLE_KEYS:
        if key not in content:
            present = "inputs" if key == "outputs" else "outputs"
            raise UserError(f"{path}: it has {present} but no {key}; {ADVICE_ON_EXAMPLES}")
    if not are_arrays[0]:
        kind = type(values[0]).__name__
        raise UserError(f"{path}: its inputs are no tensor, but {kind}; {ADVICE_ON_EXAMPLES}")
    if not are_arrays[1]:
        kind = type(values[1]).__name__
        raise UserError(
            f"{path}: beside its inputs its outputs are no tensor, but {kind}; of several outputs "
            "of a net take the one that tells the classes apart"
        )
    inputs, outputs = map(torch.as_tensor, values)
    check_example(inputs, outputs, path)
    return make_example(inputs, outputs)


def make_example(inputs: torch.Tensor, outputs: torch.Tensor) -> Example:
    """The Example of inputs (N, C, H, H) and outputs (N, classes) in any precision."""
    least_log = math.log(max(torch.finfo(dtype).tiny for dtype in (outputs.dtype, torch.float)))
    inputs, outputs = (each[:MAX_EXAMPLE_INPUTS].detach().float() for each in (inputs, outputs))
    sums = outputs.sum(1)
    # In half precision the sums are less exact.
    if outputs.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=0.02):
        return Example(inputs, outputs)
    return Example(inputs, outputs.log().clamp(min=least_log), least_log)


def check_example(inputs: torch.Tensor, outputs: torch.Tensor, path: Path) -> None:
    """Raise UserError unless these are a net's inputs and outputs that can identify the net.

    Inputs (N, C, H, H) and outputs (N, classes) have to be finite floating-point numbers, with
    N >= 2 and classes >= 2. The outputs of different inputs have to differ by more than a constant
    that is added to all classes.
    """
    if inputs.dim() != 4 or inputs.shape[2] != inputs.shape[3] or not inputs.is_floating_point():
        raise UserError(
            f"{path}: its inputs, {describe_shape(inputs)} of {inputs.dtype}, are no "
            "floating-point numbers of the shape (N, channels, pixels, pixels); "
            f"{ADVICE_ON_EXAMPLES}"
        )
    if outputs.dim() != 2 or len(outputs) != len(inputs) or not outputs.is_floating_point():
        raise UserError(
            f"{path}: its outputs, {describe_shape(outputs)} of {outputs.dtype}, are no "
            f"floating-point numbers of the shape (N, classes) for its {len(inputs)} inputs; "
            f"{ADVICE_ON_EXAMPLES}"
        )
    if not inputs.isfinite().all() or not outputs.isfinite().all():
        raise UserError(f"{path}: its inputs or outputs are not all finite; {ADVICE_ON_EXAMPLES}")
    if outputs.shape[1] < 2:
        raise UserError(f"{path}: its outputs are one number an input, not one for each class")
    if len(inputs) < 2:
        raise UserError(
            f"{path}: it has {len(inputs)} inputs, needed are two or more; {ADVICE_ON_EXAMPLES}"
        )
    first_outputs = centre(outputs[:MAX_EXAMPLE_INPUTS].float())
    if torch.allclose(first_outputs, first_outputs[:1], rtol=1e-5, atol=1e-7):
        raise UserError(
            f"{path}: its outputs are the same for all its inputs; {ADVICE_ON_EXAMPLES}"
        )


ADVICE_ON_NORMALISATION = "leave out mean and std if you do not know them"


def take_normalisation(content: dict) -> dict:
    """The mean and std in the content of a file, as they are; {} where it has none."""
    found = {key: content[key] for key in NORMALISATION_KEYS if key in content}
    others = [
        value for key, value in content.items() if key not in EXAMPLE_KEYS and key not in found
    ]
    if any(isinstance(value, dict) for value in found.values()):
        return {}  # `mean` or `std` may be the name of a state dict
    if all(value is None for value in found.values()):
        return {}  # there are none, or the owner says that they are not known
    has_weights = any(isinstance(value, torch.Tensor) and value.dim() > 1 for value in others)
    if has_weights and all(getattr(value, "ndim", 0) > 2 for value in found.values()):
        return {}  # they are buffers of the net: `split_inner_normalisation` takes them
    return found


def read_normalisation(values: dict, channels: int, path: Path) -> dict[str, list[float]]:
    """The checked mean and std of images with pixels from 0 to 1: one number for each channel.

    `values` is what `take_normalisation` returned. Raises UserError where the mean or the std is
    missing, has another count of numbers, a number outside 0 to 1, or a std of 0.
    """
    if len(values) == 1:
        present, missing = ("mean", "std") if "mean" in values else ("std", "mean")
        raise UserError(f"{path}: it has a {present} but no {missing}; {ADVICE_ON_NORMALISATION}")
    normalisation = {}
    for key, value in values.items():
        try:
            numbers = torch.as_tensor(value, dtype=torch.float64).flatten()
        except (TypeError, ValueError, RuntimeError):
            numbers = torch.empty(0)
        is_valid = len(numbers) == channels and bool(((numbers >= 0) & (numbers <= 1)).all())
        if not is_valid or (key == "std" and numbers.min() == 0):
            count = "one number" if channels == 1 else f"{channels} numbers"
            raise UserError(
                f"{path}: its {key} has to be {count} between 0 and 1, of images with pixels "
                "between 0 and 1 (divide by 255 if yours go up to 255); "
                f"{ADVICE_ON_NORMALISATION}"
            )
        normalisation[key] = numbers.tolist()
    return normalisation


def split_inner_normalisation(state: dict) -> tuple[dict, dict[str, list[float]]]:
    """Split off the mean and std of a net that normalises its inputs itself.

    Returns (the state dict without them, {"mean": [...], "std": [...]} with one number for each
    channel); the latter is {} where the net has none. They are buffers `mean` and `std`, of the net
    or of a module in it, of the shape (C, 1, 1) or (1, C, 1, 1); the net's first convolution reads
    C channels. Raises UnreadableError where they are not finite, or a std is not above 0.
    """
    kernels = [value for key, value in state.items() if key.endswith("weight") and value.dim() == 4]
    for key, mean in state.items():
        std_key = f"{key.removesuffix('mean')}std"
        std = state.get(std_key)
        if not key.endswith("mean") or std is None or not kernels:
            continue
        if mean.dim() < 3 or mean.shape != std.shape or mean.numel() != kernels[0].shape[1]:
            continue
        if not (std > 0).all() or not (mean.isfinite() & std.isfinite()).all():
            raise UnreadableError(
                f"its {std_key}, by which it divides its inputs, is not above 0, or not finite"
            )
        rest = {name: value for name, value in state.items() if name not in (key, std_key)}
        return rest, {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
    return state, {}


def combine_normalisations(outer: dict, inner: dict[str, list[float]]) -> dict[str, list[float]]:
    """The mean and std of both: images are normalised by `outer`, if the file names any, and the
    net normalises what it reads by `inner`."""
    if not outer:
        # A mean or std above 1 is of pixels from 0 to 255.
        scale = 1 / 255 if max(*inner["mean"], *inner["std"]) > 1 else 1.0
        outer = {"mean": [0.0] * len(inner["mean"]), "std": [scale] * len(inner["mean"])}
    pairs = list(zip(outer["mean"], outer["std"], inner["mean"], inner["std"]))
    return {
        "mean": [outer_mean + outer_std * mean for outer_mean, outer_std, mean, _ in pairs],
        "std": [outer_std * std for _, outer_std, _, std in pairs],
    }


def find_reading_by_example(state: dict, example: Example) -> Reading:
    """The reading of a state dict, with any of ACTIVATIONS, that computes the example. Raises one
    of READING_ERRORS where none does, or UserError where its numbers are not finite."""
    first_error = None
    differences = []
    nearest, least_difference = None, math.inf
    # First the usual readings. The unusual ones are many, so they are tried only if none of the
    # usual ones computes the example. One that does so only roughly may be a wrong one.
    for read in (read_state, partial(read_unusual_chains, size=example.size)):
        try:
            readings = read(state)
        except READING_ERRORS as error:
            first_error = first_error or error
            continue
        reading, difference = find_nearest_reading(readings, example)
        differences.append(difference)
        limit = least_difference
        if least_difference < EXAMPLE_TOLERANCE:
            limit = STRANGE_DIFFERENCE  # an unusual reading has to be clearly nearer
        if difference < limit:
            nearest, least_difference = reading, difference
        if least_difference < STRANGE_DIFFERENCE:
            break
    if least_difference < EXAMPLE_TOLERANCE:
        return nearest
    if not differences:
        raise first_error
    inputs = f"its inputs of {example.size} x {example.size} pixels"
    if least_difference == math.inf:
        raise UnreadableError(
            f"no reading of its weights takes {inputs}, or computes finite outputs from them"
        )
    raise UnreadableError(
        f"no reading of its weights computes its outputs from {inputs} (the nearest differs by "
        f"{least_difference:.0%}); either they are not of these weights in eval mode and float32, "
        "or the net does something that this tool does not take (docs/your-net.md)"
    )


@torch.no_grad()
def find_nearest_reading(readings: list[Reading], example: Example) -> tuple[Reading | None, float]:
    """Find the reading, with any of ACTIVATIONS, that computes the example best.

    Returns (the reading, its difference as in `Example.difference_of`), or (None, infinity) where
    no reading takes inputs of the example's size. Raises UnreadableError where the net has another
    number of channels or classes than the example.
    """
    architecture = readings[0].architecture  # all of them have as many channels and classes
    channels, classes = architecture.channels, architecture.classes
    if (channels, classes) != (example.channels, example.classes):
        raise UnreadableError(
            f"the net reads {channels} channels and tells {classes} classes apart, but its inputs "
            f"and outputs in the file have {example.channels} and {example.classes}"
        )
    fitting = [reading.for_size(example.size) for reading in readings]
    fitting = [reading for reading in fitting if reading is not None]
    nearest, least_difference = None, math.inf
    if not fitting:
        return nearest, least_difference
    with_all_activations = chain.from_iterable(
        change_activation(fitting, activation) for activation in ACTIVATIONS
    )
    for reading, net in build_in_turn(with_all_activations):
        try:
            difference = example.difference_of_net(net, EXAMPLE_TOLERANCE)
        except RuntimeError:  # most likely strides and poolings leave nothing of the map
            continue
        if difference < least_difference:
            nearest, least_difference = reading, difference
        if difference < ROUNDING_DIFFERENCE:
            break
    return nearest, least_difference


def build_in_turn(readings: Iterable[Reading]) -> Iterator[tuple[Reading, Net]]:
    """Yield each reading with its net in evaluation mode.

    Consecutive chains with the same state share one net object, and the next step changes its
    architecture. So use each net before taking the next one.
    """
    net = state = None
    for reading in readings:
        if isinstance(net, ChainNet) and reading.state is state:
            net.switch_architecture(reading.architecture)
        else:
            net, state = reading.build().eval(), reading.state
        yield reading, net


@torch.no_grad()
def describe_match(reading: Reading, example: Example) -> str:
    """How the net is read, for the user, and what the example leaves open."""
    words = f"read as {reading.architecture.in_words()}; so it computes the outputs in the file"
    difference = example.difference_of(reading.build().eval()(example.inputs))
    if difference > STRANGE_DIFFERENCE:
        words += (
            f", but for a difference of {difference:.2%}: outputs of a GPU or in half precision "
            "are rounded so, and so differ nets whose activation has another slope, or whose batch "
            "norms another eps"
        )
    own = reading.architecture.activation
    others = [reading.with_activation(name) for name in ACTIVATIONS if name != own]
    limit = max(difference, ROUNDING_DIFFERENCE)
    alike = [
        other.architecture.activation
        for other, net in build_in_turn(others)
        if example.difference_of_net(net, limit) <= limit
    ]
    if alike:
        words += f"; so does {' or '.join(alike)}: larger inputs would tell"
    return words


# ---- checkpoints: finding the weights in a file


# Keys in the files of unfinished runs. No checkpoint has all keys of one of these sets.
UNFINISHED_WORK = ({"title", "curve"}, {"title", "candidates"})


def find_state_dicts(content, path: Path) -> Iterator[tuple[dict[str, torch.Tensor], list[str]]]:
    """Yield (weights, notes) for each state dict in `content`, averaged ones first.

    `content` is what torch.load returned. The weights are in float32; their names lack the parts
    that wrappers add. The notes tell the user what is taken. Raises UserError.
    """
    if isinstance(content, dict) and any(keys <= content.keys() for keys in UNFINISHED_WORK):
        raise UserError(f"{path} is the state of unfinished work, not a checkpoint")
    found = dict(list_state_dicts(content))
    if not found:
        raise UserError(
            f"{path} holds no state dict (bare, or in a dict under any name); "
            "torch.save(net.state_dict(), FILE) makes such a file"
        )
    averaged = [place for place in found if AVERAGE_WORDS.search(name_of_place(place).lower())]
    for place in [*averaged, *(place for place in found if place not in averaged)]:
        tensors = found[place]
        for other in found.values():
            # Some averages hold the parameters only: the net's own buffers complete them.
            if place in averaged and tensors.keys() < other.keys():
                tensors = other | tensors
        state = convert_tensors(tensors, path)
        if any(key.startswith("gates.") for key in state):
            raise UserError(
                f"{path}: weights alone of a gated net do not say how many kernels its gates keep; "
                "give the checkpoint that they are from"
            )
        yield strip_wrappers(apply_masks(state)), list_notes(place, found, path)


def name_of_place(place: tuple) -> str:
    """Where in a file a state dict is, by the keys and indices that lead to it."""
    return ".".join(map(str, place)) or "the outermost"


def list_notes(place: tuple, found: dict[tuple, dict], path: Path) -> list[str]:
    """What the user is told where the state dict at that place is taken."""
    notes = []
    if len(found) > 1:
        others = [other for other in found if other != place]
        names = ", ".join(map(name_of_place, others))
        note = f"{path} holds several state dicts; taken is {name_of_place(place)}, not {names}"
        if others[0]:
            keys = "".join(f"[{key!r}]" for key in others[0])
            note += f"; for another: torch.save(torch.load(FILE){keys}, 'other.pt')"
        notes.append(note)
    # Vectors of the net itself, in no module: perhaps a learned scale.
    vectors = [
        f"{key} ({value.numel()} numbers)"
        for key, value in found[place].items()
        if "." not in key and value.is_floating_point() and value.dim() == 1 and len(value) > 1
    ]
    if vectors and len(vectors) < len(found[place]):
        notes.append(
            f"{path}: {', '.join(vectors)} are of no layer and not used; if the net computes with "
            "them, it is read wrongly"
        )
    kinds = {str(value.dtype).removeprefix("torch.") for value in found[place].values()}
    halves = sorted(kinds & {"float16", "bfloat16"})
    if halves:
        notes.append(f"its weights are in {' and '.join(halves)}; they are computed in float32")
    return notes


def convert_tensors(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Dense tensors, those of floating-point numbers in float32. Raises UserError."""
    state = {}
    for key, value in tensors.items():
        if value.is_quantized:
            raise UserError(f"{path}: {key} is quantised; give the weights from before that")
        value = value.to_dense() if value.layout != torch.strided else value
        state[key] = value.float() if value.is_floating_point() else value
    return state


def list_state_dicts(content, place: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    """Yield (where it is, tensors by name) for every state dict in `content`, however deep.

    Where it is: the keys of dicts and the indices of lists that lead to it.
    """
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
        keys = list(content)
    elif isinstance(content, dict):
        keys = [
            key
            for key in content
            if isinstance(key, str) and not OPTIMIZER_WORDS.search(key.lower())
        ]
    else:
        return
    tensors = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if any(value.dim() > 1 for value in tensors.values()):
        yield place, tensors
    for key in keys:
        yield from list_state_dicts(content[key], (*place, key))


def apply_masks(state: dict) -> dict:
    """Weights that torch.nn.utils.prune masks, as it computes them: NAME_orig times NAME_mask."""
    masked = {}
    for key, value in state.items():
        if key.endswith("_orig") and key.removesuffix("_orig") + "_mask" in state:
            key = key.removesuffix("_orig")
            value = value * state[f"{key}_mask"]
        elif key.endswith("_mask") and key.removesuffix("_mask") + "_orig" in state:
            continue
        masked[key] = value
    return masked


def strip_wrappers(state: dict) -> dict:
    """The state dict under shorter names: without the parts that wrappers add (`module.`), and
    without a prefix that the names of all weights share.

    Where the weights under one prefix are an averaged copy of those under another one, only the
    copy stays. Otherwise tensors without the shared prefix, such as a loss's, keep their names.
    """
    parts = {}
    for key in state:
        # A tensor whose whole name is a wrapper's keeps it.
        parts[key] = [part for part in key.split(".") if part not in WRAPPER_PARTS] or [key]
    while (first := find_part_to_strip(state, parts)) is not None:
        has_other_weights = any(
            names[0] != first and state[key].dim() > 1 for key, names in parts.items()
        )
        if has_other_weights:
            # `first` is an averaged copy, and the others are the net that was averaged.
            parts = {key: names for key, names in parts.items() if names[0] == first}
        parts = {
            key: names[1:] if names[0] == first and len(names) > 1 else names
            for key, names in parts.items()
        }
    return {".".join(names): state[key] for key, names in parts.items()}


def find_part_to_strip(state: dict, parts: dict[str, list[str]]) -> str | None:
    """The first part to strip from the names; None where nothing is to be stripped (fc.weight).

    `parts` holds the parts of each name by its key in `state`. The part to strip is the first one
    in the names of all weights, or in those of an averaged copy.
    """
    weight_keys = [key for key in parts if state[key].dim() > 1]
    shapes_of: dict[str, list] = {}  # by first part, the shapes of its weights
    for key in weight_keys:
        shapes_of.setdefault(parts[key][0], []).append(state[key].shape)
    if len(shapes_of) > 1:
        first = find_averaged_copy(shapes_of)
    else:
        first = next(iter(shapes_of))
        norm_keys = [key for key in parts if key.endswith("running_mean")]
        if any(parts[key][0] != first for key in norm_keys):
            # The layers share this part, but the norms have another one (layers.0, norms.0). So it
            # is not the name of the net.
            return None
    if first is None:
        return None
    shortest = min(len(parts[key]) for key in weight_keys if parts[key][0] == first)
    # Strip it only from PART.LAYER.weight. In LAYER.weight it is the name of the layer.
    return first if shortest > 2 else None


def find_averaged_copy(shapes_of: dict[str, list]) -> str | None:
    """The part that is named as an average, and has weights of the same shapes as another part."""
    all_shapes = list(shapes_of.values())
    for part, shapes in shapes_of.items():
        if AVERAGE_WORDS.search(part.lower()):
            return part if all_shapes.count(shapes) > 1 else None
    return None


# ---- checkpoints: modules and what they are


def list_modules(state: dict) -> list[FoundModule]:
    """Convolutions, batch norms and linear layers in their order.

    Raises UnreadableError where the net has other parameters.
    """
    found: dict[str, FoundModule] = {}
    for key, value in state.items():
        name, _, parameter = key.rpartition(".")
        found.setdefault(name, FoundModule(name, {})).tensors[parameter] = value
    modules = []
    for module in found.values():
        tensors = module.tensors
        if "running_mean" in tensors or ("weight" in tensors and tensors["weight"].dim() in (2, 4)):
            modules.append(module)
        elif any(value.dim() > 1 for value in tensors.values()):
            parameter = next(key for key, value in tensors.items() if value.dim() > 1)
            key = f"{module.name}.{parameter}".strip(".")
            hint = (
                " (a one-dimensional convolution, or a layer norm?)"
                if (parameter, tensors[parameter].dim()) == ("weight", 3)
                else ""
            )
            raise UnreadableError(
                f"{key} is {describe_shape(tensors[parameter])}, of no known layer{hint}"
            )
    if all(module.is_norm for module in modules):
        raise UnreadableError("it holds neither a convolution nor a linear layer")
    spread_selections(found)
    check_weights(modules)
    refuse_other_parameters(found, modules)
    return modules


def spread_selections(found: dict[str, FoundModule]) -> None:
    """Let the next layer after a channel selection (network slimming) read all channels.

    Its weights get zeros for the channels that the selection leaves out: (out, kept, ...) ->
    (out, C, ...). A selection is a module with `indexes` (C,) of 0 and 1. Changes the modules.
    """
    selection = None
    for module in found.values():
        if set(module.tensors) == {"indexes"}:
            selection = module.tensors["indexes"].flatten() != 0
        elif selection is not None and "weight" in module.tensors and not module.is_norm:
            weight = module.weight
            if weight.dim() > 1 and weight.shape[1] == int(selection.sum()) < len(selection):
                spread = weight.new_zeros(len(weight), len(selection), *weight.shape[2:])
                spread[:, selection] = weight
                module.tensors["weight"] = spread
            selection = None


# Tensors that change nothing: of a channel selection, which
# `spread_selections` has applied, and of thop, which counts operations.
HARMLESS_TENSORS = {"indexes", "total_ops", "total_params"}
# The tensors that this tool reads of a layer or batch norm.
LAYER_TENSORS = {"weight", "bias", "running_mean", "running_var"}


def check_weights(modules: list[FoundModule]) -> None:
    """Raise UnreadableError where weights are empty, no floating-point numbers, or of kernels
    that are not square, and where a layer has more parameters than these."""
    for module in modules:
        for name, value in module.tensors.items():
            if value.is_floating_point() and name not in LAYER_TENSORS | HARMLESS_TENSORS:
                raise UnreadableError(
                    f"{module.name}.{name} is a parameter of no known layer (a learned scale, or "
                    "an adapter as LoRA's?)"
                )
        weight = module.tensors.get("weight", module.tensors.get("running_mean"))
        if not weight.is_floating_point() or not weight.numel():
            raise UnreadableError(f"{module.name} has weights of {weight.dtype}, or none")
        if module.is_convolution and module.weight.shape[2] != module.weight.shape[3]:
            raise UnreadableError(f"{module.name} has kernels that are not square")


# Names of modules that change nothing: a training for quantisation observes ranges with them.
HARMLESS_MODULES = re.compile(r"activation_post_process|fake_quant")


def refuse_other_parameters(found: dict[str, FoundModule], modules: list[FoundModule]) -> None:
    """Raise UnreadableError where something between the layers has parameters and is no batch norm:
    another norm, a PReLU, a learned scale.

    Before the first layer and after the last one, most parameters are harmless: counters, weights
    of losses and the like. But PReLUs and norms are refused there, too, because a net may list them
    apart from its layers.
    """
    names = list(found)
    first, last = names.index(modules[0].name), names.index(modules[-1].name)
    for name in [*names[:first], *names[last + 1 :]]:
        if found[name].tensors.keys() >= {"weight", "bias"}:
            raise UnreadableError(f"{name} looks like a layer or group norm, not a batch norm")
        if is_prelu_outside(found[name], classes=modules[-1].outputs):
            raise UnreadableError(f"{name} looks like a PReLU, whose slopes this tool cannot use")
    layers = {module.name for module in modules}
    for name in names[first : last + 1]:
        if name in layers or HARMLESS_MODULES.search(name):
            continue
        tensors = found[name].tensors
        for parameter, value in tensors.items():
            if parameter in HARMLESS_TENSORS or not value.is_floating_point():
                continue
            if parameter == "weight":
                kind = "a PReLU" if "bias" not in tensors else "a layer or group norm"
                raise UnreadableError(f"{name} looks like {kind}, not a batch norm")
            key = f"{name}.{parameter}".strip(".")
            raise UnreadableError(f"{key} is a parameter of no known layer (a learned scale?)")


def is_prelu_outside(module: FoundModule, classes: int) -> bool:
    """Whether a module that stands before or after the layers is a PReLU: a single vector of
    weights. One as long as there are classes is taken as the weights of a loss."""
    if module.tensors.keys() - HARMLESS_TENSORS != {"weight"}:
        return False
    weight = module.weight
    return weight.is_floating_point() and weight.dim() == 1 and len(weight) != classes


def read_state(state: dict) -> list[Reading]:
    """All that a state dict may be, the likeliest first. Raises one of READING_ERRORS, or UserError
    where its numbers are not finite."""
    modules = list_modules(state)
    names = {module.name for module in modules}
    readings = read_modules(modules)
    check_layers_are_finite(state, names)
    return readings


def check_layers_are_finite(state: dict, names: set[str]) -> None:
    """`check_is_finite` of the layers and norms of these names. Other tensors, as an observer's for
    quantisation, are not used, and may be infinite."""
    check_is_finite({key: value for key, value in state.items() if parent_of(key) in names})


def read_modules(modules: list[FoundModule]) -> list[Reading]:
    """All that these modules may be, the likeliest first. Raises UnreadableError."""
    groups = group_blocks(modules)
    if groups is None:
        return read_chain(modules)
    convolutions = sum(module.is_convolution for module in modules)
    if convolutions >= VGG_CONVOLUTIONS and not all(group.is_sequence for group in groups):
        return read_residual_net(modules, groups)
    # These blocks may also be a chain: there are few convolutions, or each block is a sequence,
    # which has no shortcut.
    readings, errors = [], []
    for read in (partial(read_residual_net, groups=groups), read_chain):
        try:
            readings += read(modules)
        except READING_ERRORS as error:
            errors.append(error)
    if not readings:
        unusual_errors = [error for error in errors if isinstance(error, UnusualError)]
        raise (unusual_errors or errors)[0]
    return readings


# ---- checkpoints: tensors under our names


def put_layer(state: dict, name: str, module: FoundModule, norm_name, norm) -> None:
    """Put the tensors of a layer and its norm into `state`, under our names.

    A bias in front of a norm is taken off its running mean: norm(y + b) stays the same.
    """
    state[f"{name}.weight"] = module.weight
    bias = module.bias
    if norm is None:
        if module.is_linear and bias is None:
            bias = torch.zeros(module.outputs)
        if bias is not None:
            state[f"{name}.bias"] = bias
        return
    if module.is_linear:
        state[f"{name}.bias"] = torch.zeros(module.outputs)
    put_norm(state, norm_name, norm, bias)


def put_norm(state: dict, name: str, norm: FoundModule, bias=None) -> None:
    """Put a norm's tensors into `state`; one without scale and shift has scales 1 and shifts 0."""
    tensors = norm.tensors
    mean = tensors["running_mean"]
    state[f"{name}.weight"] = tensors.get("weight", torch.ones_like(mean))
    state[f"{name}.bias"] = tensors.get("bias", torch.zeros_like(mean))
    state[f"{name}.running_mean"] = mean if bias is None else mean - bias
    state[f"{name}.running_var"] = tensors["running_var"]
    state[f"{name}.num_batches_tracked"] = torch.tensor(0)


# ---- checkpoints: chains
#
# A norm is late if it stands after the activation or the pooling of its layer. A late norm of a
# convolution stays a norm (Convolution.norm_place). A late norm of a linear layer is folded into
# the next linear layer, because nothing stands between the two. The numbers of modules in an
# nn.Sequential may show that a norm is late. Otherwise both cases are tried, and only an Example
# can decide.


@dataclass
class FoundChain:
    """The layers of a foreign chain, in their order, and what their shapes say."""

    convolutions: list[FoundModule]
    linear_layers: list[FoundModule]
    norm_of: dict[str, FoundModule]  # by the names of layers
    channels: int  # of the images
    head_size: int  # the side of the map that the first linear layer reads


def read_chain(modules: list[FoundModule]) -> list[Reading]:
    """The readings of a chain of convolutions and linear layers, but for unusual ones. Raises
    UnreadableError."""
    found = find_chain(modules)
    check_first_kernel(found.convolutions)
    return make_readings(found, list_chains(found))


def read_unusual_chains(state: dict, size: int) -> list[Reading]:
    """The readings of a state dict as a chain with strides, other poolings or late norms, for
    images of that size; errors as those of `read_state`.

    There are hundreds or thousands of such readings for most state dicts, and accuracy cannot tell
    them apart. So they are tried only with an Example.
    """
    readings, first_error = [], None
    for place, is_late in product(NORM_PLACES, (False, True)):
        try:
            modules = list_modules(state)  # anew each time, because find_chain changes them
            names = {module.name for module in modules}
            found = find_chain(modules, norm_place=place, has_late_linear_norms=is_late)
            readings += make_readings(found, list_unusual_chains(found, place, size))
        except READING_ERRORS as error:
            first_error = first_error or error
    if not readings:
        raise first_error
    check_layers_are_finite(state, names)
    return readings


def find_chain(
    modules: list[FoundModule],
    *,
    norm_place: str = BEFORE_ACTIVATION,
    has_late_linear_norms: bool = False,
) -> FoundChain:
    """Read the modules as a chain whose convolutions have their norms at `norm_place`, one of
    NORM_PLACES.

    With `has_late_linear_norms` the norms of linear layers stand after the activation. This is for
    norms whose place the numbers in the names do not show. Where they show it, they decide.

    Changes the modules: convolutions that see a whole map become linear layers, and norms before a
    linear layer, after its activation or behind the last layer are folded into linear layers.
    Raises UnreadableError where the modules are no such chain.
    """
    flatten_head(modules)
    convolutions = [module for module in modules if module.is_convolution]
    linear_layers = [module for module in modules if module.is_linear]
    check_chain(modules, convolutions, linear_layers)
    norm_of = match_norms(modules)
    last_norm = norm_of.pop(linear_layers[-1].name, None)
    if last_norm is not None:
        if has_gap_between(linear_layers[-1], last_norm):
            raise UnreadableError(f"{last_norm.name} stands after an activation of the last layer")
        fold_norm(last_norm, linear_layers[-1], is_norm_first=False)
    check_norm_places(convolutions, norm_of, norm_place)
    fold_late_norms(linear_layers, norm_of, folds_all=has_late_linear_norms)
    channels, head_size = find_inputs(convolutions, linear_layers)
    return FoundChain(convolutions, linear_layers, norm_of, channels, head_size)


def make_readings(found: FoundChain, architectures: list[ChainArchitecture]) -> list[Reading]:
    """The readings of a chain by these architectures."""
    layers = [*found.convolutions, *found.linear_layers]
    widths = [module.outputs for module in layers[:-1]]
    states = {}  # Architectures with the same names of layers share one.
    readings = []
    for architecture in architectures:
        # The numbers of a VGG's layers depend on where poolings stand; flat names do not.
        poolings = tuple(bool(convolution.pooling) for convolution in architecture.convolutions)
        key = () if architecture.has_flat_names else poolings
        if key not in states:
            states[key] = translate_chain_state(architecture, layers, found.norm_of)
        readings.append(Reading(architecture, widths, states[key]))
    return readings


def flatten_head(modules: list[FoundModule]) -> None:
    """Turn convolutions that see a whole map into linear layers, as at the end of timm's VGGs.

    These are one of WHOLE_MAP_KERNEL or larger and the 1 x 1 convolutions after it, which may be
    the net's last layers. Changes the modules: weights (out, in, k, k) -> (out, in * k * k).
    """
    convolutions = [module for module in modules if module.is_convolution]
    has_linear_layer = any(module.is_linear for module in modules)
    for index, module in enumerate(convolutions):
        followers = convolutions[index + 1 :]
        are_followers_small = all(follower.kernel == 1 for follower in followers)
        if index == 0 or module.kernel < WHOLE_MAP_KERNEL or not are_followers_small:
            continue
        if not followers and has_linear_layer:
            continue  # it stays a convolution: its map may be larger
        for convolution in (module, *followers):
            convolution.tensors["weight"] = convolution.weight.flatten(1)
        return


def translate_chain_state(architecture: ChainArchitecture, layers, norm_of) -> dict:
    """The tensors of a chain under our names."""
    # A net of those names; its widths do not matter here.
    with torch.device("meta"):
        prunable_layers = build_net(architecture, [1] * architecture.prunable_count).prunable
    state = {}
    for prunable, module in zip(prunable_layers, layers):
        norm = norm_of.get(module.name)
        if norm is not None and prunable.norm_place != BEFORE_ACTIVATION:
            put_layer(state, prunable.layer_name, module, None, None)
            put_norm(state, prunable.norm_name, norm)
        else:
            put_layer(state, prunable.layer_name, module, prunable.norm_name, norm)
    put_layer(state, prunable_layers[-1].next_layer_name, layers[-1], None, None)
    return state


def check_chain(modules, convolutions, linear_layers) -> None:
    """Raise UnreadableError unless these layers are a chain, each reading what the one before it
    puts out, which ends in a linear layer, has something to prune, and has no names of residual
    nets."""
    last = [module for module in modules if not module.is_norm][-1]
    if not last.is_linear:
        raise UnreadableError(
            f"it does not end in a linear layer, but in layer {last.name} with weights of "
            f"{describe_shape(last.weight)}"
        )
    if not convolutions and len(linear_layers) == 1:
        raise UnreadableError("it has no hidden layer, so nothing to prune")
    shortcuts = [module.name for module in modules if RESIDUAL_WORDS.search(module.name.lower())]
    if shortcuts:
        raise UnreadableError(
            f"{shortcuts[0]} looks like part of a residual net, but it does not consist of a first "
            "convolution and blocks of two to four convolutions, each block in a module of its own"
        )
    for before, after in [*pairwise(convolutions), *pairwise(linear_layers)]:
        if after.inputs != before.outputs:
            raise UnreadableError(explain_break(before, after, convolutions))


def check_first_kernel(convolutions) -> None:
    """Raise UnreadableError where the first kernel is so large that it is probably strided."""
    if convolutions and convolutions[0].kernel >= STRIDED_KERNEL:
        raise UnusualError(
            f"{convolutions[0].name} has kernels of {convolutions[0].kernel} x "
            f"{convolutions[0].kernel}, so it is probably strided (an AlexNet?)"
        )


def explain_break(before: FoundModule, after: FoundModule, convolutions) -> str:
    """Why a layer cannot read what the one before it puts out, with a guess of the cause."""
    guess = ""
    # In a gray net a convolution that reads 1 channel may also read the image. Then it is a branch,
    # unless it keeps the number of channels.
    if after.is_convolution and after.inputs == 1 and after.outputs == before.outputs:
        guess = " (a depthwise convolution?)"
    elif after.is_convolution and after.inputs == convolutions[0].inputs:
        guess = " (a branch?)"
    elif after.is_convolution and after.inputs == 1:
        guess = " (a depthwise convolution?)"
    elif after.is_convolution and before.outputs % after.inputs == 0:
        guess = " (a grouped convolution?)"
    elif after.inputs > before.outputs:
        guess = " (a dense net, or a branch?)"
    unit = "channels" if after.is_convolution else "numbers"
    return (
        f"layer {after.name} reads {after.inputs} {unit} and layer {before.name}, before it, "
        f"puts out {before.outputs}{guess}"
    )


def find_sequence_number(module: FoundModule) -> int | None:
    """The number of a module in its nn.Sequential."""
    last_part = module.name.rpartition(".")[2]
    return int(last_part) if last_part.isdigit() else None


def steps_between(first: FoundModule, second: FoundModule) -> int | None:
    """How far `second` stands behind `first` in one nn.Sequential, by the numbers in their names:
    1 if it is the next module. None where the names do not say it."""
    numbers = find_sequence_number(first), find_sequence_number(second)
    if parent_of(first.name) != parent_of(second.name) or None in numbers:
        return None
    return numbers[1] - numbers[0]


def has_gap_between(layer: FoundModule, norm: FoundModule) -> bool:
    """Whether their numbers in an nn.Sequential leave room for a module, such as an activation,
    between a layer and its norm. False where there are no such numbers."""
    steps = steps_between(layer, norm)
    return steps is not None and steps > 1


def check_norm_places(convolutions, norm_of: dict[str, FoundModule], place: str) -> None:
    """Raise UnreadableError where numbers in the names say that the norm of a convolution stands
    elsewhere, or where norms are to stand late and there are none."""
    is_late = place != BEFORE_ACTIVATION
    with_norm = [layer for layer in convolutions if layer.name in norm_of]
    if is_late and not with_norm:
        raise UnreadableError("no norm stands behind a convolution")
    for layer in with_norm:
        norm = norm_of[layer.name]
        if steps_between(layer, norm) is None:
            continue
        if has_gap_between(layer, norm) and not is_late:
            raise UnusualError(f"{norm.name} stands after an activation, not before it")
        if not has_gap_between(layer, norm) and is_late:
            raise UnreadableError(f"{norm.name} stands right behind {layer.name}")


def fold_late_norms(linear_layers, norm_of: dict[str, FoundModule], *, folds_all: bool) -> None:
    """Fold norms that stand after the activation of a linear layer into the next linear layer: the
    scale into its weights, the shift into its bias. Changes the layers and `norm_of` in place.

    Norms that stand there by the numbers in the names are always folded. With `folds_all`, norms
    whose place no numbers show are folded, too. UnreadableError is raised where there are none of
    these, for then `folds_all` changes nothing.
    """
    has_norm_of_unknown_place = False
    for layer, after in pairwise(linear_layers):
        norm = norm_of.get(layer.name)
        if norm is None:
            continue
        is_place_unknown = steps_between(layer, norm) is None
        has_norm_of_unknown_place = has_norm_of_unknown_place or is_place_unknown
        if has_gap_between(layer, norm) or (is_place_unknown and folds_all):
            fold_norm(norm, after, is_norm_first=True)
            del norm_of[layer.name]
    if folds_all and not has_norm_of_unknown_place:
        raise UnreadableError("no norm stands behind a linear layer, or numbers tell where")


def compute_scale_and_shift(norm: FoundModule) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift), each (C,): the norm computes scale * x + shift."""
    tensors = {}
    put_norm(tensors, "norm", norm)
    variance = tensors["norm.running_var"] + nn.BatchNorm1d(1).eps
    scale = tensors["norm.weight"] * variance.rsqrt()
    return scale, tensors["norm.bias"] - scale * tensors["norm.running_mean"]


def fold_norm(norm: FoundModule, linear: FoundModule, *, is_norm_first: bool) -> None:
    """Let a linear layer do what a norm right before it does, or one right behind it. Gives the
    layer new tensors."""
    scale, shift = compute_scale_and_shift(norm)
    bias = torch.zeros(linear.outputs) if linear.bias is None else linear.bias
    if is_norm_first:
        new = {"weight": linear.weight * scale, "bias": bias + linear.weight @ shift}
    else:
        new = {"weight": linear.weight * scale[:, None], "bias": bias * scale + shift}
    linear.tensors = linear.tensors | new


def match_norms(modules: list[FoundModule]) -> dict[str, FoundModule]:
    """Match each batch norm with the layer that it normalises. Returns the norms by layer name.

    In the order of the modules, a run of layers is followed by a run of n norms. The first of these
    rules that fits pairs them:

    1. There are more than n layers, and every norm has the number of one of them (conv1, conv2,
       bn1) and its width: by number.
    2. The last n layers have the widths of the norms, in order: one norm for each.
    3. The last layer has the width of the first norm: these two are a pair.

    For a norm that is left over, the first of these rules that fits:

    4. A linear layer right behind it in one nn.Sequential has as many inputs: the norm is folded
       into that layer.
    5. A layer of its width has no norm and, by the numbers, does not stand behind it: the first
       such layer gets the norm.
    6. Exactly one linear layer has as many inputs: the norm is folded into that layer.

    Raises UnreadableError where none fits.
    """
    norm_of = {}
    unmatched_norms = []
    layers = []
    for is_norm, run in groupby(modules, key=attrgetter("is_norm")):
        if not is_norm:
            layers = list(run)
            continue
        norms = list(run)
        pairs = pair_run(layers, norms)
        norm_of |= {layer.name: norm for layer, norm in pairs}
        unmatched_norms += norms[len(pairs) :]
    for norm in unmatched_norms:
        place_unmatched_norm(norm, modules, norm_of)
    return norm_of


def pair_run(
    layers: list[FoundModule], norms: list[FoundModule]
) -> list[tuple[FoundModule, FoundModule]]:
    """Pair the first norms of a run with layers of the run before it, by the rules 1 to 3 of
    `match_norms`; [] if none fits."""
    by_number = pair_by_number(layers, norms)
    if by_number:
        return by_number
    if len(layers) >= len(norms):
        one_for_each = list(zip(layers[-len(norms) :], norms))
        if have_same_widths(one_for_each):
            return one_for_each
    last_and_first = list(zip(layers[-1:], norms))
    return last_and_first if have_same_widths(last_and_first) else []


def place_unmatched_norm(
    norm: FoundModule, modules: list[FoundModule], norm_of: dict[str, FoundModule]
) -> None:
    """Add a norm to `norm_of`, or fold it into a linear layer, by the rules 4 to 6 of
    `match_norms`."""
    reader = find_linear_layer_behind(norm, modules)
    if reader is not None:
        fold_norm(norm, reader, is_norm_first=True)
        return
    without_norm = [
        layer
        for layer in modules
        if not layer.is_norm
        and layer.name not in norm_of
        and layer.outputs == norm.outputs
        and not comes_before(norm, layer)
    ]
    readers = [module for module in modules if module.is_linear and module.inputs == norm.outputs]
    if without_norm:
        norm_of[without_norm[0].name] = norm
    elif len(readers) == 1:
        fold_norm(norm, readers[0], is_norm_first=True)
    else:
        raise UnreadableError(f"the batch norm {norm.name} follows no layer of its width")


def comes_before(norm: FoundModule, layer: FoundModule) -> bool:
    """Whether their numbers in an nn.Sequential say that a norm comes before a layer."""
    steps = steps_between(norm, layer)
    return steps is not None and steps > 0


def find_linear_layer_behind(norm: FoundModule, modules: list[FoundModule]) -> FoundModule | None:
    """The linear layer right behind a norm in a sequence, if it reads as many numbers."""
    for layer in modules:
        is_right_behind = steps_between(norm, layer) == 1
        if layer.is_linear and is_right_behind and layer.inputs == norm.outputs:
            return layer
    return None


def pair_by_number(
    layers: list[FoundModule], norms: list[FoundModule]
) -> list[tuple[FoundModule, FoundModule]]:
    """Each norm with the layer of its number, as bn1 with conv1. Empty where that is not clear:
    where numbers are missing or occur twice, or where there is a norm for every layer."""
    if len(layers) <= len(norms):
        return []
    numbers = [number_in_name(layer) for layer in layers]
    if len(set(numbers)) < len(numbers):
        return []
    layer_of = dict(zip(numbers, layers))
    pairs = []
    for norm in norms:
        layer = layer_of.pop(number_in_name(norm), None)
        if layer is None or number_in_name(layer) is None:
            return []
        pairs.append((layer, norm))
    return pairs if have_same_widths(pairs) else []


def number_in_name(module: FoundModule) -> str | None:
    """The number at the end of the last part of a name: 1 of conv1, 1_2 of conv1_2. None where that
    part does not end in a number, or is only a number, as in an nn.Sequential."""
    match = re.search(r"[^.\d_](_?\d+(_\d+)*)$", module.name)
    return match[1].strip("_") if match else None


def have_same_widths(pairs: list[tuple[FoundModule, FoundModule]]) -> bool:
    return all(layer.outputs == norm.outputs for layer, norm in pairs)


def find_inputs(convolutions, linear_layers) -> tuple[int, int]:
    """(channels of the images, side of the map that the first linear layer reads).

    Raises UnreadableError where it reads no square map.
    """
    features = linear_layers[0].inputs
    if convolutions:
        channels, width = convolutions[0].inputs, convolutions[-1].outputs
    else:
        channels = width = 1 if round(features**0.5) ** 2 == features else 3
    head_size = round((features / width) ** 0.5)
    if width * head_size**2 != features:
        raise UnreadableError(
            f"{linear_layers[0].name} reads {features} numbers, which are no square maps of "
            f"{width} channels"
        )
    return channels, head_size


# From this many convolutions on a chain is a VGG: its poolings follow the stages, for all 2^7
# places would be too many to try.
VGG_CONVOLUTIONS = 7
# Old small nets have them.
OLD_ACTIVATIONS = ("tanh", "sigmoid")
# Sizes of images, the usual ones first.
GRAY_SIZES = (28, 32, *range(8, 257))
COLOUR_SIZES = (32, 64, 96, 128, 224, *range(8, 257))


def list_chains(found: FoundChain) -> list[ChainArchitecture]:
    """The usual architectures of a chain, the likeliest first. Raises UnusualError where none
    fits."""
    convolutions = found.convolutions
    is_vgg = len(convolutions) >= VGG_CONVOLUTIONS
    averaging = (False,)
    if is_vgg:
        averaging = (True,)
    elif found.head_size == 1 and convolutions:
        averaging = (False, True)
    layouts = product(
        averaging,
        list_poolings(convolutions, found.norm_of),
        [(1,) * len(convolutions)],
        list_paddings(convolutions),
    )
    sizes = GRAY_SIZES if found.channels == 1 else COLOUR_SIZES
    architectures = list_fitting_chains(found, BEFORE_ACTIVATION, layouts, sizes)
    architectures.sort(key=lambda architecture: sizes.index(architecture.size))
    architectures = [fit_size_to_head(architecture, sizes) for architecture in architectures]
    with_relu = [name_as_lenet5(architecture) for architecture in architectures]
    if is_vgg:
        return with_relu  # all VGGs have it
    others = [replace(each, activation=name) for name in OLD_ACTIVATIONS for each in with_relu]
    return with_relu + others


def list_fitting_chains(
    found: FoundChain, norm_place: str, layouts: Iterable[tuple], sizes
) -> list[ChainArchitecture]:
    """The architectures that fit the weights and images of one of `sizes`, in pixels.

    Each of `layouts` is (whether the last map is averaged, poolings, strides, paddings); the last
    three have one value per convolution. The first size that fits is taken. Raises UnusualError
    where no layout fits.
    """
    convolutions = found.convolutions
    architectures = []
    for is_averaged, poolings, strides, paddings in layouts:
        architecture = ChainArchitecture(
            name_chain(convolutions),
            found.linear_layers[-1].outputs,
            found.channels,
            sizes[0],  # until `fit_size` finds one that fits
            convolutions=tuple(
                describe_convolution(module, found.norm_of, norm_place, pooling, stride, padding)
                for module, pooling, stride, padding in zip(
                    convolutions, poolings, strides, paddings
                )
            ),
            hidden_norms=tuple(module.name in found.norm_of for module in found.linear_layers[:-1]),
            head_size=found.head_size,
            is_averaged=is_averaged,
            has_flat_names=len(convolutions) < VGG_CONVOLUTIONS,
        )
        fitting = fit_size(architecture, sizes)
        if fitting is not None:
            architectures.append(fitting)
    if not architectures:
        raise UnusualError(
            f"{found.linear_layers[0].name} reads {found.head_size} x {found.head_size} places of "
            "each channel, which no usual paddings and poolings leave of any image (it may have "
            "strides, or other poolings than 2 x 2)"
        )
    return architectures


def describe_convolution(
    module: FoundModule, norm_of, norm_place: str, pooling: str, stride: int, padding: int
) -> Convolution:
    has_norm = module.name in norm_of
    place = norm_place if has_norm else BEFORE_ACTIVATION
    # A norm right behind a convolution takes the bias in.
    has_bias = module.bias is not None and not (has_norm and place == BEFORE_ACTIVATION)
    return Convolution(
        module.kernel,
        padding,
        has_bias=has_bias,
        has_norm=has_norm,
        pooling=pooling,
        stride=stride,
        norm_place=place,
    )


def fit_size(architecture: ChainArchitecture, sizes) -> ChainArchitecture | None:
    """The architecture for the first of these sizes of images that it can take."""
    for size in sizes:
        if architecture.fits_size(size):
            return replace(architecture, size=size)
    return None


def fit_size_to_head(architecture: ChainArchitecture, sizes) -> ChainArchitecture:
    """Choose the likeliest of `sizes`, in pixels, for an architecture that averages its last map.

    An averaged map may have any side, so any size would do. But where the head reads several
    places, as 7 x 7 in torchvision's VGGs, the likeliest size is the first one that leaves a map of
    just these places: 224 pixels. Without such a size the architecture is returned as it is.
    """
    if architecture.is_averaged and architecture.head_size > 1:
        for size in sizes:
            if architecture.map_size(size) == architecture.head_size:
                return replace(architecture, size=size)
    return architecture


def list_paddings(convolutions) -> list[tuple[int, ...]]:
    """Guesses of the paddings, the likeliest first. A guess has one padding per convolution, in
    pixels.

    `same` is the padding that keeps the size of a map; for an even kernel 0 stands in its place.

    - One to three convolutions: all combinations of 0 and `same`.
    - Four or more, but below VGG_CONVOLUTIONS: all `same`; all 0; a large last kernel 0 and the
      others `same`; `same` and 0 in turn.
    - VGGs: all `same`; the last one 0 and the others `same`.

    Last comes in each case: all `same`, with two more pixels around the first convolution. So nets
    made for 32 x 32 pixels read MNIST's 28 x 28.
    """
    same = [module.kernel // 2 if module.kernel % 2 else 0 for module in convolutions]
    if not convolutions:
        return [()]
    widened = (same[0] + 2, *same[1:])
    if len(convolutions) >= VGG_CONVOLUTIONS:
        return list(dict.fromkeys([tuple(same), (*same[:-1], 0), widened]))
    if len(convolutions) > 3:
        # A large last kernel may see the whole map.
        ends = [(*same[:-1], 0)] if convolutions[-1].kernel >= WHOLE_MAP_KERNEL else []
        every_second = tuple(0 if i % 2 else padding for i, padding in enumerate(same))
        return list(dict.fromkeys([tuple(same), (0,) * len(same), *ends, every_second, widened]))
    return [*dict.fromkeys(product(*((0, padding) for padding in same))), widened]


def list_poolings(convolutions, norm_of) -> list[tuple[str, ...]]:
    """Guesses of the poolings, the likeliest first. A guess has one string per convolution: "max",
    "average" (not in a VGG), or "" for none.

    In small nets the likeliest is that every convolution is pooled; next come guesses in which the
    last one is. All poolings of a guess are of one kind, with one exception: where every
    convolution is pooled, the last pooling may be "average" after "max" ones.
    """
    count = len(convolutions)
    if count == 0:
        return [()]
    poolable = find_poolable(convolutions, norm_of)
    if count >= VGG_CONVOLUTIONS:
        places = [ends for ends in list_stage_ends(convolutions) if all(poolable[i] for i in ends)]
        with_max = [tuple("max" if i in ends else "" for i in range(count)) for ends in places]
        # The last one is often an average over all that is left.
        return [*with_max, *((*poolings[:-1], "") for poolings in with_max)]
    options = [(True, False) if is_poolable else (False,) for is_poolable in poolable]
    # First all are pooled, then at least the last one, then the rest. Within each of these, guesses
    # with more poolings come first.
    choices = sorted(
        product(*options), key=lambda choice: (not all(choice), not choice[-1], -sum(choice))
    )
    found = []
    for choice in choices:
        for kind in ("max", "average") if any(choice) else ("",):
            found.append(tuple(kind if is_pooled else "" for is_pooled in choice))
        if all(choice) and count > 1:
            found.append((*("max",) * (count - 1), "average"))
    return found


def find_poolable(convolutions, norm_of) -> list[bool]:
    """For each convolution, whether the numbers in the names leave room for a pooling after it.

    The numbers between two convolutions of one nn.Sequential belong to a norm, an activation and
    perhaps a pooling. In an nn.ModuleList convolutions have consecutive numbers, which say nothing:
    each may be pooled. Raises UnreadableError where some convolutions leave room for an activation
    and others do not.
    """
    modules_between = []  # None: not known
    for before, after in pairwise(convolutions):
        steps = steps_between(before, after)
        if steps is None:
            modules_between.append(None)
            continue
        count = steps - 1
        norm = norm_of.get(before.name)
        if norm is not None and steps_between(before, norm) is not None:
            count -= 1
        modules_between.append(count)
    has_modules_between = any(modules_between)
    if has_modules_between and 0 in modules_between:
        name = convolutions[modules_between.index(0)].name
        raise UnreadableError(f"no activation stands after {name}")
    # One module in between is the activation, so there is no room for a pooling. With 0 everywhere
    # the convolutions are in an nn.ModuleList. The last convolution has no next one to count to.
    return [count != 1 for count in modules_between] + [True]


def list_stage_ends(convolutions) -> list[frozenset[int]]:
    """Guesses of which convolutions end a stage of a VGG, each a set of indices; the likeliest
    first."""
    count = len(convolutions)
    names = [module.name for module in convolutions]
    last = count - 1
    found = []
    # Numbers in one sequence: a pooling leaves a gap.
    gaps = [steps_between(before, after) for before, after in pairwise(convolutions)]
    if None not in gaps:
        before_large_gaps = frozenset(i for i, gap in enumerate(gaps) if gap > min(gaps))
        found.append(before_large_gaps | {last})
    # A stage to each parent, or to each first number: conv1_1, block1.conv1.
    for stages in (
        [parent_of(name) for name in names],
        [(re.findall(r"\d+", name) or [""])[0] for name in names],
    ):
        ends = frozenset(i for i, (a, b) in enumerate(pairwise(stages)) if a != b)
        if ends:
            found.append(ends | {last})
    # As in the published VGGs with as many convolutions.
    for counts in VGG_STAGES.values():
        if sum(counts) == count:
            found.append(frozenset(end - 1 for end in accumulate(counts)))
    # A stage ends where the next convolution is wider.
    widths = [module.outputs for module in convolutions]
    found.append(frozenset(i for i, (a, b) in enumerate(pairwise(widths)) if b > a) | {last})
    # Images of 32 pixels have room for five poolings, of 64 for six.
    return [ends for ends in dict.fromkeys(found) if 2 <= len(ends) <= 6]


# ---- checkpoints: unusual chains

# ours: a first convolution with such a kernel, or a larger one, may have a stride of 4 (AlexNet).
ALEXNET_KERNEL = 8
# ours: in chains of up to so many convolutions any of them may have a stride or a pooling.
MAX_MIXED_CONVOLUTIONS = 4


def list_unusual_chains(found: FoundChain, norm_place: str, size: int) -> list[ChainArchitecture]:
    """The architectures of a chain that may have strides and any of POOLINGS, for images of that
    size. Usual ones are among them. Raises UnusualError where none fits."""
    convolutions = found.convolutions
    averaging = (False, True) if convolutions else (False,)
    layouts = [
        (is_averaged, poolings, strides, paddings)
        for is_averaged, (poolings, strides) in product(
            averaging, list_poolings_and_strides(convolutions, found.norm_of)
        )
        for paddings in list_unusual_paddings(convolutions, strides)
    ]
    return list_fitting_chains(found, norm_place, layouts, (size,))


def list_unusual_paddings(convolutions, strides) -> list[tuple[int, ...]]:
    """The paddings of `list_paddings`, and three more. With (kernel - 1) // 2 a stride of 2 halves
    the map:

    - (kernel - 1) // 2 in every convolution (DCGAN's discriminator)
    - the same, but half of it in the first convolution (AlexNet)
    - (kernel - 1) // 2 in convolutions with a stride, and 0 in the others
    """
    if not convolutions:
        return [()]
    halving = tuple((module.kernel - 1) // 2 for module in convolutions)
    less_at_first = (halving[0] // 2, *halving[1:])
    where_strided = tuple(padding if stride > 1 else 0 for padding, stride in zip(halving, strides))
    found = [*list_paddings(convolutions), halving, less_at_first, where_strided]
    return list(dict.fromkeys(found))


def list_poolings_and_strides(convolutions, norm_of) -> list[tuple[tuple, tuple]]:
    """(the pooling, the stride) of each convolution, for unusual chains. All poolings of a net are
    alike."""
    if not convolutions:
        return [((), ())]
    poolable = find_poolable(convolutions, norm_of)
    if len(convolutions) >= VGG_CONVOLUTIONS:
        choices = list_vgg_choices(convolutions, poolable)
    else:
        choices = list_small_chain_choices(convolutions, poolable)
    found = []
    for is_pooled, strides in dict.fromkeys(choices):
        for kind in POOLINGS if any(is_pooled) else ("",):
            found.append((tuple(kind if pooled else "" for pooled in is_pooled), strides))
    return found


def list_vgg_choices(convolutions, poolable) -> Iterator[tuple[tuple, tuple]]:
    """Yield (whether each convolution is pooled, the stride of each) for a VGG.

    The stages end in one of these ways: each with a pooling; each but the last with a pooling; each
    with a convolution of stride 2. Or each stage but the first begins with a convolution of
    stride 2.
    """
    count = len(convolutions)
    for ends in list_stage_ends(convolutions):
        if all(poolable[i] for i in ends):
            for places in (ends, ends - {count - 1}):
                yield tuple(i in places for i in range(count)), (1,) * count
        yield (False,) * count, tuple(2 if i in ends else 1 for i in range(count))
        yield (False,) * count, tuple(2 if i - 1 in ends else 1 for i in range(count))


def list_small_chain_choices(convolutions, poolable) -> Iterator[tuple[tuple, tuple]]:
    """(whether each convolution is pooled, the stride of each) of a small chain."""
    count = len(convolutions)
    first_strides = (1, 2, 4) if convolutions[0].kernel >= ALEXNET_KERNEL else (1, 2)
    all_strides = list(product(first_strides, *[(1, 2)] * (count - 1)))
    all_poolings = list(product(*[(True, False) if can_be else (False,) for can_be in poolable]))
    # Strides alone.
    for strides in all_strides:
        yield (False,) * count, strides
    # Poolings, and perhaps a stride in the first convolution.
    for first_stride, is_pooled in product(first_strides, all_poolings):
        yield is_pooled, (first_stride, *[1] * (count - 1))
    if count > MAX_MIXED_CONVOLUTIONS:
        return
    # Any mixture, except that only the first convolution may have both a stride and a pooling.
    for is_pooled, strides in product(all_poolings, all_strides):
        if not any(pooled and stride > 1 for pooled, stride in zip(is_pooled[1:], strides[1:])):
            yield is_pooled, strides


# ---- checkpoints: names of chains


def name_as_lenet5(architecture: ChainArchitecture) -> ChainArchitecture:
    """The architecture under the name lenet5 where it is that one."""
    size = max(16, architecture.size)  # lenet5 takes no smaller images
    lenet5 = lenet5_architecture(architecture.classes, architecture.channels, size)
    return lenet5 if replace(architecture, name=lenet5.name) == lenet5 else architecture


def name_chain(convolutions) -> str:
    count = len(convolutions)
    if count >= VGG_CONVOLUTIONS:
        return f"vgg{count + 3}"  # the original VGGs have three linear layers, which count
    return "lenet" if count else "perceptron"


# ---- checkpoints: residual nets


@dataclass
class ModuleGroup:
    """The modules of a residual block, and the parts with which their names begin."""

    name: tuple[str, ...]
    modules: list[FoundModule]

    @property
    def is_sequence(self) -> bool:
        """Whether its modules are numbered, as in an nn.Sequential, which has no shortcut."""
        parents = {parent_of(module.name) for module in self.modules}
        numbers = [find_sequence_number(module) for module in self.modules]
        return parents == {".".join(self.name)} and None not in numbers

    def is_named_as_shortcut(self, module: FoundModule) -> bool:
        """Whether the name of a module says so, behind the block's own name."""
        inner_name = ".".join(module.name.split(".")[len(self.name) :])
        return bool(SHORTCUT_WORDS.search(inner_name.lower()))


def group_blocks(modules: list[FoundModule]) -> list[ModuleGroup] | None:
    """Group the modules into residual blocks; None where they are a chain.

    Names are cut to their first `depth` parts; the largest depth is tried first. A depth fits if
    the first convolution is the only one under its cut name, and there are at least two other cut
    names, each with two to four convolutions. These cut names are the blocks.
    """
    convolutions = [module for module in modules if module.is_convolution]
    deepest = max(module.name.count(".") for module in modules)
    for depth in range(deepest, 0, -1):
        names = [tuple(module.name.split(".")[:depth]) for module in convolutions]
        counts = Counter(names)
        block_names = list(dict.fromkeys(names))[1:]  # without the first convolution
        if len(block_names) < 2 or counts[names[0]] != 1:
            continue
        if all(2 <= counts[name] <= 4 for name in block_names):
            return [
                ModuleGroup(
                    name,
                    [module for module in modules if tuple(module.name.split(".")[:depth]) == name],
                )
                for name in block_names
            ]
    return None


@dataclass
class FoundBlock:
    """The parts of a residual block."""

    convolutions: list[FoundModule]  # along the main path
    norms: list[FoundModule]
    shortcut: FoundModule | None = None
    shortcut_norm: FoundModule | None = None

    @property
    def inputs(self) -> int:
        return self.convolutions[0].inputs

    @property
    def outputs(self) -> int:
        return self.convolutions[-1].outputs

    @property
    def inner_widths(self) -> list[int]:
        return [module.outputs for module in self.convolutions[:-1]]

    @property
    def is_preactivated(self) -> bool:
        """Whether its norms have the widths of what its convolutions read."""
        return [norm.outputs for norm in self.norms] == [conv.inputs for conv in self.convolutions]

    @property
    def is_postactivated(self) -> bool:
        return [norm.outputs for norm in self.norms] == [conv.outputs for conv in self.convolutions]


def parse_block(group: ModuleGroup, inputs: int) -> FoundBlock:
    """Find the main path, the norms and the shortcut of a block that reads `inputs` channels.

    Raises UnreadableError where its convolutions or norms do not fit together.
    """
    modules = group.modules
    convolutions = [module for module in modules if module.is_convolution]
    norms = [module for module in modules if module.is_norm]
    linear = next((module for module in modules if module.is_linear), None)
    name = convolutions[0].name
    if linear is not None:
        raise UnreadableError(
            f"{linear.name} is a linear layer in a block (squeeze-and-excitation?)"
        )
    block = None
    for shortcut in list_shortcuts(group, convolutions):
        path = [module for module in convolutions if module is not shortcut]
        widths = [inputs, *(module.outputs for module in path)]
        reads = [module.inputs for module in path]
        if shortcut is None:
            fits = widths[-1] >= inputs  # zeros can make the input wider, nothing narrower
        else:
            fits = (shortcut.inputs, shortcut.outputs, shortcut.kernel) == (inputs, widths[-1], 1)
        if len(path) in (2, 3) and reads == widths[:-1] and fits:
            block = FoundBlock(path, norms, shortcut)
            break
    if block is None and len(convolutions) == 2 and convolutions[-1].outputs < inputs:
        raise UnreadableError(
            f"the block of {name} goes from {inputs} to {convolutions[-1].outputs} channels "
            "without a convolution in its shortcut"
        )
    if block is None:
        raise UnreadableError(
            f"the convolutions of the block of {name} do not chain from {inputs} channels to a "
            "1 x 1 shortcut or none (grouped or dense ones, or another shortcut?)"
        )
    if block.shortcut is not None and len(norms) > len(block.convolutions):
        block.shortcut_norm = find_shortcut_norm(group, block)
        block.norms = [norm for norm in norms if norm is not block.shortcut_norm]
    if len(block.norms) != len(block.convolutions):
        raise UnreadableError(
            f"the block of {name} has {len(block.convolutions)} convolutions and "
            f"{len(block.norms)} batch norms"
        )
    return block


def list_shortcuts(group: ModuleGroup, convolutions: list[FoundModule]) -> list[FoundModule | None]:
    """Guesses of which convolution is a block's shortcut, the likeliest first. None stands for a
    shortcut without a convolution.

    - two convolutions: None, for both are the main path
    - three: one that is named as a shortcut; None, in a bottleneck; each 1 x 1, in a basic block
    - four: one that is named as a shortcut; each 1 x 1; None

    Of the 1 x 1 convolutions the last one is tried first.
    """
    if len(convolutions) == 2:
        return [None]
    named = [module for module in convolutions if group.is_named_as_shortcut(module)]
    one_by_one = [module for module in reversed(convolutions) if module.kernel == 1]
    if len(convolutions) == 4:
        return [*named, *one_by_one, None]
    return [*named, None, *one_by_one]


def find_shortcut_norm(group: ModuleGroup, block: FoundBlock) -> FoundModule:
    """The norm of the convolution in a block's shortcut. The first of these that exists:

    1. a norm in the shortcut's parent module, if no other convolution of the block is in there
    2. a norm that is named as a shortcut
    3. if the block lists all its convolutions first, and as many norms as these: the norm at the
       position that the shortcut has among the convolutions
    4. the next norm after the shortcut
    5. the last norm
    """
    parent = parent_of(block.shortcut.name)
    parents_of_others = {parent_of(module.name) for module in block.convolutions}
    beside = [norm for norm in block.norms if parent_of(norm.name) == parent]
    if beside and parent not in parents_of_others:
        return beside[0]
    named = [norm for norm in block.norms if group.is_named_as_shortcut(norm)]
    if named:
        return named[0]
    convolutions = [module for module in group.modules if module.is_convolution]
    has_norms_last = not any(module.is_norm for module in group.modules[: len(convolutions)])
    if has_norms_last and len(block.norms) == len(convolutions):
        return block.norms[convolutions.index(block.shortcut)]
    position = group.modules.index(block.shortcut)
    after = [module for module in group.modules[position:] if module.is_norm]
    return (after or block.norms[-1:])[0]


def read_residual_net(modules: list[FoundModule], groups: list[ModuleGroup]) -> list[Reading]:
    """The readings of a residual net. Raises UnreadableError."""
    in_blocks = {module.name for group in groups for module in group.modules}
    others = [module for module in modules if module.name not in in_blocks]
    stem = next(module for module in others if module.is_convolution)
    linear_layers = [module for module in others if module.is_linear]
    if not linear_layers:
        raise UnreadableError("a residual net without a linear layer at its end")
    # A ResNet has no norms between its last linear layers. Only the order in the file shows whether
    # this net has any.
    first, last = modules.index(linear_layers[0]), modules.index(linear_layers[-1])
    for module in modules[first:last]:
        if module.is_norm and module.name not in in_blocks:
            raise UnreadableError(
                f"{module.name} is a batch norm between the last linear layers of a residual net, "
                "by the order in the file"
            )
    blocks = []
    inputs = stem.outputs
    for group in groups:
        blocks.append(parse_block(group, inputs))
        inputs = blocks[-1].outputs
    if linear_layers[0].inputs != inputs:
        raise UnreadableError(
            f"{linear_layers[0].name} reads {linear_layers[0].inputs} numbers and the blocks put "
            f"out {inputs} channels"
        )
    for before, after in pairwise(linear_layers):
        if after.inputs != before.outputs:
            raise UnreadableError(explain_break(before, after, [stem]))
    kernels = {tuple(module.kernel for module in block.convolutions) for block in blocks}
    if len(kernels) != 1:
        kinds = " and of ".join(" x ".join(map(str, kind)) for kind in sorted(kernels))
        raise UnreadableError(f"its blocks are of different kinds, of kernels {kinds}")
    norms = [module for module in others if module.is_norm]
    names = [group.name for group in groups]
    readings, errors = [], []
    for is_preactivated in list_preactivation_guesses(modules, groups, blocks):
        try:
            readings += read_by_norm_order(
                stem, norms, blocks, names, linear_layers, is_preactivated=is_preactivated
            )
        except UnreadableError as error:
            errors.append(error)
    if not readings:
        raise errors[0]
    return readings


def read_by_norm_order(
    stem,
    norms: list[FoundModule],
    blocks: list[FoundBlock],
    names: list[tuple[str, ...]],
    linear_layers: list[FoundModule],
    *,
    is_preactivated: bool,
) -> list[Reading]:
    """The readings in which norms stand before the convolutions, or after them."""
    stem_norm, last_norm = place_outer_norms(norms, stem, is_preactivated, blocks[-1].outputs)
    if stem_norm is None and stem.bias is not None and not is_preactivated:
        stem_norm = make_identity_norm(stem.outputs)  # it takes the bias in
    widths = [width for block in blocks for width in block.inner_widths]
    # What stands behind the blocks: (a norm before the average over the map, the linear layers).
    ends = [(last_norm, linear_layers)]
    if last_norm is not None and not is_preactivated:
        # Likelier the norm stands between the average and the first linear layer.
        layer_with_norm = replace(linear_layers[0])
        fold_norm(last_norm, layer_with_norm, is_norm_first=True)
        ends.insert(0, (None, [layer_with_norm, *linear_layers[1:]]))
    readings = []
    for norm_before_average, layers in ends:
        architectures = list_residual_architectures(
            stem,
            blocks,
            names,
            linear_widths=[layer.outputs for layer in layers],
            is_preactivated=is_preactivated,
            has_stem_norm=stem_norm is not None,
            has_last_norm=norm_before_average is not None,
        )
        for architecture in architectures:
            state = translate_residual_state(
                architecture, stem, stem_norm, blocks, norm_before_average, layers
            )
            readings.append(Reading(architecture, widths, state))
    return readings


def list_preactivation_guesses(modules, groups, blocks: list[FoundBlock]) -> list[bool]:
    """Guesses of whether the net is pre-activated (its norms stand before the convolutions), the
    likelier first. Raises UnreadableError where neither fits."""
    fitting = []
    if all(block.is_postactivated for block in blocks):
        fitting.append(False)
    if all(block.is_preactivated for block in blocks):
        fitting.append(True)
    if not fitting:
        raise UnreadableError(
            "the widths of its batch norms fit its convolutions in no usual order"
        )
    starts_with_norm = groups[0].modules[0].is_norm
    position = {module.name: i for i, module in enumerate(modules)}
    last_of_blocks = max(position[module.name] for module in groups[-1].modules)
    has_norm_after_blocks = any(module.is_norm for module in modules[last_of_blocks + 1 :])
    looks_preactivated = starts_with_norm or has_norm_after_blocks
    likelier_first = [looks_preactivated, not looks_preactivated]
    return [guess for guess in likelier_first if guess in fitting]


def place_outer_norms(norms, stem, is_preactivated: bool, outputs: int):
    """(the norm after the first convolution or None, the one after the blocks or None)."""
    if len(norms) > 2:
        raise UnreadableError(f"it has {len(norms)} batch norms outside its blocks")
    stem_norm = last_norm = None
    if len(norms) == 2:
        stem_norm, last_norm = norms
        if stem_norm.outputs != stem.outputs:  # the file lists them the other way round
            stem_norm, last_norm = last_norm, stem_norm
    elif norms and is_preactivated and norms[0].outputs == outputs:
        last_norm = norms[0]
    elif norms:
        stem_norm = norms[0]
    if stem_norm is not None and stem_norm.outputs != stem.outputs:
        raise UnreadableError(f"{stem_norm.name} has another width than {stem.name}")
    if last_norm is not None and last_norm.outputs != outputs:
        raise UnreadableError(
            f"{last_norm.name}, a batch norm behind the blocks, has {last_norm.outputs} channels "
            f"and not the blocks' {outputs}"
        )
    return stem_norm, last_norm


# The usual ways in which the first part of a residual net makes the map smaller, the likeliest
# first: the stride of the first convolution, the kernel of the pooling after it (0: there is none)
# and the stride of the first block.
STARTS_WITH_LARGE_KERNEL = ((2, 3, 1), (2, 0, 1), (2, 2, 1))  # ImageNet's
STARTS_WITH_SMALL_KERNEL = (  # CIFAR's
    (1, 0, 1),
    (1, 3, 1),
    (2, 0, 1),
    (2, 3, 1),
    (1, 2, 1),
    (1, 0, 2),
)


def list_residual_architectures(
    stem,
    blocks: list[FoundBlock],
    names: list[tuple[str, ...]],
    *,
    linear_widths: list[int],
    is_preactivated: bool,
    has_stem_norm: bool,
    has_last_norm: bool,
) -> Iterator[ResNetArchitecture]:
    """The architectures that fit, the likeliest first."""
    has_large_kernel = stem.kernel >= STRIDED_KERNEL
    kernels = tuple(module.kernel for module in blocks[0].convolutions)
    starts = STARTS_WITH_LARGE_KERNEL if has_large_kernel else STARTS_WITH_SMALL_KERNEL
    # torchvision's bottlenecks have their stride in the second convolution.
    strided_convolutions = (1, 0) if len(kernels) == 3 else (0, 1)
    # Shortcuts add zeros only where a block without a convolution in its shortcut gets wider.
    adds_zeros = any(block.shortcut is None and block.inputs != block.outputs for block in blocks)
    options_of_zeros = (False, True) if adds_zeros else (False,)
    for (
        (stem_stride, pooling_kernel, first_stride),
        strided_convolution,
        is_shortcut_averaged,
        has_zeros_behind,
        is_projection_averaged,
    ) in product(
        starts,
        strided_convolutions,
        options_of_zeros,
        options_of_zeros,
        list_averaged_projections(blocks),
    ):
        for stages in list_stages(blocks, names, first_stride, is_preactivated=is_preactivated):
            yield ResNetArchitecture(
                name_residual_net(blocks, kernels, is_preactivated),
                linear_widths[-1],
                stem.inputs,
                224 if has_large_kernel else 32,
                stem_width=stem.outputs,
                stages=stages,
                kernels=kernels,
                stem_kernel=stem.kernel,
                stem_stride=stem_stride,
                has_stem_norm=has_stem_norm,
                has_stem_pooling=pooling_kernel > 0,
                stem_pooling_kernel=pooling_kernel or 3,
                is_preactivated=is_preactivated,
                has_last_norm=has_last_norm,
                hidden_widths=tuple(linear_widths[:-1]),
                strided_convolution=strided_convolution,
                is_shortcut_averaged=is_shortcut_averaged,
                has_zeros_behind=has_zeros_behind,
                is_projection_averaged=is_projection_averaged,
            )


def list_averaged_projections(blocks: list[FoundBlock]) -> tuple[bool, ...]:
    """Guesses of whether the convolutions in shortcuts read averaged maps, the likelier first.

    An average pooling may stand before a convolution that is not the first module of its
    nn.Sequential. Without such a convolution the only guess is False.
    """
    numbers = [
        find_sequence_number(block.shortcut) for block in blocks if block.shortcut is not None
    ]
    # 0 is the first module. None: it is in no nn.Sequential.
    may_follow_pooling = any(number is not None and number > 0 for number in numbers)
    return (True, False) if may_follow_pooling else (False,)


def list_stages(
    blocks: list[FoundBlock],
    names: list[tuple[str, ...]],
    first_stride: int,
    *,
    is_preactivated: bool,
) -> list[tuple]:
    """Guesses of the stages, each as ResNetArchitecture.stages, without duplicates.

    Guessed are the blocks that begin a stage and, in a pre-activated net, the shortcuts that begin
    after the first norm and relu. The net's first block has stride `first_stride`.
    """
    return list(
        dict.fromkeys(
            group_into_stages(blocks, starts, activated, first_stride)
            for starts in list_stage_starts(blocks, names)
            for activated in list_activated_shortcuts(blocks, starts, is_preactivated)
        )
    )


def list_stage_starts(blocks: list[FoundBlock], names: list[tuple[str, ...]]) -> list[list[bool]]:
    """Guesses of which blocks begin a stage with stride 2, after the net's first block."""
    parents = [name[:-1] for name in names]
    by_name = [i > 0 and parents[i] != parents[i - 1] for i in range(len(blocks))]
    by_width = [i > 0 and block.inputs != block.outputs for i, block in enumerate(blocks)]
    by_shortcut = [i > 0 and block.shortcut is not None for i, block in enumerate(blocks)]
    stage_starts = [by_name, by_width, by_shortcut]
    if all(by_name[1:]) and not all(by_width[1:]):
        stage_starts.remove(by_name)  # names that number the blocks, not the stages
    if any(any(starts) for starts in stage_starts):
        stage_starts = [starts for starts in stage_starts if any(starts)]
    return stage_starts


def group_into_stages(
    blocks: list[FoundBlock], starts: list[bool], activated: list[bool], first_stride: int
) -> tuple[tuple[Block, ...], ...]:
    """The stages, where blocks of `starts` begin one with stride 2, and the first block has
    `first_stride`; `activated`: Block.is_shortcut_activated."""
    stages = []
    for block, is_start, is_activated in zip(blocks, starts, activated):
        stride = 2 if is_start else 1
        if not stages:
            stride = first_stride
        if is_start or not stages:
            stages.append([])
        new_block = Block(
            block.outputs,
            stride=stride,
            has_convolution=block.shortcut is not None,
            is_shortcut_activated=is_activated,
        )
        stages[-1].append(new_block)
    return tuple(tuple(stage) for stage in stages)


def list_activated_shortcuts(
    blocks: list[FoundBlock], starts: list[bool], is_preactivated: bool
) -> list[list[bool]]:
    """Guesses of which blocks' shortcuts begin after the first norm and relu, the likeliest first:

    - none
    - all that are convolutions
    - that of each stage's first block
    - only that of the net's first block
    """
    no_shortcuts = [False] * len(blocks)
    if not is_preactivated:
        return [no_shortcuts]
    convolution_shortcuts = [block.shortcut is not None for block in blocks]
    first_of_stages = [i == 0 or is_start for i, is_start in enumerate(starts)]
    first_of_net = [i == 0 for i in range(len(blocks))]
    return [no_shortcuts, convolution_shortcuts, first_of_stages, first_of_net]


def name_residual_net(blocks, kernels, is_preactivated: bool) -> str:
    """By its depth: all convolutions of blocks, the first one and the linear layer."""
    depth = 2 + len(blocks) * len(kernels)
    return f"preresnet{depth}" if is_preactivated else f"resnet{depth}"


def translate_residual_state(
    architecture: ResNetArchitecture, stem, stem_norm, blocks, last_norm, linear_layers
) -> dict[str, torch.Tensor]:
    """The tensors under our names, without the biases of convolutions.

    Our convolutions have no bias. A bias in front of a norm is subtracted from the norm's running
    mean.

    In a pre-activated net the last convolution and the shortcut of a block are added to the
    residual sum, and no norm follows them. Their biases are dropped. So each later sum is too small
    by a constant per channel, `missing_bias` (C,). Every norm that reads the sum subtracts this
    constant from its running mean. If no norm reads the last sum, the bias of the first linear
    layer is corrected: bias + weight @ missing_bias.
    """
    state = {}
    put_layer(state, "conv1", stem, "bn1", stem_norm)
    missing_bias = state.pop("conv1.bias", torch.zeros(stem.outputs))
    block_names = [
        f"layer{number}.{i}"
        for number, stage in enumerate(architecture.stages, 1)
        for i in range(len(stage))
    ]
    for name, block, found_block in zip(block_names, chain(*architecture.stages), blocks):
        if architecture.is_preactivated:
            put_preactivated_block(state, name, found_block, missing_bias)
            missing_bias = compute_missing_bias(architecture, block, found_block, missing_bias)
        else:
            put_block(state, name, found_block)
    if last_norm is not None:
        bias = missing_bias if architecture.is_preactivated else None
        put_norm(state, "bn", last_norm, bias)
    names = [*architecture.hidden_names, "linear"]
    for name, layer in zip(names, linear_layers):
        put_layer(state, name, layer, None, None)
    if last_norm is None and architecture.is_preactivated:
        bias = f"{names[0]}.bias"
        state[bias] = state[bias] + linear_layers[0].weight @ missing_bias
    return state


def put_block(state: dict, name: str, block: FoundBlock) -> None:
    for number, (convolution, norm) in enumerate(zip(block.convolutions, block.norms), 1):
        state[f"{name}.conv{number}.weight"] = convolution.weight
        put_norm(state, f"{name}.bn{number}", norm, convolution.bias)
    shortcut = block.shortcut
    if shortcut is not None:
        state[f"{name}.downsample.0.weight"] = shortcut.weight
        norm = block.shortcut_norm or make_identity_norm(shortcut.outputs)
        put_norm(state, f"{name}.downsample.1", norm, shortcut.bias)


def put_preactivated_block(state: dict, name: str, block: FoundBlock, missing_bias) -> None:
    """Put the tensors of a pre-activated block into `state`, under our names.

    `missing_bias` (C,) is what the block's input lacks; see translate_residual_state. Raises
    UnreadableError where the shortcut has a batch norm.
    """
    # What the input of each norm lacks, (width of the norm,) or None.
    missing = [missing_bias, *(convolution.bias for convolution in block.convolutions[:-1])]
    for number, (convolution, norm, bias) in enumerate(
        zip(block.convolutions, block.norms, missing), 1
    ):
        state[f"{name}.conv{number}.weight"] = convolution.weight
        put_norm(state, f"{name}.bn{number}", norm, bias)
    if block.shortcut_norm is not None:
        raise UnreadableError(
            f"{block.shortcut_norm.name} is a batch norm in the shortcut of a pre-activated block"
        )
    if block.shortcut is not None:
        state[f"{name}.downsample.0.weight"] = block.shortcut.weight


def compute_missing_bias(
    architecture: ResNetArchitecture,
    block: Block,
    found_block: FoundBlock,
    missing_bias: torch.Tensor,
) -> torch.Tensor:
    """The `missing_bias` (C',) of what a pre-activated block puts out."""
    if block.is_shortcut_activated:
        # The first norm of the block has corrected for it: the shortcut begins after that norm.
        missing_bias = torch.zeros_like(missing_bias)
    shortcut = found_block.shortcut
    if shortcut is not None:
        missing_bias = shortcut.weight.flatten(1) @ missing_bias
        if shortcut.bias is not None:
            missing_bias = missing_bias + shortcut.bias
    else:
        zeros = architecture.count_zeros_around(found_block.outputs - found_block.inputs)
        missing_bias = F.pad(missing_bias, zeros)
    bias = found_block.convolutions[-1].bias
    return missing_bias if bias is None else missing_bias + bias


def make_identity_norm(width: int) -> FoundModule:
    """A batch norm that changes nothing: its variance and epsilon are 1 together."""
    variance = torch.full((width,), 1 - nn.BatchNorm2d(1).eps)
    return FoundModule("", {"running_mean": torch.zeros(width), "running_var": variance})


# ---- export ------------------------------------------------------------------------------------


class NormalisedNet(nn.Module):
    """A net with its normalisation: images (B, C, H, W) in [0, 1] -> logits (B, classes)."""

    def __init__(self, net: Net, mean, std):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # This check is traced, too. So an exported file refuses uint8 images, whose 255 would be
        # read as 255 times white.
        torch.ops.aten._assert_tensor_metadata(images, dtype=torch.float32)
        x = (images - self.mean) / self.std
        return self.net(x.contiguous(memory_format=torch.channels_last))


@torch.no_grad()
def fold_batch_norms(net: Net) -> Net:
    """A copy of `net` for inference: the batch norms of `list_foldable_norms` are folded into their
    layers."""
    net = deepcopy(net).eval()
    pairs = net.list_foldable_norms()
    for layer_name, norm_name in pairs:
        layer, norm = net.get_submodule(layer_name), net.get_submodule(norm_name)
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        net.set_submodule(layer_name, fuse(layer, norm))
        net.set_submodule(norm_name, nn.Identity())
    folded = {norm_name for _, norm_name in pairs}
    net.prunable = [
        replace(prunable, norm_name=None) if prunable.norm_name in folded else prunable
        for prunable in net.prunable
    ]
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


def prepare_for_export(net: Net, mean, std) -> NormalisedNet:
    """`net` with its normalisation. `net` itself is moved to the CPU and made ready for inference:
    evaluation mode, channels-last, no gradients."""
    net = net.cpu().to(memory_format=torch.channels_last)
    return NormalisedNet(net, mean, std).eval().requires_grad_(False)


@torch.no_grad()
def export_net(net: Net, path: Path, mean, std, size: int, *, may_replace: bool = False) -> float:
    """Write `net` for inference without this project: .pt2 (torch.export) or .onnx.

    Normalisation is included, batch norms are folded, any batch size is taken. The file is read
    back and run before it takes its name. Returns the largest difference of its logits from the
    net's on random `size` x `size` images, as a share of the largest logit. Raises UserError, also
    where `path` exists unless `may_replace`.
    """
    path = Path(path)
    check_image_size(net, size)
    original = prepare_for_export(deepcopy(net), mean, std)
    folded = prepare_for_export(fold_batch_norms(net), mean, std)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, net.channels, size, size, generator=generator)
    expected = original(images)

    def write(temporary: Path) -> float:
        try:
            run_file = write_program(folded, temporary, images[:2], path.suffix.lower() == ".onnx")
            logits = torch.cat([run_file(images[:1]), run_file(images[1:])])
        except (OSError, ImportError, MemoryError):
            raise
        except Exception as error:  # the exporters and onnxruntime raise many kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: this net cannot be exported: {reason}") from error
        largest_logit = expected.abs().max().clamp_min(1e-9)
        difference = ((logits - expected).abs().max() / largest_logit).item()
        if not difference < EXPORT_TOLERANCE:  # also where it is no number
            raise UserError(
                f"the exported net differs from the original, by {difference:.1e} of the largest "
                "logit; nothing was written"
            )
        if not may_replace:
            refuse_existing(path, "--force overwrites it")
        return difference

    try:
        return write_atomically(path, write, temporary_path(path))
    except ImportError as error:
        package = error.name or "other packages"
        raise UserError(
            f".onnx needs {package}: pip install onnx onnxscript onnxruntime"
        ) from error


def write_program(net: nn.Module, path: Path, images: torch.Tensor, is_onnx: bool):
    """Trace `net` on `images`, write it to `path`, and return a function that runs the file.

    The libraries print and warn a good deal; none of it is for the user.
    """
    with (
        warnings.catch_warnings(action="ignore"),
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
    ):
        any_batch = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(net, (images,), dynamic_shapes=any_batch)
        if is_onnx:
            return write_onnx(program, path)
        content = BytesIO()  # in memory first: on a full disk torch ends the process
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
