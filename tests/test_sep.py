import random
from copy import deepcopy
from itertools import product

import pytest
import torch
from test_models import NETS, freeze, lively, some
from torch.utils.flop_counter import FlopCounterMode

import models
import sep


def gated(arch, share=0.5, **kind):
    """A gated net whose choices differ from image to image, and a batch for it."""
    net, x = lively(arch, **kind)
    net = sep.soften(net, some(net, share)).eval()
    for gate in filter(None, net.gates):
        torch.nn.init.normal_(gate.excite.weight, 0, 2)
    return net, x


@pytest.mark.parametrize("arch", NETS)
def test_frozen_to_the_criterions_choice_it_equals_the_hard_pruned_net(arch):
    net, x = lively(arch)
    hard, soft = models.prune(net, some(net)).eval(), sep.soften(net, some(net)).eval()
    with torch.no_grad():
        assert (soft(x) - hard(x)).abs().max() < 1e-5 * hard(x).abs().max()  # a fresh gate starts there
        for gate in filter(None, soft.gates):
            torch.nn.init.normal_(gate.excite.weight, 0, 2)
        assert (soft(x) - hard(x)).abs().max() > 1e-3 * hard(x).abs().max()
        freeze(soft, models.most_important(net, some(net)))
        assert (soft(x) - hard(x)).abs().max() < 1e-5 * hard(x).abs().max()


def test_a_second_step_starts_where_a_second_hard_step_starts():
    net, x = lively("lenet5")
    first, second = (16, 40, 400), (12, 40, 320)
    hard, soft = models.prune(models.prune(net, first), second), sep.soften(sep.soften(net, first), second)
    assert (soft.eval()(x) - hard.eval()(x)).abs().max() < 1e-4
    assert soft.structure == second and soft.widths == net.widths


