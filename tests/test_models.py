"""Tests of models.py, in its order: nets and cost, pruning, checkpoints, export.

The helpers at the top, and `write_broken_files`, serve the other test files and bench.py, too.
"""

import argparse
import os
import pickle
import re
import subprocess
import sys
import warnings
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import models
import sep
from models import UserError, build, count_macs, count_parameters, prune_channels

NETS = {
    "lenet5": {"channels": 1, "size": 28},
    "vgg16": {},
    "vgg19": {},
    "resnet20": {},
    "resnet56": {},
}


def make_lively_net(arch, widths=None, **options):
    """A net in evaluation mode whose batch norms have seen something, and a batch for it."""
    torch.manual_seed(0)
    net = build(arch, widths, **(NETS.get(arch, {}) | options))
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
        norm.momentum = 1.0  # the running statistics become those of the next batch
    with torch.no_grad():
        net(torch.randn(8, net.channels, net.size, net.size))
    for norm in norms:
        norm.momentum = 0.1
    return net.eval(), torch.randn(4, net.channels, net.size, net.size)


def smaller_structure(net, share=0.6):
    """A structure in which the layers lose different shares, and one of them none."""
    return tuple(
        width if i == 1 else max(1, int(width * (share + 0.3 * (i % 2))))
        for i, width in enumerate(net.widths)
    )


def let_groups_differ(net):
    """Groups of kernels begin as copies of each other: move weights, biases and norms a little."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.requires_grad:
                module.weight += 0.3 * module.weight.std() * torch.randn_like(module.weight)
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            # Biases, and a norm's scale, shift, mean and variance, which stays above 0.
            if value.dim() == 1 and value.is_floating_point() and not name.startswith("gates."):
                value.mul_(1 + 0.2 * torch.rand_like(value)).add_(0.05 * torch.rand_like(value))


def count_flops(net, x):
    """The FLOPs of a forward pass, by torch's own counter: two for each MAC."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops()


def largest(tensor):
    """The largest absolute value, by which differences are measured."""
    return tensor.abs().max()


# ---- nets and cost


@pytest.mark.parametrize(
    ("arch", "million_macs", "parameters"),
    [
        ("lenet5", 2.293, 431_080),
        ("vgg11", 152.77, None),
        ("vgg13", 228.27, None),
        ("vgg16", 313.20, None),
        ("vgg19", 398.14, 20_035_018),
        ("resnet56", 125.49, 853_018),
    ],
)
def test_macs_and_parameters_are_the_published_counts(arch, million_macs, parameters):
    net = build(arch, **NETS.get(arch, {}))

    # The counts are published in two decimals.
    assert count_macs(net) / 1e6 == pytest.approx(million_macs, abs=0.005)
    assert parameters is None or count_parameters(net) == parameters


@pytest.mark.parametrize("arch", NETS)
def test_macs_are_half_of_what_the_flop_counter_counts(arch):
    net, x = make_lively_net(arch)
    structure = smaller_structure(net)
    small = prune_channels(net, structure)

    for candidate in (net, small):
        assert count_macs(candidate) * 2 == count_flops(candidate.eval(), x[:1])
    assert count_macs(net, structure) == count_macs(small)
    assert count_macs(small) < count_macs(net)


@pytest.mark.parametrize(
    "options", [{"classes": 7, "channels": 1}, {"classes": 100, "channels": 3}]
)
def test_a_net_takes_any_class_count_and_any_channels(options):
    for arch in ("lenet5", "vgg16", "resnet8"):
        net = build(arch, **options)
        logits = net(torch.zeros(2, options["channels"], 32, 32))
        assert logits.shape == (2, options["classes"])


@pytest.mark.parametrize("arch", ["resnet57", "resnet", "vgg12", "alexnet", "resnet2"])
def test_unknown_nets_are_refused(arch):
    with pytest.raises(UserError, match="unknown network"):
        build(arch)


@pytest.mark.parametrize("widths", [(2, 2), (2, 2, 2, 2), (2, 0, 2)])
def test_too_few_too_many_and_zero_widths_are_refused(widths):
    with pytest.raises(UserError, match="lenet5 has 3 prunable layers, each at least 1 wide"):
        build("lenet5", widths, channels=1, size=28)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "sine"}, "unknown activation 'sine'"),
        ({"convolutions": (models.Convolution(pooling="min"),) * 2}, "unknown pooling 'min'"),
        (
            {"convolutions": (models.Convolution(norm_place="nowhere"),) * 2},
            "place of a batch norm 'nowhere'",
        ),
    ],
)
def test_an_unknown_activation_pooling_or_norm_place_is_refused(changes, words):
    architecture = models.named_architecture("lenet5", channels=1, size=28)

    with pytest.raises(UserError, match=words):
        models.build_net(replace(architecture, **changes), (2, 2, 2))


@pytest.mark.parametrize("arch", models.LARGE_RESNETS)
@torch.no_grad()
def test_the_large_resnets_are_torchvisions(arch):
    case = zoo.Case("pytorch/vision", partial(zoo.make_torchvision, arch), size=32)
    torchvision_net, x = zoo.make_lively(case)
    state = {
        key.replace("fc.", "linear."): value for key, value in torchvision_net.state_dict().items()
    }
    net = build(arch, classes=7, size=32).eval()

    net.load_state_dict(state)

    assert zoo.largest_difference(net(x), torchvision_net(x)) < 1e-4
    assert count_macs(net) * 2 == count_flops(torchvision_net, x[:1])


def test_a_residual_net_is_described_as_it_is_read():
    architecture = models.named_architecture("resnet8")
    unusual = replace(
        architecture,
        stem_stride=2,
        has_stem_pooling=True,
        is_shortcut_averaged=True,
        has_zeros_behind=True,
        activation="gelu",
    )

    assert architecture.in_words() == (
        "resnet8, shortcuts of every second place with zeros around the channels, "
        "stride in convolution 1 of a block, relu"
    )
    assert unusual.in_words() == (
        "resnet8, stride 2 in its first convolution, a pooling of 3 x 3 after its first "
        "convolution, shortcuts of averaged places with zeros after the channels, "
        "stride in convolution 1 of a block, gelu"
    )


def test_fresh_weights_have_the_variance_of_he_and_no_bias():
    torch.manual_seed(0)

    for module in build("vgg16").modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            inputs = module.weight[0].numel()
            assert module.weight.var().item() == pytest.approx(2 / inputs, rel=0.15)
            assert module.bias is None or not module.bias.any()


MODULES_OF_ACTIVATIONS = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "leaky_relu_0.01": nn.LeakyReLU(),
    "leaky_relu_0.1": nn.LeakyReLU(0.1),
    "leaky_relu_0.2": nn.LeakyReLU(0.2),
    "elu": nn.ELU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "relu6": nn.ReLU6(),
    "selu": nn.SELU(),
    "hardswish": nn.Hardswish(),
    "mish": nn.Mish(),
}


@pytest.mark.parametrize("name", models.ACTIVATIONS)
def test_an_activation_is_that_of_pytorchs_module(name):
    x = torch.linspace(-8, 8, 101)

    assert_close(models.activate(x, name), MODULES_OF_ACTIVATIONS[name](x))


@pytest.mark.parametrize("name", models.ACTIVATIONS)
def test_a_max_pooling_reads_what_the_activation_puts_out(name):
    torch.manual_seed(0)
    y = 3 * torch.randn(2, 16, 16, 16)
    prunable = models.PrunableLayer("conv", None, "next", "max", name)

    found = models.finish_layer(y, None, prunable)

    assert_close(found, nn.functional.max_pool2d(MODULES_OF_ACTIVATIONS[name](y), 2))


MODULES_OF_POOLINGS = {
    "max": nn.MaxPool2d(2),
    "average": nn.AvgPool2d(2),
    "max 3 x 3": nn.MaxPool2d(3, 2),
    "padded max 3 x 3": nn.MaxPool2d(3, 2, 1),
    "average 3 x 3": nn.AvgPool2d(3, 2),
    "padded average 3 x 3": nn.AvgPool2d(3, 2, 1),
    "max 3 x 3, stride 3": nn.MaxPool2d(3),
    "max 4 x 4": nn.MaxPool2d(4),
    "average 4 x 4": nn.AvgPool2d(4),
}


@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize("name", models.POOLINGS)
def test_a_pooling_is_that_of_pytorchs_module(name, size):
    x = torch.randn(2, 3, size, size)

    expected = MODULES_OF_POOLINGS[name](x)

    assert_close(models.POOLINGS[name](x), expected)
    assert models.POOLINGS[name].map_size(size) == expected.shape[3]


def test_a_strided_shortcut_takes_every_second_pixel_and_keeps_the_layout_of_gradients():
    block = build("resnet8").layer2[0]
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()

    y = block.shortcut(x)
    (gradient,) = torch.autograd.grad(y.square().sum() / 2, x)

    every_second = x[:, :, ::2, ::2].detach()
    assert torch.equal(y[:, 8:24], every_second)
    assert not y[:, :8].any() and not y[:, 24:].any()
    assert torch.equal(gradient[:, :, ::2, ::2], every_second)
    assert torch.count_nonzero(gradient) == every_second.numel()
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_small_maps_are_convolved_alike_in_training(size):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(6, 5, size, size, requires_grad=True)
    results, calls = [], []
    layer.register_forward_hook(lambda *_: calls.append(layer.training))

    for is_training in (True, False):
        layer.train(is_training).zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = models.run_layer(layer, x).float()
        y.square().sum().backward()
        gradients = x.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()
        results.append((y.detach(), *gradients))
        x.grad = None

    assert calls == [False]  # in training no convolution ran
    assert y.shape == (6, 7, size, size)
    for by_product, by_convolution in zip(*results):
        tolerance = 0.02 * largest(by_convolution)
        assert torch.allclose(by_product, by_convolution, atol=tolerance)


