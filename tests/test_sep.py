"""Tests of sep.py, in its order: the gate, batch norm of the chosen channels, gated nets, and the
nets that are fast at single images."""

import random
from copy import deepcopy
from itertools import product

import pytest
import torch
from test_models import NETS, freeze_gates, largest, make_lively_net, smaller_structure
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
import sep
from models import UserError


def make_gated_net(arch, share=0.5, **options):
    """A gated net whose choices differ from image to image, and a batch for it."""
    net, x = make_lively_net(arch, **options)
    net = sep.add_gates(net, smaller_structure(net, share)).eval()
    randomise_gates(net)
    return net, x


def randomise_gates(net):
    """Let the gates look at the image: a fresh one chooses alike for all of them."""
    for gate in filter(None, net.gates):
        torch.nn.init.normal_(gate.excite.weight, 0, 2)


def run_one_by_one(net, x):
    """The logits (B, classes) of a net that reads single images."""
    return torch.cat([net(image) for image in x.split(1)])


def repeat_pattern(tuned, pattern):
    """Of each gate whether it is to skip: the pattern, again and again."""
    return [pattern[i % len(pattern)] for i in range(len(tuned.skipping_gates))]


# ---- the gate


@pytest.mark.parametrize("arch", NETS)
def test_frozen_to_the_criterions_choice_it_equals_the_hard_pruned_net(arch):
    net, x = make_lively_net(arch)
    structure = smaller_structure(net)
    hard = models.prune_channels(net, structure).eval()
    soft = sep.add_gates(net, structure).eval()

    with torch.no_grad():
        # A fresh gate starts there.
        assert largest(soft(x) - hard(x)) < 1e-5 * largest(hard(x))
        randomise_gates(soft)
        assert largest(soft(x) - hard(x)) > 1e-3 * largest(hard(x))
        freeze_gates(soft, models.most_important_channels(net, structure))
        assert largest(soft(x) - hard(x)) < 1e-5 * largest(hard(x))


def test_a_second_step_starts_where_a_second_hard_step_starts():
    net, x = make_lively_net("lenet5")
    first, second = (16, 40, 400), (12, 40, 320)

    hard = models.prune_channels(models.prune_channels(net, first), second).eval()
    soft = sep.add_gates(sep.add_gates(net, first), second).eval()

    assert largest(soft(x) - hard(x)) < 1e-4
    assert soft.structure == second
    assert soft.widths == net.widths


@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20"])
def test_gathering_the_kernels_changes_nothing(arch, monkeypatch):
    net, x = make_gated_net(arch)
    net.train()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    choose = sep.channels_to_gather
    choices = []

    def record_choice(is_used):
        choices.append(choose(is_used))
        return choices[-1]

    def run_step():
        net.load_state_dict(state)
        torch.manual_seed(0)
        net.zero_grad()
        y = net(x)
        y.square().sum().backward()
        gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        return [y.detach(), *gradients]

    monkeypatch.setattr(sep, "channels_to_gather", record_choice)
    gathered = run_step()
    monkeypatch.setattr(sep, "channels_to_gather", lambda is_used: None)
    masked = run_step()

    assert any(choice is not None for choice in choices)
    for a, b in zip(gathered, masked, strict=True):
        assert torch.allclose(a, b, atol=1e-3 * largest(b))


def record_scales(net, x):
    """The scales (B, C) of every gate on a batch."""
    scales = []
    compute = sep.SEGate.channel_scales

    def compute_and_record(self, *arguments):
        scales.append(compute(self, *arguments))
        return scales[-1]

    sep.SEGate.channel_scales = compute_and_record
    try:
        net(x)
    finally:
        sep.SEGate.channel_scales = compute
    return scales


def test_each_image_gets_exactly_as_many_kernels_as_the_structure_says():
    net, _ = make_gated_net("lenet5")
    brightness = torch.linspace(-2, 3, 64)[:, None, None, None]

    scales = record_scales(net, torch.rand(64, 1, 28, 28) + brightness)

    ks = [gate.k for gate in net.gates if gate is not None]
    assert len(scales) == 2
    assert len(ks) == 2
    for scale, k in zip(scales, ks):
        assert ((scale != 0).sum(1) == k).all()
        assert torch.allclose(scale.sum(1) / k, torch.ones(64))
        choices = {tuple(row.nonzero()[:, 0].tolist()) for row in scale}
        assert len(choices) > 1  # it looks at the image


