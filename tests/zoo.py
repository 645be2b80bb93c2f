"""Nets as public repositories name and build them, each in a few lines from its definition.

Names and shapes are facts about those repositories; no line here is theirs. Every case is a fresh,
narrow net with the module names of its repository: what torch.save(net.state_dict()) gives there.
"""

from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from models import ACTIVATIONS


@dataclass(frozen=True)
class Case:
    """A net of the zoo: the repository, how to make it, and the images that it takes."""

    repository: str  # or none
    make: object
    channels: int = 3
    size: int = 32
    is_first_reading: bool = True  # whether shapes and names alone settle it
    gain: float = 1.0  # of the weights: fresh sigmoids tell images hardly apart


# PyTorch's fresh weights are so small that a deep net without norms says the same of all images.
# With this gain relus pass on what they read at its own size (He et al. 2015).
GAIN_WITHOUT_NORMS = 6**0.5


def conv(inputs, outputs, kernel=3, stride=1, bias=False):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)


class Layers(nn.Module):
    """A net whose forward pass is a function of it."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


def sequence(*modules, names=None):
    """nn.Sequential, numbered or with names."""
    if names is None:
        return nn.Sequential(*modules)
    return nn.Sequential(OrderedDict(zip(names, modules, strict=True)))


# ---- LeNets and perceptrons --------------------------------------------------------------------


def run_lenet(net, x, *, pool=F.max_pool2d, activate=torch.relu):
    x = pool(activate(net.conv1(x)), 2)
    x = pool(activate(net.conv2(x)), 2).flatten(1)
    linear = [module for module in net.children() if isinstance(module, nn.Linear)]
    for layer in linear[:-1]:
        x = activate(layer(x))
    return linear[-1](x)


def make_lenet(channels=1, widths=(6, 16), kernel=5, padding=0, hidden=(120, 84), places=25, **run):
    sizes = [widths[1] * places, *hidden, 10]
    linear = {f"fc{i}": nn.Linear(*pair) for i, pair in enumerate(pairwise(sizes), 1)}
    return Layers(
        partial(run_lenet, **run),
        conv1=nn.Conv2d(channels, widths[0], kernel, padding=padding),
        conv2=nn.Conv2d(*widths, kernel),
        **linear,
    )


def make_mnist_example():
    def run(net, x):
        x = F.relu(net.conv2(F.relu(net.conv1(x))))
        return net.fc2(F.relu(net.fc1(F.max_pool2d(x, 2).flatten(1))))

    return Layers(
        run,
        conv1=nn.Conv2d(1, 32, 3),
        conv2=nn.Conv2d(32, 64, 3),
        fc1=nn.Linear(9216, 128),
        fc2=nn.Linear(128, 10),
    )


def make_named_lenet():
    """Three convolutions, the last of which sees all of its map."""
    names = ["c1", "relu1", "s2", "c3", "relu3", "s4", "c5", "relu5"]
    features = sequence(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(16, 120, 5), nn.ReLU(), names=names,
    )  # fmt: skip
    head = sequence(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10), names=["f6", "relu6", "f7"])
    return Layers(lambda net, x: net.fc(net.convnet(x).flatten(1)), convnet=features, fc=head)


def make_normed_lenet():
    """Batch norms after convolutions and the hidden linear layer."""

    def run(net, x):
        x = F.max_pool2d(F.relu(net.bn1(net.conv1(x))), 2)
        x = F.max_pool2d(F.relu(net.bn2(net.conv2(x))), 2)
        return net.fc2(F.relu(net.bn3(net.fc1(x.flatten(1)))))

    return Layers(
        run,
        conv1=nn.Conv2d(1, 8, 3, padding=1),
        conv2=nn.Conv2d(8, 12, 3, padding=1),
        bn1=nn.BatchNorm2d(8),
        bn2=nn.BatchNorm2d(12),
        fc1=nn.Linear(12 * 49, 30),
        bn3=nn.BatchNorm1d(30),
        fc2=nn.Linear(30, 10),
    )


def make_perceptron(inputs=784):
    layers = sequence(nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
                      nn.Linear(100, 10))  # fmt: skip
    return Layers(lambda net, x: net.layers(x.flatten(1)), layers=layers)


# ---- VGGs --------------------------------------------------------------------------------------

VGG16 = (8, 8, "M", 12, 12, "M", 16, 16, 16, "M", 20, 20, 20, "M", 20, 20, 20, "M")
# Ends in an average.
VGG19 = (8, 8, "M", 12, 10, "M", 16, 14, 16, 9, "M", 20, 20, 7, 20, "M", 20, 20, 20, 11)


def vgg_layers(widths, *, has_norm=True, bias=False, has_dropout=False):
    inputs, modules = 3, []
    for width in widths:
        if width == "M":
            modules.append(nn.MaxPool2d(2))
            continue
        modules.append(conv(inputs, width, bias=bias))
        if has_norm:
            modules.append(nn.BatchNorm2d(width))
        modules.append(nn.ReLU())
        if has_dropout:
            modules.append(nn.Dropout(0.3))
        inputs = width
    return sequence(*modules)


def make_vgg(widths=VGG16, *, features="features", head=None, classes=10, places=1, **options):
    layers = vgg_layers(widths, **options)
    width = [width for width in widths if width != "M"][-1] * places
    head = nn.Linear(width, classes) if head is None else head(width, classes)

    def run(net, x):
        x = F.adaptive_avg_pool2d(getattr(net, features)(x), round(places**0.5))
        return net.classifier(x.flatten(1))

    return Layers(run, **{features: layers, "classifier": head})


def two_hidden(inputs, classes):
    return sequence(nn.Dropout(), nn.Linear(inputs, 24), nn.ReLU(), nn.Dropout(),
                    nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, classes))  # fmt: skip


def normed_hidden(inputs, classes):
    return sequence(nn.Linear(inputs, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, classes))


def norms_around(inputs, classes):
    return sequence(nn.BatchNorm1d(inputs), nn.Linear(inputs, 24), nn.ReLU(),
                    nn.Linear(24, classes), nn.BatchNorm1d(classes))  # fmt: skip


def make_staged_vgg():
    """A module for each stage: block1.conv1, block1.bn1, block1.conv2, ..."""

    def run_stage(stage, x):
        names = [name for name, _ in stage.named_children() if name.startswith("conv")]
        for name in names:
            x = F.relu(getattr(stage, name.replace("conv", "bn"))(getattr(stage, name)(x)))
        return F.max_pool2d(x, 2)

    stages, inputs = {}, 3
    for number, (count, width) in enumerate(((2, 8), (2, 12), (3, 12), (3, 16), (3, 16)), 1):
        modules = {}
        for i in range(1, count + 1):
            modules |= {f"conv{i}": conv(inputs, width), f"bn{i}": nn.BatchNorm2d(width)}
            inputs = width
        stages[f"block{number}"] = Layers(run_stage, **modules)

    def run(net, x):
        for number in range(1, 6):
            x = getattr(net, f"block{number}")(x)
        return net.fc(x.flatten(1))

    return Layers(run, **stages, fc=nn.Linear(16, 10))


# ---- residual nets -----------------------------------------------------------------------------


def run_basic(block, x):
    y = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    return F.relu(y + block.shortcut_of(x))


def run_bottleneck(block, x):
    y = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))
    return F.relu(block.bn3(block.conv3(y)) + block.shortcut_of(x))


def run_preactivated(block, x, *, is_shortcut_activated=False, is_identity_activated=False):
    h = F.relu(block.bn1(x))
    y = block.conv1(h)
    for number in range(2, 4):
        if hasattr(block, f"conv{number}"):
            y = getattr(block, f"conv{number}")(F.relu(getattr(block, f"bn{number}")(y)))
    is_identity = x.shape == y.shape
    reads_activated = is_shortcut_activated and not is_identity
    if is_identity_activated and block.is_first:
        reads_activated = True
    return y + block.shortcut_of(h if reads_activated else x)


def make_block(inputs, inner, outputs, stride, run, *, kernels=(3, 3), strided=0, norms_first=False,
               shortcut="", shortcut_norm=True, shortcut_of=None, bias=False):  # fmt: skip
    """A block with the usual names; `shortcut` names its 1 x 1 convolution, if it has one."""
    widths = [inputs, *inner, outputs]
    modules = {}
    for i, kernel in enumerate(kernels):
        layer = conv(widths[i], widths[i + 1], kernel, stride if i == strided else 1, bias)
        norm = nn.BatchNorm2d(widths[i] if norms_first else widths[i + 1])
        pair = {f"conv{i + 1}": layer, f"bn{i + 1}": norm}
        modules |= dict(reversed(pair.items())) if norms_first else pair
    block = Layers(run, **modules)
    block.shortcut_of = lambda x: x
    if shortcut and (stride > 1 or inputs != outputs):
        projection = [conv(inputs, outputs, 1, stride, bias)]
        if shortcut_norm:
            projection.append(nn.BatchNorm2d(outputs))
        module = sequence(*projection) if shortcut_norm is not None else projection[0]
        block.add_module(shortcut, module)
        block.shortcut_of = module.forward
    elif shortcut_of and inputs != outputs:
        block.shortcut_of = partial(shortcut_of, stride=stride, zeros=outputs - inputs)
    return block


def pad_around(x, stride, zeros):
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, zeros // 2, zeros // 2))


def pad_behind(x, stride, zeros):
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, zeros))


def average_and_pad(x, stride, zeros):
    return F.pad(F.avg_pool2d(x, stride), (0, 0, 0, 0, 0, zeros))


def make_resnet(outputs=(8, 12, 16), blocks=2, *, inner=None, stem=8, stem_kernel=3, last="fc",
                stage="layer{}", run=run_basic, stem_norm=True, last_norm="", classes=10,
                stem_stride=None, pool_stem=None, first_stride=1, **options):  # fmt: skip
    """conv1, bn1, layer1.0.conv1, ..., and a linear layer."""
    is_large = stem_kernel == 7
    if is_large and pool_stem is None:
        pool_stem = nn.MaxPool2d(3, 2, 1)
    modules = {"conv1": conv(3, stem, stem_kernel, stem_stride or (2 if is_large else 1))}
    if stem_norm:
        modules["bn1"] = nn.BatchNorm2d(stem)
    inputs = stem
    for number, width in enumerate(outputs, 1):
        stage_blocks = []
        for i in range(blocks):
            stride = 1
            if i == 0:
                stride = 2 if number > 1 else first_stride
            hidden = inner(number) if inner else (width,)
            stage_blocks.append(make_block(inputs, hidden, width, stride, run, **options))
            stage_blocks[-1].is_first = i == 0
            inputs = width
        name, _, within = stage.format(number).partition(".")
        stage_module = sequence(*stage_blocks)
        modules[name] = nn.ModuleDict({within: stage_module}) if within else stage_module
    if last_norm:
        modules[last_norm] = nn.BatchNorm2d(inputs)

    def forward(net, x):
        x = net.conv1(x)
        if stem_norm:
            x = F.relu(net.bn1(x))
        if pool_stem is not None:
            x = pool_stem(x)
        for number in range(1, len(outputs) + 1):
            name, _, within = stage.format(number).partition(".")
            module = getattr(net, name)
            x = (module[within] if within else module)(x)
        if last_norm:
            x = F.relu(getattr(net, last_norm)(x))
        return getattr(net, last)(x.mean((2, 3)))

    return Layers(forward, **modules, **{last: nn.Linear(inputs, classes)})


def make_resnet_with_last_norm():
    """A batch norm reads the averages that the linear layer reads ("BNNeck")."""
    net = make_resnet(shortcut="downsample")
    net.fc = sequence(nn.BatchNorm1d(16), nn.Linear(16, 10, bias=False))
    return net


def make_resnet_with_hidden_layer():
    """The head that a net often gets for other classes: two linear layers."""
    net = make_resnet(shortcut="downsample")
    net.fc = sequence(nn.Linear(16, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 10))
    return net


def make_resnet_without_first_norm():
    net = make_resnet(shortcut="downsample", stem_norm=False)
    net.conv1 = sequence(conv(3, 8, bias=True), nn.ReLU())
    return net


def make_resnet_d():
    """Shortcuts of stride 2 begin with an average over 2 x 2 places."""
    net = make_resnet(shortcut="downsample")
    for block in (net.layer2[0], net.layer3[0]):
        layer, norm = block.downsample
        layer.stride = (1, 1)
        average = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        block.downsample = sequence(average, layer, norm)
        block.shortcut_of = block.downsample.forward
    return net


def bottleneck_widths(number):
    return (4 * number, 4 * number)


BOTTLENECK = {
    "run": run_bottleneck,
    "kernels": (1, 3, 1),
    "inner": bottleneck_widths,
    "strided": 1,
}
PREACTIVATED = {"run": run_preactivated, "norms_first": True, "shortcut_norm": False}


def make_flat_resnet(*, norms_last=False, stage="stage", stem_norm=True):
    """Blocks that have their shortcut's layers beside the others: conv1, bn1, conv2, bn2,
    shortcut_conv, shortcut_bn, or with `norms_last` conv1, conv2, conv3, bn1, bn2, bn3."""
    shortcut, shortcut_norm = ("conv3", "bn3") if norms_last else ("shortcut_conv", "shortcut_bn")

    def run_block(block, x):
        y = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        if hasattr(block, shortcut):
            x = getattr(block, shortcut_norm)(getattr(block, shortcut)(x))
        return F.relu(y + x)

    def block(inputs, outputs, stride):
        modules = {"conv1": conv(inputs, outputs, 3, stride), "bn1": nn.BatchNorm2d(outputs),
                   "conv2": conv(outputs, outputs), "bn2": nn.BatchNorm2d(outputs)}  # fmt: skip
        if inputs != outputs:
            modules[shortcut] = conv(inputs, outputs, 1, stride)
            modules[shortcut_norm] = nn.BatchNorm2d(outputs)
        names = list(modules)
        if norms_last:
            names.sort(key=lambda name: name.startswith("bn"))
        return Layers(run_block, **{name: modules[name] for name in names})

    stages, inputs = {}, 8
    for number, width in enumerate((8, 12, 16), 1):
        stride = 2 if number > 1 else 1
        stages[f"{stage}{number}"] = sequence(block(inputs, width, stride), block(width, width, 1))
        inputs = width

    def run(net, x):
        x = net.conv1(x)
        x = F.relu(net.bn1(x) if stem_norm else x)
        for name in stages:
            x = getattr(net, name)(x)
        return net.fc(x.mean((2, 3)))

    stem = {"conv1": conv(3, 8)} | ({"bn1": nn.BatchNorm2d(8)} if stem_norm else {})
    return Layers(run, **stem, **stages, fc=nn.Linear(16, 10))


def make_nested_resnet():
    """Sequences within sequences: conv2_x.0.residual_function.0, conv2_x.0.shortcut.0."""

    def block(inputs, outputs, stride):
        path = sequence(conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs), nn.ReLU(),
                        conv(outputs, outputs), nn.BatchNorm2d(outputs))  # fmt: skip
        shortcut = sequence()
        if stride > 1 or inputs != outputs:
            shortcut = sequence(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        return Layers(lambda net, x: F.relu(net.residual_function(x) + net.shortcut(x)),
                      residual_function=path, shortcut=shortcut)  # fmt: skip

    stages = {"conv1": sequence(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())}
    inputs = 8
    for number, width in enumerate((8, 12, 16, 20), 2):
        stride = 2 if number > 2 else 1
        stages[f"conv{number}_x"] = sequence(block(inputs, width, stride), block(width, width, 1))
        inputs = width

    def run(net, x):
        for name in stages:
            x = getattr(net, name)(x)
        return net.fc(x.mean((2, 3)))

    return Layers(run, **stages, fc=nn.Linear(20, 10))


def make_lettered_resnet(shortcut_of=pad_behind):
    """conv_1_3x3, bn_1, stage_1.0.conv_a, stage_1.0.bn_a, ..., classifier."""

    def run_block(block, x):
        y = block.bn_b(block.conv_b(F.relu(block.bn_a(block.conv_a(x)))))
        return F.relu(y + block.shortcut_of(x))

    modules = {"conv_1_3x3": conv(3, 8), "bn_1": nn.BatchNorm2d(8)}
    inputs = 8
    for number, width in enumerate((8, 16, 32), 1):
        blocks = []
        for i in range(2):
            stride = 2 if number > 1 and i == 0 else 1
            block = Layers(run_block, conv_a=conv(inputs, width, 3, stride),
                           bn_a=nn.BatchNorm2d(width), conv_b=conv(width, width),
                           bn_b=nn.BatchNorm2d(width))  # fmt: skip
            block.shortcut_of = lambda x: x
            if width != inputs:
                block.shortcut_of = partial(shortcut_of, stride=stride, zeros=width - inputs)
            blocks.append(block)
            inputs = width
        modules[f"stage_{number}"] = sequence(*blocks)

    def run(net, x):
        x = F.relu(net.bn_1(net.conv_1_3x3(x)))
        for number in (1, 2, 3):
            x = getattr(net, f"stage_{number}")(x)
        return net.classifier(x.mean((2, 3)))

    return Layers(run, **modules, classifier=nn.Linear(32, 10))


def make_unit_resnet():
    """Blocks in a module of their own, beside the projection where there is one: unit1.body.conv1,
    unit1.identity_conv."""

    def block(inputs, outputs, stride):
        body = sequence(
            sequence(conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs), nn.ReLU(),
                     names=["conv", "bn", "activ"]),
            sequence(conv(outputs, outputs), nn.BatchNorm2d(outputs), names=["conv", "bn"]),
            names=["conv1", "conv2"],
        )  # fmt: skip
        modules = {"body": body}
        if inputs != outputs:
            projection = [conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)]
            modules["identity_conv"] = sequence(*projection, names=["conv", "bn"])

        def run(net, x):
            identity = net.identity_conv(x) if inputs != outputs else x
            return F.relu(net.body(x) + identity)

        return Layers(run, **modules)

    stages = [sequence(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), names=["conv", "bn", "activ"])]
    inputs = 8
    for number, width in enumerate((8, 12, 16)):
        # The last block changes its width and no size, as narrowed nets have it.
        last = width + 4 if number == 2 else width
        units = [block(inputs, width, 2 if number else 1), block(width, last, 1)]
        stages.append(sequence(*units, names=["unit1", "unit2"]))
        inputs = last
    names = ["init_block", "stage1", "stage2", "stage3"]
    features = sequence(*stages, names=names)

    def run(net, x):
        return net.output(net.features(x).mean((2, 3)))

    return Layers(run, features=features, output=nn.Linear(inputs, 10))


class ChannelSelection(nn.Module):
    """The channels that are left of a batch norm (network slimming)."""

    def __init__(self, indexes):
        super().__init__()
        self.indexes = nn.Parameter(torch.tensor(indexes, dtype=torch.float))

    def forward(self, x):
        return x[:, self.indexes != 0]


def make_slimmed_preresnet():
    """Pre-activated bottlenecks whose first convolutions read some of the channels alone."""

    def run_block(block, x):
        y = block.conv1(F.relu(block.select(block.bn1(x))))
        y = block.conv3(F.relu(block.bn3(block.conv2(F.relu(block.bn2(y))))))
        return y + (block.downsample(x) if hasattr(block, "downsample") else x)

    def make(inputs, outputs, stride, number):
        kept = [(i + number) % 3 > 0 for i in range(inputs)]
        modules = {
            "bn1": nn.BatchNorm2d(inputs), "select": ChannelSelection(kept),
            "conv1": conv(sum(kept), 5, 1), "bn2": nn.BatchNorm2d(5),
            "conv2": conv(5, 6, 3, stride), "bn3": nn.BatchNorm2d(6), "conv3": conv(6, outputs, 1),
        }  # fmt: skip
        if inputs != outputs:
            modules["downsample"] = sequence(conv(inputs, outputs, 1, stride))
        return Layers(run_block, **modules)

    modules, inputs = {"conv1": conv(3, 8)}, 8
    for number, width in enumerate((16, 24, 32), 1):
        stride = 2 if number > 1 else 1
        blocks = [make(inputs, width, stride, number), make(width, width, 1, number + 1)]
        modules[f"layer{number}"] = sequence(*blocks)
        inputs = width
    kept = [i % 4 > 0 for i in range(32)]

    def run(net, x):
        x = net.layer3(net.layer2(net.layer1(net.conv1(x))))
        return net.fc(F.relu(net.select(net.bn(x))).mean((2, 3)))

    return Layers(run, **modules, bn=nn.BatchNorm2d(32), select=ChannelSelection(kept),
                  fc=nn.Linear(sum(kept), 10))  # fmt: skip


def make_convolutional_head():
    """A VGG whose first two linear layers are convolutions of 7 x 7 and 1 x 1."""

    def run(net, x):
        x = F.adaptive_avg_pool2d(net.features(x), 7)
        return net.fc(F.relu(net.fc2(F.relu(net.fc1(x)))).flatten(1))

    return Layers(run, features=vgg_layers(VGG16, has_norm=False, bias=True),
                  fc1=nn.Conv2d(20, 24, 7), fc2=nn.Conv2d(24, 16, 1),
                  fc=nn.Linear(16, 10))  # fmt: skip


def make_listed_perceptron():
    """Layers and norms in two lists: layers.0, layers.1, ..., norms.0, norms.1."""
    layers = nn.ModuleList([nn.Linear(784, 30), nn.Linear(30, 20), nn.Linear(20, 10)])
    norms = nn.ModuleList([nn.BatchNorm1d(30), nn.BatchNorm1d(20)])

    def run(net, x):
        x = x.flatten(1)
        for layer, norm in zip(net.layers, net.norms):
            x = F.relu(norm(layer(x)))
        return net.layers[-1](x)

    return Layers(run, layers=layers, norms=norms)


def make_cnn_in_blocks(*, is_averaged):
    """conv1, then blocks of two convolutions and a pooling, which are no residual ones."""

    def block(inputs, outputs):
        return sequence(
            conv(inputs, outputs, bias=True), nn.ReLU(),
            conv(outputs, outputs, bias=True), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip

    def run(net, x):
        x = net.block2(net.block1(F.max_pool2d(F.relu(net.conv1(x)), 2)))
        return net.fc(x.mean((2, 3)) if is_averaged else x.flatten(1))

    return Layers(run, conv1=conv(3, 8, bias=True), block1=block(8, 12), block2=block(12, 16),
                  fc=nn.Linear(16 if is_averaged else 16 * 16, 10))  # fmt: skip


def make_vgg_in_blocks():
    """conv1 and bn1, then blocks of two convolutions and a pooling, seven convolutions in all."""

    def block(inputs, outputs):
        return sequence(
            conv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(),
            conv(outputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip

    def run(net, x):
        x = F.relu(net.bn1(net.conv1(x)))
        return net.fc(net.block3(net.block2(net.block1(x))).flatten(1))

    return Layers(run, conv1=conv(3, 8), bn1=nn.BatchNorm2d(8), block1=block(8, 8),
                  block2=block(8, 12), block3=block(12, 16),
                  fc=nn.Linear(16 * 16, 10))  # fmt: skip


def make_cnn(paddings, pools, places, *, norms=True):
    """conv1, bn1, conv2, bn2, ..., each with its own padding and pooling."""
    modules, inputs = {}, 3
    for number, padding in enumerate(paddings, 1):
        width = 4 + 4 * number
        modules[f"conv{number}"] = nn.Conv2d(inputs, width, 3, padding=padding, bias=not norms)
        if norms:
            modules[f"bn{number}"] = nn.BatchNorm2d(width)
        inputs = width

    def run(net, x):
        for number, pool in enumerate(pools, 1):
            x = getattr(net, f"conv{number}")(x)
            x = F.relu(getattr(net, f"bn{number}")(x) if norms else x)
            x = pool(x, 2) if pool else x
        return net.fc(x.flatten(1))

    return Layers(run, **modules, fc=nn.Linear(inputs * places, 10))


def make_cnn_with_late_norm():
    """conv1, conv2, bn1: two convolutions of one width, the norm is that of the first."""

    def run(net, x):
        x = F.max_pool2d(F.relu(net.bn1(net.conv1(x))), 2)
        return net.fc(F.max_pool2d(F.relu(net.conv2(x)), 2).flatten(1))

    return Layers(run, conv1=conv(3, 8), conv2=conv(8, 8, bias=True), bn1=nn.BatchNorm2d(8),
                  fc=nn.Linear(8 * 64, 10))  # fmt: skip


def make_cnn_with_norm_before_head():
    """A batch norm reads the flattened map; another one stands behind the hidden layer."""

    def run(net, x):
        for layer in (net.conv1, net.conv2):
            x = F.max_pool2d(F.relu(layer(x)), 2)
        x = net.fc1(net.bn1(x.flatten(1)))
        return net.fc2(F.relu(net.bn2(x)))

    return Layers(run, conv1=conv(3, 8, bias=True), conv2=conv(8, 12, bias=True),
                  bn1=nn.BatchNorm1d(12 * 64), fc1=nn.Linear(12 * 64, 24),
                  bn2=nn.BatchNorm1d(24), fc2=nn.Linear(24, 10))  # fmt: skip


def make_listed_cnn(names=("convs.{}", "norms.{}")):
    """Convolutions of one width and their norms, each in a list of their own."""
    layers = {}
    for number, inputs in enumerate((3, 8, 8)):
        layers[names[0].format(number)] = conv(inputs, 8)
    for number in range(3):
        layers[names[1].format(number)] = nn.BatchNorm2d(8)
    modules = {}
    for name, layer in layers.items():
        parent, _, number = name.partition(".")
        if number:
            modules.setdefault(parent, nn.ModuleList()).append(layer)
        else:
            modules[parent] = layer

    def run(net, x):
        for number in range(3):
            layer, norm = (net.get_submodule(name.format(number)) for name in names)
            x = F.max_pool2d(F.relu(norm(layer(x))), 2)
        return net.fc(x.flatten(1))

    return Layers(run, **modules, fc=nn.Linear(8 * 16, 10))


def make_large_kernel_cnn(*, is_averaged):
    """Two convolutions, of 5 x 5 and 7 x 7."""

    def run(net, x):
        x = F.max_pool2d(F.relu(net.conv1(x)), 2)
        x = F.max_pool2d(F.relu(net.conv2(x)), 2)
        return net.fc(x.mean((2, 3)) if is_averaged else x.flatten(1))

    return Layers(run, conv1=nn.Conv2d(1, 8, 5), conv2=nn.Conv2d(8, 16, 7),
                  fc=nn.Linear(16 if is_averaged else 16 * 9, 10))  # fmt: skip


def make_averaged_cnn():
    """Five convolutions, a pooling after each but the last, then an average."""
    widths = (8, 12, 16, 20, 20)
    modules, inputs = [], 3
    for number, width in enumerate(widths):
        modules += [conv(inputs, width, bias=True), nn.ReLU()]
        if number < 4:
            modules.append(nn.MaxPool2d(2))
        inputs = width
    layers = sequence(*modules)
    return Layers(lambda net, x: net.classifier(net.block(x).mean((2, 3))),
                  block=layers, classifier=nn.Linear(20, 10))  # fmt: skip


def make_wide_resnet_with_biases():
    net = CASES["wide ResNet with biases, stride second"].make()
    net.conv1 = conv(3, 8, bias=True)
    return net


def make_torchvision(name):
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=7)


def make_torchvision_vgg():
    """torchvision's VGG-11, with 128 hidden units in place of 4,096, to save time."""
    from torchvision.models.vgg import VGG, cfgs, make_layers

    features = make_layers(cfgs["A"])
    with torch.device("meta"):  # its hidden layers of 4,096 units are replaced below
        net = VGG(features, num_classes=7, init_weights=False)
    inputs = net.classifier[0].in_features
    net.classifier[0] = nn.Linear(inputs, 128)
    net.classifier[3] = nn.Linear(128, 128)
    net.classifier[6] = nn.Linear(128, 7)
    return net