# ---- pruning


@pytest.mark.parametrize("arch", NETS)
def test_removing_channels_equals_masking_them(arch):
    net, x = make_lively_net(arch)
    structure = smaller_structure(net)
    kept_channels = models.most_important_channels(net, structure)
    small = prune_channels(net, structure).eval()
    models.rescale_next_filters(net, kept_channels)
    mask_inputs(net, kept_channels)

    with torch.no_grad():
        masked, removed = net(x), small(x)

    assert small.widths == structure
    assert count_parameters(small) < count_parameters(net)
    assert largest(masked - removed) < 1e-5 * largest(masked)


def mask_inputs(net, kept_channels):
    """Set the channels that are not kept to 0 where the next layer reads them."""

    def make_hook(mask):
        def multiply(_, inputs):
            x = inputs[0]
            if x.dim() == 2:
                return x * mask.repeat_interleave(x.shape[1] // len(mask))
            return x * mask[:, None, None]

        return multiply

    for prunable, width, kept in zip(net.prunable, net.widths, kept_channels):
        mask = torch.zeros(width).index_fill(0, kept, 1.0)
        net.get_submodule(prunable.next_layer_name).register_forward_pre_hook(make_hook(mask))


def test_a_net_that_keeps_everything_is_the_same_net():
    net, x = make_lively_net("resnet20")

    same_net = prune_channels(net, net.widths).eval()

    assert torch.equal(net(x), same_net(x))


def test_importance_is_the_energy_that_the_next_layer_applies():
    net, _ = make_lively_net("lenet5")
    with torch.no_grad():
        net.fc1.weight.zero_()
        # Channel 7 of conv2 feeds 16 inputs of 500 neurons.
        net.fc1.weight[:, 7 * 16 : 8 * 16] = 0.5

    importance = models.channel_importance(net)[1]

    assert importance[7] == pytest.approx(0.25 * 16 * 500)
    assert importance.sum() == importance[7]
    assert models.most_important_channels(net, (20, 1, 500))[1].tolist() == [7]


def test_compensation_keeps_the_energy_of_hurt_filters_and_leaves_the_others():
    net, _ = make_lively_net("lenet5", (2, 2, 2))
    with torch.no_grad():
        net.fc2.weight.zero_()
        # Channel 1 holds 16/25 > 0.8/2 of this filter, and 1/17 of the next one.
        net.fc2.weight[0] = torch.tensor([3.0, 4.0])
        net.fc2.weight[1] = torch.tensor([4.0, 1.0])

    models.rescale_next_filters(net, [torch.arange(2), torch.arange(2), torch.tensor([0])])

    assert net.fc2.weight[0, 0].item() == pytest.approx(5.0)  # (3, 4) -> (5, gone)
    assert net.fc2.weight[1, 0].item() == pytest.approx(4.0)


def test_a_filter_is_rescaled_where_one_of_its_lost_channels_is_strong():
    net, _ = make_lively_net("lenet5", (2, 2, 4))
    with torch.no_grad():
        net.fc2.weight.zero_()
        # Each filter has an energy of 10, and a lost channel with more than 0.8 / 4 of it, 2.0, is
        # strong. The first filter loses a strong channel (2.1), the second none (1.9).
        net.fc2.weight[0] = torch.tensor([6.0, 2.1, 1.0, 0.9]).sqrt()
        net.fc2.weight[1] = torch.tensor([6.0, 1.9, 1.9, 0.2]).sqrt()

    models.rescale_next_filters(net, [torch.arange(2), torch.arange(2), torch.tensor([0])])

    assert_close(net.fc2.weight[:2, 0].detach().square(), torch.tensor([10.0, 6.0]))


# ---- checkpoints


@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20"])
def test_a_checkpoint_comes_back_as_it_was(tmp_path, arch):
    net, x = make_lively_net(arch)
    small = prune_channels(net, smaller_structure(net)).eval()

    models.save_checkpoint(tmp_path / "a.pt", small, {"seed": 3})
    loaded_net, facts = sep.load(tmp_path / "a.pt")

    assert facts == {"seed": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]
    assert torch.equal(loaded_net.eval()(x), small(x))


def test_a_checkpoint_with_a_number_that_is_not_finite_is_refused(tmp_path):
    net, _ = make_lively_net("lenet5")
    net.fc2.bias.data[3] = float("nan")
    models.save_checkpoint(tmp_path / "a.pt", net, {})

    with pytest.raises(UserError, match=r"a\.pt: .*not finite.*fc2\.bias"):
        sep.load(tmp_path / "a.pt")


def without(part):
    """A change of a state dict: it loses what has that part in its name."""
    return lambda state: {key: value for key, value in state.items() if part not in key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda content: content | {"format": models.CHECKPOINT_FORMAT + 1},
            "another checkpoint format",
        ),
        (without("facts"), "is damaged: it lacks facts"),
        (lambda content: content | {"widths": [20, 50, 0]}, "is no positive whole number"),
        (
            lambda content: content | {"widths": [20, 50, 400]},
            r"do not fit a lenet5 .*: fc1\.weight is 500 x 800, not 400 x 800",
        ),
        (
            lambda content: content | {"state": without("fc2.bias")(content["state"])},
            r"fc2\.bias is missing",
        ),
        (
            lambda content: content | {"state": content["state"] | {"fc3.bias": torch.ones(1)}},
            r"fc3\.bias is not in this net",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_why(tmp_path, change, words):
    models.save_checkpoint(tmp_path / "a.pt", build("lenet5", channels=1, size=28), {})
    torch.save(change(torch.load(tmp_path / "a.pt")), tmp_path / "a.pt")

    with pytest.raises(UserError, match=words):
        sep.load(tmp_path / "a.pt")


def test_a_residual_checkpoint_without_hidden_widths_comes_back(tmp_path):
    net, x = make_lively_net("resnet8")
    models.save_checkpoint(tmp_path / "a.pt", net, {})
    content = torch.load(tmp_path / "a.pt")
    del content["architecture"]["hidden_widths"]
    torch.save(content, tmp_path / "a.pt")

    assert torch.equal(sep.load(tmp_path / "a.pt")[0].eval()(x), net(x))


def prefix_keys(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def to_double(state):
    return {
        key: value.double() if value.is_floating_point() else value for key, value in state.items()
    }


def read_case(name):
    """(the net of the zoo, a batch, its logits, the readings that take images of its size)."""
    case = zoo.CASES[name]
    net, x = zoo.make_lively(case)
    with torch.no_grad():
        expected = net(x)
    readings = models.recognise_state_dict(net.state_dict(), Path("a.pt"))["readings"]
    fitting = (reading.for_size(case.size) for reading in readings)
    return net, x, expected, [reading for reading in fitting if reading is not None]


@torch.no_grad()
def find_right_reading(name):
    """(the net of the reading that computes what the zoo's net does, a batch, its logits)."""
    _, x, expected, readings = read_case(name)
    for reading in readings:
        net = reading.build().eval()
        if zoo.largest_difference(net(x), expected) < 1e-4:
            return net, x, expected
    raise AssertionError(f"no reading of {name} computes its logits")


@pytest.mark.parametrize("name", zoo.CASES)
def test_the_nets_of_public_repositories_are_read(name):
    _, x, expected, readings = read_case(name)

    def is_right(reading):
        return zoo.largest_difference(reading.build().eval()(x), expected) < 1e-4

    with torch.no_grad():
        # Where names and shapes settle it, it is the first.
        assert is_right(readings[0]) or not zoo.CASES[name].is_first_reading
        assert any(map(is_right, readings))


@pytest.mark.parametrize("name", zoo.CASES)
def test_the_nets_of_public_repositories_are_pruned_gated_and_counted(name):
    net, x, _ = find_right_reading(name)
    folded = models.fold_batch_norms(net)

    check_pruning(net, x)

    if getattr(net.architecture, "has_stem_norm", False):
        assert isinstance(folded.bn1, nn.Identity)


@torch.no_grad()
def check_pruning(net, x):
    """Removing channels equals masking them; all ways to run a net, and both counts, agree."""
    structure = smaller_structure(net, share=0.5)
    small = prune_channels(net, structure).eval()
    soft = sep.prune_softly(net, structure, [x]).eval()

    kept_channels = models.most_important_channels(net, structure)
    masked = deepcopy(net)
    models.rescale_next_filters(masked, kept_channels)
    mask_inputs(masked, kept_channels)
    assert zoo.largest_difference(small(x), masked(x)) < 1e-4
    assert zoo.largest_difference(small(x), soft(x)) < 1e-4
    tuned = sep.TunedNet(soft)
    assert zoo.largest_difference(tuned(x[:1]), soft(x[:1])) < 1e-4
    assert zoo.largest_difference(models.fold_batch_norms(net)(x), net(x)) < 1e-4
    for candidate in (net, small):
        assert count_macs(candidate) * 2 == count_flops(candidate, x[:1])
    assert small.structure == structure


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("ResNet-18 of torchvision", 224),
        ("ResNet-50 of torchvision", 224),
        ("VGG-11 of torchvision", 224),
        ("ResNet, option B", 32),
        ("VGG-16, one linear layer", 32),
        ("LeNet of 10, 20 and 50", 28),
    ],
)
def test_a_state_dict_alone_is_read_for_images_of_the_usual_size(name, size):
    state = zoo.CASES[name].make().state_dict()

    readings = models.recognise_state_dict(state, Path("a.pt"))["readings"]

    assert readings[0].architecture.size == size


@torch.no_grad()
def test_a_resnet_d_averages_the_cut_windows_of_odd_maps():
    foreign_net, *_ = read_case("ResNet-D")
    net, *_ = find_right_reading("ResNet-D")
    x = torch.randn(2, 3, 33, 33)

    assert_close(net(x), foreign_net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["LeNet, padded", "VGG-16, batch norm in its head", "ResNet, zeros behind", "wide ResNet"],
)
def test_the_nets_of_public_repositories_are_saved_and_exported(tmp_path, name):
    net, x, _ = find_right_reading(name)
    net = prune_channels(net, smaller_structure(net)).eval()

    models.save_checkpoint(tmp_path / "a.pt", net, {})
    loaded_net, _ = sep.load(tmp_path / "a.pt")
    statistics = [[0.5] * net.channels, [0.25] * net.channels]
    difference = models.export_net(net, tmp_path / "a.pt2", *statistics, net.size)

    assert loaded_net.architecture == net.architecture
    assert torch.equal(loaded_net.eval()(x), net(x))
    assert difference < 1e-4


WRAPPERS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "best_prec1": 1.0},
    "net, DataParallel": lambda state: {"net": prefix_keys(state, "module.")},
    "Lightning": lambda state: {"epoch": 3, "state_dict": prefix_keys(state, "model.")},
    "torch.compile": lambda state: prefix_keys(state, "_orig_mod.module."),
    "model, float64": lambda state: {"model": to_double(state)},
    "prefixes of all layers": lambda state: prefix_keys(state, "backbone.net."),
    "any name, nested": lambda state: {"epoch": 3, "weights": {"network": state}},
    "the best one": lambda state: {"optimal_state_dict": state, "optimizer": {"a": torch.ones(2)}},
    "a tuple": lambda state: (state, 0.93),
    "losses and counters": lambda state: {
        "criterion.weight": torch.ones(10),
        **state,
        "total_ops": torch.zeros(1),
        "n_averaged": torch.tensor(3),
    },
    "the average beside it": lambda state: {
        "state_dict": {key: torch.zeros_like(value) for key, value in state.items()},
        "state_dict_ema": prefix_keys(state, "module."),
        "optimizer": {"momentum": {"fc.weight": torch.ones(2, 2)}},
    },
    "both copies in one": lambda state: {
        **{f"model.{key}": torch.zeros_like(value) for key, value in state.items()},
        **prefix_keys(state, "ema_model.module."),
    },
}