@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20"])
def test_gathering_the_kernels_changes_nothing(arch, monkeypatch):
    net, x = gated(arch)
    net.train()

    def step():
        torch.manual_seed(0)
        net.zero_grad()
        y = net(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    state = {k: v.clone() for k, v in net.state_dict().items()}
    used = []
    gather = sep.gather
    monkeypatch.setattr(sep, "gather", lambda u: used.append(gather(u)) or used[-1])
    gathered = step()
    assert any(u is not None for u in used)
    net.load_state_dict(state)
    monkeypatch.setattr(sep, "gather", lambda used: None)
    for a, b in zip(gathered, step(), strict=True):
        assert torch.allclose(a, b, atol=1e-3 * b.abs().max())


def choices(net, x):
    """The scales (B, C) of every gate on a batch."""
    found, scale = [], sep.Gate.scale
    sep.Gate.scale = lambda self, *z: found.append(scale(self, *z)) or found[-1]
    try:
        net(x)
    finally:
        sep.Gate.scale = scale
    return found


def test_each_image_gets_exactly_as_many_kernels_as_the_structure_says():
    net, _ = gated("lenet5")
    scales = choices(net, torch.rand(64, 1, 28, 28) + torch.linspace(-2, 3, 64)[:, None, None, None])
    keeps = [g.keep for g in net.gates if g is not None]
    assert len(scales) == len(keeps) == 2
    for scale, keep in zip(scales, keeps):
        assert ((scale != 0).sum(1) == keep).all() and torch.allclose(scale.sum(1) / keep, torch.ones(64))
        assert len({tuple(row.nonzero()[:, 0].tolist()) for row in scale}) > 1  # it looks at the image


@pytest.mark.parametrize("arch", ["lenet5", "vgg16"])
def test_an_excluded_kernel_gets_no_gradient_from_the_image_that_excludes_it(arch):
    net, x = gated(arch)
    net.train()
    scales = choices(net, x)
    net.zero_grad()
    (net(x) * torch.tensor([1.0, 0, 0, 0])[:, None]).sum().backward() if arch == "lenet5" else net(x[:1].repeat(4, 1, 1, 1)).sum().backward()
    gates = [i for i, g in enumerate(net.gates) if g is not None]
    for i, scale in zip(gates, scales if arch == "lenet5" else choices(net, x[:1].repeat(4, 1, 1, 1))):
        grad = net.get_submodule(net.prunable[i].layer).weight.grad.flatten(1).abs().sum(1)
        assert (grad[scale[0] == 0] == 0).all() and (scale[0] == 0).any()
        assert (grad[scale[0] != 0] != 0).any()


def test_batch_norm_counts_only_the_images_that_use_a_channel():
    torch.manual_seed(0)
    norm, y = torch.nn.BatchNorm2d(3), torch.randn(6, 3, 4, 4, requires_grad=True)
    mask = torch.ones(6, 3, 1, 1)
    mask[2:, 1] = 0  # channel 1 is used by images 0 and 1 alone, channel 2 by none
    mask[:, 2] = 0
    out = sep.masked_norm(y, mask[:, :, 0, 0], norm, None) * mask
    reference = torch.nn.BatchNorm2d(3)
    assert torch.allclose(out[:, 0], reference(y)[:, 0], atol=1e-5)
    assert torch.allclose(norm.running_var[0], reference.running_var[0], atol=1e-6)
    reference = torch.nn.BatchNorm2d(3)
    assert torch.allclose(out[:2, 1], reference(y[:2])[:, 1], atol=1e-5)
    assert torch.allclose(norm.running_mean[1], reference.running_mean[1], atol=1e-6)
    assert norm.running_mean[2] == 0 and norm.running_var[2] == 1
    (out * torch.randn_like(out)).sum().backward()
    assert (y.grad[2:, 1] == 0).all() and (y.grad[:, 2] == 0).all() and (y.grad[:2, 1] != 0).any()


def test_where_all_images_choose_alike_batch_norm_is_the_ordinary_one():
    torch.manual_seed(0)
    y, mask, pick = 2 + torch.randn(6, 3, 4, 4), torch.ones(6, 3), torch.tensor([4, 0, 2])
    mask[:, 2] = 0  # chosen for no image
    few, many = torch.nn.BatchNorm2d(5), torch.nn.BatchNorm2d(5)
    alike = sep.masked_norm(y, mask, few, pick)
    other = sep.masked_norm(torch.cat([y, y[:1]]), torch.cat([mask, torch.zeros(1, 3)]), many, pick)  # one image more, which uses none
    assert torch.allclose(alike[:, :2], other[:6, :2], atol=1e-5)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(few.state_dict()[key], many.state_dict()[key], atol=1e-5), key
    assert few.running_mean[[1, 2, 3]].abs().max() == 0 and few.running_mean[[0, 4]].min() > 0.1
    assert torch.allclose(sep.masked_norm(y, mask, few.eval(), pick)[:, 0], few(y.repeat(1, 2, 1, 1)[:, [0, 1, 1, 1, 0]])[:, 4], atol=1e-5)


def test_macs_are_what_runs_with_the_gates(monkeypatch):
    net, x = lively("vgg16")
    for p in net.prunable:  # no channel is dead
        torch.nn.init.constant_(net.get_submodule(p.norm).weight, 0.01)
        torch.nn.init.constant_(net.get_submodule(p.norm).bias, 1)
    structure, flops = tuple(w // 2 for w in net.widths), []
    soft = sep.soften(net, structure).eval()
    monkeypatch.setattr(sep, "GRAIN", 1)
    gates = {torch.ops.aten.addmv: lambda bias, matrix, vector, **_: 2 * matrix[0] * matrix[1]}  # these are not in its own list
    fast = sep.tune(soft, x[:1], rounds=1)
    fast.switch([True] * len(fast.skips))
    for one, images in ((soft, 2), (fast, 1)):
        with FlopCounterMode(display=False, custom_mapping=gates) as counter, torch.no_grad():
            one(x[:1].repeat(images, 1, 1, 1))
        flops.append(counter.get_total_flops() / 2 / images)
    # where images choose alike the gathered net runs only the kernels it keeps, and the squeezes read no excluded channel, where MACs count them whole
    unread = sum(g.squeeze.out_features * (g.squeeze.in_features - k) for g, k in zip(list(soft.gates)[1:], structure) if g is not None)
    assert flops == [sep.macs(soft) - unread] * 2
    assert sep.macs(soft) == sep.macs(net, structure)
    assert sep.macs(soft) - models.macs(net, structure) == sum(max(4, i // 16) * (i + o) for i, o in zip((3, *net.widths), net.widths))
    assert sep.macs(net) == sep.macs(net, net.widths) == models.macs(net)


def test_a_gated_net_comes_back_from_its_checkpoint(tmp_path):
    net, x = gated("lenet5")
    models.save(tmp_path / "a.pt", net, {"method": "sep"})
    found, facts = sep.load(tmp_path / "a.pt")
    assert facts["method"] == "sep" and found.structure == net.structure and sep.macs(found) == sep.macs(net)
    assert torch.equal(found.eval()(x), net(x))
    content = torch.load(tmp_path / "a.pt")
    for gates in ([1, 2], [99, 40, 400], "abc", [0, 40, 400]):
        torch.save(content | {"gates": gates}, tmp_path / "b.pt")
        with pytest.raises(models.Failure, match=r"b\.pt"):
            sep.load(tmp_path / "b.pt")


def test_a_gate_counts_whom_it_chose():
    net, x = lively("lenet5")
    soft = sep.soften(net, (5, 50, 500)).eval()
    (chosen, scales), *others = sep.count(soft, [x, x])
    assert others == [None, None] and soft.gates[0].used is None
    assert chosen.sum() == scales.sum() == 5 * 2 * len(x) and set(chosen.tolist()) == {0.0, 2.0 * len(x)}


@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20"])
def test_a_hardened_net_is_the_gated_one_where_choices_do_not_change(arch):
    net, x = lively(arch)
    soft = sep.soften(net, some(net)).eval().to(memory_format=torch.channels_last)
    for gate in filter(None, soft.gates):
        gate.unit *= 1 + 0.1 * torch.rand(len(gate.unit))  # scales that are not 1
    small = sep.harden(soft, [x]).eval()
    with torch.no_grad():
        assert (soft(x) - small(x)).abs().max() < 1e-5 * small(x).abs().max()
    assert small.gates is None and small.widths == some(net) and soft.gates is not None


def test_the_kernels_chosen_most_often_stay():
    net, x = gated("lenet5")
    small = sep.harden(net, x.split(1))
    for p, keep, used in zip(net.prunable, net.structure, sep.count(net, [x])):
        if used is not None:
            least = used[0].sort().values[-keep]
            whole, left = net.get_submodule(p.layer).weight.flatten(1)[:, :25], small.get_submodule(p.layer).weight.flatten(1)[:, :25]
            if p.layer == "conv1":  # whose inputs are all there
                stayed = [(whole == row).all(1).nonzero().item() for row in left]
                assert used[0][stayed].min() == least and len(stayed) == keep
    assert small.widths == net.structure


@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20"])
def test_one_image_at_a_time_skips_kernels_and_says_the_same(arch):
    net, x = gated(arch)
    fast = sep.tune(net, x[:1], rounds=1)
    with torch.no_grad():
        right, counts = net(x), []
        assert (fast(x) - right).abs().max() < 1e-5 * right.abs().max()
        for skips in ((True,), (False,), (True, False), (False, True)):
            fast.switch([skips[i % len(skips)] for i in range(len(fast.skips))])
            with FlopCounterMode(display=False) as counter:
                found = torch.cat([fast(image) for image in x.split(1)])
            counts.append(counter.get_total_flops())
            assert (found - right).abs().max() < 1e-4 * right.abs().max()
            again = torch.cat([fast(image) for image in x.repeat_interleave(3, 0).split(1)])  # choices met again, for as many images
            assert (again - right.repeat_interleave(3, 0)).abs().max() < 1e-4 * right.abs().max()
    assert counts[0] < (0.95 if arch == "lenet5" else 0.8) * counts[1]  # conv1 + fc1 of LeNet-5 are gated, conv2 keeps all outputs


@pytest.mark.parametrize("arch", NETS)
def test_a_plain_net_is_tuned_too(arch):
    net, x = lively(arch)
    fast = sep.tune(net, x)
    assert fast.skips == [] and not any(isinstance(m, torch.nn.BatchNorm2d) for n in (fast.many, fast.one) for m in n.modules())
    for found in (fast(x), torch.cat([fast(image) for image in x.split(1)]), torch.cat([fast(image) for image in x.split(1)])):
        assert not found.requires_grad and (found - net(x)).abs().max() < 1e-4 * net(x).abs().max()


@pytest.mark.parametrize("seed", range(6))
def test_the_quickest_combination_of_gates_that_skip_and_gates_that_mask_is_found(seed, monkeypatch):
    net, x = lively("lenet5")
    net, rng = sep.soften(net, (10, 25, 250)), random.Random(seed)
    times = [{(before, own): rng.randint(1, 9) for before in (True, False) for own in (True, False)} for _ in net.gates]
    times[0] |= {(False, own): times[0][True, own] for own in (True, False)}  # nothing is before the first one
    clock, call, singles, made = [0.0], sep.Single.__call__, [], sep.Single.__init__

    def slow(self, *a):
        i = singles.index(self)
        clock[0] += times[i][singles[max(0, i - 1)].skip, self.skip]
        return call(self, *a)

    monkeypatch.setattr(sep.Single, "__init__", lambda self, *a: singles.append(self) or made(self, *a))
    monkeypatch.setattr(sep.Single, "__call__", slow)
    monkeypatch.setattr(sep.time, "perf_counter", lambda: clock[0])
    cost = lambda skips: sum(t[before, own] for t, before, own in zip(times, (True, *skips), skips))
    best = min(product((True, False), repeat=3), key=cost)
    fast = sep.tune(net, x, rounds=1)
    assert fast.one.quick == singles and cost(fast.skips) == cost(best)


@pytest.mark.parametrize("arch", ["lenet5", "resnet20"])
def test_a_choice_met_again_takes_the_kernels_gathered_before(arch, monkeypatch):
    net, x = gated(arch)
    fast = sep.tune(net, x, rounds=1)
    gathered, parts = [], models.parts
    fast.switch([True] * len(fast.skips))
    monkeypatch.setattr(models, "parts", lambda *a: gathered.append(a) or parts(*a))
    counts = []
    for n in (0, 1, 1, 1, 0, 2, 2):
        gathered.clear()
        assert torch.allclose(fast(x[n : n + 1]), net(x)[n : n + 1], atol=1e-4)
        counts.append(sum(a[2] is not None or a[3] is not None for a in gathered if isinstance(a[0], models.Kernels)))
    assert all(counts[i] == 0 for i in (2, 3, 6)) and all(counts[i] > 0 for i in (1, 4, 5))


def test_a_tuned_net_is_a_copy():
    net, x = gated("resnet20")
    fast, before = sep.tune(net, x, rounds=1), net(x)
    copied = deepcopy(fast)
    for p in net.parameters():
        p.data.mul_(1.1)
    assert (net(x) - before).abs().max() > 1e-3 * before.abs().max()
    fast.switch([True] * len(fast.skips)), copied.switch([False] * len(fast.skips))
    assert all(fast.skips) and not any(copied.skips)
    for tuned in (fast, copied):
        assert (torch.cat([tuned(image) for image in x.split(1)]) - before).abs().max() < 1e-4 * before.abs().max()
    net(x[:1]).sum().backward()  # and what is tuned can still be trained


def test_a_net_loaded_in_inference_mode_reads_a_single_image(tmp_path):
    net, x = gated("resnet20")
    models.save(tmp_path / "net.pt", net, {})
    with torch.inference_mode():
        again = sep.load(tmp_path / "net.pt")[0].eval()
        for one in (again, sep.tune(again, x, rounds=1)):
            for _ in range(2):
                assert (one(x[:1]) - again(x)[:1]).abs().max() < 1e-4 * again(x).abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("arch", ["lenet5", "resnet20"])
def test_a_gated_net_computes_in_other_precisions(arch, dtype):
    net, x = lively(arch)
    net = sep.soften(net, some(net)).eval()
    with torch.no_grad():
        right, net, x = net(x), net.to(dtype), x.to(dtype)
        fast = sep.tune(net, x, rounds=1)
        for found in (net(x), *(torch.cat([one(image) for image in x.split(1)]) for one in (net, fast))):
            assert found.dtype == dtype and (found - right).abs().max() < (1e-5 if dtype == torch.float64 else 0.1) * right.abs().max()


def test_a_tuned_net_keeps_its_precision_under_autocast():
    net, x = gated("resnet20")
    fast = sep.tune(net, x, rounds=1)
    right = fast(x[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(x[:1]).dtype == torch.float32 and (fast(x[:1]) - right).abs().max() < 1e-5 * right.abs().max()


def test_tune_refuses_what_are_no_images():
    net, x = gated("resnet20")
    for wrong in (x[:, :2], x[:0], x[0], x.double(), x.numpy(), None):
        with pytest.raises(models.Failure, match=r"images \(N, 3, H, W\), at least one, of torch.float32 on the CPU"):
            sep.tune(net, wrong)
    fast = sep.tune(net, x, rounds=1)
    with pytest.raises(models.Failure, match="not a Tuned"):
        sep.tune(fast, x)
    with pytest.raises(RuntimeError):
        fast(x[:1].double())
    assert (fast(x[:1]) - net(x)[:1]).abs().max() < 1e-4 * net(x).abs().max()  # what was wrong left nothing behind


def test_a_tuned_net_takes_images_of_several_sizes_in_turns():
    net, _ = gated("vgg11")
    fast = sep.tune(net, torch.randn(2, 3, 32, 32), rounds=1)
    for skip in (True, False):
        fast.switch([skip] * len(fast.skips))
        for size in (32, 48, 48, 32):
            x = torch.randn(1, 3, size, size).to(memory_format=torch.channels_last)
            assert (fast(x) - net(x)).abs().max() < 1e-4 * net(x).abs().max()


@pytest.mark.parametrize("keeps", [(1, None, 12, 16, None, 20, 24, 32, 20, 5), (8, 8, 16, 16, 32, 32, 32, 32, 40, 24)])
def test_a_tuned_net_with_hidden_linear_layers_and_gates_of_all_kinds(keeps):
    torch.manual_seed(0)
    net = models.build("vgg11", (8, 8, 16, 16, 32, 32, 32, 32, 40, 24), side=2, size=64)
    sep.attach(net.eval(), keeps)
    for gate in filter(None, net.gates):
        torch.nn.init.normal_(gate.excite.weight, 0, 2)
    x = torch.randn(3, 3, 64, 64)
    fast = sep.tune(net, x, rounds=1)
    for skips in ((True,), (False,), (True, False)):
        fast.switch([skips[i % len(skips)] for i in range(len(fast.skips))])
        found = torch.cat([fast(image) for image in x.repeat_interleave(2, 0).split(1)])
        assert (found - net(x).repeat_interleave(2, 0)).abs().max() < 1e-4 * net(x).abs().max()


def test_a_single_image_is_masked_where_nothing_was_measured(monkeypatch):
    net, x = gated("resnet20")
    right = net(x)
    monkeypatch.setattr(sep, "gather", None)
    assert (net(x[:1]) - right[:1]).abs().max() < 1e-4 * right.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20"])
def test_a_gpu_says_what_the_cpu_says(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its three digits are enough to tip a gate's choice
    net, x = gated(arch)
    there, y = deepcopy(net).cuda(), x.cuda()
    with torch.no_grad():
        assert torch.allclose(there(y).cpu(), net(x), atol=1e-2 * net(x).abs().max().item())
    assert sep.harden(there, [y]).widths == sep.harden(net, [x]).widths
    there.train()(y).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in there.gates.parameters())
    assert models.export(there.eval(), tmp_path / "a.pt2", [0.5] * net.channels, [0.5] * net.channels, net.size) < 1e-3