@pytest.mark.parametrize("arch", ["lenet5", "vgg16"])
def test_an_excluded_kernel_gets_no_gradient_from_the_image_that_excludes_it(arch):
    net, x = make_gated_net(arch)
    net.train()
    # LeNet-5 has no batch norm, so images can be told apart by the loss; VGG-16 gets one image.
    weights = torch.tensor([1.0, 0, 0, 0])[:, None]
    if arch == "vgg16":
        x = x[:1].repeat(4, 1, 1, 1)
        weights = torch.ones(4, 1)
    scales = record_scales(net, x)

    net.zero_grad()
    (net(x) * weights).sum().backward()

    gated = [prunable for prunable, gate in zip(net.prunable, net.gates) if gate is not None]
    for prunable, scale in zip(gated, scales):
        gradient = net.get_submodule(prunable.layer_name).weight.grad.flatten(1).abs().sum(1)
        assert (scale[0] == 0).any()
        assert (gradient[scale[0] == 0] == 0).all()
        assert (gradient[scale[0] != 0] != 0).any()


# ---- batch norm of the chosen channels


def test_batch_norm_counts_only_the_images_that_use_a_channel():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3)
    y = torch.randn(6, 3, 4, 4, requires_grad=True)
    mask = torch.ones(6, 3, 1, 1)
    mask[2:, 1] = 0  # channel 1 is used by images 0 and 1 alone
    mask[:, 2] = 0  # channel 2 by none

    out = sep.masked_batch_norm(y, mask[:, :, 0, 0], norm, None) * mask

    by_all = torch.nn.BatchNorm2d(3)
    assert torch.allclose(out[:, 0], by_all(y)[:, 0], atol=1e-5)
    assert torch.allclose(norm.running_var[0], by_all.running_var[0], atol=1e-6)
    by_two = torch.nn.BatchNorm2d(3)
    assert torch.allclose(out[:2, 1], by_two(y[:2])[:, 1], atol=1e-5)
    assert torch.allclose(norm.running_mean[1], by_two.running_mean[1], atol=1e-6)
    assert norm.running_mean[2] == 0
    assert norm.running_var[2] == 1

    (out * torch.randn_like(out)).sum().backward()
    assert (y.grad[2:, 1] == 0).all()
    assert (y.grad[:, 2] == 0).all()
    assert (y.grad[:2, 1] != 0).any()


def test_where_all_images_choose_alike_batch_norm_is_the_ordinary_one():
    torch.manual_seed(0)
    y = 2 + torch.randn(6, 3, 4, 4)
    mask = torch.ones(6, 3)
    mask[:, 2] = 0  # chosen for no image
    channels = torch.tensor([4, 0, 2])
    alike, differing = torch.nn.BatchNorm2d(5), torch.nn.BatchNorm2d(5)

    out = sep.masked_batch_norm(y, mask, alike, channels)
    # One image more, which uses none.
    more_y, more_mask = torch.cat([y, y[:1]]), torch.cat([mask, torch.zeros(1, 3)])
    expected = sep.masked_batch_norm(more_y, more_mask, differing, channels)

    assert torch.allclose(out[:, :2], expected[:6, :2], atol=1e-5)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(alike.state_dict()[key], differing.state_dict()[key], atol=1e-5), key
    assert alike.running_mean[[1, 2, 3]].abs().max() == 0
    assert alike.running_mean[[0, 4]].min() > 0.1
    alike.eval()
    some_channels = sep.masked_batch_norm(y, mask, alike, channels)
    all_channels = alike(y.repeat(1, 2, 1, 1)[:, [0, 1, 1, 1, 0]])
    assert torch.allclose(some_channels[:, 0], all_channels[:, 4], atol=1e-5)


# ---- gated nets