@pytest.mark.parametrize(
    ("arch", "wrapper"),
    [*((arch, "bare") for arch in NETS), *(("resnet20", wrapper) for wrapper in WRAPPERS)],
)
def test_a_foreign_state_dict_is_recognised(tmp_path, arch, wrapper):
    net, x = make_lively_net(arch)
    small = prune_channels(net, smaller_structure(net)).eval()
    torch.save(WRAPPERS[wrapper](small.state_dict()), tmp_path / "a.pth")

    loaded_net, _ = sep.load(tmp_path / "a.pth")

    assert loaded_net.arch == arch
    assert loaded_net.widths == small.widths
    assert torch.allclose(loaded_net.eval()(x), small(x), atol=1e-6)


def test_a_convolution_bias_in_front_of_batch_norm_is_folded(tmp_path):
    net, x = make_lively_net("vgg16")
    expected = net(x)
    state = net.state_dict()
    for prunable in net.prunable:
        # A bias, and a running mean that takes it away again.
        bias = torch.randn(net.get_submodule(prunable.layer_name).out_channels)
        state[f"{prunable.layer_name}.bias"] = bias
        key = f"{prunable.norm_name}.running_mean"
        state[key] = state[key] + bias
    torch.save(state, tmp_path / "a.pth")

    loaded_net, _ = sep.load(tmp_path / "a.pth")

    assert torch.allclose(loaded_net.eval()(x), expected, atol=1e-4)


