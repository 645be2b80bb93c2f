#!/usr/bin/env python3
"""Measurements, not tests: python tests/bench.py [DATA_DIR [exactness|speed|size|search]]. Run it on an idle machine;
DATA_DIR holds torchvision's MNIST and CIFAR-10.

Speed: a recovery of LeNet-5, ResNet-56 and VGG-19, batch 128, against the loop that a user would write (DataLoader with 2 workers,
transforms, float32, the teacher run on every batch), the two in turns in one run. Exactness: removing channels against masking them, and a
frozen SEP net against the hard-pruned one, per net. Size: the time of --help, the memory of a MNIST run. Search: what the LSTM
of `fast` learns in 60 candidates where accuracies are made up (no data, 15 minutes). And alone:

    bench.py DATA_DIR structures BASELINE CUT      LeNet-5s of one cut and very different structures, 10 epochs each
    bench.py DATA_DIR recipes BASELINE CUT EPOCHS [TEMPERATURE:PEAK ...]   final trainings of one structure, by several losses and rates
    bench.py DATA_DIR choices BASELINE CUT STEPS   the same channels for all images, or each image's own: accuracy after so many steps
    bench.py DATA_DIR signals BASELINE CUT COUNT   whether validation images, seen by a stranger's net, rank structures as unseen ones do
    bench.py DATA_DIR budgets BASELINE CUT COUNT   which recovery ranks structures as their final training will
    bench.py DATA_DIR seeds RUN SEED [...]         the final trainings of a run's structures, by other seeds, to test accuracies
    bench.py . small [CHECKPOINT ...]              how much of the MACs saved arrives as time and bytes
"""

import io
import resource
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, transforms

import controller
import models
import sep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NETS = [
    ("lenet5", "mnist", 20, 300, 5),
    ("resnet56", "cifar10", 3, 15, 3),
    ("vgg19", "cifar10", 3, 15, 3),
]  # steps to warm up, timed; rounds


class Pictures(TensorDataset):
    """Random images as a user's data set: an image object and a label, transformed one by one."""

    def __init__(self, images, transform):
        super().__init__(images.pixels, images.labels)
        self.transform = transform

    def __getitem__(self, i):
        return self.transform(
            transforms.functional.to_pil_image(self.tensors[0][i].permute(2, 0, 1))
        ), int(self.tensors[1][i])


def clock():
    """The time when the work given so far is done."""
    torch.cuda.synchronize() if DEVICE.type == "cuda" else None
    return time.perf_counter()