CASES = {
    "LeNet of 10, 20 and 50": Case(
        "pytorch/examples (2017)",
        partial(make_lenet, widths=(10, 20), hidden=(50,), places=16),
        1,
        28,
    ),
    "MNIST example": Case("pytorch/examples", make_mnist_example, 1, 28),
    "LeNet of 6-16-120-84": Case("kuangliu/pytorch-cifar", partial(make_lenet, channels=3)),
    "LeNet, padded": Case("written for this test", partial(make_lenet, padding=2), 1, 28),
    "LeNet, averaged, tanh": Case(
        "ContinualAI/avalanche",
        partial(make_lenet, pool=F.avg_pool2d, activate=torch.tanh),
        1,
        32,
        False,
    ),
    "LeNet by letters": Case("activatedgeek/LeNet-5", make_named_lenet, 1, 32, False),
    "LeNet with batch norms": Case("written for this test", make_normed_lenet, 1, 28),
    "perceptron": Case("mil-ad/snip", make_perceptron, 1, 28),
    "perceptron of colour images": Case(
        "written for this test", partial(make_perceptron, 3 * 32 * 32)
    ),
    "perceptron, norms in a list": Case("written for this test", make_listed_perceptron, 1, 28),
    "CNN in blocks": Case(
        "written for this test",
        partial(make_cnn_in_blocks, is_averaged=False),
        gain=GAIN_WITHOUT_NORMS,
    ),
    "CNN in blocks, averaged": Case(
        "written for this test",
        partial(make_cnn_in_blocks, is_averaged=True),
        is_first_reading=False,
        gain=GAIN_WITHOUT_NORMS,
    ),
    "VGG in blocks": Case("written for this test", make_vgg_in_blocks, is_first_reading=False),
    "CNN, an average after max-poolings": Case(
        "written for this test",
        partial(make_cnn, (1, 1, 1), (F.max_pool2d, F.max_pool2d, F.avg_pool2d), 16),
        is_first_reading=False,
    ),
    "CNN, every second convolution padded": Case(
        "keras-team/keras-io",
        partial(make_cnn, (1, 0, 1, 0), (None, F.max_pool2d, None, F.max_pool2d), 36, norms=False),
        is_first_reading=False,
        gain=GAIN_WITHOUT_NORMS,
    ),
    "CNN, a norm behind two convolutions": Case("written for this test", make_cnn_with_late_norm),
    "CNN, a norm before its first linear layer": Case(
        "written for this test", make_cnn_with_norm_before_head
    ),
    "CNN, norms in a list": Case("written for this test", make_listed_cnn),
    "CNN, norms behind the convolutions": Case(
        "written for this test", partial(make_listed_cnn, ("conv2d{}", "bn{}"))
    ),
    "CNN of large kernels": Case(
        "written for this test", partial(make_large_kernel_cnn, is_averaged=False), 1, 28
    ),
    "CNN of large kernels, averaged": Case(
        "written for this test", partial(make_large_kernel_cnn, is_averaged=True), 1, 28, False
    ),
    "VGG-16, one linear layer": Case("kuangliu/pytorch-cifar", make_vgg),
    "VGG-16 with biases": Case("kuangliu/pytorch-cifar", partial(make_vgg, bias=True)),
    "VGG-19 pruned, average at its end": Case(
        "Eric-mingjie/network-slimming",
        partial(make_vgg, VGG19, features="feature"),
        is_first_reading=False,
    ),
    "VGG-16, batch norm in its head": Case(
        "Eric-mingjie/rethinking-network-pruning",
        partial(make_vgg, (*VGG16[:-1], "M"), features="feature", head=normed_hidden),
    ),
    "VGG-16, batch norms at both ends of its head": Case(
        "written for this test", partial(make_vgg, head=norms_around)
    ),
    "VGG-16, batch norm in its head alone": Case(
        "written for this test",
        partial(make_vgg, has_norm=False, bias=True, head=normed_hidden),
        gain=GAIN_WITHOUT_NORMS,
    ),
    "VGG-16 without batch norms": Case(
        "chengyangfu/pytorch-vgg-cifar10",
        partial(make_vgg, has_norm=False, bias=True, head=two_hidden),
        gain=GAIN_WITHOUT_NORMS,
    ),
    "VGG-16 with dropout": Case("written for this test", partial(make_vgg, has_dropout=True)),
    "VGG in stages": Case("written for this test", make_staged_vgg),
    "VGG-11 of torchvision": Case("pytorch/vision", make_torchvision_vgg, size=64),
    "ResNet-18 of torchvision": Case(
        "pytorch/vision", partial(make_torchvision, "resnet18"), size=64
    ),
    "ResNet-50 of torchvision": Case(
        "pytorch/vision", partial(make_torchvision, "resnet50"), size=64
    ),
    "ResNet, option A": Case(
        "akamaster/pytorch_resnet_cifar10",
        partial(make_resnet, last="linear", shortcut_of=pad_around),
    ),
    "ResNet, zeros behind": Case(
        "he-y/filter-pruning-geometric-median", make_lettered_resnet, is_first_reading=False
    ),
    "ResNet, averaged shortcut": Case(
        "written for this test",
        partial(make_lettered_resnet, average_and_pad),
        is_first_reading=False,
    ),
    "ResNet, option B": Case(
        "chenyaofo/pytorch-cifar-models", partial(make_resnet, shortcut="downsample")
    ),
    "ResNet-18, 3 x 3": Case(
        "kuangliu/pytorch-cifar",
        partial(make_resnet, (8, 12, 16, 20), shortcut="shortcut", last="linear"),
    ),
    "ResNet, a norm before its last layer": Case(
        "michuanhaohao/reid-strong-baseline", make_resnet_with_last_norm
    ),
    "ResNet, two linear layers": Case("written for this test", make_resnet_with_hidden_layer),
    "ResNet, no norm after its first convolution": Case(
        "written for this test", make_resnet_without_first_norm
    ),
    "ResNet-D": Case("huggingface/pytorch-image-models", make_resnet_d),
    "ResNet, strided at first": Case(
        "written for this test",
        partial(make_resnet, shortcut="downsample", stem_stride=2),
        is_first_reading=False,
    ),
    "ResNet, 2 x 2 pooling at first": Case(
        "written for this test",
        partial(make_resnet, shortcut="downsample", pool_stem=nn.MaxPool2d(2)),
        is_first_reading=False,
    ),
    "ResNet, strided in its first block": Case(
        "written for this test",
        partial(make_resnet, (12, 16, 20), shortcut="downsample", first_stride=2),
        is_first_reading=False,
    ),
    "ResNet, pruned inside": Case(
        "written for this test",
        partial(
            make_resnet, (8, 12, 16), shortcut="downsample", inner=lambda number: (3 + number,)
        ),
    ),
    "bottlenecks": Case(
        "bearpaw/pytorch-classification",
        partial(make_resnet, (16, 24, 32), shortcut="downsample", **BOTTLENECK),
    ),
    "bottlenecks, stride first": Case(
        "written for this test",
        partial(make_resnet, (16, 24, 32), shortcut="downsample", **(BOTTLENECK | {"strided": 0})),
        is_first_reading=False,
    ),
    "ResNet, flat blocks": Case("written for this test", make_flat_resnet),
    "ResNet, flat blocks in stages named down": Case(
        "written for this test", partial(make_flat_resnet, stage="down")
    ),
    "ResNet, norms behind all convolutions": Case(
        "written for this test", partial(make_flat_resnet, norms_last=True)
    ),
    "ResNet without a first norm": Case(
        "written for this test", partial(make_flat_resnet, stem_norm=False)
    ),
    "nested sequences": Case("weiaicunzai/pytorch-cifar100", make_nested_resnet),
    "PreActResNet-18": Case(
        "kuangliu/pytorch-cifar",
        partial(
            make_resnet,
            (8, 12, 16),
            stem_norm=False,
            last="linear",
            shortcut="shortcut",
            **(PREACTIVATED | {"run": partial(run_preactivated, is_shortcut_activated=True)}),
        ),
        is_first_reading=False,
    ),
    "pre-activated bottlenecks": Case(
        "Eric-mingjie/network-slimming",
        partial(
            make_resnet,
            (16, 24, 32),
            stem_norm=False,
            last_norm="bn",
            shortcut="downsample",
            **(BOTTLENECK | PREACTIVATED),
        ),
    ),
    "wide ResNet": Case(
        "HobbitLong/RepDistiller",
        partial(
            make_resnet,
            (16, 24, 32),
            stage="block{}.layer",
            stem_norm=False,
            last_norm="bn1",
            shortcut="convShortcut",
            **(
                PREACTIVATED
                | {
                    "shortcut_norm": None,
                    "run": partial(run_preactivated, is_shortcut_activated=True),
                }
            ),
        ),
        is_first_reading=False,
    ),
    "VGG, norm behind the relu of its head": Case(
        "mil-ad/snip",
        partial(
            make_vgg,
            head=lambda inputs, classes: sequence(
                nn.Linear(inputs, 24), nn.ReLU(), nn.BatchNorm1d(24), nn.Linear(24, classes)
            ),
        ),
    ),
    "VGG, a head of convolutions": Case(
        "huggingface/pytorch-image-models", make_convolutional_head, gain=GAIN_WITHOUT_NORMS
    ),
    "CNN, averaged": Case("HobbitLong/RepDistiller", make_averaged_cnn, is_first_reading=False),
    "LeNet, padded, averaged, sigmoid": Case(
        "d2l-ai/d2l-en",
        partial(make_lenet, padding=2, pool=F.avg_pool2d, activate=torch.sigmoid),
        1,
        28,
        False,
        gain=8.0,
    ),
    "units with a body": Case("osmr/imgclsmob", make_unit_resnet),
    "slimmed by channel selection": Case("Eric-mingjie/network-slimming", make_slimmed_preresnet),
    "wide ResNet with biases, stride second": Case(
        "timgaripov/swa",
        partial(
            make_resnet,
            (16, 24, 32),
            stem_norm=False,
            last_norm="bn1",
            shortcut="shortcut",
            last="linear",
            strided=1,
            bias=True,
            **PREACTIVATED,
        ),
        is_first_reading=False,
    ),
    "pre-activated with biases, no last norm": Case(
        "weiaicunzai/pytorch-cifar100",
        partial(make_resnet, (16, 24, 32), shortcut="shortcut", bias=True, **PREACTIVATED),
    ),
    "wide ResNet with biases, in its first convolution, too": Case(
        "timgaripov/swa", make_wide_resnet_with_biases, is_first_reading=False
    ),
    "wide ResNet with biases, shortcuts behind a norm": Case(
        "written for this test",
        partial(
            make_resnet,
            (16, 24, 32),
            stem_norm=False,
            last_norm="bn1",
            shortcut="shortcut",
            bias=True,
            **(PREACTIVATED | {"run": partial(run_preactivated, is_shortcut_activated=True)}),
        ),
        is_first_reading=False,
    ),
    "pre-activated with biases, option A": Case(
        "written for this test",
        partial(
            make_resnet,
            (16, 24, 32),
            stem_norm=False,
            last_norm="bn1",
            shortcut_of=pad_around,
            bias=True,
            **PREACTIVATED,
        ),
        is_first_reading=False,
    ),
    "ResNet with biases": Case(
        "written for this test", partial(make_resnet, shortcut="downsample", bias=True)
    ),
    "ResNet, no norms in its shortcuts": Case(
        "written for this test", partial(make_resnet, shortcut="downsample", shortcut_norm=False)
    ),
    "ResNet, a norm before its average": Case(
        "written for this test",
        partial(make_resnet, shortcut="downsample", last_norm="bn"),
        is_first_reading=False,
    ),
    "pre-activated, first identity activated": Case(
        "hysts/pytorch_image_classification",
        partial(
            make_resnet,
            (8, 16, 24),
            stem_norm=False,
            last_norm="bn",
            shortcut="shortcut",
            **(PREACTIVATED | {"run": partial(run_preactivated, is_identity_activated=True)}),
        ),
        is_first_reading=False,
    ),
}