@pytest.mark.parametrize("dropout_first", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_torchvisions_vgg_is_recognised_with_its_head(tmp_path, has_bias, dropout_first):
    torchvision_net, x, expected = make_torchvision_vgg(has_bias, dropout_first)
    torch.save(torchvision_net.state_dict(), tmp_path / "a.pth")

    net = sep.load(tmp_path / "a.pth")[0].eval()

    assert net.arch == "vgg11"
    assert net.head_size == 2
    assert net.widths[-3:] == (64, 40, 30)
    assert net.classes == 7
    assert torch.allclose(net(x), expected, atol=1e-5)


@pytest.mark.parametrize("dropout_first", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_torchvisions_vgg_is_pruned_and_saved_with_its_head(tmp_path, has_bias, dropout_first):
    torchvision_net, _, _ = make_torchvision_vgg(has_bias, dropout_first)
    torch.save(torchvision_net.state_dict(), tmp_path / "a.pth")
    net = sep.load(tmp_path / "a.pth")[0].eval()
    assert net.size == 64  # of which its poolings leave the 2 x 2 places that its head reads
    x = torch.randn(3, 3, net.size, net.size)
    structure = tuple(width // 2 for width in net.widths)

    small = prune_channels(net, structure).eval()
    soft = sep.prune_softly(net, structure, [x]).eval()
    models.save_checkpoint(tmp_path / "b.pt", small, {})
    loaded_net = sep.load(tmp_path / "b.pt")[0].eval()

    assert torch.allclose(small(x), soft(x), atol=1e-5)
    assert small.prunable[-1].next_layer_name == "classifier.6"
    assert torch.equal(loaded_net(x), small(x))
    assert count_flops(small, x[:1]) == 2 * count_macs(small)


def make_torchvision_vgg(has_bias, dropout_first):
    """(torchvision's VGG-11 of an eighth of its widths, a batch, its logits)."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    narrow = [width if width == "M" else width // 8 for width in cfgs["A"]]
    features = make_layers(narrow, batch_norm=True)
    head = [nn.Dropout()] if dropout_first else []
    head += [nn.Linear(64 * 4, 40), nn.ReLU(), nn.Dropout()]
    head += [nn.Linear(40, 30), nn.ReLU(), nn.Dropout(), nn.Linear(30, 7)]
    net = nn.ModuleDict({"features": features, "classifier": nn.Sequential(*head)}).eval()
    for module in features:
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.randn_like(module.bias)) if has_bias else None
    x = torch.randn(3, 3, 32, 32)
    pooled = nn.functional.adaptive_avg_pool2d(features(x), 2).flatten(1)
    return net, x, net["classifier"](pooled)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("layer2.0.conv2"), r"batch norm layer2\.0\.bn2 follows no layer of its width"),
        (without("layer2.0.bn2"), "has 2 convolutions and 1 batch norms"),
        (without("linear"), "a residual net without a linear layer at its end"),
        (
            lambda state: (
                state | {"linear2.weight": torch.ones(10, 9), "linear2.bias": torch.ones(10)}
            ),
            "layer linear2 reads 9 numbers and layer linear, before it, puts out 10",
        ),
        (without("layer1.0.bn1.running_var"), "of no net that this tool knows .*running_var"),
        (
            lambda state: state | {"linear.weight": torch.ones(10, 63)},
            "linear reads 63 numbers and the blocks put out 64 channels",
        ),
        (
            lambda state: state | {"layer1.0.conv2.weight": torch.ones(16, 8, 3, 3)},
            r"convolutions of the block of layer1\.0\.conv1 do not chain",
        ),
        (
            lambda state: state | {"layer1.0.se.weight": torch.ones(16, 16)},
            r"layer1\.0\.se is a linear layer in a block \(squeeze-and-excitation",
        ),
        (
            lambda state: {"conv1.weight": state["conv1.weight"], "scale": torch.ones(1)} | state,
            "scale is a parameter of no known layer",
        ),
        (
            lambda state: (
                {"conv1.weight": state["conv1.weight"], "act.weight": torch.ones(1)} | state
            ),
            "act looks like a PReLU, not a batch norm",
        ),
        (
            lambda state: state | {"activations.0.weight": torch.ones(16)},
            r"activations\.0 looks like a PReLU, whose slopes",
        ),
        (
            lambda state: {"act.weight": torch.ones(1)} | state,
            "act looks like a PReLU, whose slopes",
        ),
        (
            lambda state: (
                {key.replace("linear", "head"): value for key, value in state.items()}
                | {"head.bias": torch.full((10,), float("nan"))}
            ),
            r"not finite numbers, in head\.bias: take",
        ),
        (
            lambda state: state | {"gates.0.initial_scale": torch.ones(16)},
            "do not say how many kernels its gates keep",
        ),
        (
            lambda state: state | {"layer1.0.conv1.weight": torch.ones(16, 16, 3, 1)},
            r"layer1\.0\.conv1 has kernels that are not square",
        ),
        (
            lambda state: state | {"layer1.0.conv1.weight": torch.ones(16, 16, 1, 1)},
            "of different kinds, of kernels 1 x 3 and of 3 x 3",
        ),
    ],
)
def test_a_misfit_is_named(tmp_path, change, words):
    torch.save(change(build("resnet8").state_dict()), tmp_path / "a.pt")

    with pytest.raises(UserError, match=words):
        sep.load(tmp_path / "a.pt")


def test_the_names_of_torchvision_and_of_its_tutorial_are_known(tmp_path):
    net, x = make_lively_net("resnet20")
    state = {key.replace("linear", "fc"): value for key, value in net.state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "a.pt")

    loaded_net, _ = sep.load(tmp_path / "a.pt")

    assert torch.equal(loaded_net.eval()(x), net(x))


def flip_bits(content, place):
    """The content eight times, each with another bit of one byte flipped."""
    for bit in range(8):
        flipped = bytearray(content)
        flipped[int(place * len(flipped))] ^= 1 << bit
        yield flipped


@pytest.mark.parametrize("name", ["a.pt", "c.pt"])
def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path, name):
    models.save_checkpoint(tmp_path / "a.pt", build("resnet8"), {})
    torch.save(build("resnet8").state_dict(), tmp_path / "c.pt")

    for content in flip_bits((tmp_path / name).read_bytes(), 0.5):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            models.read_checkpoint(tmp_path / name)


def test_a_flipped_bit_in_unfinished_work_is_found(tmp_path):
    path = tmp_path / "b.pt"
    models.write_tensors(path, {"title": "t", "x": torch.zeros(1000)})
    assert models.read_unfinished_work(path, "t", {"x"})
    assert not models.read_unfinished_work(path, "other", {"x"})

    intact_content = path.read_bytes()
    # The middle of the tensor, the last record, and three places in the zip's directory.
    for place in (0.5, 0.9, 0.93, 0.96, 0.99):
        for content in flip_bits(intact_content, place):
            path.write_bytes(content)
            work = models.read_unfinished_work(path, "t", {"x"})
            # In the zip's directory some bits mean nothing.
            assert work is None or torch.equal(work["x"], torch.zeros(1000))


class Evil:
    """What runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


def quantise(tensor):
    with warnings.catch_warnings(action="ignore"):
        return torch.quantize_per_tensor(tensor, scale=0.1, zero_point=0, dtype=torch.qint8)


def write_broken_files(folder):
    """Files that are no checkpoints, each in another way; returns their names."""
    net = build("resnet8")
    state = net.state_dict()
    checkpoint = {
        "format": 1,
        "arch": "resnet8",
        "widths": [1],
        "classes": 10,
        "channels": 3,
        "size": 32,
        "side": 1,
        "gates": None,
        "state": state,
        "facts": {},
    }
    complex_state = {
        key: value.to(torch.complex64) if value.is_floating_point() else value
        for key, value in state.items()
    }
    contents = {
        "evil": {"state_dict": Evil()},
        "module": net,
        "list": [1, 2],
        "other": {"a.weight": torch.ones(2)},
        "lacking": {key: value for key, value in state.items() if "bn2" not in key},
        "shape": state | {"linear.weight": torch.ones(10, 63)},
        "nan": state | {"linear.bias": torch.full((10,), float("nan"))},
        "format": {"format": torch.ones(2)},
        "complex": complex_state,
        "quantised": state | {"linear.weight": quantise(state["linear.weight"])},
        "half": {"format": 1, "arch": "resnet8"},
        "widths": checkpoint,
        "types": checkpoint | {"widths": "abc", "classes": None},
        "state": checkpoint | {"state": 7},
        "zero": checkpoint | {"widths": [16, 32, 64], "classes": 0},
        "text_in_state": checkpoint | {"widths": [16, 32, 64], "state": {"conv1.weight": "text"}},
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
    torch.save(state, folder / "whole.pt")
    (folder / "cut.pt").write_bytes((folder / "whole.pt").read_bytes()[:5000])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("hello")
    (folder / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    return [f"{name}.pt" for name in ("cut", "empty", "text", "pickle", *contents)]


def test_sparse_weights_and_those_that_torch_masks_are_read_as_they_compute(tmp_path):
    net, x = make_lively_net("lenet5")
    pruned = deepcopy(net)
    prune.random_unstructured(pruned.conv2, "weight", amount=0.5)
    expected = pruned(x)  # before it is saved: here the mask is applied

    torch.save(pruned.state_dict(), tmp_path / "masked.pt")
    prune.remove(pruned.conv2, "weight")
    state = pruned.state_dict()
    torch.save(state | {"fc1.weight": state["fc1.weight"].to_sparse()}, tmp_path / "sparse.pt")

    for name in ("masked.pt", "sparse.pt"):
        assert torch.equal(sep.load(tmp_path / name)[0].eval()(x), expected)


def test_what_lies_harmless_beside_the_weights_is_read(tmp_path):
    net, x = make_lively_net("resnet8")
    content = {
        "best": np.float64(93.4),
        "epochs": np.int64(3),
        "is_best": np.bool_(True),
        "losses": np.arange(4.0),
        "options": argparse.Namespace(lr=0.1, folder=Path("runs")),
        # Between the layers: thop's counts of operations, the observer of a quantisation.
        "state_dict": {
            "conv1.weight": net.conv1.weight.data,
            "total_ops": torch.zeros(1),
            "act.activation_post_process.scale": torch.ones(1),
        }
        | net.state_dict()
        # Behind them: the weights of the classes in a loss.
        | {"criterion.weight": torch.ones(10)},
    }
    torch.save(content, tmp_path / "a.pt")

    assert torch.equal(sep.load(tmp_path / "a.pt")[0].eval()(x), net(x))


def test_what_was_taken_from_a_file_is_noted(tmp_path):
    state = build("resnet8").state_dict()
    torch.save({"model": state, "model_ema": state}, tmp_path / "a.pt")
    half = {key: value.half() if value.dim() else value for key, value in state.items()}
    torch.save(half, tmp_path / "b.pt")

    notes = models.read_checkpoint(tmp_path / "a.pt")["notes"]
    assert notes == [
        f"{tmp_path}/a.pt holds several state dicts; taken is model_ema, not model; for another: "
        "torch.save(torch.load(FILE)['model'], 'other.pt')"
    ]
    torch.save({"epoch": 3, "nets": [state, state]}, tmp_path / "d.pt")
    (note,) = models.read_checkpoint(tmp_path / "d.pt")["notes"]
    assert note.endswith("torch.save(torch.load(FILE)['nets'][1], 'other.pt')")
    notes = models.read_checkpoint(tmp_path / "b.pt")["notes"]
    assert notes == ["its weights are in float16; they are computed in float32"]
    torch.save({"scale": torch.ones(16)} | state, tmp_path / "c.pt")
    notes = models.read_checkpoint(tmp_path / "c.pt")["notes"]
    assert notes == [
        f"{tmp_path}/c.pt: scale (16 numbers) are of no layer and not used; if the net computes "
        "with them, it is read wrongly"
    ]


@pytest.mark.parametrize("prefix", ["", "normalize."])
@pytest.mark.parametrize("has_example", [False, True])
def test_a_net_may_normalise_its_inputs_itself(tmp_path, prefix, has_example):
    net, x = make_lively_net("resnet8")
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    shape = (1, 3, 1, 1)
    buffers = {f"{prefix}mean": mean.reshape(shape), f"{prefix}std": std.reshape(shape)}
    content = {"state_dict": buffers | net.state_dict()}
    if has_example:
        inputs = x * std.reshape(shape) + mean.reshape(shape)
        content |= {"inputs": inputs, "outputs": net(x)}
    torch.save(content, tmp_path / "a.pt")
    torch.save(buffers | net.state_dict(), tmp_path / "b.pt")

    for name in ("a.pt", "b.pt"):
        loaded_net, facts = sep.load(tmp_path / name)
        assert torch.equal(loaded_net.eval()(x), net(x))
        assert facts == {"mean": pytest.approx(mean.tolist()), "std": pytest.approx(std.tolist())}


def test_a_net_that_normalises_itself_may_read_normalised_images():
    inner = {"mean": [127.5], "std": [51.0]}

    by_pixels = models.combine_normalisations({}, inner)
    of_both = models.combine_normalisations({"mean": [0.5], "std": [0.1]}, inner)

    assert by_pixels == {"mean": [pytest.approx(0.5)], "std": [pytest.approx(0.2)]}
    divided_alone = models.combine_normalisations({}, {"mean": [0.0], "std": [255.0]})
    assert divided_alone == {"mean": [0.0], "std": [pytest.approx(1.0)]}
    assert of_both == {"mean": [pytest.approx(13.25)], "std": [pytest.approx(5.1)]}


def test_a_net_that_divides_its_inputs_by_0_is_refused(tmp_path):
    buffers = {"mean": torch.zeros(3, 1, 1), "std": torch.tensor([0.2, 0.0, 0.2])[:, None, None]}
    torch.save(buffers | make_lively_net("resnet8")[0].state_dict(), tmp_path / "a.pt")

    with pytest.raises(UserError, match="its std, by which it divides its inputs, is not above 0"):
        sep.load(tmp_path / "a.pt")


def test_a_tensor_with_the_name_of_a_wrapper_is_no_traceback(tmp_path):
    net, x = make_lively_net("resnet8")
    torch.save(net.state_dict() | {"module": torch.tensor(3)}, tmp_path / "a.pt")

    assert torch.equal(sep.load(tmp_path / "a.pt")[0].eval()(x), net(x))


def test_a_batch_norm_between_the_last_linear_layers_of_a_resnet_is_refused(tmp_path):
    state = make_lively_net("resnet8")[0].state_dict()
    head = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    body = {key: value for key, value in state.items() if not key.startswith("linear.")}
    named_head = {f"fc.{key}": value for key, value in head.state_dict().items()}
    torch.save(body | named_head, tmp_path / "a.pt")

    with pytest.raises(UserError, match=r"fc\.1 is a batch norm between the last linear layers"):
        sep.load(tmp_path / "a.pt")


def test_of_several_dicts_the_largest_says_why_none_is_read(tmp_path):
    state = {"conv1.weight": torch.ones(8, 3, 3, 3), "conv2.weight": torch.ones(8, 1, 3, 3)}
    content = {"confusion": {"matrix": torch.ones(10, 10)}, "state_dict": state}
    torch.save(content, tmp_path / "a.pt")

    with pytest.raises(UserError, match="conv2"):
        sep.load(tmp_path / "a.pt")


def test_a_residual_net_with_a_hidden_linear_layer_is_pruned_saved_and_tuned(tmp_path):
    net = make_net_of_zoo("ResNet, two linear layers")
    x = torch.randn(2, 3, 32, 32)
    assert net.architecture.hidden_widths == (24,)

    small = prune_channels(net, smaller_structure(net)).eval()
    models.save_checkpoint(tmp_path / "a.pt", small, {})
    loaded_net = sep.load(tmp_path / "a.pt")[0].eval()

    with torch.no_grad():
        assert torch.equal(loaded_net(x), small(x))
        assert largest(sep.tune(small)(x[:1]) - small(x[:1])) < 1e-4 * largest(small(x))
        assert count_flops(small, x[:1]) == 2 * count_macs(small)
    models.export_net(small, tmp_path / "a.pt2", (0.0,) * 3, (1.0,) * 3, 32)


def make_net_of_zoo(name):
    """The likeliest reading of a net of the zoo."""
    return read_case(name)[3][0].build().eval()


def test_weights_in_half_precision_compute_what_they_do_in_float32(tmp_path):
    net, x = make_lively_net("resnet8")
    for dtype in (torch.float16, torch.bfloat16):
        torch.save(deepcopy(net).to(dtype).state_dict(), tmp_path / "a.pt")

        loaded_net, _ = sep.load(tmp_path / "a.pt")

        expected = deepcopy(net).to(dtype).float()(x)
        assert torch.allclose(loaded_net.eval()(x), expected, atol=1e-5)


def save_with_example(path, net, x):
    """A file of a net's weights, of inputs and of what it puts out for them."""
    inputs = torch.cat([x, -x])
    torch.save({"state_dict": net.state_dict(), "inputs": inputs, "outputs": net(inputs)}, path)


USUAL_NETS_WITH_EXAMPLES = [
    # (name, activation)
    ("CNN of large kernels, averaged", "selu"),
    ("CNN in blocks, averaged", "relu6"),
    ("VGG-16 without batch norms", "mish"),
    ("ResNet, averaged shortcut", "relu"),
    ("bottlenecks", "hardswish"),
    ("wide ResNet", "leaky_relu_0.01"),
]


@pytest.mark.parametrize(("name", "activation"), USUAL_NETS_WITH_EXAMPLES)
@torch.no_grad()
def test_an_example_tells_how_a_net_is_read(tmp_path, name, activation):
    case = zoo.CASES[name]
    with zoo.replace_relu(activation):
        net, x = zoo.make_lively(case)
        save_with_example(tmp_path / "a.pt", net, x)
        expected = net(x.flip(3))

    loaded_net, checkpoint = sep.load_checkpoint(tmp_path / "a.pt")

    assert loaded_net.architecture.activation == activation
    assert zoo.largest_difference(loaded_net.eval()(x.flip(3)), expected) < 1e-4
    assert checkpoint["has_example"]
    assert [each.architecture for each in checkpoint["readings"]] == [loaded_net.architecture]
    assert checkpoint["notes"] == [
        f"{tmp_path}/a.pt: read as {loaded_net.architecture.in_words()}; so it computes the "
        "outputs in the file"
    ]


WORDS_OF_EXAMPLE_CASES = {
    "AlexNet": "stride 4 in convolution 1, max 3 x 3 pooling after convolution 1, "
    "max 3 x 3 pooling after convolution 2, padding 1 and 2,",
    "strided CNN, averaged": "stride 2 in convolution 1, stride 2 in convolution 2, stride 2 in "
    "convolution 3, padding 1,",
    "CNN, padded poolings of 3 x 3": "padded max 3 x 3 pooling after convolution 2, padding 1,",
    "CNN, averages of 3 x 3": "average 3 x 3 pooling after convolution 1, ",
    "CNN, poolings of 4 x 4": "max 4 x 4 pooling after convolution 1, ",
    "CNN, norm before the pooling": "batch norms after activation, padding 1,",
    "CNN, norm after the pooling": "batch norms after pooling, padding 1,",
    "sequence, norms after relus": "batch norms after activation, padding 1,",
}


@torch.no_grad()
def load_example_case(name, path):
    """(the net of the zoo, a batch, the net that is read from its file with an example)."""
    net, x = zoo.make_lively(zoo.EXAMPLE_CASES[name])
    if "norm" in name:
        for module in net.modules():
            # With a negative scale the order of norm and max-pooling matters.
            if isinstance(module, nn.BatchNorm2d):
                module.weight[::2] *= -1
    save_with_example(path, net, x)
    return net, x, sep.load(path)[0].eval()


@pytest.mark.parametrize("name", zoo.EXAMPLE_CASES)
@torch.no_grad()
def test_unusual_chains_with_an_example_are_read_pruned_and_gated(tmp_path, name):
    net, x, loaded_net = load_example_case(name, tmp_path / "a.pt")

    assert zoo.largest_difference(loaded_net(x.flip(3)), net(x.flip(3))) < 1e-4
    assert WORDS_OF_EXAMPLE_CASES.get(name, "") in loaded_net.architecture.in_words()
    check_pruning(loaded_net, x)
    models.save_checkpoint(tmp_path / "b.pt", loaded_net, {})
    assert torch.equal(sep.load(tmp_path / "b.pt")[0].eval()(x), loaded_net(x))


@pytest.mark.parametrize(
    "name",
    [
        "AlexNet",
        "CNN, padded poolings of 3 x 3",
        "CNN, averages of 3 x 3",
        "CNN, norm before the pooling",
        "CNN, norm after the pooling",
    ],
)
@torch.no_grad()
def test_unusual_chains_are_exported(tmp_path, name):
    net, x, loaded_net = load_example_case(name, tmp_path / "a.pt")
    statistics = (0.5,) * loaded_net.channels

    models.export_net(loaded_net, tmp_path / "a.pt2", statistics, statistics, x.shape[2])

    exported = torch.export.load(tmp_path / "a.pt2").module()
    assert zoo.largest_difference(exported(0.5 * x + 0.5), net(x)) < 1e-4


def test_what_an_example_leaves_open_is_said(tmp_path):
    net, x = make_lively_net("lenet5")

    def read_note(inputs, outputs):
        content = {"state_dict": net.state_dict(), "inputs": inputs, "outputs": outputs}
        torch.save(content, tmp_path / "a.pt")
        (note,) = models.read_checkpoint(tmp_path / "a.pt")["notes"]
        return note

    outputs = net(x).detach()
    assert read_note(x, outputs).endswith("relu; so it computes the outputs in the file")
    note = read_note(x, outputs * (1 + 0.005 * torch.randn_like(outputs)))  # as a GPU rounds
    assert "outputs in the file, but for a difference of " in note
    assert "whose activation has another slope" in note
    # No activation is above 6 where inputs are small.
    note = read_note(0.05 * x, net(0.05 * x))
    assert note.endswith("outputs in the file; so does relu6: larger inputs would tell")


def test_safetensors_may_hold_an_example(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    net, x = zoo.make_lively(zoo.CASES["CNN in blocks, averaged"])
    outputs = net(x).detach()
    tensors = {"inputs": x, "outputs": outputs, "mean": torch.zeros(3), "std": torch.ones(3)}
    safetensors_torch.save_file(net.state_dict() | tensors, tmp_path / "a.safetensors")

    loaded_net, facts = sep.load(tmp_path / "a.safetensors")

    assert zoo.largest_difference(loaded_net.eval()(x.flip(3)), net(x.flip(3))) < 1e-4
    assert facts == {"mean": [0.0] * 3, "std": [1.0] * 3}


def test_a_normaliser_in_a_file_in_alphabetical_order_is_no_convolution(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    net, x = make_lively_net("resnet8")
    state = {f"model.{key.replace('layer', 'block')}": v for key, v in net.state_dict().items()}
    buffers = {"normalize.mean": torch.zeros(1, 3, 1, 1), "normalize.std": torch.ones(1, 3, 1, 1)}
    safetensors_torch.save_file(state | buffers, tmp_path / "a.safetensors")

    loaded_net, facts = sep.load(tmp_path / "a.safetensors")

    assert facts == {"mean": [0.0] * 3, "std": [1.0] * 3}
    assert torch.allclose(loaded_net.eval()(x), net(x), atol=1e-5)


@pytest.mark.parametrize("key", ["conv1.gain", "fc1.lora_A", "conv2.scale"])
def test_a_parameter_that_a_layer_has_besides_is_refused(tmp_path, key):
    state = make_lively_net("lenet5")[0].state_dict()
    torch.save(state | {key: torch.ones(3, 2)}, tmp_path / "a.pt")

    with pytest.raises(UserError, match=rf"{key} is a parameter of no known layer"):
        sep.load(tmp_path / "a.pt")


def test_an_infinite_number_that_is_of_no_layer_is_ignored(tmp_path):
    net, x = make_lively_net("resnet8")
    observer = {"relu.activation_post_process.min_val": torch.tensor(torch.inf)}
    torch.save(observer | net.state_dict(), tmp_path / "a.pt")

    assert torch.allclose(sep.load(tmp_path / "a.pt")[0].eval()(x), net(x), atol=1e-5)


@pytest.mark.parametrize(
    ("start", "smallest"),
    [
        ({}, 8),
        ({"stem_stride": 2}, 20),
        ({"has_stem_pooling": True}, 20),
        ({"has_stem_pooling": True, "stem_pooling_kernel": 2}, 20),
    ],
)
def test_averaged_shortcuts_take_only_images_whose_maps_are_even_where_they_are_halved(
    start, smallest
):
    architecture = replace(models.named_architecture("resnet8"), **start)
    averaged = replace(architecture, is_shortcut_averaged=True)

    # In smaller images a shortcut of a single place would be broadcast to the whole map.
    for size in range(smallest, smallest + 32):
        net = models.build_net(replace(averaged, size=size), models.default_widths("resnet8"))
        try:
            net.eval()(torch.zeros(1, 3, size, size))
            runs = True
        except RuntimeError:
            runs = False
        assert averaged.fits_size(size) == runs
        assert architecture.fits_size(size)


@pytest.mark.parametrize("form", ["nested", "flat", "safetensors"])
def test_a_mean_and_std_are_taken_without_inputs_and_outputs(tmp_path, form):
    state = make_lively_net("resnet8")[0].state_dict()
    normalisation = {"mean": torch.full((3,), 0.5), "std": torch.full((3, 1, 1), 0.25)}
    path = tmp_path / "a.pt"
    if form == "safetensors":
        path = tmp_path / "a.safetensors"
        pytest.importorskip("safetensors.torch").save_file(state | normalisation, path)
    else:
        weights = state if form == "flat" else {"net": state}
        torch.save(weights | normalisation, path)

    checkpoint = models.read_checkpoint(path)

    assert checkpoint["facts"] == {"mean": [0.5] * 3, "std": [0.25] * 3}
    assert len(checkpoint["readings"]) > 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"mean": [0.5]}, "it has a mean but no std; leave out"),
        ({"std": [0.5]}, "it has a std but no mean; leave out"),
        ({"mean": [127.0], "std": [50.0]}, "between 0 and 1 (divide by 255 if yours go up to"),
        ({"mean": [0.93, 0.92], "std": [0.1, 0.2]}, "its mean has to be one number between"),
        ({"mean": None, "std": [0.5]}, "its mean has to be one number between 0 and 1"),
    ],
)
def test_a_mean_and_std_that_are_none_of_images_are_not_used(tmp_path, content, words):
    net, x = make_lively_net("lenet5")
    content = {"net": net.state_dict()} | content
    torch.save(content, tmp_path / "a.pt")

    checkpoint = models.read_checkpoint(tmp_path / "a.pt")

    assert checkpoint["facts"] == {}
    (note,) = checkpoint["notes"]
    assert words in note
    assert note.endswith("; so they are ignored")
    # Beside inputs and outputs they are meant for this tool.
    torch.save(content | {"inputs": x, "outputs": net(x)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=re.escape(words)):
        models.read_checkpoint(tmp_path / "a.pt")


def test_what_is_named_mean_and_std_may_be_something_else(tmp_path):
    net, _ = make_lively_net("lenet5")

    for content in ({"mean": net.state_dict()}, {"net": net.state_dict(), "mean": None}):
        torch.save(content, tmp_path / "a.pt")
        checkpoint = models.read_checkpoint(tmp_path / "a.pt")
        assert (checkpoint["facts"], checkpoint["notes"]) == ({}, [])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"inputs": torch.randn(4, 1, 28, 28)}, "it has inputs but no outputs; make them by"),
        ({"outputs": torch.randn(4, 10)}, "it has outputs but no inputs; make them by"),
        (
            {"inputs": [0.5], "outputs": torch.randn(4, 10)},
            "its inputs are no tensor, but list; make them by",
        ),
    ],
)
def test_half_an_example_is_refused(tmp_path, content, words):
    net, _ = make_lively_net("lenet5")
    torch.save({"net": net.state_dict()} | content, tmp_path / "a.pt")

    with pytest.raises(UserError, match=words):
        models.read_checkpoint(tmp_path / "a.pt")