def plain(data, teacher, student, warm, steps):
    """Images per second of the plain loop."""
    optimizer = torch.optim.SGD(student.parameters(), 0.001, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(data, batch_size=128, shuffle=True, num_workers=2)
    student.train(), teacher.eval()
    for step, (x, y) in enumerate(loader):
        if step == warm:  # the workers are up
            began = clock()
        if step == warm + steps:
            return steps * 128 / (clock() - began)
        x, y = x.to(DEVICE), y.to(DEVICE)
        with torch.no_grad():
            soft = teacher(x).softmax(1)
        logits = student(x)
        loss = F.mse_loss(logits.softmax(1), soft) + 0.1 * F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ours(images, guide, student, warm, steps):
    """Images per second of `fit`, as a recovery calls it, the teacher's outputs at hand."""
    student = student.to(memory_format=torch.channels_last)
    plan = controller.Plan(1, 0.001, steps=warm + steps + 1)
    guide.probabilities(0, plan.steps * 128)

    def track(numbers):
        for step in numbers:
            if step in (warm, warm + steps):
                marks.append(clock())
            if step == warm + steps:
                return
            yield step

    marks = []
    next(
        controller.fit(
            student,
            images,
            plan,
            optimizer=controller.sgd(student, 0.001),
            seed=0,
            teacher=guide,
            track=track,
        )
    )
    return steps * 128 / (marks[1] - marks[0])


def chip(net, images_per_second):
    """How near a GPU is to its limits: the step's share of the bfloat16 matrix products' peak measured here (3 passes of the student's MACs;
    what a cached teacher saves is no work done), and its kernels, each taking at least what an empty one takes in a graph."""
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    times = []
    for _ in range(8):
        began = clock()
        a @ a
        times.append(clock() - began)
    peak = 8192**3 / min(times)
    x, labels = (
        torch.randn(128, net.channels, net.size, net.size, device=DEVICE),
        torch.zeros(128, device=DEVICE).long(),
    )
    soft = torch.full((128, 10), 0.1, device=DEVICE)
    step = controller.Step(*controller.filled(net, controller.sgd(net, 0.0)))
    step(x, labels, soft, 0.0)  # what it captures is run once more, to be seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step.run(x, labels, soft, step.apart)
        torch.cuda.synchronize()
    kernels = sum(
        e.device_type == torch.autograd.DeviceType.CUDA for e in found.events()
    )  # and not the calls that start them
    one, graph = torch.zeros(1, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(1000):
            one.add_(1)
    graph.replay()
    began = clock()
    graph.replay()
    floor, took = (clock() - began) / 1000 * kernels, 128 / images_per_second
    print(
        f"{3 * models.macs(net) * images_per_second / peak:.1%} of the {2 * peak / 1e12:.0f} TFLOP/s measured here; {kernels} kernels a step, "
        f"as many empty ones take {floor * 1e3:.2f} ms of the step's {took * 1e3:.2f} ms ({floor / took:.0%})",
        flush=True,
    )


def speed(folder):
    for arch, name, warm, steps, rounds in NETS:
        mean, std = controller.STATISTICS[name]
        crop = dict(crop=4, flip=True) if name == "cifar10" else {}
        moves = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()] if crop else []
        normalise = transforms.Compose(
            [*moves, transforms.ToTensor(), transforms.Normalize(mean, std)]
        )
        try:
            data = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name](
                folder, transform=normalise
            )
            images = controller.load_data(name, folder, **crop)[0]
        except (RuntimeError, models.Failure):
            shape = (48000, 28, 28, 1) if name == "mnist" else (48000, 32, 32, 3)
            images = controller.Images(
                torch.randint(0, 256, shape, dtype=torch.uint8),
                torch.randint(0, 10, shape[:1]),
                mean=mean,
                std=std,
                **crop,
            )
            data = Pictures(images, normalise)
        if DEVICE.type == "cuda":
            warm, steps, rounds, images = 20, 100, 3, images.to(DEVICE)
        print(
            f"{arch} recovery on {type(data).__name__}, batch 128, {steps} steps, {controller.describe(DEVICE)}, median of {rounds} rounds in turns"
        )
        kind = dict(channels=1, size=28) if name == "mnist" else {}
        nets = [models.build(arch, **kind).to(DEVICE) for _ in range(3)]
        guide = controller.Teacher(nets[0], images, 0)
        rows = [
            (plain(data, nets[0], nets[1], warm, steps), ours(images, guide, nets[2], warm, steps))
            for _ in range(rounds)
        ]
        a, b = (median(r) for r in zip(*rows))
        print(
            f"plain loop {a:,.0f} images/s -> fit {b:,.0f} images/s ({b / a:.2f}x); each round {', '.join(f'{y / x:.2f}x' for x, y in rows)}",
            flush=True,
        )
        if DEVICE.type == "cuda":
            chip(nets[2], b)
    native = controller.half(DEVICE)._enabled
    print(f"bfloat16 {'is' if native else 'is not'} native here")


def exactness(_):
    from test_models import NETS, freeze, lively, some

    print(
        "largest difference of the logits (largest logit): masked - removed; SEP frozen to the criterion's choice - hard-pruned"
    )
    for arch in NETS:
        net, x = lively(arch)
        structure = some(net)
        kept = models.most_important(net, structure)
        hard, soft = models.prune(net, structure).eval(), sep.soften(net, structure).eval()
        freeze(soft, kept)
        models.compensate(net, kept)
        for p, w, stay in zip(net.prunable, net.widths, kept):
            lost = torch.ones(w, dtype=torch.bool).index_fill(0, stay, False)
            weight = net.get_submodule(p.next).weight.data
            models.per_channel(weight, w)[:, lost] = 0
        with torch.no_grad():
            a, b, c = net(x), hard(x), soft(x)
        print(
            f"{arch:9} {(a - b).abs().max():.1e}   {(c - b).abs().max():.1e}   ({b.abs().max():.2f})"
        )