def test_macs_are_what_runs_with_the_gates(monkeypatch):
    net, x = make_lively_net("vgg16")
    for prunable in net.prunable:  # no channel is dead
        norm = net.get_submodule(prunable.norm_name)
        torch.nn.init.constant_(norm.weight, 0.01)
        torch.nn.init.constant_(norm.bias, 1)
    structure = tuple(width // 2 for width in net.widths)
    soft = sep.add_gates(net, structure).eval()
    monkeypatch.setattr(sep, "GATHER_MULTIPLE", 1)
    tuned = sep.tune(soft, x[:1], rounds=1)
    tuned.set_skipping([True] * len(tuned.skipping_gates))

    def count_addmv(bias, matrix, vector, **_):
        return 2 * matrix[0] * matrix[1]

    macs = []
    for candidate, images in ((soft, 2), (tuned, 1)):
        # The counter's own list lacks addmv.
        custom = {torch.ops.aten.addmv: count_addmv}
        counter = FlopCounterMode(display=False, custom_mapping=custom)
        with counter, torch.no_grad():
            candidate(x[:1].repeat(images, 1, 1, 1))
        macs.append(counter.get_total_flops() / 2 / images)

    # Where images choose alike the gathered net runs only the kernels it keeps, and the squeezes
    # read no excluded channel, where count_macs counts them whole.
    unread = sum(
        gate.squeeze.out_features * (gate.squeeze.in_features - k)
        for gate, k in zip(list(soft.gates)[1:], structure)
        if gate is not None
    )
    assert macs == [sep.count_macs(soft) - unread] * 2
    assert sep.count_macs(soft) == sep.count_macs(net, structure)
    gate_macs = sum(
        max(4, inputs // 16) * (inputs + outputs)
        for inputs, outputs in zip((3, *net.widths), net.widths)
    )
    assert sep.count_macs(soft) - models.count_macs(net, structure) == gate_macs
    assert sep.count_macs(net) == models.count_macs(net)
    assert sep.count_macs(net, net.widths) == models.count_macs(net)


def test_a_gated_net_comes_back_from_its_checkpoint(tmp_path):
    net, x = make_gated_net("lenet5")
    models.save_checkpoint(tmp_path / "a.pt", net, {"method": "sep"})

    loaded_net, facts = sep.load(tmp_path / "a.pt")

    assert facts["method"] == "sep"
    assert loaded_net.structure == net.structure
    assert sep.count_macs(loaded_net) == sep.count_macs(net)
    assert torch.equal(loaded_net.eval()(x), net(x))


@pytest.mark.parametrize("gates", [[1, 2], [99, 40, 400], "abc", [0, 40, 400]])
def test_gates_that_fit_no_net_are_refused_by_name(tmp_path, gates):
    net, _ = make_gated_net("lenet5")
    models.save_checkpoint(tmp_path / "a.pt", net, {})
    torch.save(torch.load(tmp_path / "a.pt") | {"gates": gates}, tmp_path / "b.pt")

    with pytest.raises(UserError, match=r"b\.pt"):
        sep.load(tmp_path / "b.pt")


@pytest.mark.parametrize("arch", ["lenet5", "vgg11", "resnet8"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_a_checkpoint_of_the_format_before_comes_back(tmp_path, arch, is_gated):
    net, x = make_gated_net(arch) if is_gated else make_lively_net(arch)
    models.save_checkpoint(tmp_path / "a.pt", net, {"seed": 3})
    content = torch.load(tmp_path / "a.pt")
    # It named a few nets alone, and the initial scales of gates otherwise.
    sizes = {"classes": 10, "channels": net.channels, "size": net.size}
    sizes["side"] = net.architecture.head_size if arch == "lenet5" else 1
    state = {key.replace("initial_scale", "unit"): value for key, value in content["state"].items()}
    del content["architecture"]
    torch.save(content | sizes | {"format": 1, "arch": arch, "state": state}, tmp_path / "a.pt")

    loaded_net, facts = sep.load(tmp_path / "a.pt")

    assert torch.equal(loaded_net.eval()(x), net(x))
    assert loaded_net.architecture == net.architecture
    assert facts == {"seed": 3}


def test_a_batch_norm_of_a_linear_layer_counts_the_images_that_use_a_channel():
    torch.manual_seed(0)
    norm, other = nn.BatchNorm1d(5), nn.BatchNorm2d(5)
    y, scales = torch.randn(8, 5), torch.rand(8, 5) * (torch.rand(8, 5) > 0.4)

    found = sep.masked_batch_norm(y, scales, norm, None)
    expected = sep.masked_batch_norm(y[..., None, None], scales, other, None)

    assert torch.equal(found, expected[..., 0, 0])
    assert torch.equal(norm.running_mean, other.running_mean)


def test_a_gate_counts_whom_it_chose():
    net, x = make_lively_net("lenet5")
    soft = sep.add_gates(net, (5, 50, 500)).eval()

    usage, *others = sep.measure_usage(soft, [x, x])

    assert others == [None, None]
    assert soft.gates[0].usage is None
    assert usage.images == 2 * len(x)
    assert usage.selections.sum() == 5 * 2 * len(x)
    assert usage.scale_sums.sum() == 5 * 2 * len(x)
    # A fresh gate chooses alike for all images.
    assert usage.count_kernels() == (15, 0, 5)
    assert len(usage.choices) == 1


def test_usage_tells_choices_apart():
    usage = sep.Usage(4, "cpu")
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]).float()

    usage.add(mask, 2 * mask)
    usage.add(mask[:1], mask[:1])

    assert usage.images == 4
    assert usage.selections.tolist() == [4, 3, 1, 0]
    assert usage.scale_sums.tolist() == [7, 5, 2, 0]
    assert usage.count_kernels() == (1, 2, 1)
    assert len(usage.choices) == 2


@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20"])
def test_a_static_net_is_the_gated_one_where_choices_do_not_change(arch):
    net, x = make_lively_net(arch)
    structure = smaller_structure(net)
    soft = sep.add_gates(net, structure).eval().to(memory_format=torch.channels_last)
    for gate in filter(None, soft.gates):
        # Scales that are not 1.
        gate.initial_scale *= 1 + 0.1 * torch.rand(len(gate.initial_scale))

    small = sep.to_static(soft, [x]).eval()

    with torch.no_grad():
        assert largest(soft(x) - small(x)) < 1e-5 * largest(small(x))
    assert small.gates is None
    assert small.widths == structure
    assert soft.gates is not None


def test_the_kernels_chosen_most_often_stay():
    net, x = make_gated_net("lenet5")

    small = sep.to_static(net, x.split(1))

    # conv1's inputs are all there, so its kernels can be recognised.
    selections = sep.measure_usage(net, [x])[0].selections
    k = net.structure[0]
    all_kernels = net.conv1.weight.flatten(1)
    kernels = small.conv1.weight.flatten(1)
    kept_channels = [(all_kernels == kernel).all(1).nonzero().item() for kernel in kernels]
    assert len(kept_channels) == k
    assert selections[kept_channels].min() == selections.sort().values[-k]
    assert small.widths == net.structure


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("arch", ["lenet5", "resnet20"])
def test_a_gated_net_computes_in_other_precisions(arch, dtype):
    net, x = make_lively_net(arch)
    net = sep.add_gates(net, smaller_structure(net)).eval()
    tolerance = 1e-5 if dtype == torch.float64 else 0.1

    with torch.no_grad():
        expected = net(x)
        net, x = net.to(dtype), x.to(dtype)
        tuned = sep.tune(net, x, rounds=1)
        results = [net(x), run_one_by_one(net, x), run_one_by_one(tuned, x)]

    for logits in results:
        assert logits.dtype == dtype
        assert largest(logits - expected) < tolerance * largest(expected)


def test_a_single_image_is_masked_where_nothing_was_measured(monkeypatch):
    net, x = make_gated_net("resnet20")
    expected = net(x)
    monkeypatch.setattr(sep, "channels_to_gather", None)

    logits = net(x[:1])

    assert largest(logits - expected[:1]) < 1e-4 * largest(expected)


# ---- fast single images


@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20"])
def test_one_image_at_a_time_skips_kernels_and_says_the_same(arch):
    net, x = make_gated_net(arch)
    tuned = sep.tune(net, x[:1], rounds=1)
    repeated = x.repeat_interleave(3, 0)
    flops = []

    with torch.no_grad():
        expected = net(x)
        repeated_expected = expected.repeat_interleave(3, 0)
        assert largest(tuned(x) - expected) < 1e-5 * largest(expected)
        for pattern in ((True,), (False,), (True, False), (False, True)):
            tuned.set_skipping(repeat_pattern(tuned, pattern))
            with FlopCounterMode(display=False) as counter:
                logits = run_one_by_one(tuned, x)
            flops.append(counter.get_total_flops())
            assert largest(logits - expected) < 1e-4 * largest(expected)
            # Choices met again, for as many images.
            repeated_logits = run_one_by_one(tuned, repeated)
            assert largest(repeated_logits - repeated_expected) < 1e-4 * largest(expected)

    flops_skipping, flops_masking = flops[:2]
    # conv1 and fc1 of LeNet-5 are gated, conv2 keeps all outputs.
    most = 0.95 if arch == "lenet5" else 0.8
    assert flops_skipping < most * flops_masking


@pytest.mark.parametrize("arch", NETS)
def test_a_plain_net_is_tuned_too(arch):
    net, x = make_lively_net(arch)

    tuned = sep.tune(net, x)

    assert tuned.skipping_gates == []
    for inner_net in (tuned.batch_net, tuned.single_net):
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in inner_net.modules())
    for logits in (tuned(x), run_one_by_one(tuned, x), run_one_by_one(tuned, x)):
        assert not logits.requires_grad
        assert largest(logits - net(x)) < 1e-4 * largest(net(x))


@pytest.mark.parametrize("seed", range(6))
def test_the_quickest_combination_of_gates_that_skip_and_gates_that_mask_is_found(
    seed, monkeypatch
):
    net, x = make_lively_net("lenet5")
    net = sep.add_gates(net, (10, 25, 250))
    times = make_up_times(seed, len(net.gates))
    clock = [0.0]
    runners = []
    initialise, run = sep.GatedRunner.__init__, sep.GatedRunner.__call__

    def record_runner(self, *arguments):
        runners.append(self)
        initialise(self, *arguments)

    def run_slowly(self, *arguments):
        i = runners.index(self)
        before = runners[max(0, i - 1)]
        clock[0] += times[i][before.is_skipping, self.is_skipping]
        return run(self, *arguments)

    def total_time(choice):
        befores = (True, *choice)
        return sum(t[before, own] for t, before, own in zip(times, befores, choice))

    monkeypatch.setattr(sep.GatedRunner, "__init__", record_runner)
    monkeypatch.setattr(sep.GatedRunner, "__call__", run_slowly)
    monkeypatch.setattr(sep.time, "perf_counter", lambda: clock[0])

    tuned = sep.tune(net, x, rounds=1)

    best = min(product((True, False), repeat=3), key=total_time)
    assert tuned.single_net.layer_runners == runners
    assert total_time(tuned.skipping_gates) == total_time(best)


def make_up_times(seed, gates):
    """Per gate {(whether the one before skips, whether it does): seconds}."""
    generator = random.Random(seed)
    times = [
        {pair: generator.randint(1, 9) for pair in product((True, False), repeat=2)}
        for _ in range(gates)
    ]
    for skips in (True, False):  # nothing is before the first one
        times[0][False, skips] = times[0][True, skips]
    return times


@pytest.mark.parametrize("arch", ["lenet5", "resnet20"])
def test_a_choice_met_again_takes_the_kernels_gathered_before(arch, monkeypatch):
    net, x = make_gated_net(arch)
    tuned = sep.tune(net, x, rounds=1)
    tuned.set_skipping([True] * len(tuned.skipping_gates))
    select = models.select_weight_and_bias
    selections = []

    def record_selection(layer, features, input_channels, output_channels):
        is_gathered = input_channels is not None or output_channels is not None
        if isinstance(layer, sep.GatheringLayer) and is_gathered:
            selections.append(layer)
        return select(layer, features, input_channels, output_channels)

    monkeypatch.setattr(models, "select_weight_and_bias", record_selection)
    counts = []
    # The images in this order: at places 2, 3 and 6 comes the one before once more.
    for n in (0, 1, 1, 1, 0, 2, 2):
        selections.clear()
        assert torch.allclose(tuned(x[n : n + 1]), net(x)[n : n + 1], atol=1e-4)
        counts.append(len(selections))

    assert all(counts[i] == 0 for i in (2, 3, 6))
    assert all(counts[i] > 0 for i in (1, 4, 5))


def test_a_tuned_net_is_a_copy():
    net, x = make_gated_net("resnet20")
    tuned = sep.tune(net, x, rounds=1)
    expected = net(x)
    copied = deepcopy(tuned)

    for parameter in net.parameters():
        parameter.data.mul_(1.1)
    tuned.set_skipping([True] * len(tuned.skipping_gates))
    copied.set_skipping([False] * len(tuned.skipping_gates))

    assert largest(net(x) - expected) > 1e-3 * largest(expected)
    assert all(tuned.skipping_gates)
    assert not any(copied.skipping_gates)
    for candidate in (tuned, copied):
        assert largest(run_one_by_one(candidate, x) - expected) < 1e-4 * largest(expected)
    net(x[:1]).sum().backward()  # and what is tuned can still be trained


def test_a_net_loaded_in_inference_mode_reads_a_single_image(tmp_path):
    net, x = make_gated_net("resnet20")
    models.save_checkpoint(tmp_path / "net.pt", net, {})

    with torch.inference_mode():
        loaded_net = sep.load(tmp_path / "net.pt")[0].eval()
        expected = loaded_net(x)
        for candidate in (loaded_net, sep.tune(loaded_net, x, rounds=1)):
            for _ in range(2):
                assert largest(candidate(x[:1]) - expected[:1]) < 1e-4 * largest(expected)


def test_a_tuned_net_keeps_its_precision_under_autocast():
    net, x = make_gated_net("resnet20")
    tuned = sep.tune(net, x, rounds=1)
    expected = tuned(x[:1])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = tuned(x[:1])

    assert logits.dtype == torch.float32
    assert largest(logits - expected) < 1e-5 * largest(expected)


def test_tune_refuses_what_are_no_images():
    net, x = make_gated_net("resnet20")
    words = r"images \(N, 3, H, W\), at least one, of torch.float32 on the CPU"

    for wrong in (x[:, :2], x[:0], x[0], x.double(), x.numpy(), None):
        with pytest.raises(UserError, match=words):
            sep.tune(net, wrong)
    tuned = sep.tune(net, x, rounds=1)
    with pytest.raises(UserError, match="not a Tuned"):
        sep.tune(tuned, x)
    with pytest.raises(RuntimeError):
        tuned(x[:1].double())
    # What was wrong left nothing behind.
    assert largest(tuned(x[:1]) - net(x)[:1]) < 1e-4 * largest(net(x))


def test_a_tuned_net_takes_images_of_several_sizes_in_turns():
    net, _ = make_gated_net("vgg11")
    tuned = sep.tune(net, torch.randn(2, 3, 32, 32), rounds=1)

    for is_skipping in (True, False):
        tuned.set_skipping([is_skipping] * len(tuned.skipping_gates))
        for size in (32, 48, 48, 32):
            x = torch.randn(1, 3, size, size).to(memory_format=torch.channels_last)
            assert largest(tuned(x) - net(x)) < 1e-4 * largest(net(x))


@pytest.mark.parametrize(
    "ks", [(1, None, 12, 16, None, 20, 24, 32, 20, 5), (8, 8, 16, 16, 32, 32, 32, 32, 40, 24)]
)
def test_hidden_linear_layers_and_gates_of_all_kinds_are_tuned(ks):
    torch.manual_seed(0)
    widths = (8, 8, 16, 16, 32, 32, 32, 32, 40, 24)
    net = models.build("vgg11", widths, head_size=2, size=64).eval()
    sep.attach_gates(net, ks)
    randomise_gates(net)
    x = torch.randn(3, 3, 64, 64)
    tuned = sep.tune(net, x, rounds=1)
    expected = net(x).repeat_interleave(2, 0)

    for pattern in ((True,), (False,), (True, False)):
        tuned.set_skipping(repeat_pattern(tuned, pattern))
        logits = run_one_by_one(tuned, x.repeat_interleave(2, 0))
        assert largest(logits - expected) < 1e-4 * largest(expected)


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
    assert sep.to_static(gpu_net, [gpu_x]).widths == sep.to_static(net, [x]).widths
    gpu_net.train()(gpu_x).sum().backward()
    for parameter in gpu_net.gates.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    half = [0.5] * net.channels
    difference = models.export_net(gpu_net.eval(), tmp_path / "a.pt2", half, half, net.size)
    assert difference < 1e-3