def test_inputs_and_outputs_that_are_no_tensors_are_no_example(tmp_path):
    net, _ = make_lively_net("lenet5")
    torch.save({"state_dict": net.state_dict(), "inputs": 784, "outputs": 10}, tmp_path / "a.pt")

    checkpoint = models.read_checkpoint(tmp_path / "a.pt")

    assert not checkpoint["has_example"] and len(checkpoint["readings"]) > 1


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.softmax(1),
        lambda logits: logits.log_softmax(1),
        lambda logits: logits * (1 + 0.005 * torch.randn_like(logits)),  # rounded by a GPU
        lambda logits: logits.double().requires_grad_(),
        lambda logits: logits.softmax(1).bfloat16(),
        lambda logits: logits.softmax(1).half(),
        lambda logits: logits.double().softmax(1),
        lambda logits: logits.numpy(),
        lambda logits: logits - 1000,
    ],
)
def test_an_example_may_be_of_probabilities_and_rounded(tmp_path, change):
    net, x = make_lively_net("lenet5")
    content = {"net": net.state_dict(), "inputs": x, "outputs": change(net(x).detach())}
    torch.save(content | {"mean": torch.tensor([0.2]), "std": (0.5,)}, tmp_path / "a.pt")

    loaded_net, facts = sep.load(tmp_path / "a.pt")

    assert loaded_net.architecture == net.architecture
    assert torch.equal(loaded_net.eval()(x), net(x))
    assert facts == {"mean": [pytest.approx(0.2)], "std": [0.5]}