def search(_):
    from test_controller import Surrogate

    print(
        "made-up accuracies, mean of 20 problems: how far from uniform to a greedy search that knows them all"
    )
    torch.set_num_threads(1)
    for arch, target in (("vgg19", 0.701), ("resnet56", 0.475)):
        for power in (1, 2, 3):
            found = []
            for seed in range(20):
                p = Surrogate(seed, arch, target, power)
                even, greedy = controller.uniform(p.net.widths, p.cut, target), p.greedy()
                papers = p.search(None, kind=controller.Search, parents=5, patience=10)
                ends = (
                    even,
                    greedy,
                    p.search(60, dice=True).best.structure,
                    p.search(60).best.structure,
                    papers.best.structure,
                )
                found.append([*(p.true(w) for w in ends), papers.best.cut, len(papers.tried) - 1])
            low, high, *others, cut, count = torch.tensor(found).mean(0).tolist()
            way = [f"{v:.4f} ({(v - low) / (high - low):.0%})" for v in others]
            print(
                f"{arch}, loss ~ share^{power}: uniform {low:.4f}, greedy {high:.4f}, 60 candidates: dice {way[0]}, LSTM {way[1]}; "
                f"the papers' rules {way[2]} at a cut of {cut:.1%} after {count:.0f} candidates",
                flush=True,
            )


def loaded(folder, net, facts):
    """The training and the test images of a baseline of `train` or `reproduce`, normalised as it reads them."""
    crop = dict(crop=4, flip=True) if net.channels == 3 else {}
    return [
        images.to(DEVICE).normalised(tuple(facts["mean"]), tuple(facts["std"]))
        for images in controller.load_data(facts["data"], folder, **crop)[:2]
    ]


def parts(images, facts):
    """(training, validation) as a baseline saw them; before its checkpoint said `split`, its seed was it."""
    return controller.split(images, facts.get("split", facts["seed"]))


def ready(folder, checkpoint, cut):
    """(net, training and validation images, teacher, what a structure cuts, the `uniform` one at `cut`) for a baseline of `train` or `reproduce`."""
    net, facts = sep.load(checkpoint)
    train, validation = parts(loaded(folder, net, facts)[0], facts)
    net, whole = net.to(DEVICE), models.macs(net)
    share = lambda w: 1 - models.macs(net, w) / whole
    return (
        net,
        train,
        validation,
        controller.Teacher(net, train, 0),
        share,
        controller.uniform(net.widths, share, float(cut)),
    )


def validated(net, plan, train, validation, guide):
    """The accuracy on validation images after each epoch of a training of a copy of `net`."""
    return [controller.accuracy(small, validation) for small in trained(net, plan, train, guide)]


def trained(net, plan, train, guide, seed=0):
    """A copy of `net` after each epoch of its training."""
    small = deepcopy(net).to(memory_format=torch.channels_last)
    for _ in controller.fit(
        small, train, plan, optimizer=controller.sgd(small, plan.lr), seed=seed, teacher=guide
    ):
        yield small


def structures(folder, checkpoint, cut):
    """Is there anything to find? What LeNet-5s of very different structures and the same MACs come to, on validation images."""
    net, train, validation, guide, share, even = ready(folder, checkpoint, cut)
    tried, cut = {even: "uniform"}, float(cut)
    for a in (2, 3, 4, 5):
        for b in (6, 8, 10, 12, 14, 16):  # and as wide a fc1 as the cut leaves
            if (
                share((a, b, 1)) > cut
                and (c := max(c for c in range(1, 501) if share((a, b, c)) >= cut)) > 8
            ):
                tried.setdefault((a, b, c), "")
    for w, name in tried.items():
        found = validated(
            models.prune(net, w), controller.Plan(10, 0.05, True), train, validation, guide
        )
        print(f"{w} {name}: cut {share(w):.1%}, validation accuracy {found[-1]:.2%}", flush=True)


@torch.no_grad()
def outputs(net, images):
    """The logits (N, classes)."""
    return torch.cat([net.eval()(images.batch(i)) for i in controller.chunks(images)])


def judged(net, images, whole):
    """The accuracy on images, and the loss to the baseline's softmax `whole` (N, classes) there at temperature 4, whatever the training's."""
    z = outputs(net, images)
    return (z.argmax(1) == images.labels).float().mean().item(), controller.loss_of(
        z, images.labels, whole, 4.0
    ).item()


