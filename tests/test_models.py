import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
import sep
from models import Failure, build, macs, parameters, prune

NETS = {"lenet5": dict(channels=1, size=28), "vgg16": {}, "vgg19": {}, "resnet20": {}, "resnet56": {}}


def lively(arch, widths=None, **kind):
    """A net in evaluation mode whose batch norms have seen something, and a batch for it."""
    torch.manual_seed(0)
    net = build(arch, widths, **(NETS.get(arch, {}) | kind))
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        nn.init.uniform_(m.weight, 0.5, 1.5)
        nn.init.normal_(m.bias, 0, 0.2)
        m.momentum = 1.0
    with torch.no_grad():
        net(torch.randn(8, net.channels, net.size, net.size))
    for m in norms:
        m.momentum = 0.1
    return net.eval(), torch.randn(4, net.channels, net.size, net.size)


def some(net, share=0.6):
    """A structure in which the layers lose different shares, and one of them none."""
    return tuple(w if i == 1 else max(1, int(w * (share + 0.3 * (i % 2)))) for i, w in enumerate(net.widths))


def freeze(net, kept):
    """Let every gate choose the channels `kept` for every image, at scale 1."""
    for gate, width, stay in zip(net.gates, net.widths, kept):
        if gate is not None:
            nn.init.zeros_(gate.excite.weight)
            gate.start(torch.zeros(width).index_fill(0, stay, 1.0))


@pytest.mark.parametrize(("arch", "mega", "params"), [("lenet5", 2.293, 431_080), ("vgg16", 313.20, None), ("vgg19", 398.14, 20_035_018),
                                                     ("resnet56", 125.49, 853_018)])
def test_macs_and_parameters_are_the_published_counts(arch, mega, params):
    net = build(arch, **NETS[arch])
    assert macs(net) / 1e6 == pytest.approx(mega, abs=0.005)
    assert params is None or parameters(net) == params


