"""Tests of sep.py, in its order: the gate, batch norm of the chosen kernels, gated nets, loading,
and the nets that are fast at single images."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from test_models import NETS, largest, let_groups_differ, make_lively_net, smaller_structure
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import models
import sep
from models import UserError
from sep import GateSize


def make_gated_net(arch, **options):
    """(a gated net whose groups of kernels differ, a batch). Its gates choose more than one group
    among the images of the batch; its second layer is not pruned and has no gate. A LeNet has a
    gate with five groups, and one with kernels that are always on."""
    net, x = make_lively_net(arch, **options)
    structure = (4, 50, 300) if arch == "lenet5" else smaller_structure(net, share=0.4)
    net = sep.prune_softly(net, structure, [x]).eval()
    let_groups_differ(net)
    return net, x


def run_one_by_one(net, x):
    """The logits (B, classes) of a net that reads single images."""
    return torch.cat([net(image) for image in x.split(1)])


def record_choices(net, x):
    """The groups (B,) that every gate chooses for a batch."""
    choices = []
    choose = sep.SEGate.choose_groups

    def record(self, x, layer):
        groups = choose(self, x, layer)
        choices.append(groups)
        return groups

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sep.SEGate, "choose_groups", record)
        net(x)
    return choices


def record_masks(net, x):
    """The masks (B, C) of every gate on a batch, by what its choice says."""
    gates = filter(None, net.gates)
    return [gate.masks[groups] for gate, groups in zip(gates, record_choices(net, x))]


# ---- the gate


def test_a_gate_chooses_in_full_precision_under_autocast():
    torch.manual_seed(0)
    x, layer, gate = torch.randn(2000, 64), nn.Linear(64, 16), sep.SEGate(64, GateSize(0, 2, 8))
    expected = gate.choose_groups(x, layer)

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate.choose_groups(x, layer), expected)


def test_a_gate_averages_maps_in_float32():
    x = torch.randn(50, 8, 6, 6).bfloat16()

    assert_close(sep.squeeze(x, is_linear=False), x.float().mean((2, 3)))


def test_gates_are_fitted_on_the_first_images_alone(monkeypatch):
    monkeypatch.setattr(sep, "MIN_CLUSTERED_IMAGES", 6)
    monkeypatch.setattr(sep, "MAX_CLUSTERED_NUMBERS", 0)
    net, _ = make_lively_net("lenet5")

    squeezed = sep.collect_squeezed(net, ["conv2"], torch.randn(5, 4, 1, 28, 28))["conv2"]

    assert len(squeezed) == 8  # six, and up to a batch more
    assert_close(sep.fit_gate(squeezed, 2), sep.fit_gate(squeezed[:6], 2), rtol=0, atol=0)


def test_numbers_that_are_not_finite_do_not_stop_the_clustering():
    squeezed = torch.randn(50, 3)
    squeezed[7, 1], squeezed[8, 2] = float("nan"), float("inf")

    weight, bias = sep.fit_gate(squeezed, 2)

    assert weight.isfinite().all()
    assert bias.isfinite().all()


@pytest.mark.parametrize("arch", NETS)
def test_fresh_gates_change_nothing(arch):
    net, x = make_lively_net(arch)
    structure = smaller_structure(net)
    hard = models.prune_channels(net, structure).eval()

    soft = sep.prune_softly(net, structure, [x]).eval()

    assert soft.structure == structure
    with torch.no_grad():
        assert largest(soft(x) - hard(x)) < 1e-5 * largest(hard(x))


def test_each_image_gets_as_many_kernels_as_the_structure_says():
    net, x = make_gated_net("lenet5")
    outputs = []
    for gate in filter(None, net.gates):
        gate.register_forward_hook(lambda gate, inputs, output: outputs.append(output))

    net(x)

    gates = [gate for gate in net.gates if gate is not None]
    assert [(gate.size.k, gate.size.width) for gate in gates] == [(4, 20), (300, 500)]
    for output, gate in zip(outputs, gates, strict=True):
        is_used = output.reshape(len(x), gate.size.width, -1).amax(2) > 0
        used_count = is_used.sum(1)
        assert (used_count <= gate.size.k).all()
        assert used_count.max() > gate.size.k / 3  # a relu may leave nothing of the others
        assert len(torch.unique(is_used, dim=0)) > 1  # it looks at the image


def test_a_gate_normalises_a_kernel_by_the_images_that_choose_it():
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    gate = sep.SEGate(3, GateSize(0, 2, 2))
    gate.excite.weight.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3]))
    gate.excite.bias.copy_(torch.tensor([1.5, -1.5]))
    x = torch.randn(16, 3, 6, 6)
    x[8:] += 1

    gate(x, layer, norm, models.PrunableLayer("conv", "bn", "next"))

    chosen_groups = gate.choose_groups(x, layer)
    assert 1 < chosen_groups.sum() < 15
    for group, channels in ((0, [0, 1]), (1, [2, 3])):
        mean = layer(x)[chosen_groups == group][:, channels].mean((0, 2, 3))
        assert torch.allclose(norm.running_mean[channels], 0.1 * mean, atol=1e-6)


def test_a_gate_has_kernels_that_are_always_on_and_groups_of_one_size():
    gate = sep.SEGate(3, GateSize(2, 2, 3))

    assert gate.size.width == 8
    assert gate.size.always_on_share == 0.5
    assert gate.channels_of_group(0).tolist() == [0, 1, 2, 3]
    assert gate.channels_of_group(2).tolist() == [0, 1, 6, 7]
    assert gate.masks.sum(1).tolist() == [4, 4, 4]
    assert not any(parameter.requires_grad for parameter in gate.parameters())


def test_an_image_gives_no_gradient_to_kernels_that_it_does_not_choose():
    net, x = make_gated_net("lenet5")  # it has no batch norm, which would mix the images
    net.train()

    net(x)[0].sum().backward()

    check_gradients(net, record_masks(net, x))


def test_with_batch_norm_kernels_that_no_image_chooses_get_no_gradient():
    net, x = make_gated_net("vgg16")
    x = x[:1].repeat(4, 1, 1, 1)  # all images choose alike
    net.train()

    net(x).sum().backward()

    check_gradients(net, record_masks(net, x))


def check_gradients(net, masks):
    """Of each gated layer those kernels have a gradient, and no others, that image 0 chooses."""
    gated = [prunable for prunable, gate in zip(net.prunable, net.gates) if gate is not None]
    for prunable, mask in zip(gated, masks, strict=True):
        gradient = net.get_submodule(prunable.layer_name).weight.grad.flatten(1).abs().sum(1)
        assert (mask[0] == 0).any()
        assert (gradient[mask[0] == 0] == 0).all()
        # A relu has no gradient below 0: in a linear layer that is about half of the others.
        assert (gradient[mask[0] != 0] != 0).float().mean() > 0.4


def test_clusters_that_lie_apart_are_found():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    points = (centres[:, None] + torch.randn(4, 50, 2)).flatten(0, 1)

    found = sep.find_clusters(points, 4)

    distances = torch.cdist(centres, found)
    assert sorted(distances.argmin(1).tolist()) == [0, 1, 2, 3]
    assert distances.min(1).values.max() < 0.5
    assert torch.equal(found, sep.find_clusters(points, 4))


def test_a_gate_gives_each_image_the_group_of_the_nearest_cluster():
    torch.manual_seed(0)
    squeezed = 3 + torch.randn(200, 5) * torch.tensor([0.1, 1, 10, 1, 1])
    squeezed[:, 3] = 7.0  # says nothing
    gate = sep.SEGate(5, GateSize(0, 2, 3))

    weight, bias = sep.fit_gate(squeezed, 3)
    gate.excite.weight.copy_(weight)
    gate.excite.bias.copy_(bias)

    groups = gate.choose_groups(squeezed, nn.Linear(5, 6))
    kept = [0, 1, 2, 4]
    standardised = (squeezed - squeezed.mean(0))[:, kept] / squeezed.std(0)[kept]
    centres = sep.find_clusters(standardised.double(), 3)
    nearest = torch.cdist(standardised.double(), centres).argmin(1)
    # The input that never changes moves no point, so the clusters are the same.
    assert torch.equal(groups, nearest)
    assert groups.bincount(minlength=3).min() > 10
    assert (gate.excite.weight[:, 3] == 0).all()


def test_a_gate_reads_means_of_channels_and_all_inputs_of_a_linear_layer():
    x = torch.randn(2, 3, 4, 5)

    of_convolution = sep.squeeze(x, is_linear=False)
    of_linear_layer = sep.squeeze(x, is_linear=True)

    assert torch.allclose(of_convolution, x.sum((2, 3)) / 20, atol=1e-6)
    assert torch.equal(of_linear_layer, x.flatten(1))


# ---- batch norm of the chosen kernels


def test_batch_norm_counts_only_the_images_that_use_a_channel():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    y = torch.randn(6, 3, 4, 4, requires_grad=True)
    mask = torch.ones(6, 3)
    mask[2:, 1] = 0  # channel 1 is used by images 0 and 1 alone
    mask[:, 2] = 0  # channel 2 by none

    out = sep.masked_batch_norm(y, mask, norm) * mask[:, :, None, None]

    by_all = nn.BatchNorm2d(3)
    assert torch.allclose(out[:, 0], by_all(y)[:, 0], atol=1e-5)
    assert torch.allclose(norm.running_var[0], by_all.running_var[0], atol=1e-6)
    by_two = nn.BatchNorm2d(3)
    assert torch.allclose(out[:2, 1], by_two(y[:2])[:, 1], atol=1e-5)
    assert torch.allclose(norm.running_mean[1], by_two.running_mean[1], atol=1e-6)
    assert norm.running_mean[2] == 0
    assert norm.running_var[2] == 1

    (out * torch.randn_like(out)).sum().backward()
    assert (y.grad[2:, 1] == 0).all()
    assert (y.grad[:, 2] == 0).all()
    assert (y.grad[:2, 1] != 0).any()


def test_a_batch_norm_of_a_linear_layer_counts_the_images_that_use_a_channel():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5)
    y, mask = torch.randn(8, 5), (torch.rand(8, 5) > 0.4).float()

    found = sep.masked_batch_norm(y, mask, norm)

    for channel in range(5):
        has_channel = mask[:, channel] == 1
        alone = nn.BatchNorm1d(1)
        expected = alone(y[has_channel, channel : channel + 1])[:, 0]
        assert 1 < has_channel.sum() < 8
        assert torch.allclose(found[has_channel, channel], expected, atol=1e-5)
        assert torch.allclose(norm.running_mean[channel], alone.running_mean[0], atol=1e-6)
        assert torch.allclose(norm.running_var[channel], alone.running_var[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_where_all_images_use_all_channels_it_is_a_usual_batch_norm(momentum, dtype):
    torch.manual_seed(0)
    masked, usual = (nn.BatchNorm2d(3, momentum=momentum, dtype=dtype) for _ in range(2))

    for _ in range(3):
        y = torch.randn(8, 3, 5, 5, dtype=dtype)
        found = sep.masked_batch_norm(y, torch.ones(8, 3), masked)
        assert torch.allclose(found, usual(y), atol=1e-5)

    assert found.dtype == dtype
    for name, value in usual.state_dict().items():
        assert torch.allclose(masked.state_dict()[name], value, atol=1e-5), name


def test_batch_statistics_of_bfloat16_maps_are_computed_in_float32():
    torch.manual_seed(0)
    masked, usual = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    y = (20 + torch.randn(16, 3, 8, 8)).bfloat16()

    found = sep.masked_batch_norm(y, torch.ones(16, 3), masked)

    usual(y.float())
    assert found.dtype == torch.bfloat16
    assert_close(masked.running_mean, usual.running_mean, rtol=1e-4, atol=0)
    assert_close(masked.running_var, usual.running_var, rtol=1e-3, atol=0)


def test_a_channel_with_a_single_value_keeps_its_running_statistics():
    norm = nn.BatchNorm1d(2)
    mask = torch.ones(4, 2)
    mask[1:, 1] = 0

    sep.masked_batch_norm(torch.randn(4, 2), mask, norm)

    assert (norm.running_mean[1].item(), norm.running_var[1].item()) == (0, 1)
    assert norm.running_mean[0] != 0


# ---- gated nets


@pytest.mark.parametrize(
    ("width", "k", "expected"),
    [
        (500, 50, GateSize(0, 50, 8)),  # no more than MAX_GROUPS
        (12, 4, GateSize(0, 4, 3)),
        (13, 4, GateSize(0, 4, 3)),
        (8, 4, GateSize(0, 4, 2)),
        (7, 4, GateSize(1, 3, 2)),
        (5, 4, GateSize(3, 1, 2)),
        (9, 8, None),  # too little room
        (8, 8, None),
        (1, 1, None),
    ],
)
def test_a_gate_has_no_more_kernels_than_the_layer_had(width, k, expected):
    size = sep.choose_gate_size(width, k)

    assert size == expected
    if size is not None:
        assert size.width <= width
        assert size.k == k
        assert sep.SEGate(1, size).masks.shape == (size.group_count, size.width)


def test_each_gate_chooses_in_the_gated_net_what_its_clusters_say():
    net, _ = make_lively_net("vgg16")
    x = torch.randn(64, 3, 32, 32)
    plain = models.prune_channels(net, smaller_structure(net, share=0.3)).eval()
    sizes = sep.choose_gate_sizes(net.widths, plain.widths)
    gated_layers = [p.layer_name for p, size in zip(plain.prunable, sizes) if size is not None]
    squeezed = sep.collect_squeezed(plain, gated_layers, [x])

    gated = sep.add_gates(plain, sizes, [x]).eval()

    chosen = record_choices(gated, x)
    gates = [gate for gate in gated.gates if gate is not None]
    assert len(gates) > 8
    for name, gate, groups in zip(gated_layers, gates, chosen, strict=True):
        weight, bias = sep.fit_gate(squeezed[name], gate.size.group_count)
        expected = (squeezed[name].double() @ weight.T + bias).argmax(1)
        # Two clusters may be equally near, up to rounding.
        assert (groups == expected).float().mean() > 0.95, name
        assert len(groups.unique()) > 1


def test_the_most_important_kernels_are_always_on():
    net, x = make_lively_net("lenet5")
    plain = models.prune_channels(net, (20, 30, 100))
    importance = models.channel_importance(plain)[1]

    gated = sep.add_gates(plain, [None, GateSize(10, 20, 2), None], [x])

    kernels = gated.conv2.weight.flatten(1)
    assert gated.widths == (20, 50, 100)
    order = importance.argsort(descending=True)
    assert torch.equal(kernels[:10], plain.conv2.weight[order[:10]].flatten(1))
    assert torch.equal(kernels[10:30], kernels[30:])


def test_a_net_without_room_for_gates_stays_plain():
    net, x = make_lively_net("lenet5")

    soft = sep.prune_softly(net, net.widths, [x])

    assert soft.gates is None
    assert torch.allclose(soft.eval()(x), net(x), atol=1e-5)


@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20"])
def test_macs_are_what_runs_with_the_gates(arch):
    net, x = make_lively_net(arch)
    structure = smaller_structure(net, share=0.4)
    soft = sep.prune_softly(net, structure, [x]).eval()
    tuned = sep.tune(soft)

    def count_addmv(bias, matrix, vector, **_):
        return 2 * matrix[0] * matrix[1]

    # The counter's own list lacks addmv.
    custom = {torch.ops.aten.addmv: count_addmv}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter, torch.no_grad():
        tuned(x[:1])

    assert counter.get_total_flops() == 2 * sep.count_macs(soft)
    assert sep.count_macs(soft) == sep.count_macs(net, structure)
    assert sep.count_macs(soft) > models.count_macs(net, structure)
    assert sep.count_macs(net) == models.count_macs(net)
    assert sep.count_macs(net, net.widths) == models.count_macs(net)


def test_a_gate_counts_whom_it_chose():
    net, x = make_gated_net("lenet5")

    usages = sep.measure_usage(net, [x, x])

    assert usages[1] is None
    for usage, gate in zip(usages, net.gates):
        if gate is None:
            continue
        assert gate.usage is None
        assert usage.image_count == 2 * len(x)
        assert usage.share_of_kernel.sum() == pytest.approx(gate.size.k)
        assert usage.count_kernels()[1] > 0
        assert 1 < usage.groups_in_use <= gate.size.group_count


def test_usage_says_what_kernels_serve():
    gate = sep.SEGate(1, GateSize(1, 1, 3))  # 4 kernels
    usage = sep.Usage(gate)

    usage.add(torch.tensor([0, 2, 0]))
    usage.add(torch.tensor([0]))

    assert usage.image_count == 4
    assert usage.images_per_group.tolist() == [3, 0, 1]
    assert usage.share_of_kernel.tolist() == [1, 0.75, 0, 0.25]
    assert usage.count_kernels() == (1, 2, 1)
    assert usage.groups_in_use == 2


def test_a_static_net_needs_an_image():
    net, _ = make_gated_net("lenet5")

    with pytest.raises(ValueError, match="at least one image"):
        sep.to_static(net, [])


@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20"])
def test_a_static_net_is_the_gated_one_where_choices_do_not_change(arch):
    net, x = make_gated_net(arch)
    for gate in filter(None, net.gates):
        gate.excite.weight.zero_()
        gate.excite.bias.zero_()
        gate.excite.bias[1] = 1  # the second group for every image

    small = sep.to_static(net, [x]).eval()

    with torch.no_grad():
        assert largest(net(x) - small(x)) < 1e-5 * largest(small(x))
    assert small.gates is None
    assert small.widths == net.structure
    assert net.gates is not None


def test_in_a_static_net_a_group_counts_by_the_images_that_choose_it():
    net, x = make_gated_net("lenet5")
    gate = net.gates[0]
    images_of_group = gate.choose_groups(x, net.conv1).bincount(minlength=gate.size.group_count)

    small = sep.to_static(net, x.split(1))

    assert (images_of_group > 0).sum() > 1
    expected = sum(
        images / len(x) * net.conv1.weight[gate.channels_of_group(group)]
        for group, images in enumerate(images_of_group)
    )
    assert largest(small.conv1.weight - expected) < 1e-6


def test_a_static_net_has_the_mean_of_its_groups_norms():
    net, x = make_gated_net("resnet20")
    usages = sep.measure_usage(net, [x])
    before = net.state_dict()

    after = sep.to_static(net, [x]).state_dict()

    assert any(usage.groups_in_use > 1 for usage in usages if usage is not None)
    for prunable, gate, usage in zip(net.prunable, net.gates, usages):
        if gate is None:
            continue
        for part in ("weight", "bias", "running_mean", "running_var"):
            name = f"{prunable.norm_name}.{part}"
            expected = sum(
                share * before[name][gate.channels_of_group(group)]
                for group, share in enumerate(usage.share_of_group.tolist())
            )
            assert_close(after[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20"])
def test_a_static_net_of_fresh_gates_is_the_pruned_net(arch):
    net, x = make_lively_net(arch)
    structure = smaller_structure(net)
    gated = sep.prune_softly(net, structure, [x])

    small = sep.to_static(gated, [x]).eval()

    pruned = models.prune_channels(net, structure).eval()
    with torch.no_grad():
        assert largest(small(x) - pruned(x)) < 1e-5 * largest(pruned(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("arch", ["lenet5", "resnet20"])
def test_a_gated_net_computes_in_other_precisions(arch, dtype):
    net, x = make_lively_net(arch)
    # Fresh gates: a choice that tips changes nothing.
    net = sep.prune_softly(net, smaller_structure(net), [x]).eval()
    tolerance = 1e-5 if dtype == torch.float64 else 0.1

    with torch.no_grad():
        expected = net(x)
        net, x = net.to(dtype), x.to(dtype)
        tuned = sep.tune(net)
        results = [net(x), run_one_by_one(net, x), run_one_by_one(tuned, x)]

    for logits in results:
        assert logits.dtype == dtype
        assert largest(logits - expected) < tolerance * largest(expected)


# ---- loading


def test_a_gated_net_comes_back_from_its_checkpoint(tmp_path):
    net, x = make_gated_net("lenet5")
    models.save_checkpoint(tmp_path / "a.pt", net, {"method": "sep"})

    loaded_net, facts = sep.load(tmp_path / "a.pt")

    assert facts["method"] == "sep"
    assert loaded_net.structure == net.structure
    assert sep.count_macs(loaded_net) == sep.count_macs(net)
    assert torch.allclose(loaded_net.eval()(x), net(x), atol=1e-5)


GATE = {"k": 8, "always_on_share": 0.0}


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        ("abc", "gates in it is of the wrong type"),
        ([None, None], "its gates are 2, but a lenet5 has 3 prunable layers"),
        ([None, 20, None], "the gate of conv2 does not say its k and its always_on_share"),
        ([None, {"k": 8}, None], "the gate of conv2 does not say its k"),
        (
            [None, GATE | {"k": 8.0}, None],
            "the gate of conv2 has a k of 8.0, not a whole number from 1 to 16",
        ),
        ([None, GATE | {"k": 17}, None], "the gate of conv2 has a k of 17, not a whole number"),
        ([None, GATE | {"k": 7}, None], "the gate of conv2 does not fit 16 kernels: 7 of them"),
        (
            [None, GATE | {"always_on_share": 1.5}, None],
            r"share of 1.5, not a number in \[0, 1\]; make the net anew",
        ),
        ([None, GATE | {"always_on_share": -0.1}, None], r"share of -0.1, not a number"),
        ([None, GATE | {"always_on_share": "1"}, None], r"share of '1', not a number"),
        ([None, GATE | {"always_on_share": float("nan")}, None], r"share of nan, not a number"),
        (
            [None, GATE | {"always_on_share": 1}, None],
            "the gate of conv2 does not fit 16 kernels: 8 of them for",
        ),
    ],
)
def test_gates_that_fit_no_net_are_refused_by_name(tmp_path, gates, words):
    net = models.build("lenet5", (4, 16, 20), channels=1, size=28)
    models.save_checkpoint(tmp_path / "a.pt", net, {})
    torch.save(torch.load(tmp_path / "a.pt") | {"gates": gates}, tmp_path / "b.pt")

    with pytest.raises(UserError, match=rf"b\.pt.*{words}"):
        sep.load(tmp_path / "b.pt")


@pytest.mark.parametrize("version", [1, 2])
def test_a_gated_checkpoint_of_a_format_before_is_refused(tmp_path, version):
    net, _ = make_lively_net("lenet5")
    models.save_checkpoint(tmp_path / "a.pt", net, {})
    sizes = {"classes": 10, "channels": 1, "size": 28, "side": 4, "arch": "lenet5"}
    content = torch.load(tmp_path / "a.pt") | sizes
    torch.save(content | {"format": version, "gates": [20, 40, 400]}, tmp_path / "a.pt")

    with pytest.raises(UserError, match=r"a\.pt has gates of an earlier version, .* --method sep"):
        sep.load(tmp_path / "a.pt")


# ---- fast single images


@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20", "resnet50"])
def test_one_image_at_a_time_says_the_same(arch):
    options = {"widths": [8] * 32, "size": 64} if arch == "resnet50" else {}
    net, x = make_gated_net(arch, **options)
    tuned = sep.tune(net)

    with torch.no_grad():
        expected = net(x)
        for _ in range(2):  # kernels are gathered by the first time
            assert largest(run_one_by_one(tuned, x) - expected) < 1e-4 * largest(expected)
        assert largest(tuned(x) - expected) < 1e-4 * largest(expected)
        no_images = tuned(x[:0])
    assert no_images.shape == (0, 10)


def test_a_net_without_gates_is_tuned_too():
    net, x = make_lively_net("resnet20")

    tuned = sep.tune(net)

    with torch.no_grad():
        assert largest(run_one_by_one(tuned, x) - net(x)) < 1e-4 * largest(net(x))
    assert tuned.eval() is tuned


def test_kernels_are_gathered_once_for_each_pair_of_groups(monkeypatch):
    net, x = make_gated_net("vgg16")
    tuned = sep.tune(net)
    gathered = []
    gather = sep.GatheringLayer.gather

    def record(self, previous, own):
        gathered.append((id(self), (previous, own)))
        return gather(self, previous, own)

    monkeypatch.setattr(sep.GatheringLayer, "gather", record)
    run_one_by_one(tuned, x)
    first_time = len(gathered)
    run_one_by_one(tuned, x)

    assert len(gathered) == first_time == len(set(gathered))
    assert len({pair for _, pair in gathered}) > 3


def test_a_tuned_net_is_a_copy():
    net, x = make_gated_net("resnet20")
    tuned = sep.tune(net)
    expected = net(x)
    copied = deepcopy(tuned)

    for parameter in net.parameters():
        parameter.data.mul_(1.1)

    assert largest(net(x) - expected) > 1e-3 * largest(expected)
    for candidate in (tuned, copied):
        assert largest(run_one_by_one(candidate, x) - expected) < 1e-4 * largest(expected)
    net(x[:1]).sum().backward()  # and what is tuned can still be trained


def test_a_net_loaded_in_inference_mode_reads_a_single_image(tmp_path):
    net, x = make_gated_net("resnet20")
    models.save_checkpoint(tmp_path / "net.pt", net, {})

    with torch.inference_mode():
        loaded_net = sep.load(tmp_path / "net.pt")[0].eval()
        expected = loaded_net(x)
        for candidate in (loaded_net, sep.tune(loaded_net)):
            for _ in range(2):
                assert largest(candidate(x[:1]) - expected[:1]) < 1e-4 * largest(expected)


def test_a_tuned_net_keeps_its_precision_under_autocast():
    net, x = make_gated_net("resnet20")
    tuned = sep.tune(net)
    expected = tuned(x[:1])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = tuned(x[:1])

    assert logits.dtype == torch.float32
    assert largest(logits - expected) < 1e-5 * largest(expected)


def test_tune_refuses_what_is_no_net_and_what_is_not_on_the_cpu():
    net, _ = make_gated_net("resnet20")

    with pytest.raises(UserError, match="not a Tuned"):
        sep.tune(sep.tune(net))
    with pytest.raises(UserError, match="on the CPU"):
        sep.tune(deepcopy(net).to("meta"))


def test_a_tuned_net_goes_on_after_an_image_of_another_precision():
    net, x = make_gated_net("resnet20")
    tuned = sep.tune(net)

    with pytest.raises(RuntimeError, match=r"dtype|type"):
        tuned(x[:1].double())

    assert largest(tuned(x[:1]) - net(x)[:1]) < 1e-4 * largest(net(x))


def test_a_tuned_net_takes_images_of_several_sizes_in_turns():
    net, _ = make_gated_net("vgg11")
    tuned = sep.tune(net)

    for size in (32, 48, 48, 32):
        x = torch.randn(1, 3, size, size).to(memory_format=torch.channels_last)
        assert largest(tuned(x) - net(x)) < 1e-4 * largest(net(x))


@pytest.mark.parametrize("place", [models.AFTER_ACTIVATION, models.AFTER_POOLING])
def test_norms_behind_the_activation_are_tuned(place):
    torch.manual_seed(0)
    architecture = models.named_architecture("vgg11")
    convolutions = [replace(each, norm_place=place) for each in architecture.convolutions]
    architecture = replace(architecture, convolutions=tuple(convolutions))
    net = models.build_net(architecture, (16,) * 8).eval()
    x = torch.randn(6, 3, 32, 32)

    gated = sep.prune_softly(net, (4,) * 8, [x]).eval()
    let_groups_differ(gated)

    with torch.no_grad():
        expected = gated(x)
        found = run_one_by_one(sep.tune(gated), x)
        assert largest(found - expected) < 1e-4 * largest(expected)
    assert len(torch.cat(record_choices(gated, x)).unique()) > 1


def test_hidden_linear_layers_with_gates_of_all_kinds_are_tuned():
    torch.manual_seed(0)
    widths = (8, 8, 16, 16, 32, 32, 32, 32, 40, 24)
    net = models.build("vgg11", widths, head_size=2, size=64).eval()
    x = torch.randn(6, 3, 64, 64)
    sizes = [GateSize(0, 8, 2), None, GateSize(8, 8, 3), None, GateSize(1, 31, 2)]
    sizes += [GateSize(0, 32, 8), None, GateSize(0, 32, 2), GateSize(10, 30, 2)]
    sizes += [GateSize(0, 24, 3)]

    gated = sep.add_gates(net, sizes, [x]).eval()
    let_groups_differ(gated)
    tuned = sep.tune(gated)

    with torch.no_grad():
        expected = gated(x)
        for _ in range(2):
            assert largest(run_one_by_one(tuned, x) - expected) < 1e-4 * largest(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20"])
def test_a_gpu_says_what_the_cpu_says(arch, tmp_path, monkeypatch):
    # TF32's three digits are enough to tip a gate's choice.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net, x = make_gated_net(arch)
    gpu_net, gpu_x = deepcopy(net).cuda(), x.cuda()

    with torch.no_grad():
        tolerance = 1e-2 * largest(net(x)).item()
        assert torch.allclose(gpu_net(gpu_x).cpu(), net(x), atol=tolerance)
        gpu_static, static = sep.to_static(gpu_net, [gpu_x]).eval(), sep.to_static(net, [x]).eval()
        assert torch.allclose(gpu_static(gpu_x).cpu(), static(x), atol=tolerance)
    gpu_net.train()(gpu_x).sum().backward()
    gradients = [each.grad for each in gpu_net.parameters() if each.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    half = [0.5] * net.channels
    difference = models.export_net(gpu_net.eval(), tmp_path / "a.pt2", half, half, net.size)
    assert difference < 1e-3