def test_a_late_norm_that_changes_little_is_not_taken_for_an_early_one(tmp_path):
    early = models.Convolution(5, 0, has_norm=True, pooling="max")
    late = replace(early, norm_place=models.AFTER_ACTIVATION)
    architecture = models.named_architecture("lenet5", channels=1, size=28)
    torch.manual_seed(0)
    net = models.build_net(replace(architecture, convolutions=(late, late)), (4, 8, 20))
    for prunable in net.prunable[:2]:
        nn.init.normal_(net.get_submodule(prunable.norm_name).bias, 0, 0.002)
    x = torch.randn(4, 1, 28, 28)
    content = {"net": net.state_dict(), "inputs": x, "outputs": net.eval()(x)}
    torch.save(content, tmp_path / "a.pt")

    loaded_net, _ = sep.load(tmp_path / "a.pt")

    early_architecture = replace(architecture, convolutions=(early, early))
    early_net = models.build_net(early_architecture, (4, 8, 20)).eval()
    early_net.load_state_dict(net.state_dict())
    example = models.Example(x, net(x).detach())
    difference = example.difference_of(early_net(x).detach())
    assert models.STRANGE_DIFFERENCE < difference < models.EXAMPLE_TOLERANCE
    assert {prunable.norm_place for prunable in loaded_net.prunable[:2]} == {late.norm_place}


def test_an_example_tells_which_of_several_state_dicts_is_meant(tmp_path):
    net, x = make_lively_net("lenet5")
    average = {key: value + 0.01 for key, value in net.state_dict().items()}
    content = {"net": net.state_dict(), "ema": average, "inputs": x, "outputs": net(x)}
    torch.save(content, tmp_path / "a.pt")

    assert torch.equal(sep.load(tmp_path / "a.pt")[0].eval()(x), net(x))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"outputs": torch.randn(4, 10)}, r"28 x 28 pixels \(the nearest differs by [1-9]\d+%\)"),
        ({"inputs": torch.randn(4, 1, 30, 30)}, "its inputs of 30 x 30 pixels"),
        ({"outputs": torch.ones(4, 10)}, "its outputs are the same for all its inputs; make them"),
        ({"outputs": torch.ones(4, 10) / 0}, "not all finite; make them by"),
        ({"outputs": torch.randn(4, 7)}, "tells 10 classes apart, but its inputs and outputs"),
        ({"outputs": torch.randn(3, 10)}, r"its outputs, 3 x 10 .* for its 4 inputs"),
        ({"outputs": (torch.randn(4, 10), 1)}, "its outputs are no tensor, but tuple; of several"),
        ({"outputs": None}, "its outputs are no tensor, but NoneType"),
        ({"outputs": torch.randn(4, 1)}, "one number an input, not one for each class"),
        ({"outputs": torch.ones(4, 10).int()}, "int32, are no floating-point numbers"),
        ({"inputs": torch.randn(4, 784)}, r"of the shape \(N, channels, pixels, pixels\)"),
        ({"inputs": torch.ones(4, 1, 28, 28).byte()}, "uint8, are no floating-point numbers"),
        ({"inputs": torch.randn(4, 1, 28, 30)}, "its inputs, 4 x 1 x 28 x 30 of"),
        ({"inputs": torch.ones(0, 1, 28, 28), "outputs": torch.ones(0, 10)}, "it has 0 inputs"),
        ({"mean": [0.1, 0.2]}, "its mean has to be one number between 0 and 1"),
        ({"mean": "none"}, "its mean has to be one number between 0 and 1"),
        ({"mean": 127.5}, "its mean has to be one number between 0 and 1"),
        ({"std": [0.0]}, "its std has to be one number between 0 and 1"),
        ({"std": None}, "its std has to be one number between 0 and 1"),
    ],
)
def test_an_example_that_tells_nothing_is_refused(tmp_path, changes, words):
    net, x = make_lively_net("lenet5")
    content = {"state_dict": net.state_dict(), "inputs": x, "outputs": net(x)}
    torch.save(content | {"mean": [0.1], "std": [0.3]} | changes, tmp_path / "a.pt")

    with pytest.raises(UserError, match=words):
        sep.load(tmp_path / "a.pt")