# ---- nets that only an example of their outputs tells ------------------------------------------


def make_alexnet():
    """AlexNet for images of 64 x 64, in narrow: large strides, poolings of 3 x 3."""
    features = sequence(
        nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        conv(16, 24, bias=True), nn.ReLU(), conv(24, 16, bias=True), nn.ReLU(),
        conv(16, 16, bias=True), nn.ReLU(),
    )  # fmt: skip
    classifier = sequence(nn.Dropout(), nn.Linear(16 * 9, 32), nn.ReLU(), nn.Linear(32, 10))
    return Layers(
        lambda net, x: net.classifier(net.features(x).flatten(1)),
        features=features,
        classifier=classifier,
    )


def make_strided_cnn():
    """Kernels of 4 x 4 with stride 2, as in the discriminator of a DCGAN."""
    modules, inputs = [], 3
    for width in (8, 16, 24):
        layer = nn.Conv2d(inputs, width, 4, 2, 1, bias=False)
        modules += [layer, nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        inputs = width
    return Layers(
        lambda net, x: net.fc(net.main(x).flatten(1)),
        main=sequence(*modules),
        fc=nn.Linear(24 * 16, 10),
    )


def make_cnn_with_poolings(pool, places):
    """Three convolutions, with that pooling after the first two."""

    def run(net, x):
        x = pool(F.relu(net.bn1(net.conv1(x))))
        x = pool(F.relu(net.bn2(net.conv2(x))))
        return net.fc2(F.relu(net.fc1(F.relu(net.conv3(x)).flatten(1))))

    return Layers(
        run,
        conv1=conv(3, 8), bn1=nn.BatchNorm2d(8),
        conv2=conv(8, 12), bn2=nn.BatchNorm2d(12),
        conv3=conv(12, 16, bias=True),
        fc1=nn.Linear(16 * places, 20), fc2=nn.Linear(20, 10),
    )  # fmt: skip


def make_strided_vgg():
    """Stages of two convolutions, of which the second has a stride in place of a pooling."""
    modules, inputs = [], 3
    for width in (8, 12, 16, 20):
        for stride in (1, 2):
            modules += [conv(inputs, width, stride=stride), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
    return Layers(
        lambda net, x: net.classifier(net.features(x).mean((2, 3))),
        features=sequence(*modules),
        classifier=nn.Linear(20, 10),
    )


def make_cnn_with_late_norms(*, is_pooled_last):
    """Convolution, relu, batch norm and pooling, or the last two the other way round; in the hidden
    linear layer, too, the norm stands last."""

    def run(net, x):
        for layer, norm in ((net.conv1, net.bn1), (net.conv2, net.bn2)):
            x = F.relu(layer(x))
            x = F.max_pool2d(norm(x), 2) if is_pooled_last else norm(F.max_pool2d(x, 2))
        return net.fc2(net.bn3(F.relu(net.fc1(x.flatten(1)))))

    return Layers(
        run,
        conv1=conv(3, 8, bias=True), bn1=nn.BatchNorm2d(8),
        conv2=conv(8, 12, bias=True), bn2=nn.BatchNorm2d(12),
        fc1=nn.Linear(12 * 64, 20), bn3=nn.BatchNorm1d(20), fc2=nn.Linear(20, 10),
    )  # fmt: skip


def make_late_norm_sequence():
    """The same in one nn.Sequential, whose numbers show where the norms stand."""
    modules, inputs = [], 3
    for width in (8, 12, 16):
        modules += [conv(inputs, width, bias=True), nn.ReLU(), nn.BatchNorm2d(width)]
        modules.append(nn.MaxPool2d(2))
        inputs = width
    return sequence(*modules, nn.Flatten(), nn.Linear(16 * 16, 10))


def make_strided_average(strides):
    """Convolutions with these strides, then an average."""
    modules, inputs = [], 3
    for width, stride in zip((8, 12, 16, 20), strides):
        modules += [conv(inputs, width, stride=stride, bias=True), nn.ReLU()]
        inputs = width
    return sequence(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def make_nature_cnn():
    """The convolutions of a DQN: 8 x 8 with stride 4, 4 x 4 with stride 2, 3 x 3."""
    return sequence(
        nn.Conv2d(3, 8, 8, 4), nn.ReLU(), nn.Conv2d(8, 12, 4, 2), nn.ReLU(),
        nn.Conv2d(12, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 24), nn.ReLU(),
        nn.Linear(24, 10),
    )  # fmt: skip


def make_kaggle_cnn():
    """Four convolutions with norms after the relus; the third one is strided and alone padded."""

    def run(net, x):
        for number in range(1, 5):
            x = net.get_submodule(f"bn{number}")(F.relu(net.get_submodule(f"conv{number}")(x)))
        return net.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))

    return Layers(
        run,
        conv1=nn.Conv2d(3, 8, 3), bn1=nn.BatchNorm2d(8),
        conv2=nn.Conv2d(8, 8, 3), bn2=nn.BatchNorm2d(8),
        conv3=nn.Conv2d(8, 12, 5, 2, 2), bn3=nn.BatchNorm2d(12),
        conv4=nn.Conv2d(12, 16, 3), bn4=nn.BatchNorm2d(16),
        fc=nn.Linear(16 * 4, 10),
    )  # fmt: skip


def make_late_norm_vgg():
    """Stages of two convolutions, norms after the relus, poolings but after the last stage."""
    modules, inputs = [], 3
    for number, width in enumerate((8, 12, 16, 20)):
        for _ in range(2):
            modules += [conv(inputs, width), nn.ReLU(), nn.BatchNorm2d(width)]
            inputs = width
        if number < 3:
            modules.append(nn.MaxPool2d(2))
    return Layers(
        lambda net, x: net.classifier(net.features(x).mean((2, 3))),
        features=sequence(*modules),
        classifier=nn.Linear(20, 10),
    )


EXAMPLE_CASES = {
    "AlexNet": Case("pytorch/vision", make_alexnet, size=64, gain=GAIN_WITHOUT_NORMS),
    "strided CNN": Case("pytorch/examples", make_strided_cnn),
    "strided CNN, averaged": Case("", partial(make_strided_average, (2, 2, 2))),
    "CNN, strided later, averaged": Case("", partial(make_strided_average, (1, 2, 2, 2))),
    "Nature CNN": Case("", make_nature_cnn, size=64),
    "CNN, padded poolings of 3 x 3": Case(
        "", partial(make_cnn_with_poolings, nn.MaxPool2d(3, 2, 1), 64)
    ),
    "CNN, averages of 3 x 3": Case("", partial(make_cnn_with_poolings, nn.AvgPool2d(3, 2), 49)),
    "CNN, poolings of 4 x 4": Case("", partial(make_cnn_with_poolings, nn.MaxPool2d(4), 4)),
    "strided VGG": Case("", make_strided_vgg),
    "CNN, norm before the pooling": Case(
        "", partial(make_cnn_with_late_norms, is_pooled_last=True)
    ),
    "CNN, norm after the pooling": Case(
        "", partial(make_cnn_with_late_norms, is_pooled_last=False)
    ),
    "sequence, norms after relus": Case("", make_late_norm_sequence),
    "CNN, padded where it is strided": Case("", make_kaggle_cnn),
    "VGG, norms after relus, average at its end": Case("", make_late_norm_vgg),
}


@contextmanager
def replace_relu(activation):
    """Nets that run within it have another of models.ACTIVATIONS where they have relu."""
    function = ACTIVATIONS[activation]
    names = {**vars(F), "relu": function}
    with (
        mock.patch.dict(globals(), {"F": SimpleNamespace(**names)}),
        mock.patch.object(nn.ReLU, "forward", lambda module, x: function(x)),
    ):
        yield


def make_lively(case):
    """(a net of that case in evaluation mode, whose batch norms have seen something; a batch)."""
    torch.manual_seed(0)
    net = case.make()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= case.gain
    norms = [
        module for module in net.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
        norm.momentum = 1.0
    images = torch.randn(16, case.channels, case.size, case.size)
    with torch.no_grad():
        net.train()(images)
    return net.eval(), images[:4]


@torch.no_grad()
def spread_logits(net, x):
    """Let no class be the largest for most images: each class's mean and spread become alike."""
    *_, last = (module for module in net.modules() if isinstance(module, nn.Linear))
    last.weight /= net(x).std(0)[:, None]
    last.bias /= net(x).std(0)
    last.bias -= net(x).mean(0)


def largest_difference(logits, expected):
    """The largest difference, as a share of the largest logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()