@pytest.mark.parametrize("arch", NETS)
def test_macs_are_half_of_what_the_flop_counter_counts(arch):
    net, x = lively(arch)
    for candidate in (net, prune(net, some(net))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            candidate.eval()(x[:1])
        assert macs(candidate) * 2 == counter.get_total_flops()
    assert macs(net, some(net)) == macs(candidate) < macs(net)


@pytest.mark.parametrize("arch", NETS)
def test_removing_channels_equals_masking_them(arch):
    net, x = lively(arch)
    kept = models.most_important(net, some(net))
    small = prune(net, some(net)).eval()
    models.compensate(net, kept)
    for p, width, stay in zip(net.prunable, net.widths, kept):  # the mask sits where the next layer reads
        mask = torch.zeros(width).index_fill(0, stay, 1.0)
        net.get_submodule(p.next).register_forward_pre_hook(
            lambda m, x, mask=mask: x[0] * (mask.repeat_interleave(x[0].shape[1] // len(mask)) if x[0].dim() == 2 else mask[:, None, None]))
    with torch.no_grad():
        masked, removed = net(x), small(x)
    assert small.widths == some(net) and parameters(small) < parameters(net)
    assert (masked - removed).abs().max() < 1e-5 * masked.abs().max()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_small_maps_are_convolved_alike_in_training(size):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(5, 7, 3, padding=1).to(memory_format=torch.channels_last), torch.randn(6, 5, size, size, requires_grad=True)
    found, calls = [], []
    layer.register_forward_hook(lambda *_: calls.append(layer.training))
    for training in (True, False):
        layer.train(training).zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = models.apply(layer, x).float()
        y.square().sum().backward()
        found.append((y.detach(), x.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()))
        x.grad = None
    assert calls == [False] and all(torch.allclose(a, b, atol=0.02 * b.abs().max()) for a, b in zip(*found)) and y.shape == (6, 7, size, size)


def test_a_net_that_keeps_everything_is_the_same_net():
    net, x = lively("resnet20")
    assert torch.equal(net(x), prune(net, net.widths).eval()(x))


def test_importance_is_the_energy_that_the_next_layer_applies():
    net, _ = lively("lenet5")
    with torch.no_grad():
        net.fc1.weight.zero_()
        net.fc1.weight[:, 7 * 16 : 8 * 16] = 0.5  # channel 7 of conv2 feeds 16 inputs of 500 neurons
    found = models.importance(net)[1]
    assert found[7] == pytest.approx(0.25 * 16 * 500) and found.sum() == found[7]
    assert models.most_important(net, (20, 1, 500))[1].tolist() == [7]


def test_compensation_keeps_the_energy_of_hurt_filters_and_leaves_the_others():
    net, _ = lively("lenet5", (2, 2, 2))
    with torch.no_grad():
        net.fc2.weight.zero_()
        net.fc2.weight[0] = torch.tensor([3.0, 4.0])  # channel 1 holds 16/25 > 0.8/2 of this filter
        net.fc2.weight[1] = torch.tensor([4.0, 1.0])  # and 1/17 of this one
    models.compensate(net, [torch.arange(2), torch.arange(2), torch.tensor([0])])
    assert net.fc2.weight[0, 0].item() == pytest.approx(5.0)  # (3, 4) -> (5, gone)
    assert net.fc2.weight[1, 0].item() == pytest.approx(4.0)


@pytest.mark.parametrize("kind", [dict(classes=7, channels=1), dict(classes=100, channels=3)])
def test_any_class_count_and_channels(kind):
    for arch in ("lenet5", "vgg16", "resnet8"):
        net = build(arch, **kind)
        assert net(torch.zeros(2, kind["channels"], 32, 32)).shape == (2, kind["classes"])


@pytest.mark.parametrize("arch", ["resnet57", "resnet", "vgg12", "alexnet", "resnet2"])
def test_unknown_nets_are_refused(arch):
    with pytest.raises(Failure, match="unknown network"):
        build(arch)


# ---- checkpoints


@pytest.mark.parametrize("arch", ["lenet5", "vgg16", "resnet20"])
def test_a_checkpoint_comes_back_as_it_was(tmp_path, arch):
    net, x = lively(arch)
    small = prune(net, some(net)).eval()
    models.save(tmp_path / "a.pt", small, {"seed": 3})
    found = models.read(tmp_path / "a.pt")
    assert found["facts"] == {"seed": 3} and [f.name for f in tmp_path.iterdir()] == ["a.pt"]
    assert torch.equal(models.restore(found, "a.pt").eval()(x), small(x))


@pytest.mark.parametrize("arch", NETS)
def test_a_strangers_state_dict_is_recognised(tmp_path, arch):
    net, x = lively(arch)
    small = prune(net, some(net)).eval()
    for wrap in (lambda s: s, lambda s: {"state_dict": s, "best_prec1": 1.0}, lambda s: {"net": {f"module.{k}": v for k, v in s.items()}},
                 lambda s: {"epoch": 3, "state_dict": {f"model.{k}": v for k, v in s.items()}}, lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
                 lambda s: {"model": {k: v.double() if v.is_floating_point() else v for k, v in s.items()}}):
        torch.save(wrap(small.state_dict()), tmp_path / "a.pth")
        found = models.read(tmp_path / "a.pth")
        assert found["arch"] == arch and tuple(found["widths"]) == small.widths
        assert torch.allclose(models.restore(found, "a.pth").eval()(x), small(x), atol=1e-6)


def test_a_convolution_bias_in_front_of_batch_norm_is_folded(tmp_path):
    net, x = lively("vgg16")
    expected, state = net(x), net.state_dict()
    for p in net.prunable:
        bias = torch.randn(net.get_submodule(p.layer).out_channels)
        state[p.layer + ".bias"] = bias
        state[p.norm + ".running_mean"] = state[p.norm + ".running_mean"] + bias
    torch.save(state, tmp_path / "a.pth")
    assert torch.allclose(models.restore(models.read(tmp_path / "a.pth"), "").eval()(x), expected, atol=1e-4)


@pytest.mark.parametrize("dropout_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_torchvisions_vgg_with_its_head(tmp_path, bias, dropout_first):
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    features = make_layers([c if c == "M" else c // 8 for c in cfgs["A"]], batch_norm=True)
    head = [nn.Linear(64 * 4, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 30), nn.ReLU(), nn.Dropout(), nn.Linear(30, 7)]
    theirs = nn.ModuleDict(dict(features=features, classifier=nn.Sequential(*[nn.Dropout()] * dropout_first, *head))).eval()
    for m in features:
        if isinstance(m, nn.Conv2d):
            m.bias = nn.Parameter(torch.randn_like(m.bias)) if bias else None
    x = torch.randn(3, 3, 32, 32)
    expected = theirs["classifier"](nn.functional.adaptive_avg_pool2d(features(x), 2).flatten(1))
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    net = models.restore(models.read(tmp_path / "a.pth"), "a.pth").eval()
    assert (net.arch, net.side, net.widths[-3:], net.classes) == ("vgg11", 2, (64, 40, 30), 7)
    assert torch.allclose(net(x), expected, atol=1e-5)
    structure = tuple(w // 2 for w in net.widths)
    small, soft = prune(net, structure).eval(), sep.soften(net, structure).eval()
    freeze(soft, models.most_important(net, structure))
    assert torch.allclose(small(x), soft(x), atol=1e-5) and small.prunable[-1].next == "classifier.6"
    models.save(tmp_path / "b.pt", small, {})
    assert torch.equal(models.restore(models.read(tmp_path / "b.pt"), "").eval()(x), small(x))
    with FlopCounterMode(display=False) as counter:
        small(x[:1])
    assert counter.get_total_flops() == 2 * macs(small)


@pytest.mark.parametrize("change, words", [
    (lambda s: {k.replace("conv2", "other"): v for k, v in s.items()}, r"layer1\.0\.conv2\.weight is missing"),
    (lambda s: s | {"extra.weight": torch.ones(2)}, r"extra\.weight is not in this net"),
    (lambda s: s | {"linear.weight": torch.ones(10, 63)}, "linear.weight is 10 x 63, not 10 x 64"),
    (lambda s: s | {"layer2.0.shortcut.0.weight": torch.ones(32, 16, 1, 1)}, "shortcuts are convolutions"),
    (lambda s: s | {"gates.0.unit": torch.ones(16)}, "do not say how many kernels its gates keep"),
])
def test_a_misfit_is_named(tmp_path, change, words):
    torch.save(change(build("resnet8").state_dict()), tmp_path / "a.pt")
    with pytest.raises(Failure, match=words):
        models.restore(models.read(tmp_path / "a.pt"), "a.pt")


def test_names_of_torchvision_and_of_its_tutorial(tmp_path):
    net, x = lively("resnet20")
    torch.save({"model_state_dict": {k.replace("linear", "fc"): v for k, v in net.state_dict().items()}}, tmp_path / "a.pt")
    assert torch.equal(models.restore(models.read(tmp_path / "a.pt"), "").eval()(x), net(x))


def test_a_flipped_bit_is_found(tmp_path):
    models.save(tmp_path / "a.pt", build("resnet8"), {})
    models.write(tmp_path / "b.pt", dict(title="t", x=torch.zeros(1000)))
    assert models.read_progress(tmp_path / "b.pt", "t") and not models.read_progress(tmp_path / "b.pt", "other")
    torch.save(build("resnet8").state_dict(), tmp_path / "c.pt")
    for name, places in (("a.pt", (0.5,)), ("c.pt", (0.5,)), ("b.pt", (0.5, 0.9, 0.93, 0.96, 0.99))):
        whole = (tmp_path / name).read_bytes()
        for place in places:
            for bit in range(8):
                content = bytearray(whole)
                content[int(place * len(content))] ^= 1 << bit
                (tmp_path / name).write_bytes(content)
                if name == "b.pt":
                    found = models.read_progress(tmp_path / name, "t")  # in the zip's directory some bits mean nothing
                    assert found is None or torch.equal(found["x"], torch.zeros(1000))
                else:
                    with pytest.raises(Failure, match="damaged"):
                        models.read(tmp_path / name)


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def broken_files(folder):
    net = build("resnet8")
    state = net.state_dict()
    torch.save(state, folder / "whole.pt")
    (folder / "cut.pt").write_bytes((folder / "whole.pt").read_bytes()[:5000])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("hello")
    (folder / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": Evil()}, folder / "evil.pt")
    torch.save(net, folder / "module.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"a.weight": torch.ones(2)}, folder / "other.pt")
    torch.save({k: v for k, v in state.items() if "bn2" not in k}, folder / "lacking.pt")
    torch.save(state | {"linear.weight": torch.ones(10, 63)}, folder / "shape.pt")
    torch.save(state | {"linear.bias": torch.full((10,), float("nan"))}, folder / "nan.pt")
    torch.save({"format": torch.ones(2)}, folder / "format.pt")
    torch.save({k: v.to(torch.complex64) if v.is_floating_point() else v for k, v in state.items()}, folder / "complex.pt")
    torch.save({"format": 1, "arch": "resnet8"}, folder / "half.pt")
    kind = dict(format=1, arch="resnet8", widths=[1], classes=10, channels=3, size=32, gates=None, state=state, facts={})
    torch.save(kind, folder / "widths.pt")
    torch.save(kind | dict(widths="abc", classes=None), folder / "types.pt")
    torch.save(kind | dict(state=7), folder / "state.pt")
    return [f"{n}.pt" for n in ("cut", "empty", "text", "pickle", "evil", "module", "list", "other", "lacking", "shape", "nan", "format", "half",
                                "complex", "widths", "types", "state")]


def test_what_a_state_dict_lacks_is_named(tmp_path):
    state = build("lenet5", channels=1, size=28).state_dict()
    del state["fc2.weight"]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(Failure, match=r"of no net that this tool knows \(it lacks fc2\.weight\)"):
        models.read(tmp_path / "a.pt")


def test_a_gate_of_no_whole_number_is_refused(tmp_path):
    models.save(tmp_path / "a.pt", sep.soften(build("lenet5", channels=1, size=28), (10, 25, 250)), {})
    torch.save(torch.load(tmp_path / "a.pt") | {"gates": [10, 25.0, 250]}, tmp_path / "a.pt")
    with pytest.raises(Failure):
        sep.load(tmp_path / "a.pt")


def test_what_is_no_checkpoint_is_refused_in_one_line_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in broken_files(tmp_path):
        with pytest.raises(Failure) as e:
            models.restore(models.read(tmp_path / name), name)
        assert name in str(e.value) and "\n" not in str(e.value), name
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(Failure, match=r"no checkpoint .*gone") as e:
        models.read(tmp_path / "gone.pt")
    assert e.value.status == 2


def test_a_failed_write_leaves_the_old_file(tmp_path):
    models.write(tmp_path / "a.pt", {"old": 1})
    with pytest.raises((Failure, TypeError, AttributeError, pickle.PicklingError)):
        models.write(tmp_path / "a.pt", {"new": lambda: 0})
    assert torch.load(tmp_path / "a.pt") == {"old": 1}
    with pytest.raises(Failure, match="cannot write"):
        models.write(tmp_path / "a.pt" / "b.pt", {})


# ---- export


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_file_whose_writing_is_cut_short_leaves_the_old_one_alone(tmp_path, error):
    def make(part):
        part.write_text("half")
        raise error

    (tmp_path / "net.pt").write_text("whole")
    with pytest.raises(Failure if error is OSError else error):
        models.replaced(tmp_path / "net.pt", make)
    assert [f.name for f in tmp_path.iterdir()] == ["net.pt"] and (tmp_path / "net.pt").read_text() == "whole"


@pytest.mark.parametrize(("arch", "gated"), [("lenet5", True), ("resnet8", False), ("vgg11", True)])
def test_an_exported_net_runs_without_this_project(tmp_path, arch, gated):
    net, _ = lively(arch, [16] * 8 if arch == "vgg11" else None)
    net = (sep.soften if gated else prune)(net, some(net)).eval().to(memory_format=torch.channels_last)
    for gate in filter(None, net.gates or ()):
        nn.init.normal_(gate.excite.weight, 0, 0.5)
    assert models.export(net, tmp_path / "net.pt2", [0.4] * net.channels, [0.2] * net.channels, net.size) < 1e-5
    images = torch.rand(7, net.channels, net.size, net.size)
    torch.save(images, tmp_path / "images")
    code = "import sys, torch; torch.save(torch.export.load('net.pt2').module()(torch.load('images')), 'logits'); assert 'models' not in sys.modules"
    if arch == "lenet5":  # once is enough
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    program = torch.export.load(tmp_path / "net.pt2")
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    found = torch.load(tmp_path / "logits") if arch == "lenet5" else program.module()(images)
    assert not found.requires_grad
    with torch.no_grad():
        assert torch.allclose(found, net((images - 0.4) / 0.2), atol=1e-3)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("arch", NETS)
def test_a_folded_net_computes_the_same_without_batch_norms(arch):
    net, x = lively(arch)
    for one in (net.eval(), sep.soften(net, some(net)).eval()):
        small = models.folded(one)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
        with torch.no_grad():
            assert (small(x) - one(x)).abs().max() < 1e-4
        assert one.prunable != small.prunable or arch == "lenet5"


@pytest.mark.parametrize("gated", [False, True])
def test_onnxruntime_runs_an_exported_net(tmp_path, gated):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, _ = lively("resnet8")
    net = (sep.soften if gated else prune)(net, some(net)).eval()
    assert models.export(net, tmp_path / "net.onnx", [0.4] * 3, [0.2] * 3, 32) < 1e-4
    images, session = torch.rand(3, 3, 32, 32), onnxruntime.InferenceSession(tmp_path / "net.onnx")
    with torch.no_grad():
        for x in (images, images[:1]):
            assert abs(session.run(None, {"images": x.numpy()})[0] - net((x - 0.4) / 0.2).numpy()).max() < 1e-3


@pytest.mark.parametrize("size", [16, 20, 24, 32])
def test_a_gated_lenet_refuses_images_of_another_size_as_a_plain_one_does(tmp_path, size):
    net, _ = lively("lenet5")
    for one in (net.eval(), sep.soften(net, some(net)).eval()):
        for count in (1, 2):
            with pytest.raises(RuntimeError), torch.no_grad():
                one(torch.rand(count, 1, size, size))
        with pytest.raises(Failure, match=f"cannot take images of {size} x {size}") as e:
            models.export(one, tmp_path / "a.pt2", [0.5], [0.5], size)
        assert e.value.status == 2 and not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    net, _ = lively("lenet5")
    with pytest.raises(Failure, match="cannot take images of 40 x 40") as e:
        models.export(net, tmp_path / "a.pt2", [0.5], [0.5], 40)
    assert e.value.status == 2
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Failure, match="pip install onnx onnxscript onnxruntime"):
        models.export(net, tmp_path / "a.onnx", [0.5], [0.5], 28)
    (tmp_path / "a.pt2").write_text("old")
    load = torch.export.load
    monkeypatch.setattr(torch.export, "load", lambda f: load(f) and type("Wrong", (), {"module": lambda _: lambda x: torch.ones(len(x), 10)})())
    with pytest.raises(Failure, match="differs from the original"):
        models.export(net, tmp_path / "a.pt2", [0.5], [0.5], 28)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.pt2", "old")]