def test_safetensors_are_read_where_the_package_is_there(tmp_path, monkeypatch):
    net, x = make_lively_net("resnet8")
    (tmp_path / "a.safetensors").write_bytes(b"no such file")

    monkeypatch.setitem(sys.modules, "safetensors", None)  # so that its import fails
    with pytest.raises(UserError, match="pip install safetensors"):
        sep.load(tmp_path / "a.safetensors")
    monkeypatch.undo()

    safetensors_torch = pytest.importorskip("safetensors.torch")
    with pytest.raises(UserError, match=r"a\.safetensors is damaged"):
        sep.load(tmp_path / "a.safetensors")
    safetensors_torch.save_file(net.state_dict(), tmp_path / "a.safetensors")
    assert torch.equal(sep.load(tmp_path / "a.safetensors")[0].eval()(x), net(x))


@pytest.mark.parametrize("arch", ["vgg11", "resnet74", "lenet5"])
def test_safetensors_are_the_same_net(tmp_path, arch):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    net, x = make_lively_net(arch)
    safetensors_torch.save_file(net.state_dict(), tmp_path / "a.safetensors")

    assert torch.equal(sep.load(tmp_path / "a.safetensors")[0].eval()(x), net(x))


# The alphabet hides before which layer its selection stands.
@pytest.mark.parametrize(
    "name", [name for name in zoo.CASES if name != "slimmed by channel selection"]
)
def test_nets_are_read_from_tensors_by_the_alphabet(name):
    net, x = zoo.make_lively(zoo.CASES[name])
    # In a module's own order its own tensors would come first.
    tensors = dict(sorted((net.state_dict() | {"temperature": torch.ones(1)}).items()))

    state = models.restore_order(tensors)

    readings = models.recognise_state_dict(state, Path("a.safetensors"))["readings"]
    with torch.no_grad():
        assert any(
            zoo.largest_difference(reading.build().eval()(x), net(x)) < 1e-4
            for reading in (reading.for_size(x.shape[-1]) for reading in readings)
            if reading is not None
        )


def test_a_strided_net_without_an_example_is_advised_to_add_one(tmp_path):
    net, _ = zoo.make_lively(zoo.EXAMPLE_CASES["AlexNet"])
    torch.save(net.state_dict(), tmp_path / "a.pt")

    with pytest.raises(UserError, match=r"probably strided .* holds inputs and outputs, too"):
        sep.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "taken"),
    [("swa_model", "swa_model"), ("average", "average"), ("ema", "ema"), ("schema", "model")],
)
def test_an_averaged_copy_is_known_by_its_name(tmp_path, name, taken):
    state = build("resnet8").state_dict()
    torch.save({"model": state, name: state}, tmp_path / "a.pt")

    (note,) = models.read_checkpoint(tmp_path / "a.pt")["notes"]

    assert f"taken is {taken}, not " in note


def test_the_first_state_dict_that_is_a_net_is_taken(tmp_path):
    net, x = make_lively_net("resnet8")
    state = net.state_dict()
    parameters = {key: value.clone() for key, value in net.named_parameters()}
    zeros = {key: torch.zeros_like(value) for key, value in state.items()}
    buffers = {key: value for key, value in state.items() if key not in parameters}
    contents = [
        {"model": zeros | buffers, "ema": {"shadow": parameters}},
        {"state_dict": state, "confusion_matrix": torch.ones(3, 3)},
        {"state_dict": state, "running_avg": {"loss_matrix": torch.ones(3, 3)}},
        {"title": "mine", "epoch": 1, "state_dict": state},
        {"format": "pt", "state_dict": state},
    ]
    for content in contents:
        torch.save(content, tmp_path / "a.pt")
        assert torch.equal(sep.load(tmp_path / "a.pt")[0].eval()(x), net(x))


def test_a_block_that_gets_narrower_without_a_convolution_in_its_shortcut_is_refused(tmp_path):
    net = zoo.make_resnet((16, 16, 8), stem=16, shortcut="downsample")
    state = {key: value for key, value in net.state_dict().items() if "downsample" not in key}
    torch.save(state, tmp_path / "a.pt")

    with pytest.raises(
        UserError, match="from 16 to 8 channels without a convolution in its shortcut"
    ):
        models.read_checkpoint(tmp_path / "a.pt")


def test_a_net_of_one_width_may_have_its_norms_before_or_after():
    net = zoo.make_resnet((8, 8, 8))

    readings = models.recognise_state_dict(net.state_dict(), Path("a.pt"))["readings"]

    assert not readings[0].architecture.is_preactivated
    assert {reading.architecture.is_preactivated for reading in readings} == {False, True}


def test_a_whole_module_and_a_program_are_refused_with_the_code_that_helps(tmp_path):
    net, x = make_lively_net("resnet8")
    torch.save(net, tmp_path / "net.pt")
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(net, x).save(tmp_path / "program.pt")

    for name, loads in (("net", "torch.load("), ("program", "torch.jit.load(")):
        with pytest.raises(UserError) as refusal:
            models.read_checkpoint(tmp_path / f"{name}.pt")
        message = str(refusal.value)
        assert loads in message
        assert f"torch.save(net.state_dict(), '{name}-state.pt')" in message