def recipes(folder, checkpoint, cut, epochs, *kinds):
    """Which final training? The `uniform` structure at a cut, by several (TEMPERATURE:PEAK; temperature 0: the papers' MSE): accuracy on
    validation images that the baseline has not seen, and the loss to its outputs there (16 KL + 0.1 CE), which owes less to luck."""
    net, train, validation, guide, _, even = ready(folder, checkpoint, cut)
    whole = outputs(net, validation).softmax(1)
    for kind in kinds or ("0:0.1", "0:0.03", "4:0.06", "4:0.02", "4:0.006"):
        temperature, peak = map(float, kind.split(":"))
        plan = controller.Plan(int(epochs), peak, True, temperature=temperature or None)
        for epoch, small in enumerate(trained(models.prune(net, even), plan, train, guide), 1):
            right, loss = judged(small, validation, whole)
            print(f"{kind}, epoch {epoch}: {right:.2%}, {loss:.4f}", flush=True)


class Strongest(sep.Gate):
    """Chooses for each image the channels that are the strongest in it: it computes them all first, so no gate can know it better."""

    def forward(self, x, at, layer, norm, pool):
        y = models.activate(norm(models.apply(layer, x, at)), pool)
        strength = self.importance * y.detach().float().square().mean((2, 3))
        mask = torch.zeros_like(strength).scatter_(1, strength.topk(self.keep, 1).indices, 1.0)
        return y * mask[..., None, None].to(y.dtype), None


def choices(folder, checkpoint, cut, steps):
    """What is it worth to choose by the image? The `uniform` structure at a cut, with hard pruning's choice and with each image's own."""
    net, train, validation, guide, _, even = ready(folder, checkpoint, cut)
    gated = sep.soften(net, even)
    for gate, score in zip(gated.gates, models.importance(net)):
        if gate is not None:
            gate.__class__, gate.importance = Strongest, score
    for name, small in (("the same for all", models.prune(net, even)), ("each image's own", gated)):
        plans = [controller.Plan(1, 0.02, True, int(n)) for n in steps.split(",")]
        found = [
            controller.accuracy(small, validation),
            *(validated(small, plan, train, validation, guide)[-1] for plan in plans),
        ]
        print(
            f"{name}: validation accuracy before training, after {steps} steps: {', '.join(f'{v:.2%}' for v in found)}",
            flush=True,
        )


def walks(net, share, cut, count):
    """`uniform` and walks of dice to a cut, `count` structures or a few less."""
    from test_controller import TINY, candidate

    settings = controller.Settings(
        **(vars(TINY) | dict(rate=0.2, target=float(cut), candidates=int(count)))
    )
    search = controller.Guided(
        net, candidate(net.widths, 1.0, 0.0), settings, settings.target, share, dice=True
    )
    while (step := search.next()) is not None:
        if step[2] not in search.tried:
            yield step[2]
        search.tell(candidate(step[2], 0.0, share(step[2])))


def ranks(found):
    """The rank correlations (M, M) of M measures, found (N, M)."""
    return torch.corrcoef(torch.tensor(found).argsort(0).argsort(0).float().T)


def signals(folder, checkpoint, cut, count):
    """Do the validation images, which a stranger's baseline has mostly seen, rank structures as images do that no training saw? As many
    test images, after `fast`'s 50 steps, for `uniform` and walks of dice."""
    net, train, validation, guide, share, _ = ready(folder, checkpoint, cut)
    test, found = loaded(folder, *sep.load(checkpoint))[1].part(torch.arange(len(validation))), []
    for w in walks(net, share, cut, count):
        for small in trained(
            models.prune(net, w), controller.Plan(1, 0.02, True, 50), train, guide
        ):
            found.append([controller.accuracy(small, images) for images in (validation, test)])
        print(f"{w}: validation {found[-1][0]:.2%}, test {found[-1][1]:.2%}", flush=True)
    print(
        f"rank correlation {ranks(found)[0, 1]:.2f}, of the accuracies {torch.corrcoef(torch.tensor(found).T)[0, 1]:.2f}"
    )


def budgets(folder, checkpoint, cut, count):
    """Which recovery ranks structures as the final training will? `uniform` and walks of dice, each by several recoveries and by two final
    trainings of ten epochs; on validation images, the accuracy and the loss at temperature 4 (16 KL to the baseline's outputs + 0.1 CE)."""
    net, train, validation, guide, share, _ = ready(folder, checkpoint, cut)
    plan = partial(
        controller.Plan, lr=0.02 if net.arch == "lenet5" else 0.005, cycle=True, temperature=4.0
    )
    plans = {
        "50 steps, MSE": controller.Plan(1, 0.02, True, 50),
        "200 steps, MSE": controller.Plan(1, 0.02, True, 200),
        "200 steps": plan(1, steps=200),
        "1 epoch": plan(1),
        "2 epochs": plan(2),
        "10 epochs": plan(10),
        "again": plan(10),
    }

    whole, guides, found = (
        outputs(net, validation).softmax(1),
        (guide, controller.Teacher(net, train, 1)),
        [],
    )
    for w in walks(net, share, cut, count):
        found.append([])
        for name, p in plans.items():
            seed = int(name == "again")
            *_, small = trained(models.prune(net, w), p, train, guides[seed], seed)
            right, loss = judged(small, validation, whole)
            found[-1] += [right, -loss]
        print(
            f"{w}: "
            + ", ".join(
                f"{name} {a:.2%} {-b:.3f}"
                for name, a, b in zip(plans, found[-1][::2], found[-1][1::2])
            ),
            flush=True,
        )
    table, accuracies = ranks(found), torch.tensor(found)[:, ::2].mean(0)
    print(
        "mean accuracy; rank correlation with the last one's accuracy, loss: of each one's accuracy; of its loss"
    )
    for n, name in enumerate(plans):
        right, loss = (", ".join(f"{v:.2f}" for v in row[-2:]) for row in table[2 * n : 2 * n + 2])
        print(f"{name}: {accuracies[n]:.2%}; {right}; {loss}")


def seeds(folder, run, *numbers):
    """How much do the rows of a `fast` run owe to luck? Its structures anew from its baseline, recovery and final training by other seeds."""
    results = controller.read_results(Path(run))
    recovery, final = (controller.Plan(**results["settings"][k]) for k in ("recovery", "final"))
    net, facts = sep.load(Path(run) / "baseline.pt")
    net, (every, test) = net.to(DEVICE), loaded(folder, net, facts)
    train = parts(every, facts)[0]
    for seed in map(int, numbers):
        guides = {images: controller.Teacher(net, images, seed) for images in (train, every)}
        for row in results["rows"]:
            if row["method"] not in controller.METHODS:
                continue
            torch.manual_seed(seed)
            small = controller.METHODS[row["method"]][0](net, row["widths"]).to(
                memory_format=torch.channels_last
            )
            for images, plan in ((train, recovery), (every, final)):
                *_, (_, loss) = controller.fit(
                    small,
                    images,
                    plan,
                    optimizer=controller.sgd(small, plan.lr),
                    seed=seed,
                    teacher=guides[images],
                )
            print(
                f"seed {seed}, {row['method']}: loss {loss:.4f}, test accuracy {controller.accuracy(small, test, exact=True):.2%}",
                flush=True,
            )


class Exported:
    """A net as `export` writes it and torch.export or onnxruntime reads it, for images as a user has them, channels first."""

    def __init__(self, net, ending="pt2"):
        with tempfile.TemporaryDirectory() as folder:
            models.export(
                net,
                file := Path(folder) / f"net.{ending}",
                (0.5,) * net.channels,
                (0.25,) * net.channels,
                net.size,
            )
            if ending == "pt2":
                self.run = torch.export.load(file).module()
            else:
                import onnxruntime

                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = torch.get_num_threads()
                session = onnxruntime.InferenceSession(file.read_bytes(), options)
                self.run = lambda x: session.run(None, {"images": x.numpy()})

    def eval(self):
        return self

    def __call__(self, x):
        return self.run(x.contiguous())