def test_what_a_chain_lacks_is_named(tmp_path):
    state = build("lenet5", channels=1, size=28).state_dict()
    without_last = {key: value for key, value in state.items() if not key.startswith("fc")}
    torch.save(without_last, tmp_path / "a.pt")

    with pytest.raises(UserError, match="it does not end in a linear layer"):
        models.read_checkpoint(tmp_path / "a.pt")

    torch.save(state | {"conv2.weight": torch.ones(50, 10, 5, 5)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"conv2 reads 10 channels .*grouped"):
        models.read_checkpoint(tmp_path / "a.pt")

    for outputs, guess in ((20, "depthwise"), (7, "branch")):
        torch.save(state | {"conv2.weight": torch.ones(outputs, 1, 5, 5)}, tmp_path / "a.pt")
        with pytest.raises(UserError, match=rf"conv2 reads 1 channels .*{guess}"):
            models.read_checkpoint(tmp_path / "a.pt")


def test_what_is_no_checkpoint_is_refused_in_one_line_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    for name in write_broken_files(tmp_path):
        with pytest.raises(UserError) as refusal:
            sep.load(tmp_path / name)
        assert name in str(refusal.value), name
        assert "\n" not in str(refusal.value), name
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(UserError, match=r"pickle\.pt is not a file of weights alone"):
        models.read_checkpoint(tmp_path / "pickle.pt")
    with pytest.raises(UserError, match=r"text\.pt is not a checkpoint that torch can read"):
        models.read_checkpoint(tmp_path / "text.pt")
    with pytest.raises(UserError, match=r"no checkpoint .*gone") as refusal:
        models.read_checkpoint(tmp_path / "gone.pt")
    assert refusal.value.status == 2


def test_an_error_for_the_user_is_one_line():
    assert str(UserError("what\n  went wrong\n")) == "what went wrong"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    models.write_tensors(tmp_path / "a.pt", {"old": 1})

    with pytest.raises((UserError, TypeError, AttributeError, pickle.PicklingError)):
        models.write_tensors(tmp_path / "a.pt", {"new": lambda: 0})

    assert torch.load(tmp_path / "a.pt") == {"old": 1}
    with pytest.raises(UserError, match="cannot write"):
        models.write_tensors(tmp_path / "a.pt" / "b.pt", {})


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_file_whose_writing_is_cut_short_leaves_the_old_one_alone(tmp_path, error):
    def write_half(path):
        path.write_text("half")
        raise error

    (tmp_path / "net.pt").write_text("whole")

    with pytest.raises(UserError if error is OSError else error):
        models.write_atomically(tmp_path / "net.pt", write_half)

    assert [file.name for file in tmp_path.iterdir()] == ["net.pt"]
    assert (tmp_path / "net.pt").read_text() == "whole"


@pytest.mark.parametrize("arch", ["lenet5", "vgg11", "resnet8"])
def test_a_plain_checkpoint_of_the_formats_before_comes_back(tmp_path, arch):
    net, x = make_lively_net(arch)
    models.save_checkpoint(tmp_path / "a.pt", net, {"seed": 3})
    content = torch.load(tmp_path / "a.pt")
    torch.save(content | {"format": 2}, tmp_path / "format2.pt")
    # Format 1 knew fewer nets, and described them by these numbers.
    sizes = {"classes": 10, "channels": net.channels, "size": net.size}
    sizes["side"] = net.architecture.head_size if arch == "lenet5" else 1
    del content["architecture"]
    torch.save(content | sizes | {"format": 1, "arch": arch}, tmp_path / "format1.pt")

    for name in ("format1.pt", "format2.pt"):
        loaded_net, facts = sep.load(tmp_path / name)
        assert torch.equal(loaded_net.eval()(x), net(x))
        assert loaded_net.architecture == net.architecture
        assert facts == {"seed": 3}


# ---- export


@pytest.mark.parametrize(
    ("arch", "is_gated"), [("lenet5", True), ("resnet8", False), ("vgg11", True)]
)
def test_an_exported_net_runs_without_this_project(tmp_path, arch, is_gated):
    net, x = make_lively_net(arch, [16] * 8 if arch == "vgg11" else None)
    structure = smaller_structure(net, share=0.4)
    small = sep.prune_softly(net, structure, [x]) if is_gated else prune_channels(net, structure)
    net = small.eval().to(memory_format=torch.channels_last)
    let_groups_differ(net)
    mean, std = [0.4] * net.channels, [0.2] * net.channels
    images = torch.rand(7, net.channels, net.size, net.size)

    difference = models.export_net(net, tmp_path / "net.pt2", mean, std, net.size)

    assert difference < 1e-5
    assert not list(tmp_path.glob("*.part"))
    program = torch.export.load(tmp_path / "net.pt2")
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    logits = program.module()(images)
    if arch == "lenet5":  # once is enough
        logits = run_in_another_process(tmp_path, images)
    assert not logits.requires_grad
    with torch.no_grad():
        assert torch.allclose(logits, net((images - 0.4) / 0.2), atol=1e-3)


@torch.no_grad()
def test_an_export_normalises_each_channel_and_takes_the_size_that_is_asked_for(tmp_path):
    net, _ = make_lively_net("resnet8")
    mean, std = [0.1, 0.4, 0.8], [0.2, 0.3, 0.5]
    images = torch.rand(2, 3, 40, 40)

    models.export_net(net, tmp_path / "a.pt2", mean, std, 40)

    exported = torch.export.load(tmp_path / "a.pt2").module()
    normalised = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert_close(exported(images), net(normalised), rtol=1e-3, atol=1e-3)


def run_in_another_process(folder, images):
    """The logits of folder/net.pt2 in a Python that does not know this project."""
    torch.save(images, folder / "images")
    code = (
        "import sys, torch; net = torch.export.load('net.pt2').module(); "
        "torch.save(net(torch.load('images')), 'logits'); assert 'models' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, cwd=folder, capture_output=True)
    return torch.load(folder / "logits")


@pytest.mark.parametrize("arch", NETS)
def test_a_folded_net_computes_the_same_without_batch_norms(arch):
    net, x = make_lively_net(arch)

    for candidate in (net.eval(), sep.prune_softly(net, smaller_structure(net), [x]).eval()):
        folded = models.fold_batch_norms(candidate)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        with torch.no_grad():
            assert largest(folded(x) - candidate(x)) < 1e-4
        # The batch norms are gone from this list, too; LeNet-5 has none.
        assert candidate.prunable != folded.prunable or arch == "lenet5"


@pytest.mark.parametrize("is_gated", [False, True])
def test_onnxruntime_runs_an_exported_net(tmp_path, is_gated):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = make_lively_net("resnet8")
    structure = smaller_structure(net, share=0.4)
    small = sep.prune_softly(net, structure, [x]) if is_gated else prune_channels(net, structure)
    net = small.eval()
    let_groups_differ(net)
    images = torch.rand(3, 3, 32, 32)
    path = tmp_path / ("net.ONNX" if is_gated else "net.onnx")  # either is taken

    difference = models.export_net(net, path, [0.4] * 3, [0.2] * 3, 32)

    assert difference < 1e-4
    session = onnxruntime.InferenceSession(path)
    (found_input,), (found_output,) = session.get_inputs(), session.get_outputs()
    assert (found_input.name, found_input.shape) == ("images", ["batch", 3, 32, 32])
    assert (found_output.name, found_output.shape) == ("logits", ["batch", 10])
    for x in (images, images[:1]):
        logits = session.run(None, {"images": x.numpy()})[0]
        with torch.no_grad():
            expected = net((x - 0.4) / 0.2).numpy()
        assert abs(logits - expected).max() < 1e-3


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_an_exported_net_refuses_uint8_images(tmp_path, ending):
    onnxruntime = pytest.importorskip("onnxruntime") if ending == "onnx" else None
    net, _ = make_lively_net("resnet8")
    path = tmp_path / f"net.{ending}"
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)

    models.export_net(net, path, [0.4] * 3, [0.2] * 3, 32)

    if ending == "pt2":
        with pytest.raises(RuntimeError, match="Expected: Float"):
            torch.export.load(path).module()(images)
    else:
        session = onnxruntime.InferenceSession(path)
        with pytest.raises(Exception, match=r"expected: \(tensor\(float\)\)"):
            session.run(None, {"images": images.numpy()})


@pytest.mark.parametrize("size", [16, 20, 24, 32, 40])
def test_a_gated_lenet_refuses_images_of_another_size_as_a_plain_one_does(tmp_path, size):
    net, x = make_lively_net("lenet5")

    for candidate in (net.eval(), sep.prune_softly(net, smaller_structure(net), [x]).eval()):
        for count in (1, 2):
            with pytest.raises(RuntimeError), torch.no_grad():
                candidate(torch.rand(count, 1, size, size))
        with pytest.raises(UserError, match=f"cannot take images of {size} x {size}") as refusal:
            models.export_net(candidate, tmp_path / "a.pt2", [0.5], [0.5], size)
        assert refusal.value.status == 2
        assert not list(tmp_path.iterdir())


def test_an_export_to_onnx_without_onnxruntime_names_it_and_leaves_nothing(tmp_path, monkeypatch):
    net, _ = make_lively_net("lenet5")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # so that its import fails

    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        models.export_net(net, tmp_path / "a.onnx", [0.5], [0.5], 28)

    assert not list(tmp_path.iterdir())


def test_an_exporter_that_fails_says_so_in_one_line(tmp_path, monkeypatch):
    def fail(*arguments):
        raise ArithmeticError("no such\noperator")

    monkeypatch.setattr(models, "write_program", fail)
    net = build("lenet5", (2, 3, 5), channels=1, size=28)

    with pytest.raises(UserError, match=r"a\.pt2: this net cannot be exported: no such operator"):
        models.export_net(net, tmp_path / "a.pt2", [0.5], [0.5], 28)

    assert not list(tmp_path.iterdir())


def test_an_export_keeps_a_file_that_it_may_not_replace(tmp_path):
    net, _ = make_lively_net("lenet5")
    (tmp_path / "a.pt2").write_text("old")

    with pytest.raises(UserError, match="exists already and is kept; --force"):
        models.export_net(net, tmp_path / "a.pt2", [0.5], [0.5], 28)

    assert read_texts(tmp_path) == {"a.pt2": "old"}


def test_an_exported_net_that_differs_is_refused_and_leaves_the_old_file(tmp_path, monkeypatch):
    net, _ = make_lively_net("lenet5")
    (tmp_path / "a.pt2").write_text("old")
    load = torch.export.load

    class WrongProgram:
        def module(self):
            return lambda x: torch.ones(len(x), 10)

    def load_wrong_program(file):
        load(file)  # the file itself can be read
        return WrongProgram()

    monkeypatch.setattr(torch.export, "load", load_wrong_program)

    with pytest.raises(UserError, match="differs from the original"):
        models.export_net(net, tmp_path / "a.pt2", [0.5], [0.5], 28, may_replace=True)

    assert read_texts(tmp_path) == {"a.pt2": "old"}


def test_an_export_whose_folded_norms_compute_something_else_is_refused(tmp_path, monkeypatch):
    net, _ = make_lively_net("resnet8")
    fold_batch_norms = models.fold_batch_norms

    def fold_wrongly(net):
        folded = fold_batch_norms(net)
        for parameter in folded.linear.parameters():
            parameter.data *= 1.05
        return folded

    monkeypatch.setattr(models, "fold_batch_norms", fold_wrongly)

    with pytest.raises(UserError, match=r"differs from the original, by 5\.0e-02"):
        models.export_net(net, tmp_path / "a.pt2", [0.5] * 3, [0.25] * 3, 32)

    assert not list(tmp_path.iterdir())


def read_texts(folder):
    """The content of each file in the folder, by its name."""
    return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # Numbers tell; of those that occur twice the old rule is left: the first of that width.
        ("conv1 conv2 bn1", {"conv1": "bn1"}),
        ("conv1 conv2 fc1 bn1", {"conv1": "bn1"}),
        ("conv1_1 conv1_2 conv2_1 bn1_2", {"conv1_2": "bn1_2"}),
        ("0 2 3", {"2": "3"}),
        ("conv1 conv2 norm", {"conv2": "norm"}),
    ],
)
def test_a_norm_behind_several_layers_belongs_to_the_one_of_its_number(names, expected):
    modules = []
    for name in names.split():
        is_norm = name.startswith(("bn", "norm")) or name == "3"
        tensors = {"running_mean": torch.zeros(8), "running_var": torch.ones(8)}
        # The last layer of the second case has another width.
        width = 4 if name == "fc1" else 8
        if not is_norm:
            shape = (width, 8) if name == "fc1" else (width, 8, 3, 3)
            tensors = {"weight": torch.zeros(shape)}
        modules.append(models.FoundModule(name, tensors))

    norm_of = models.match_norms(modules)

    assert {layer: norm.name for layer, norm in norm_of.items()} == expected