def small(folder, *checkpoints):
    """How much of the MACs saved arrives as time, in PyTorch, tuned, and in exported files: checkpoints beside their whole nets; without any,
    VGG-19 and ResNet-56 at half the widths, untrained (hard-pruned; gated, all images choosing alike as a fresh gate does; gated, with
    choices that differ from image to image)."""
    torch.manual_seed(0)
    nets = {path: sep.load(path)[0] for path in checkpoints}
    for arch in () if checkpoints else ("vgg19", "resnet56"):
        whole = models.build(arch)
        half = [w // 2 for w in whole.widths]
        nets |= {
            f"{arch} hard": models.prune(whole, half),
            f"{arch} gated alike": sep.soften(whole, half),
            f"{arch} gated": sep.soften(whole, half),
        }
        for gate in nets[f"{arch} gated"].gates:
            torch.nn.init.normal_(gate.excite.weight, 0, 2)
    print(
        f"{torch.get_num_threads()} threads, medians, ratios to the whole net: MACs; time of 1 image, both nets as PyTorch runs them, the small one "
        "tuned, both tuned; of 128 images; of the exported nets, .pt2 and .onnx; bytes of the state dict"
    )
    ratio = lambda a, b: f"{b / a:.2f} ({a * 1e3:.1f} -> {b * 1e3:.1f} ms)"
    for name, net in nets.items():
        whole = models.like(net, models.default_widths(net.arch))
        images = controller.Images(
            torch.randint(0, 256, (128, net.size, net.size, net.channels), dtype=torch.uint8),
            torch.zeros(128),
            mean=(0.5,) * net.channels,
            std=(0.25,) * net.channels,
        )
        pair = [n.to(memory_format=torch.channels_last) for n in (whole, net)]
        files, tuned, skips = (
            [Exported(n, e) for e in ("pt2", "onnx") for n in pair],
            [controller.tuned(n, images) for n in pair],
            "",
        )
        many = [controller.latency(n, images, 128) for n in (*pair, *files)]
        masked = [deepcopy(tuned[1])] * bool(net.gates)
        for n in masked:
            n.switch([False] * len(n.skips))
        one = [
            median(v)
            for v in zip(
                *(
                    [controller.latency(n, images, 1) for n in (*pair, *tuned, *files, *masked)]
                    for _ in range(5)
                )
            )
        ]
        if masked:
            skips = f"{sum(tuned[1].skips)} of {len(tuned[1].skips)} gates skip, all of them masked: {one[8] * 1e3:.1f} ms; "
        sizes = []
        for n in pair:
            torch.save(n.state_dict(), file := io.BytesIO())
            sizes.append(file.tell())
        print(
            f"{name}: {sep.macs(net) / models.macs(whole):.2f}; {ratio(*one[:2])}, {ratio(one[0], one[3])}, {ratio(*one[2:4])}; {skips}{ratio(*many[:2])}; "
            f".pt2 {ratio(*one[4:6])}, {ratio(*many[2:4])}; .onnx {ratio(*one[6:8])}, {ratio(*many[4:])}; "
            f"{sizes[1] / sizes[0]:.2f} ({sizes[1] / 1e6:.2f} MB)",
            flush=True,
        )


def size(folder):
    wtp = [sys.executable, str(Path(__file__).parents[1] / "wtp.py")]
    times = []
    for _ in range(7):
        began = time.perf_counter()
        subprocess.run([*wtp, "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    print(f"--help: {median(times):.2f} s")
    with tempfile.TemporaryDirectory() as out:
        for command in (["train", "mnist"], ["reproduce", "digits", "--schedule", "smoke"]):
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            done = subprocess.run(
                [*wtp, *command, "--data-dir", str(folder), "--out", out], capture_output=True
            )
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            print(
                f"{' '.join(command)}: "
                + (
                    f"at most {max(before, peak) / 1e6:.2f} GB"
                    if done.returncode == 0
                    else f"exit {done.returncode}, no figure"
                )
            )


if __name__ == "__main__":
    where, name = (
        sys.argv[1] if len(sys.argv) > 1 else "data",
        sys.argv[2] if len(sys.argv) > 2 else "",
    )
    kinds = (
        (exactness, speed, size, search),
        (structures, recipes, choices, signals, budgets, seeds, small),
    )
    usual, others = ({m.__name__: m for m in kind} for kind in kinds)
    if where.startswith("-") or name not in {"", *usual, *others}:
        sys.exit(__doc__)
    for measure in [(usual | others)[name]] if name else usual.values():
        measure(Path(where), *sys.argv[3:])
