#!/usr/bin/env python3
"""Measurements, not tests. Run them on an idle machine.

    bench.py DATA_DIR                              exactness, speed, size and search
    bench.py DATA_DIR exactness                    removing channels against masking them
    bench.py DATA_DIR speed                        a recovery against the loop a user would write
    bench.py DATA_DIR size                         the time of --help, the memory of a MNIST run
    bench.py . search [PROBLEMS [NAME ...]]        what an LSTM learns where accuracies are made up

    bench.py DATA_DIR ablation VARIANT BASELINE CUT SEED FILE
                                                   the search of `lstm` without its LSTM
    bench.py DATA_DIR narrow ARCH SHARE EPOCHS FILE [DATA_SET]
                                                   a baseline with that share of its widths
    bench.py DATA_DIR structures BASELINE CUT      LeNet-5s of one cut and different structures
    bench.py DATA_DIR recipes BASELINE CUT EPOCHS [TEMPERATURE:PEAK[:OPTION ...] ...]
                                                   final trainings by several losses and rates
    bench.py DATA_DIR gates BASELINE STRUCTURE EPOCHS PEAK SEED [VARIANT ...]
                                                   a choice by the image, by several gates
    bench.py DATA_DIR gates_by_validation ...      the same without the test images
    bench.py DATA_DIR signals BASELINE CUT COUNT   do images that the baseline saw rank alike?
    bench.py DATA_DIR budgets BASELINE CUT COUNT   which recovery ranks as final trainings do?
    bench.py DATA_DIR seeds RUN SEED [...]         a run's final trainings by other seeds
    bench.py DATA_DIR finalists RUN COUNT [SEED]   do a search's best candidates stay the best?
    bench.py DATA_DIR leads GROUP GROUP [...]      how sure is the lead of the first group of nets?
    bench.py DATA_DIR imitation BASELINE CHECKPOINT [...]
                                                   how like its baseline is a pruned net?
    bench.py DATA_DIR rivals RUN                   a run's rows beside those of torch-pruning

    bench.py . small [CHECKPOINT ...]              how much of the MACs saved arrives as time
    bench.py . families [NAME]                     the nets of zoo.py by the commands, end to end
    bench.py DATA_DIR readings [NAME]              trained nets of zoo.py: are they read rightly?
    bench.py . examples [NAME]                     the same by files with inputs and outputs
    bench.py DATA_DIR photographs FOLDER           a ResNet-18 on pictures in a folder, end to end

DATA_DIR holds torchvision's MNIST and CIFAR-10, for DATA_SET cifar100 also CIFAR-100. BASELINE is a
checkpoint of `train` or `reproduce`, RUN a run folder, GROUP one checkpoint or several with commas
between. This file has the measurements in that order.
"""

import hashlib
import io
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
import zoo
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, transforms

import controller
import models
import sep
from controller import (
    Images,
    Teacher,
    TrainingPlan,
    compute_logits,
    make_optimizer,
    measure_accuracy,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def say(text):
    print(text, flush=True)


def read_clock():
    """Seconds, when the work given so far is done."""
    return controller.read_clock(DEVICE)


# ---- exactness ---------------------------------------------------------------------------------


def exactness(_):
    from test_models import NETS, make_lively_net, smaller_structure

    say(
        "largest difference of the logits (largest logit): masked - removed; "
        "fresh gates - hard-pruned"
    )
    for arch in NETS:
        net, x = make_lively_net(arch)
        structure = smaller_structure(net)
        kept_channels = models.most_important_channels(net, structure)
        hard = models.prune_channels(net, structure).eval()
        soft = sep.prune_softly(net, structure, [x]).eval()
        mask_channels(net, kept_channels)
        with torch.no_grad():
            masked, removed, gated = net(x), hard(x), soft(x)
        mask_difference = (masked - removed).abs().max()
        gate_difference = (gated - removed).abs().max()
        largest = removed.abs().max()
        say(f"{arch:9} {mask_difference:.1e}   {gate_difference:.1e}   ({largest:.2f})")


def mask_channels(net, kept_channels):
    """Compensate the filters, and set their weights on the other channels to 0."""
    models.rescale_next_filters(net, kept_channels)
    for prunable, width, kept in zip(net.prunable, net.widths, kept_channels):
        is_lost = torch.ones(width, dtype=torch.bool).index_fill(0, kept, False)
        weight = net.get_submodule(prunable.next_layer_name).weight.data
        models.group_by_input_channel(weight, width)[:, is_lost] = 0


# ---- speed -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeedTest:
    arch: str
    data: str
    warm_up_steps: int
    steps: int
    rounds: int
    cut: float | None = None  # of the pruned net, the paper's


SPEED_TESTS = (
    SpeedTest("lenet5", "mnist", 20, 300, 5),
    SpeedTest("resnet56", "cifar10", 3, 15, 3, cut=0.475),
    SpeedTest("vgg19", "cifar10", 3, 15, 3, cut=0.701),
)
GPU_STEPS = {"warm_up_steps": 20, "steps": 100, "rounds": 3}


class RandomPictures(TensorDataset):
    """Random images as a user's data set: an image object and a label, transformed one by one."""

    def __init__(self, images, transform):
        super().__init__(images.pixels, images.labels)
        self.transform = transform

    def __getitem__(self, index):
        pixels, label = super().__getitem__(index)
        picture = transforms.functional.to_pil_image(pixels.permute(2, 0, 1))
        return self.transform(picture), int(label)


def speed(folder):
    """A recovery by the loop that a user would write (DataLoader with 2 workers, transforms,
    float32, the teacher run on every batch) and by `fit`, in turns; then by `fit` of the whole net
    and of a pruned one."""
    for test in SPEED_TESTS:
        if DEVICE.type == "cuda":
            test = replace(test, **GPU_STEPS)
        dataset, images = load_speed_data(test.data, folder)
        device = controller.describe_machine(DEVICE)["device"]
        say(
            f"{test.arch} recovery on {type(dataset).__name__}, batch 128, {test.steps} steps, "
            f"{device}, median of {test.rounds} rounds in turns"
        )
        options = {"channels": 1, "size": 28} if test.data == "mnist" else {}
        teacher_net, plain_student, student = (
            models.build(test.arch, **options).to(DEVICE) for _ in range(3)
        )
        teacher = Teacher(teacher_net, images, 0)
        rounds = [
            (
                measure_plain_loop(dataset, teacher_net, plain_student, test),
                measure_fit(images, teacher, student, test),
            )
            for _ in range(test.rounds)
        ]
        plain, fit = (median(column) for column in zip(*rounds))
        ratios = ", ".join(f"{ours / theirs:.2f}x" for theirs, ours in rounds)
        say(
            f"plain loop {plain:,.0f} images/s -> fit {fit:,.0f} images/s ({fit / plain:.2f}x); "
            f"each round {ratios}"
        )
        if DEVICE.type == "cuda":
            compare_with_chip(student, fit)
        if test.cut is not None:
            compare_pruned_speed(images, teacher, student, test)
    is_native = controller.autocast_for(DEVICE)._enabled
    say(f"bfloat16 {'is' if is_native else 'is not'} native here")


def compare_pruned_speed(images, teacher, whole, test):
    """What of a cut arrives in training: `fit` of the whole net and of `uniform`'s, in turns."""

    def reduction_of(structure):
        return 1 - models.count_macs(whole, structure) / models.count_macs(whole)

    structure = controller.uniform_structure(whole.widths, reduction_of, test.cut)
    pruned = models.prune_channels(whole, structure)
    rounds = [
        [measure_fit(images, teacher, net, test) for net in (whole, pruned)]
        for _ in range(test.rounds)
    ]
    speeds = [median(column) for column in zip(*rounds)]
    macs_ratio = 1 / (1 - reduction_of(structure))
    speed_ratio = speeds[1] / speeds[0]
    say(
        f"fit of {1 / macs_ratio:.0%} of the MACs: {speeds[0]:,.0f} -> {speeds[1]:,.0f} images/s "
        f"({speed_ratio:.2f}x), {speed_ratio / macs_ratio:.2f} of what the MACs say "
        f"({macs_ratio:.2f}x)"
    )


def load_speed_data(name, folder):
    """(a torchvision data set with transforms, the same images in memory); random ones where the
    data are not there."""
    mean, std = controller.STATISTICS[name]
    augmentation, crops = {}, []
    if name == "cifar10":
        augmentation = {"crop": 4, "flip": True}
        crops = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()]
    normalise = transforms.Normalize(mean, std)
    transform = transforms.Compose([*crops, transforms.ToTensor(), normalise])
    dataset_class = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        dataset = dataset_class(folder, transform=transform)
        images = controller.load_data(name, folder, **augmentation)[0]
    except (RuntimeError, models.UserError):
        shape = (48000, 28, 28, 1) if name == "mnist" else (48000, 32, 32, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        labels = torch.randint(0, 10, shape[:1])
        images = Images(pixels, labels, mean=mean, std=std, **augmentation)
        dataset = RandomPictures(images, transform)
    return dataset, images.to(DEVICE)


def measure_plain_loop(dataset, teacher, student, test):
    """Images per second of the plain loop."""
    optimizer = torch.optim.SGD(student.parameters(), 0.001, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(dataset, batch_size=128, shuffle=True, num_workers=2)
    student.train()
    teacher.eval()
    start = end = None
    for step, (x, labels) in enumerate(loader):
        if step == test.warm_up_steps:  # the workers are up
            start = read_clock()
        if step == test.warm_up_steps + test.steps:
            end = read_clock()  # before the workers are stopped
            break
        x, labels = x.to(DEVICE), labels.to(DEVICE)
        with torch.no_grad():
            teacher_probs = teacher(x).softmax(1)
        logits = student(x)
        distance = F.mse_loss(logits.softmax(1), teacher_probs)
        loss = distance + 0.1 * F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return test.steps * 128 / (end - start)


def measure_fit(images, teacher, student, test):
    """Images per second of `fit`, as a recovery calls it, the teacher's outputs at hand."""
    student = student.to(memory_format=torch.channels_last)
    last_step = test.warm_up_steps + test.steps
    plan = TrainingPlan(1, 0.001, max_steps=last_step + 1)
    teacher.probabilities(0, plan.max_steps * 128)
    times = []

    def record_times(steps):
        for step in steps:
            if step in (test.warm_up_steps, last_step):
                times.append(read_clock())
            if step == last_step:
                return
            yield step

    optimizer = make_optimizer(student, 0.001)
    options = {"optimizer": optimizer, "seed": 0, "teacher": teacher}
    next(controller.fit(student, images, plan, wrap_steps=record_times, **options))
    start, end = times
    return test.steps * 128 / (end - start)


def compare_with_chip(net, images_per_second):
    """How near a GPU is to its limits.

    A step's share of the peak of bfloat16 matrix products, measured here: 3 passes of the student's
    MACs, for what a kept teacher saves is no work done. And its kernels, each taking at least what
    an empty one takes in a graph.
    """
    peak = measure_peak_macs()
    kernels = count_kernels(net)
    floor = measure_empty_kernel() * kernels
    step = 128 / images_per_second
    share = 3 * models.count_macs(net) * images_per_second / peak
    say(
        f"{share:.1%} of the {2 * peak / 1e12:.0f} TFLOP/s measured here; {kernels} kernels a "
        f"step, as many empty ones take {floor * 1e3:.2f} ms of the step's {step * 1e3:.2f} ms "
        f"({floor / step:.0%})"
    )


def measure_peak_macs():
    """Multiply-accumulates per second of large bfloat16 matrix products."""
    matrix = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    seconds = []
    for _ in range(8):
        start = read_clock()
        matrix @ matrix
        seconds.append(read_clock() - start)
    return 8192**3 / min(seconds)


def count_kernels(net):
    """The kernels of a training step."""
    x = torch.randn(128, net.channels, net.size, net.size, device=DEVICE)
    labels = torch.zeros(128, device=DEVICE).long()
    teacher_probs = torch.full((128, 10), 0.1, device=DEVICE)
    step = controller.GraphTrainStep(net, make_optimizer(net, 0.0))
    step(x, labels, teacher_probs, 0.0)
    # What it captured is run once more, to be seen.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step.update(x, labels, teacher_probs, step.side_stream)
        torch.cuda.synchronize()
    # The kernels, and not the calls that start them.
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in profile.events())


def measure_empty_kernel():
    """Seconds of a kernel with next to no work, in a graph."""
    number, graph = torch.zeros(1, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(1000):
            number.add_(1)
    graph.replay()
    start = read_clock()
    graph.replay()
    return (read_clock() - start) / 1000


# ---- size --------------------------------------------------------------------------------------


def size(folder):
    program = [sys.executable, str(Path(__file__).parents[1] / "wtp.py")]
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run([*program, "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    say(f"--help: {median(seconds):.2f} s")
    with tempfile.TemporaryDirectory() as out:
        for command in (["train", "mnist"], ["reproduce", "digits", "--schedule", "smoke"]):
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            folders = ["--data-dir", str(folder), "--out", out]
            done = subprocess.run([*program, *command, *folders], capture_output=True)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            figure = f"exit {done.returncode}, no figure"
            if done.returncode == 0:
                figure = f"at most {max(before, peak) / 1e6:.2f} GB"
            say(f"{' '.join(command)}: {figure}")


# ---- search ------------------------------------------------------------------------------------


class SearchByMacs(controller.RegressionSearch):
    """The search of `lstm` without anything learnt: a step of any layer is taken to cost the same.

    Layers are likely to be pruned where that saves many MACs; the candidates' accuracies only say
    which of them is the best.
    """

    def predict_costs(self, features):
        return torch.ones(features.shape[:-1])

    def fit_policy(self):
        """There is nothing to fit."""


class SearchByLinearModel(controller.RegressionSearch):
    """The search of `lstm` with a linear model in the LSTM's place. It reads the same features,
    which say which layer it is at, so it learns one cost for each layer at least."""

    # The best of 0.003, 0.01, 0.03 and 0.1 on two made-up problems of each kind, seeds 0 and 1.
    policy_lr = 0.01

    def make_policy(self):
        model = nn.Linear(controller.LAYER_FEATURES + len(self.net.widths), 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model


ABLATIONS = {"macs": SearchByMacs, "linear": SearchByLinearModel}
# Smaller seeds are of the problems that the numbers of the searches were chosen on.
FIRST_PROBLEM = 100
# What a MadeUpProblem of test_controller.py is searched by.
MADE_UP_SEARCHES = {
    "lstm": {"max_candidates": 60},
    "dice": {"max_candidates": 60, "is_random": True},
    "macs": {"max_candidates": 60, "search_class": SearchByMacs},
    "linear": {"max_candidates": 60, "search_class": SearchByLinearModel},
    "papers": {
        "max_candidates": None,
        "search_class": controller.ReinforceSearch,
        "candidates_per_lstm_epoch": 5,
        "patience": 10,
    },
}


def search(_, problems="20", *names):
    """How far from `uniform` to a greedy search that knows all made-up accuracies? No data; an hour
    for all searches, or those of some `names` alone."""
    names = names or tuple(MADE_UP_SEARCHES)
    say(
        f"made-up accuracies, mean of {problems} problems: how far from uniform to a greedy search "
        "that knows them all"
    )
    torch.set_num_threads(1)
    for arch, target in (("vgg19", 0.701), ("resnet56", 0.475)):
        for power in (1, 2, 3):
            seeds = range(FIRST_PROBLEM, FIRST_PROBLEM + int(problems))
            rows = torch.tensor(
                [search_made_up(arch, target, power, seed, names) for seed in seeds]
            )
            uniform, greedy = rows[:, :2].mean(0).tolist()
            say(f"{arch}, loss ~ share^{power}: uniform {uniform:.4f}, greedy {greedy:.4f}")
            ways = (rows[:, 2::3] - uniform) / (greedy - uniform)  # (problems, searches)
            cuts, candidates = rows[:, 3::3].mean(0), rows[:, 4::3].mean(0)
            for n, name in enumerate(names):
                lead = ""
                if n > 0:
                    error = standard_error(ways[:, n] - ways[:, 0])
                    lead = f"; the lead over {names[0]} has a standard error of {error:.0%}"
                say(
                    f"  {name}: {ways[:, n].mean():.0%}; {candidates[n]:.0f} candidates, a cut of "
                    f"{cuts[n]:.1%}{lead}"
                )


def search_made_up(arch, target, power, seed, names):
    """The true accuracies of `uniform` and of a greedy search, then of each search by its name the
    true accuracy, the cut and the number of its candidates."""
    from test_controller import MadeUpProblem

    problem = MadeUpProblem(seed, arch, target, power)
    uniform = controller.uniform_structure(problem.net.widths, problem.reduction_of, target)
    row = [problem.true_accuracy(uniform), problem.true_accuracy(problem.search_greedily())]
    for name in names:
        # A new problem of the same seed: the noise of its measurements begins anew.
        problem = MadeUpProblem(seed, arch, target, power)
        search = problem.run_search(seed=seed, **MADE_UP_SEARCHES[name])
        accuracy = problem.true_accuracy(search.best.structure)
        row += [accuracy, search.best.macs_reduction, len(search.candidates)]
    return row


def ablation(folder, variant, checkpoint, cut, seed, file):
    """`prune --method lstm --schedule fast` with another thing in the LSTM's place, to a checkpoint
    and a run folder beside it."""
    import wtp

    arguments = ["prune", checkpoint, "--target", cut, "--schedule", "fast", "--seed", seed]
    arguments += ["--data-dir", str(folder), "--out", f"{file}-runs", "--output", file]
    with mock.patch.object(controller, "RegressionSearch", ABLATIONS[variant]):
        sys.exit(wtp.main(arguments))


# ---- a baseline and what is trained from it ----------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """A net of `train` or `reproduce`, its images as it reads them, and its outputs as teacher."""

    net: models.Net
    all: Images
    train: Images
    validation: Images
    test: Images
    teacher: Teacher

    def reduction_of(self, structure):
        return 1 - models.count_macs(self.net, structure) / models.count_macs(self.net)

    def uniform(self, cut):
        return controller.uniform_structure(self.net.widths, self.reduction_of, float(cut))


def load_net_and_images(folder, checkpoint):
    """(net, images to train with, test images, facts); the images as the net reads them."""
    net, facts = sep.load(checkpoint)
    net = net.to(DEVICE)
    augmentation = {"crop": 4, "flip": True} if net.channels == 3 else {}
    loaded = controller.load_data(facts["data"], folder, **augmentation)[:2]
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    images, test = (each.to(DEVICE).normalised_by(mean, std) for each in loaded)
    return net, images, test, facts


def load_baseline(folder, checkpoint):
    net, images, test, facts = load_net_and_images(folder, checkpoint)
    train, validation = controller.split_images(images, facts["split"])
    return Baseline(net, images, train, validation, test, Teacher(net, train, 0))


def train_copy(net, plan, images, teacher, seed=0):
    """Yield a copy of `net` after each epoch of its training."""
    copy = deepcopy(net).to(memory_format=torch.channels_last)
    options = {"optimizer": make_optimizer(copy, plan.lr), "seed": seed, "teacher": teacher}
    for _ in controller.fit(copy, images, plan, **options):
        yield copy


def train_to_the_end(net, plan, images, teacher, seed=0):
    *_, trained = train_copy(net, plan, images, teacher, seed)
    return trained


def judge(net, images, teacher_probs):
    """(accuracy, loss to the baseline's outputs) on images.

    The loss is that at temperature 4 whatever the training's, for it owes less to luck.
    """
    logits = compute_logits(net, images, in_float32=True)
    accuracy = (logits.argmax(1) == images.labels).float().mean().item()
    # A recipe may have another weight of the labels; all are judged by one.
    with mock.patch.object(controller, "CROSS_ENTROPY_WEIGHT", DEFAULT_LABEL_WEIGHT):
        loss = controller.distillation_loss(logits, images.labels, teacher_probs, 4.0)
    return accuracy, loss.item()


def draw_structures(baseline, cut, count):
    """`uniform` and walks of dice to a cut, `count` structures or a few less."""
    from test_controller import TINY, make_candidate

    settings = replace(TINY, pruning_rate=0.2, target=float(cut), max_candidates=int(count))
    walks = controller.RegressionSearch(
        baseline.net,
        make_candidate(baseline.net.widths, 1.0, 0.0),
        settings,
        settings.target,
        baseline.reduction_of,
        method="",
        is_random=True,
    )
    while (proposal := walks.propose()) is not None:
        structure = proposal.structure
        if structure not in walks.known_scores:
            yield structure
        score = make_candidate(structure, 0.0, baseline.reduction_of(structure))
        walks.record(proposal, score)


def rank_correlations(rows):
    """The rank correlations (M, M) of M measures, rows (N, M)."""
    return torch.corrcoef(torch.tensor(rows).argsort(0).argsort(0).float().T)


# ---- baselines, structures, recipes ---------------------------------------------------


def narrow(folder, arch, share, epochs, file, data_set="cifar10"):
    """Train a narrower net than the papers', which stands in for them where time is short: to a
    checkpoint that has not seen its validation images."""
    train, _, data = controller.load_data(data_set, folder, crop=4, flip=True)
    training, validation = (each.to(DEVICE) for each in controller.split_images(train, 0))
    torch.manual_seed(0)
    widths = [int(float(share) * width) for width in models.default_widths(arch)]
    net = models.build(arch, widths, classes=train.classes, channels=3, size=32).to(DEVICE)
    plan = TrainingPlan(int(epochs), 0.1, is_one_cycle=True)
    for epoch, trained in enumerate(train_copy(net, plan, training, None), 1):
        say(f"epoch {epoch}: validation accuracy {measure_accuracy(trained, validation):.2%}")
    facts = {"data": data, "split": 0, "mean": list(train.mean), "std": list(train.std)}
    models.save_checkpoint(Path(file), trained.cpu(), facts)


def structures(folder, checkpoint, cut):
    """Is there anything to find? What LeNet-5s of very different structures and the same MACs come
    to, on validation images."""
    baseline = load_baseline(folder, checkpoint)
    plan = TrainingPlan(10, 0.05, is_one_cycle=True)
    names = {baseline.uniform(cut): "uniform"}
    for structure in list_lenets(baseline, float(cut)):
        names.setdefault(structure, "")
    for structure, name in names.items():
        small = models.prune_channels(baseline.net, structure)
        small = train_to_the_end(small, plan, baseline.train, baseline.teacher)
        accuracy = measure_accuracy(small, baseline.validation)
        reduction = baseline.reduction_of(structure)
        say(f"{structure} {name}: cut {reduction:.1%}, validation accuracy {accuracy:.2%}")


def list_lenets(baseline, cut):
    """LeNet-5s with several widths of the convolutions, and as wide a fc1 as the cut leaves."""
    for first in (2, 3, 4, 5):
        for second in (6, 8, 10, 12, 14, 16):
            hidden_widths = [
                hidden
                for hidden in range(1, 501)
                if baseline.reduction_of((first, second, hidden)) >= cut
            ]
            if hidden_widths and hidden_widths[-1] > 8:
                yield first, second, hidden_widths[-1]


# The engine's weight of the labels, read here because `recipes` overwrites it for each recipe.
DEFAULT_LABEL_WEIGHT = controller.CROSS_ENTROPY_WEIGHT
DEFAULT_RECIPES = ("0:0.1", "0:0.03", "4:0.06", "4:0.02", "4:0.006")
# Decay, for each step, of the exponential average of the weights. It begins after two thirds of
# the training, and nearly all of it comes from the last few epochs.
AVERAGE_DECAY = 0.999


class CosinePlan(TrainingPlan):
    """A twentieth of the training up to the peak, then down to 0 along half a cosine."""

    def lr_at(self, progress):
        warm_up = 0.05
        if progress < warm_up:
            return self.lr * progress / warm_up
        angle = math.pi * (progress - warm_up) / (1 - warm_up)
        return self.lr * (1 + math.cos(angle)) / 2


class MixedImages(Images):
    """Each image with another one shining through (mixup, Zhang et al. 2018). Teacher and student
    see the same mixture, and the image itself is the stronger part (Beyer et al. 2021)."""

    is_augmented = True  # other pictures in every epoch, so the teacher's outputs are others, too

    def draw_epoch(self, seed, epoch):
        order, crops = super().draw_epoch(seed, epoch)
        generator = torch.Generator().manual_seed(controller.seed_for(seed, "mixed", epoch))
        self.partners = torch.randperm(len(self), generator=generator).to(self.device)
        self.shares = torch.rand(len(self), generator=generator).div(2).to(self.device)
        return order, crops

    def batch(self, index, crops=None):
        share = self.shares[index][:, None, None, None]
        partners = super().batch(self.partners[index], crops)
        return super().batch(index, crops).mul_(1 - share).add_(partners.mul_(share))


class ErasedImages(Images):
    """Each image without a square of it, which has the images' mean instead (cutout, DeVries and
    Taylor 2017). Teacher and student see the same."""

    is_augmented = True

    def draw_epoch(self, seed, epoch):
        order, crops = super().draw_epoch(seed, epoch)
        generator = torch.Generator().manual_seed(controller.seed_for(seed, "erased", epoch))
        middles = torch.randint(0, self.size, (len(self), 2), generator=generator)
        self.middles = middles.to(self.device)
        return order, crops

    def batch(self, index, crops=None):
        places = torch.arange(self.size, device=self.device)
        is_near = (places - self.middles[index][:, :, None]).abs() < self.erased_side / 2
        is_erased = is_near[:, 0, :, None] & is_near[:, 1, None, :]  # (B, H, W)
        return super().batch(index, crops).masked_fill_(is_erased[:, None], 0)


class RepeatingImages(Images):
    """The crops of the first `crop_epochs` epochs again and again, in the order of each epoch: a
    teacher would have to run in these epochs alone."""

    def draw_epoch(self, seed, epoch):
        order, _ = super().draw_epoch(seed, epoch)
        _, crops = super().draw_epoch(seed, epoch % self.crop_epochs)
        return order, crops


def treat_images(images, recipe):
    """The images as a recipe shows them; the very same where it does nothing to them."""
    treatment = {name: getattr(images, name) for name in ("mean", "std", "crop", "flip")}
    if recipe.is_mixed:
        return MixedImages(images.pixels, images.labels, **treatment)
    if recipe.erased_side is not None:
        erased = ErasedImages(images.pixels, images.labels, **treatment)
        erased.erased_side = recipe.erased_side
        return erased
    if recipe.crop_epochs is None:
        return images
    repeating = RepeatingImages(images.pixels, images.labels, **treatment)
    repeating.crop_epochs = recipe.crop_epochs
    return repeating


@dataclass(frozen=True)
class Recipe:
    """A final training, by a name as 4:0.02:cosine:mixed:decay=0.0001:labels=0.5:seed=1."""

    plan: TrainingPlan
    weight_decay: float
    label_weight: float  # of the cross-entropy beside the teacher's outputs
    is_mixed: bool
    seed: int
    crop_epochs: int | None  # after which the images' crops repeat
    erased_side: int | None  # pixels of the square that is erased


def parse_recipe(name, epochs):
    temperature, peak, *words = name.split(":")
    options = dict(word.split("=") for word in words if "=" in word)
    plan_class = CosinePlan if "cosine" in words else TrainingPlan
    plan = plan_class(
        epochs, float(peak), is_one_cycle=True, temperature=float(temperature) or None
    )
    return Recipe(
        plan,
        float(options.get("decay", controller.WEIGHT_DECAY)),
        float(options.get("labels", DEFAULT_LABEL_WEIGHT)),
        "mixed" in words,
        int(options.get("seed", 0)),
        int(options["crops"]) if "crops" in options else None,
        int(options["erased"]) if "erased" in options else None,
    )


def train_by_recipe(net, recipe, images, teacher):
    """Yield (a copy of `net`, the average of its weights or None) after each epoch."""
    copy = deepcopy(net).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(copy, recipe.plan.lr)
    optimizer.param_groups[0]["weight_decay"] = recipe.weight_decay
    average = AveragedModel(
        copy, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY), use_buffers=True
    )
    is_averaging = False

    def average_after_each(steps):
        for step in steps:
            yield step
            if is_averaging:
                average.update_parameters(copy)

    options = {"optimizer": optimizer, "seed": recipe.seed, "teacher": teacher}
    epochs = controller.fit(copy, images, recipe.plan, wrap_steps=average_after_each, **options)
    for epoch, _ in epochs:
        yield copy, average.module if is_averaging else None
        # On a GPU a padded net is trained, and `copy` gets its weights only after each epoch.
        is_averaging = DEVICE.type == "cpu" and epoch + 1 >= 2 / 3 * recipe.plan.epochs


def recipes(folder, checkpoint, cut, epochs, *names):
    """Which final training? The `uniform` structure at a cut, by several TEMPERATURE:PEAK, where
    temperature 0 is the papers' MSE: on validation images that the baseline has not seen. Beside
    it, on a CPU, an exponential average of the weights, begun after two thirds. Options: `cosine`,
    `mixed`, decay=W, labels=W, seed=N, erased=N (cutout of N x N pixels), and crops=N: the epochs
    after which crops repeat."""
    baseline = load_baseline(folder, checkpoint)
    small = models.prune_channels(baseline.net, baseline.uniform(cut))
    logits = compute_logits(baseline.net, baseline.validation, in_float32=True)
    teacher_probs = logits.softmax(1)
    say(f"the baseline: {measure_accuracy(baseline.net, baseline.validation):.2%}")
    for name in names or DEFAULT_RECIPES:
        recipe = parse_recipe(name, int(epochs))
        controller.CROSS_ENTROPY_WEIGHT = recipe.label_weight
        images = treat_images(baseline.train, recipe)
        teacher = baseline.teacher
        if images is not baseline.train or recipe.seed:
            teacher = Teacher(baseline.net, images, recipe.seed)
        trainings = train_by_recipe(small, recipe, images, teacher)
        for epoch, (trained, average) in enumerate(trainings, 1):
            accuracy, loss = judge(trained, baseline.validation, teacher_probs)
            line = f"{name}, epoch {epoch}: {accuracy:.2%}, {loss:.4f}"
            if average is not None:
                accuracy, loss = judge(average, baseline.validation, teacher_probs)
                line += f"; average {accuracy:.2%}, {loss:.4f}"
            say(line)


# ---- gates -------------------------------------------------------------------------------------
#
# How much does it help to let each image choose its kernels, and how much of that does each kind of
# gate reach? One structure, one final training.


class ScoringGate(nn.Module):
    """A squeeze-and-excitation block (Hu et al. 2018) that gives each of `width` kernels a score.
    What comes of the scores say its subclasses."""

    def __init__(self, inputs, hidden, width, k):
        super().__init__()
        self.width = width
        self.k = k  # kernels that work for an image
        self.is_used = None  # (B, C) by the images of the last batch
        self.reduce = nn.Linear(inputs, hidden)
        self.excite = nn.Linear(hidden, width)

    def standardise(self, squeezed):
        """Let the first layer read `squeezed` (N, inputs) in standard deviations from its mean."""
        mean, deviation = squeezed.mean(0), squeezed.std(0)
        deviation = torch.where(deviation > 1e-6, deviation, torch.inf)
        with torch.no_grad():
            self.reduce.weight /= deviation
            self.reduce.bias -= self.reduce.weight @ mean

    def score(self, x, layer):
        with torch.autocast(x.device.type, enabled=False):
            squeezed = sep.squeeze(x, is_linear=isinstance(layer, nn.Linear)).float()
            return self.excite(torch.relu(self.reduce(squeezed)))

    def make_factors(self, scores, y):
        """What the outputs y (B, C, H, W) are multiplied with, (B, C), by the scores (B, C)."""
        raise NotImplementedError

    def forward(self, x, layer, norm, prunable):
        y = models.run_layer(layer, x)
        y = models.pool_and_activate(y if norm is None else norm(y), prunable)
        factors = self.make_factors(self.score(x, layer), y)
        self.is_used = factors.detach() != 0
        return y * factors.reshape(*factors.shape, *[1] * (y.dim() - 2)).to(y.dtype)


class ScaleGate(ScoringGate):
    """Scales the kernels of a hard-pruned layer, and chooses none."""

    def __init__(self, inputs, hidden, width, k):
        super().__init__(inputs, hidden, width, k)
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)

    def make_factors(self, scores, y):
        return 2 * torch.sigmoid(scores)


class KernelGate(ScoringGate):
    """Chooses k single kernels of a layer that keeps all of them. It is taught to choose those that
    matter most to an image, and goes on learning by straight-through gradients."""

    def __init__(self, inputs, hidden, width, k):
        super().__init__(inputs, hidden, width, k)
        nn.init.kaiming_normal_(self.excite.weight)
        # The layer that reads this one; in a tuple, for it is no part of the gate, and the gate's
        # teaching must not train it.
        self.next_layer = ()
        self.is_taught = False
        self.loss_of_imitation = None

    def score(self, x, layer):
        # Nor must the teaching train the layers before.
        return super().score(x if self.is_taught else x.detach(), layer)

    def measure_strength(self, y):
        """How much each kernel matters to each image: its output's energy, times that of the
        weights that read it."""
        energy = y.detach().float().square()
        energy = energy.mean((2, 3)) if y.dim() == 4 else energy
        (next_layer,) = self.next_layer
        by_channel = models.group_by_input_channel(next_layer.weight.detach(), self.width)
        return energy * by_channel.square().sum((0, 2))

    def count_chosen(self):
        """How many kernels are chosen for an image now."""
        return self.k

    def mask_of(self, scores, count):
        """1 for the `count` largest scores of each image, else 0."""
        return torch.zeros_like(scores).scatter_(1, scores.topk(count, 1).indices, 1.0)

    def make_factors(self, scores, y):
        if not self.is_taught:
            mask = self.mask_of(self.measure_strength(y), self.k)
            self.loss_of_imitation = F.binary_cross_entropy_with_logits(scores, mask)
            return mask
        count = self.count_chosen()
        mask = self.mask_of(scores, count)
        if self.training and count < self.width:
            threshold = scores.topk(count, 1).values[:, -1:].detach()
            soft = torch.sigmoid(scores - threshold)
            # The value is the mask's. The gradient is a tenth of the sigmoid's, so that the scores
            # learn more slowly than the net.
            mask = mask + 0.1 * (soft - soft.detach())
        return mask


class StrongestGate(KernelGate):
    """Chooses the k kernels that matter most to an image. It computes all of them first, so it
    saves nothing, and no gate can know it better."""

    def make_factors(self, scores, y):
        return self.mask_of(self.measure_strength(y), self.k)


class Annealing(nn.Module):
    """Knows how much of a gate's annealing is over, which takes the first steps of a training. Not
    for a GPU: there one step is recorded, and repeated as it was."""

    def __init__(self):
        super().__init__()
        self.step_count = 0  # `gates` sets it
        # A buffer, so that a training that goes on knows it.
        self.register_buffer("finished_steps", torch.zeros((), dtype=torch.long))

    def take_step(self):
        """Call it in each step of the training: what share of the annealing was over before this
        step, in [0, 1]."""
        self.finished_steps += 1
        return min(1.0, (self.finished_steps.item() - 1) / self.step_count)


class AnnealedGate(KernelGate):
    """A KernelGate for which the number of chosen kernels falls from all to k, linearly."""

    def __init__(self, inputs, hidden, width, k):
        super().__init__(inputs, hidden, width, k)
        self.annealing = Annealing()

    def count_chosen(self):
        if not self.training:
            return self.k
        return round(self.width + self.annealing.take_step() * (self.k - self.width))


# The next ones are the gates of `sep` with one change each.

NOISE = 0.3  # the scale of the noise on scores, in standard deviations of the scores
STRAIGHT_THROUGH_SHARE = 0.1  # of the gradient, so that gates learn more slowly than the net
# Of SoftGate's softmax, over scores with a standard deviation of 1.
FIRST_TEMPERATURE = 1.0
LAST_TEMPERATURE = 0.05
ANNEALING_SHARE = 0.35  # of the whole training
BALANCING_STEP = 0.01  # in standard deviations of the scores


class NoisyGate(sep.SEGate):
    """In training its scores have Gumbel noise, so that an image does not always get its nearest
    group."""

    def score_groups(self, x, layer):
        scores = super().score_groups(x, layer)
        if self.training:
            exponential = torch.empty_like(scores).exponential_()
            scores = scores - NOISE * exponential.log()
        return scores


class TrainedGate(sep.SEGate):
    """Its scores are trained on by straight-through gradients: its value is the mask of the chosen
    group, its gradient that of a softmax over the scores."""

    def __init__(self, input_count, size):
        super().__init__(input_count, size)
        self.excite.requires_grad_(True)

    def choose_kernels(self, x, layer):
        mask = super().choose_kernels(x, layer)
        if self.training:
            soft = self.score_groups(x, layer).softmax(1) @ self.masks
            mask = mask + STRAIGHT_THROUGH_SHARE * (soft - soft.detach())
        return mask


class SoftGate(sep.SEGate):
    """At first the output is a mixture of all groups, by a softmax over the scores, so the scores
    are trained by true gradients. The softmax becomes sharper and sharper. At the end of the
    annealing one group is chosen, and the scores learn no more."""

    def __init__(self, input_count, size):
        super().__init__(input_count, size)
        self.excite.requires_grad_(True)
        self.annealing = Annealing()

    def choose_kernels(self, x, layer):
        share = self.annealing.take_step() if self.training else 1.0
        if share == 1.0:
            return super().choose_kernels(x, layer)
        temperature = FIRST_TEMPERATURE ** (1 - share) * LAST_TEMPERATURE**share
        scores = self.score_groups(x, layer)
        self.balance(scores)
        return (scores / temperature).softmax(1) @ self.masks

    def balance(self, scores):
        """Nothing here; BalancedSoftGate moves the biases."""


class BalancedSoftGate(SoftGate):
    """In each step of the annealing the bias of a group with too many images falls a little, and
    that of a group with too few rises, as in Wang et al. 2024, "Auxiliary-loss-free load
    balancing". There the bias only selects; here it also weighs the mixture."""

    @torch.no_grad()
    def balance(self, scores):
        images_per_group = scores.argmax(1).bincount(minlength=scores.shape[1])
        excess = images_per_group - len(scores) / scores.shape[1]
        self.excite.bias -= BALANCING_STEP * excess.sign()


def halve_groups(baseline_width, size):
    """The size of a gate with the k of `size` of which half are always on; None if there is no room
    for two groups."""
    always_on_count = size.k // 2
    group_size = size.k - always_on_count
    group_count = min(sep.MAX_GROUPS, (baseline_width - always_on_count) // group_size)
    return sep.GateSize(always_on_count, group_size, group_count) if group_count >= 2 else None


@torch.no_grad()
def change_gates(kind, net, batches):
    """Change the fresh gates of `net`, as a variant of `groups` asks; in place."""
    gate_class = {
        "groups-noisy": NoisyGate,
        "groups-trained": TrainedGate,
        "groups-soft": SoftGate,
        "groups-soft-balanced": BalancedSoftGate,
    }.get(kind)
    if not gate_class and kind not in ("groups-balanced", "groups-normalised"):
        return
    for gate, scores in zip(sep.gates_of(net), collect_scores(net, batches), strict=True):
        if gate is None:
            continue
        if kind == "groups-balanced":
            gate.excite.bias += find_balancing_shifts(scores)
        elif kind == "groups-normalised":
            deviation = scores.std(0)
            gate.excite.weight /= deviation[:, None]
            gate.excite.bias.sub_(scores.mean(0)).div_(deviation)
        else:
            # Noise and softmax need scores of a known size. The choices stay the same.
            deviation = (scores - scores.mean(1, keepdim=True)).std()
            gate.excite.weight /= deviation
            gate.excite.bias /= deviation
    if gate_class:
        net.gates = nn.ModuleList(copy_gate(gate, gate_class) for gate in net.gates)


def copy_gate(gate, gate_class):
    """`gate` as a gate of that class; None if there is none."""
    if gate is None:
        return None
    copy = gate_class(gate.excite.in_features, gate.size)
    copy.excite.load_state_dict(gate.excite.state_dict())
    return copy.to(gate.masks.device)


@torch.no_grad()
def collect_scores(net, batches):
    """Of each prunable layer the scores (N, groups) that its gate gives, None without a gate."""
    collected = [None if gate is None else [] for gate in sep.gates_of(net)]
    hooks = [
        gate.excite.register_forward_hook(lambda _, __, scores, to=to: to.append(scores))
        for gate, to in zip(sep.gates_of(net), collected)
        if gate is not None
    ]
    net.eval()
    for x in batches:
        net(x)
    for hook in hooks:
        hook.remove()
    return [None if scores is None else torch.cat(scores) for scores in collected]


def find_balancing_shifts(scores):
    """What to add to scores (N, groups), for each group, so that each group has the largest score
    of about as many images."""
    groups = scores.shape[1]
    shifts = torch.zeros(groups, device=scores.device)
    rate = scores.std()
    for step in range(1000):
        chosen = (scores + shifts).argmax(1)
        excess = chosen.bincount(minlength=groups) * groups / len(scores) - 1
        shifts -= rate / (10 + step) * excess
    return shifts


def put_gates(net, gate_class, ks, images):
    """`net` with a gate of that class in every layer with a k: so many of its kernels work for an
    image."""
    names = [prunable.layer_name for prunable, k in zip(net.prunable, ks) if k is not None]
    chunks = torch.arange(2000).split(500)  # MNIST and CIFAR come shuffled
    squeezed = sep.collect_squeezed(net, names, images.batches(chunks))
    gates = []
    for index, (prunable, width, k) in enumerate(zip(net.prunable, net.widths, ks)):
        if k is None:
            gates.append(None)
            continue
        inputs = squeezed[prunable.layer_name].shape[1]
        previous = sep.index_of_previous_layer(net, index)
        # Of a linear layer after a convolution they are fewer than its inputs.
        channels = inputs if previous is None else net.widths[previous]
        hidden = max(4, channels // 16)  # as in SENet, but no fewer than 4
        gate = gate_class(inputs, hidden, width, k).to(images.device)
        gate.standardise(squeezed[prunable.layer_name])
        gate.next_layer = (net.get_submodule(prunable.next_layer_name),)
        gates.append(gate)
    net.gates = nn.ModuleList(gates)
    return net


TEACHING_STEPS = 300
TEACHING_RATE = 0.01  # of Adam, at first; it falls to 0


def teach_gates(net, images):
    """Let KernelGates imitate the strongest kernels of each image; the net stays as it is."""
    gates = [gate for gate in net.gates if gate is not None]
    parameters = [parameter for gate in gates for parameter in gate.parameters()]
    optimizer = torch.optim.Adam(parameters, TEACHING_RATE)
    order, crops = images.draw_epoch(seed=99, epoch=0)
    net.eval()
    for step in range(TEACHING_STEPS):
        index = order[torch.arange(step * 128, (step + 1) * 128) % len(order)]
        net(images.batch(index, crops))
        loss = sum(gate.loss_of_imitation for gate in gates)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = TEACHING_RATE * (1 - step / TEACHING_STEPS)
        optimizer.step()
    for gate in gates:
        gate.is_taught = True


KERNEL_GATES = {
    "kernels": KernelGate,
    "kernels-annealed": AnnealedGate,
    "strongest": StrongestGate,
}
GROUP_VARIANTS = (
    "groups",
    "groups-at-once",  # from the start of the training
    "groups-half",  # half of the kernels are always on
    "groups-balanced",  # every group begins with about as many images
    "groups-normalised",  # the scores of each group are standardised
    "groups-noisy",
    "groups-trained",
    "groups-soft",
    "groups-soft-balanced",
)


def make_gate_variant(name, baseline, structure):
    """(net to train, the GateSize of each layer that `add_gates` puts on later; None where the
    variant has its gates already, or has none)."""
    net = models.prune_channels(baseline.net, structure)
    kind, _, option = name.partition("=")
    max_gated_layers = max(1, int(option)) if option else len(structure)
    widths = baseline.net.widths
    gate_sizes = sep.choose_gate_sizes(widths, structure)
    if kind == "groups-half":
        gate_sizes = [size and halve_groups(width, size) for width, size in zip(widths, gate_sizes)]
    gate_sizes = controller.keep_last_gates(gate_sizes, max_gated_layers)
    images = baseline.all
    if kind == "hard":
        return net, None
    if kind == "scales":
        # In the layers where `groups` may have gates.
        ks = [None if size is None else k for k, size in zip(structure, gate_sizes)]
        return put_gates(net, ScaleGate, ks, images), None
    if kind in KERNEL_GATES:
        # They keep all kernels of the baseline, and choose in the last layers that are pruned.
        pruned_layers = [i for i, width in enumerate(widths) if structure[i] < width]
        gated_layers = pruned_layers[-max_gated_layers:]
        ks = [k if i in gated_layers else None for i, k in enumerate(structure)]
        kept = [widths[i] if i in gated_layers else k for i, k in enumerate(structure)]
        net = put_gates(models.prune_channels(baseline.net, kept), KERNEL_GATES[kind], ks, images)
        if kind != "strongest":
            teach_gates(net, images)
        return net, None
    if kind in GROUP_VARIANTS:
        if not any(gate_sizes):
            sys.exit("no layer lost enough kernels to have room for a gate")
        return net, gate_sizes
    sys.exit(f"no variant {name}: hard, scales, {', '.join((*KERNEL_GATES, *GROUP_VARIANTS))}")


def gates(folder, checkpoint, structure, epochs, peak, seed, *variants):
    """One structure, as 2-9-72, by several gates, each with the same final training: test accuracy,
    MACs, kernels for no, some and all test images, and how many bits the use of a kernel tells of
    the class. All nets begin right after the pruning, without a recovery.

    hard, scales          hard pruning; the same with squeeze-and-excitation scales on the kernels
    groups                the gates of `sep`, put on after 30 % of the training
    groups-...            the same with one change: see GROUP_VARIANTS
    kernels               gates that choose single kernels of all that the baseline has
    kernels-annealed      the same; at first they choose all kernels, then fewer and fewer
    strongest             a choice that knows the strongest kernels, and saves nothing

    VARIANT=N puts gates, or scales, on the last N layers that have room for them. Gates of groups
    are also made plain. This net gets a recovery of 50 steps like those of the final training
    (`static` of a run has that run's recovery).

    The trainings are kept in files gates-*.pt in the folder in which you are. The same command goes
    on from there, and measures finished ones again. Two processes with the same seed must not
    share a folder, for they share files.
    """
    baseline = load_baseline(folder, checkpoint)
    compare_gates("gates", baseline, checkpoint, structure, epochs, peak, seed, variants)


def gates_by_validation(folder, checkpoint, structure, epochs, peak, seed, *variants):
    """As `gates`, but all trainings have the training images alone, and "test accuracy" is that on
    the validation images. So variants can be compared before anybody reads the test images."""
    baseline = load_baseline(folder, checkpoint)
    baseline = replace(baseline, all=baseline.train, test=baseline.validation)
    title = "gates-by-validation"
    compare_gates(title, baseline, checkpoint, structure, epochs, peak, seed, variants)


def compare_gates(title, baseline, checkpoint, structure, epochs, peak, seed, variants):
    """The work of `gates`; `title` begins the names of its files."""
    # Another checkpoint may have the same name: every run calls its baseline baseline.pt.
    digest = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()[:8]
    work = f"{title}-{Path(checkpoint).stem}-{digest}-{structure}-epochs{epochs}"
    work += f"-peak{peak}-s{seed}"
    structure = tuple(map(int, structure.split("-")))
    plan = TrainingPlan(int(epochs), float(peak), is_one_cycle=True, temperature=4.0)
    teacher = Teacher(baseline.net, baseline.all, int(seed))

    def train_part(net, epochs, title):
        for module in net.modules():
            if isinstance(module, Annealing):
                steps = plan.epochs * (len(baseline.all) // controller.BATCH_SIZE)
                module.step_count = round(ANNEALING_SHARE * steps)
        return train_resumably(net, plan, teacher, epochs, Path(f"{work}-{title}.pt"))

    annealed = [name for name in variants if "annealed" in name or "soft" in name]
    if annealed and DEVICE.type != "cpu":
        sys.exit(f"{', '.join(annealed)}: on a CPU alone")
    for name in variants or ("hard", "scales", "groups", "groups-at-once", "kernels", "strongest"):
        torch.manual_seed(int(seed))
        net, gate_sizes = make_gate_variant(name, baseline, structure)
        if gate_sizes is None:
            net = train_part(net, range(plan.epochs), name)
        else:
            if name.startswith("groups-at-once"):
                gated_epochs = range(plan.epochs)
            else:
                ungated_epochs, gated_epochs = controller.split_epochs(plan)
                net = train_part(net, ungated_epochs, "ungated")  # for all variants the same
            chunks = torch.arange(controller.CLUSTERED_IMAGES).split(500)
            net = sep.add_gates(net, gate_sizes, baseline.all.batches(chunks))
            change_gates(name.partition("=")[0], net, baseline.all.batches(chunks))
            net = train_part(net, gated_epochs, name)
        say(f"{name}, seed {seed}: {describe_gated(net, baseline)}")
        if gate_sizes is not None:
            say(f"{name} made plain, seed {seed}: {describe_static(net, baseline, plan, teacher)}")


def train_resumably(net, plan, teacher, epochs, path):
    """Train these epochs of the plan on the teacher's images, and keep the training in `path` after
    every fifth epoch."""
    net = net.to(DEVICE).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(net, plan.lr)
    content = models.read_unfinished_work(path, path.stem, {"net", "optimizer", "epochs"})
    finished_epochs = 0
    if content is not None:
        # It may be of an earlier version of this code, and then it is to be removed.
        say(f"{path}: {content['epochs']} of {len(epochs)} epochs are there already")
        net.load_state_dict(content["net"])
        optimizer.load_state_dict(content["optimizer"])
        finished_epochs = content["epochs"]
    options = {"optimizer": optimizer, "seed": teacher.seed, "teacher": teacher}
    trainings = controller.fit(
        net, teacher.images, plan, epochs=epochs[finished_epochs:], **options
    )
    for _ in trainings:
        finished_epochs += 1
        if finished_epochs % 5 == 0 or finished_epochs == len(epochs):
            weights = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
            models.write_tensors(path, weights | {"title": path.stem, "epochs": finished_epochs})
    return net


def describe_static(net, baseline, plan, teacher):
    """Test accuracies of a gated net made plain, before and after a recovery of 50 steps."""
    plain = controller.make_static(net, baseline.all)
    recovery = replace(plan, epochs=1, max_steps=50)
    recovered = train_to_the_end(plain, recovery, baseline.all, teacher, teacher.seed)
    before, after = (
        measure_accuracy(each, baseline.test, in_float32=True) for each in (plain, recovered)
    )
    return f"test accuracy {before:.2%}, after 50 steps {after:.2%}"


def describe_gated(net, baseline):
    accuracy = measure_accuracy(net, baseline.test, in_float32=True)
    macs = models.count_macs(net, net.structure)
    for i, gate in enumerate(sep.gates_of(net)):
        if isinstance(gate, sep.SEGate):
            macs += sep.count_gate_macs(net, net.structure, i, gate.size.group_count)
        elif gate is not None:
            # Its first layer costs as much as a gate with so many groups.
            hidden = gate.reduce.out_features
            macs += sep.count_gate_macs(net, net.structure, i, hidden) + hidden * gate.width
    cut = 1 - macs / models.count_macs(baseline.net)
    text = f"test accuracy {accuracy:.2%}, cut {cut:.2%}"
    if any(isinstance(gate, StrongestGate) for gate in sep.gates_of(net)):
        text = f"test accuracy {accuracy:.2%}, no cut, for all kernels are computed"
    if net.gates is None:
        return text
    labels = baseline.test.labels.bincount().float()
    for layer, shares in measure_shares(net, baseline.test).items():
        never, sometimes, always, information = describe_choice(shares, labels)
        text += f"; {layer} {never}/{sometimes}/{always}, {information:.2f} bits"
    return text


@torch.no_grad()
def measure_shares(net, images):
    """Of each gated layer (classes, C): the share of a class's images that each kernel serves."""
    if any(isinstance(gate, sep.SEGate) for gate in sep.gates_of(net)):
        layers = controller.measure_usage_by_class(net, images)["layers"]
        return {name: torch.tensor(shares, device=DEVICE) for name, shares in layers.items()}
    gates = [(p.layer_name, gate) for p, gate in zip(net.prunable, net.gates) if gate is not None]
    shares = {name: [] for name, _ in gates}
    for label in range(net.classes):
        sums = dict.fromkeys(shares, 0)
        index = (images.labels == label).nonzero()[:, 0]
        for x in images.batches(index.split(500)):
            net.eval()(x)
            for name, gate in gates:
                sums[name] += gate.is_used.float().sum(0)
        for name in shares:
            shares[name].append(sums[name] / len(index))
    return {name: torch.stack(rows) for name, rows in shares.items()}


def describe_choice(shares, images_of_class):
    """(kernels for no, for some, for all images; the mean, over the kernels for some images, of the
    mutual information of "is used" and the class, in bits) of shares (classes, C)."""

    def entropy(p):
        return -(p * p.clamp_min(1e-12).log2() + (1 - p) * (1 - p).clamp_min(1e-12).log2())

    weights = images_of_class / images_of_class.sum()
    overall = weights @ shares  # (C,)
    information = entropy(overall) - weights @ entropy(shares)
    serves_none, serves_all = overall < 1e-6, overall > 1 - 1e-6  # shares are rounded
    varies = ~serves_none & ~serves_all
    mean = information[varies].mean().item() if varies.any() else 0.0
    return int(serves_none.sum()), int(varies.sum()), int(serves_all.sum()), mean


# ---- signals, budgets, seeds -------------------------------------------------------------------


def signals(folder, checkpoint, cut, count):
    """Do the validation images, which a public baseline has mostly seen, rank structures as
    images do that no training saw? As many test images, after `fast`'s 50 steps."""
    baseline = load_baseline(folder, checkpoint)
    test = baseline.test.select(torch.arange(len(baseline.validation)))
    plan = TrainingPlan(1, 0.02, is_one_cycle=True, max_steps=50)
    rows = []
    for structure in draw_structures(baseline, cut, count):
        small = models.prune_channels(baseline.net, structure)
        small = train_to_the_end(small, plan, baseline.train, baseline.teacher)
        seen, unseen = (measure_accuracy(small, images) for images in (baseline.validation, test))
        rows.append([seen, unseen])
        say(f"{structure}: validation {seen:.2%}, test {unseen:.2%}")
    by_rank = rank_correlations(rows)[0, 1]
    by_accuracy = torch.corrcoef(torch.tensor(rows).T)[0, 1]
    say(f"rank correlation {by_rank:.2f}, of the accuracies {by_accuracy:.2f}")


def list_budgets(arch):
    """Recoveries from the shortest to the longest, and twice the training that they should
    foretell: (plan, seed) by name."""
    mse = partial(TrainingPlan, 1, 0.02, is_one_cycle=True)
    peak = 0.02 if arch == "lenet5" else 0.005
    soft = partial(TrainingPlan, lr=peak, is_one_cycle=True, temperature=4.0)
    return {
        "50 steps, MSE": (mse(max_steps=50), 0),
        "200 steps, MSE": (mse(max_steps=200), 0),
        "200 steps": (soft(1, max_steps=200), 0),
        "1 epoch": (soft(1), 0),
        "2 epochs": (soft(2), 0),
        "10 epochs": (soft(10), 0),
        "again": (soft(10), 1),
    }


def budgets(folder, checkpoint, cut, count):
    """Which recovery ranks structures as the final training will? On validation images, by the
    accuracy and by the loss to the baseline's outputs."""
    baseline = load_baseline(folder, checkpoint)
    logits = compute_logits(baseline.net, baseline.validation, in_float32=True)
    teacher_probs = logits.softmax(1)
    teachers = [baseline.teacher, Teacher(baseline.net, baseline.train, 1)]
    plans = list_budgets(baseline.net.arch)
    rows = []
    for structure in draw_structures(baseline, cut, count):
        small = models.prune_channels(baseline.net, structure)
        row, texts = [], []
        for name, (plan, seed) in plans.items():
            trained = train_to_the_end(small, plan, baseline.train, teachers[seed], seed)
            accuracy, loss = judge(trained, baseline.validation, teacher_probs)
            row += [accuracy, -loss]
            texts.append(f"{name} {accuracy:.2%} {loss:.3f}")
        rows.append(row)
        say(f"{structure}: {', '.join(texts)}")
    table = rank_correlations(rows)
    accuracies = torch.tensor(rows)[:, ::2].mean(0)
    say(
        "mean accuracy; rank correlation with the last one's accuracy, loss: "
        "of each one's accuracy; of its loss"
    )
    for n, name in enumerate(plans):
        by_accuracy, by_loss = (
            ", ".join(f"{value:.2f}" for value in row[-2:]) for row in table[2 * n : 2 * n + 2]
        )
        say(f"{name}: {accuracies[n]:.2%}; {by_accuracy}; {by_loss}")


def seeds(folder, run, *numbers):
    """How much do the rows of a `fast` run owe to luck? Its structures anew from its baseline,
    recovery and final training by other seeds."""
    results = controller.read_results(Path(run))
    recovery, final = (TrainingPlan(**results["settings"][name]) for name in ("recovery", "final"))
    baseline = load_baseline(folder, Path(run) / "baseline.pt")
    rows = [row for row in results["rows"] if row["method"] in ("lstm", "random", "uniform")]
    for seed in map(int, numbers):
        stages = [
            (images, plan, Teacher(baseline.net, images, seed))
            for images, plan in ((baseline.train, recovery), (baseline.all, final))
        ]
        for row in rows:
            net = models.prune_channels(baseline.net, row["widths"])
            net = net.to(memory_format=torch.channels_last)
            for images, plan, teacher in stages:
                optimizer = make_optimizer(net, plan.lr)
                options = {"optimizer": optimizer, "seed": seed, "teacher": teacher}
                *_, (_, loss) = controller.fit(net, images, plan, **options)
            accuracy = measure_accuracy(net, baseline.test, in_float32=True)
            say(f"seed {seed}, {row['method']}: loss {loss:.4f}, test accuracy {accuracy:.2%}")


def finalists(folder, run, count, seed="0"):
    """Do the best candidates of a finished search of `lstm` by `fast` stay the best?

    The `count` best ones and the first, which is `uniform`'s, each pruned anew: after the recovery,
    after a trial, and after the final training, on the images that do not validate. All are judged
    by the images that do.
    """
    results = controller.read_results(Path(run))
    plans = {name: TrainingPlan(**results["settings"][name]) for name in ("recovery", "final")}
    baseline = load_baseline(folder, Path(run) / "baseline.pt")
    plans["trial"] = controller.plan_trial(plans["final"], len(baseline.train))
    teacher = Teacher(baseline.net, baseline.train, int(seed))
    logits = compute_logits(baseline.net, baseline.validation, in_float32=True)
    search = results["search"]["lstm"]
    candidates = [controller.read_candidate(values) for values in search["candidates"]]
    reached = [candidate for candidate in candidates if candidate.reaches(search["target"])]
    best = controller.rank_by_reward(reached, int(count))
    rows = []
    for structure in dict.fromkeys(candidate.structure for candidate in (candidates[0], *best)):
        small = models.prune_channels(baseline.net, structure)
        trained = {
            "recovery": train_to_the_end(
                small, plans["recovery"], baseline.train, teacher, int(seed)
            )
        }
        for name in ("trial", "final"):
            trained[name] = train_to_the_end(
                trained["recovery"], plans[name], baseline.train, teacher, int(seed)
            )
        row, texts = [], []
        for name, net in trained.items():
            accuracy, loss = judge(net, baseline.validation, logits.softmax(1))
            row += [accuracy, -loss]
            texts.append(f"{name} {accuracy:.2%} {loss:.4f}")
        rows.append(row)
        say(f"{structure}: {', '.join(texts)}")
    table = rank_correlations(rows)
    for n, name in enumerate(("recovery", "trial")):
        by_accuracy, by_loss = table[2 * n, 4], table[2 * n + 1, 5]
        say(
            f"{name}: rank correlation with the final training's, of the accuracies "
            f"{by_accuracy:.2f}, of the losses {by_loss:.2f}"
        )


def leads(folder, *groups):
    """By how much is the first group of nets ahead of each other one, in test accuracy, and how
    sure is that? A group is CHECKPOINT[,CHECKPOINT ...], as one of each seed.

    Two standard errors of the mean lead: by the luck of the test images, which are the same for all
    nets; and by the luck of the seeds, where the nets of one place in the groups are a pair.
    """
    paths = [group.split(",") for group in groups]
    if len(groups) < 2 or len({len(checkpoints) for checkpoints in paths}) > 1:
        sys.exit("bench: leads compares two groups or more of as many checkpoints each")
    answers = [
        torch.stack([find_right_answers(folder, checkpoint) for checkpoint in checkpoints])
        for checkpoints in paths
    ]
    for group, is_right in zip(groups, answers):
        say(f"{group}: " + ", ".join(f"{value:.2%}" for value in is_right.mean(1).tolist()))
    for group, is_right in zip(groups[1:], answers[1:]):
        differences = 100 * (answers[0] - is_right)  # (pairs, images), in points
        line = f"ahead of {group} by {differences.mean():.2f} points; standard error "
        line += f"{standard_error(differences.mean(0)):.2f} by the test images"
        if len(is_right) > 1:
            line += f", {standard_error(differences.mean(1)):.2f} by the seeds"
        say(line)


def find_right_answers(folder, checkpoint):
    """(images,), 1 where a net is right about a test image, else 0."""
    net, _, test, _ = load_net_and_images(folder, checkpoint)
    logits = compute_logits(net, test, in_float32=True)
    return (logits.argmax(1) == test.labels).float().cpu()


def imitation(folder, checkpoint, *pruned):
    """How like its baseline each pruned net is on the test images: its accuracy, also on those that
    the baseline gets right and on the others, and the share of images of which both say the
    same."""
    baseline, _, test, _ = load_net_and_images(folder, checkpoint)
    baseline_predicted = compute_logits(baseline, test, in_float32=True).argmax(1)
    baseline_is_right = baseline_predicted == test.labels
    for path in pruned:
        net, _ = sep.load(path)  # it reads images as its baseline does
        predicted = compute_logits(net.to(DEVICE), test, in_float32=True).argmax(1)
        is_right = (predicted == test.labels).float()
        agreement = (predicted == baseline_predicted).float().mean()
        say(
            f"{path}: test accuracy {is_right.mean():.2%}, "
            f"{is_right[baseline_is_right].mean():.2%} where the baseline is right, "
            f"{is_right[~baseline_is_right].mean():.2%} where it is wrong; says what the baseline "
            f"says {agreement:.2%}"
        )


def standard_error(values):
    """That of the mean of independent values (N,)."""
    return values.std() / math.sqrt(len(values))


# ---- rivals ------------------------------------------------------------------------------------
#
# What a user would take instead: torch-pruning (Fang et al. 2023), here as its own script for CIFAR
# uses it, benchmarks/main.py. It has to be installed; the project itself does not need it.

SPARSITY_WEIGHT = 5e-4  # of the group norms, in the gradients (its script)
PRUNING_STEPS = 400  # (its script)


class StepsPlan(TrainingPlan):
    """A rate that falls to a tenth after 60 % and after 80 % of the time (its script)."""

    def lr_at(self, progress):
        return self.lr * 0.1 ** ((progress >= 0.6) + (progress >= 0.8))


@dataclass(frozen=True)
class Rival:
    """A way of torch-pruning to choose channels."""

    name: str
    norm: int  # L1 or L2 of a group's weights
    is_global: bool  # whether the channels of all layers are compared with each other
    has_sparse_training: bool = False  # before it prunes


RIVALS = (
    Rival("group L1 in each layer", 1, is_global=False),
    Rival("group L1 of all layers", 1, is_global=True),
    Rival("group L2 in each layer", 2, is_global=False),
    Rival("group L2 of all layers", 2, is_global=True),
    Rival("group sparsity", 2, is_global=True, has_sparse_training=True),
)


def make_pruner(rival, net):
    import torch_pruning

    prunable = {net.get_submodule(prunable.layer_name) for prunable in net.prunable}
    layers = (module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    images = torch.zeros(1, net.channels, net.size, net.size, device=DEVICE)
    pruner_class, options = torch_pruning.BasePruner, {}
    if rival.has_sparse_training:
        pruner_class = torch_pruning.GroupNormPruner
        options = {"reg": SPARSITY_WEIGHT}
    return pruner_class(
        net,
        images,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=rival.norm),
        global_pruning=rival.is_global,
        iterative_steps=PRUNING_STEPS,
        pruning_ratio=1.0,
        ignored_layers=[layer for layer in layers if layer not in prunable],
        **options,
    )


def train_sparsely(pruner, net, plan, images):
    """Its script's training before it prunes: the groups' norms take the weight decay's place."""
    optimizer = make_optimizer(net, plan.lr)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.register_step_pre_hook(lambda *_: pruner.regularize(net))
    # No graph on a GPU: the hook looks at values.
    with mock.patch.object(controller, "make_train_step", controller.TrainStep):
        for _ in controller.fit(net, images, plan, optimizer=optimizer, seed=0):
            pass


def prune_by_rival(rival, baseline, cut, plan):
    """A net with at least that cut."""
    net = deepcopy(baseline.net)
    pruner = make_pruner(rival, net)
    if rival.has_sparse_training:
        train_sparsely(pruner, net, plan, baseline.all)
    net.eval()
    macs = models.count_macs(net)
    while True:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "pruned.pt"
            torch.save(net.state_dict(), file)
            pruned = sep.load(file)[0].to(DEVICE)
        if 1 - models.count_macs(pruned) / macs >= cut:
            return pruned
        pruner.step()


def rivals(folder, run):
    """The rows of a finished run beside torch-pruning: from the same baseline, at the same cut,
    with as many epochs at the end, by the run's final training and by torch-pruning's own."""
    results = controller.read_results(Path(run))
    baseline = load_baseline(folder, Path(run) / "baseline.pt")
    final = TrainingPlan(**results["settings"]["final"])
    own_plan = StepsPlan(final.epochs, 0.01)
    seed = results["seed"]
    teacher = Teacher(baseline.net, baseline.all, seed)
    say("row; cut; validation accuracy before the final training; test accuracy; seconds in all")
    for row in results["rows"]:
        say(
            f"{row['method']}; {row['macs_reduction']:.2%}; {row['validation_accuracy']:.2%}; "
            f"{row['test_accuracy']:.2%}; {row['seconds']:.0f}"
        )
    cut = results["settings"]["target"] or results["rows"][1]["macs_reduction"]
    for rival in RIVALS:
        start = read_clock()
        net = prune_by_rival(rival, baseline, cut, own_plan)
        seconds = read_clock() - start
        before = measure_accuracy(net, baseline.validation)
        reduction = baseline.reduction_of(net.structure)
        for name, plan, its_teacher in (
            ("the run's final training", final, teacher),
            ("its own", own_plan, None),
        ):
            start = read_clock()
            trained = train_to_the_end(net, plan, baseline.all, its_teacher, seed)
            accuracy = measure_accuracy(trained, baseline.test, in_float32=True)
            seconds_in_all = seconds + read_clock() - start
            say(
                f"{rival.name}, {name}; {reduction:.2%}; {before:.2%}; {accuracy:.2%}; "
                f"{seconds_in_all:.0f}; widths {list(net.structure)}"
            )


# ---- small -------------------------------------------------------------------------------------


class ExportedNet:
    """A net as `export` writes it and torch.export or onnxruntime reads it, for images as a user
    has them, channels first."""

    def __init__(self, net, ending):
        mean, std = (0.5,) * net.channels, (0.25,) * net.channels
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"net.{ending}"
            models.export_net(net, file, mean, std, net.size)
            if ending == "pt2":
                self.run = torch.export.load(file).module()
            else:
                self.run = self.open_onnx(file.read_bytes())

    def open_onnx(self, content):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(content, options)
        return lambda x: session.run(None, {"images": x.numpy()})

    def eval(self):
        return self

    def __call__(self, x):
        return self.run(x.contiguous())


def make_half_nets():
    """VGG-19 and ResNet-56 at half the widths, untrained: hard-pruned, and gated."""
    torch.manual_seed(0)
    nets = {}
    for arch in ("vgg19", "resnet56"):
        whole = models.build(arch)
        half = [width // 2 for width in whole.widths]
        nets[f"{arch} hard"] = models.prune_channels(whole, half)
        nets[f"{arch} gated"] = sep.prune_softly(whole, half, [torch.randn(256, 3, 32, 32)])
    return nets


def small(_, *checkpoints):
    """How much of the MACs saved arrives as time, in PyTorch, tuned, and in exported files, and as
    bytes: checkpoints beside their whole nets; without any, `make_half_nets`."""
    nets = {path: sep.load(path)[0] for path in checkpoints} or make_half_nets()
    say(
        f"{torch.get_num_threads()} threads, medians, ratios to the whole net: MACs; time "
        "of 1 image, both nets as PyTorch runs them, the small one tuned, both tuned; of 128 "
        "images; of the exported nets, .pt2 and .onnx; bytes of the state dict"
    )
    for name, net in nets.items():
        say(f"{name}: {compare_sizes(net)}")


def compare_sizes(net):
    """A line on a small net beside its whole one."""
    whole = models.build_like(net, models.default_widths(net.arch))
    pair = [each.to(memory_format=torch.channels_last) for each in (whole, net)]
    images = make_random_images(net)
    tuned = [sep.tune(each) for each in pair]
    exported = {ending: [ExportedNet(each, ending) for each in pair] for ending in ("pt2", "onnx")}

    all_nets = [*pair, *tuned, *exported["pt2"], *exported["onnx"]]
    rounds = [measure_one_by_one(all_nets, images, 1) for _ in range(5)]
    one = [median(seconds) for seconds in zip(*rounds)]
    many = measure_one_by_one([*pair, *exported["pt2"], *exported["onnx"]], images, 128)

    bytes_of_whole, bytes_of_net = (count_bytes(each) for each in pair)
    macs = sep.count_macs(net) / models.count_macs(whole)
    parts = [
        f"{macs:.2f}",
        f"{ratio(one[0], one[1])}, {ratio(one[0], one[3])}, {ratio(one[2], one[3])}",
        f"{ratio(many[0], many[1])}",
        f".pt2 {ratio(one[4], one[5])}, {ratio(many[2], many[3])}",
        f".onnx {ratio(one[6], one[7])}, {ratio(many[4], many[5])}",
        f"{bytes_of_net / bytes_of_whole:.2f} ({bytes_of_net / 1e6:.2f} MB)",
    ]
    return "; ".join(parts)


def measure_one_by_one(nets, images, batch_size):
    """Latencies with each net's weights in the cache, as where it runs alone."""
    return [controller.measure_latencies([net], images, batch_size)[0] for net in nets]


def ratio(seconds_of_whole, seconds):
    change = f"{seconds_of_whole * 1e3:.1f} -> {seconds * 1e3:.1f} ms"
    return f"{seconds / seconds_of_whole:.2f} ({change})"


def make_random_images(net):
    shape = (128, net.size, net.size, net.channels)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    statistics = {"mean": (0.5,) * net.channels, "std": (0.25,) * net.channels}
    return Images(pixels, torch.zeros(128), **statistics)


def count_bytes(net):
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    return file.tell()


# ---- families ----------------------------------------------------------------------------------


def families(_, name=""):
    """Each net of zoo.py by the commands, as a user has it: a state dict, and images in a folder,
    labelled with what the net says of them. Exported, its logits are compared with the net's own.
    Then it is pruned to half its MACs by `smoke` and exported anew."""
    say("| net | repository | largest difference of logits | cut | the pruned net's |")
    say("|---|---|---|---|---|")
    for case_name, case in zoo.CASES.items():
        if name in case_name:
            with tempfile.TemporaryDirectory() as folder:
                numbers = measure_family(Path(folder), case)
            say(f"| {case_name} | {case.repository} | {' | '.join(numbers)} |")


def measure_family(folder, case):
    """(largest difference of the exported net, cut, the same of the pruned net)."""
    net, _ = zoo.make_lively(case)
    name = "mnist" if case.channels == 1 else "cifar10"
    statistics = controller.STATISTICS[name]
    pixels = make_patches(1000, case)
    images = Images(pixels, torch.zeros(len(pixels)), mean=statistics[0], std=statistics[1])
    x = images.batch(torch.arange(len(pixels)))
    zoo.spread_logits(net, x[:500])
    with torch.no_grad():
        expected = net(x[:8])
        labels = torch.cat([net(part).argmax(1) for part in x.split(100)])
    save_pictures(folder, pixels, labels)
    torch.save(net.state_dict(), folder / "net.pth")
    run_command(folder, "export", "net.pth", "net.onnx", "--data-dir", folder)
    options = ["--target", "0.5", "--schedule", "smoke", "--force", "--out", folder / "runs"]
    run_command(folder, "prune", "net.pth", "--data-dir", folder, *options)
    run_command(folder, "export", "net-pruned.pt", "small.onnx")
    small, facts = sep.load(folder / "net-pruned.pt")
    with torch.no_grad():
        small_expected = small.eval()(x[:8])
    cut = 1 - facts["macs"] / facts["baseline"]["macs"]
    unit_pixels = pixels[:8].permute(0, 3, 1, 2).float() / 255
    differences = [
        zoo.largest_difference(run_onnx(folder / file, unit_pixels), logits)
        for file, logits in (("net.onnx", expected), ("small.onnx", small_expected))
    ]
    return f"{differences[0]:.0e}", f"{cut:.1%}", f"{differences[1]:.0e}"


def make_patches(count, case):
    """(N, H, W, C) uint8: noise that is alike in neighbouring places, of many contrasts."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, case.channels, 8, 8, generator=generator) - 0.5
    contrast = torch.rand(count, 1, 1, 1, generator=generator)
    shift = torch.rand(count, case.channels, 1, 1, generator=generator)
    x = F.interpolate(coarse, size=(case.size, case.size), mode="bilinear")
    return ((x * contrast + shift).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1)


def save_pictures(folder, pixels, labels):
    """As a user's own data set: four fifths train, the others test."""
    from PIL import Image

    pixels = pixels.squeeze(3) if pixels.shape[3] == 1 else pixels
    counts = Counter()
    for number, (image, label) in enumerate(zip(pixels, labels.tolist())):
        part = "test" if counts[label] % 5 == 0 else "train"
        counts[label] += 1
        class_folder = folder / part / f"class{label:02}"
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(class_folder / f"{number}.png")


def run_command(folder, *arguments):
    """What a command of the tool says, in another process. Ends with its message if it fails."""
    program = Path(__file__).parents[1] / "wtp.py"
    command = [sys.executable, program, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))}: {done.stderr}")
    return done.stdout


def run_onnx(file, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


# ---- readings ----------------------------------------------------------------------------------

READ_IMAGES = 5000
READ_PLAN = TrainingPlan(20, 0.05, is_one_cycle=True)
# From this difference on, as a share of the largest logit, two nets do not compute the same.
DIFFERENT_LOGITS = 1e-3


def readings(folder, name=""):
    """Each small net of zoo.py with batch norms, as it is and with GELU in place of relu: it is
    trained for some epochs, then its state dict is read by `find_reading` on its training images.
    Is that the net? With what batch norms tell, and without it."""
    say("| net | activation | accuracy | normalised by | mismatch | read | without norms |")
    say("|---|---|---|---|---|---|---|")
    for number, (case_name, case) in enumerate(zoo.CASES.items()):
        # Larger images take too much time.
        if name not in case_name or case.size > 32 or not has_norms(case.make()):
            continue
        for activation in ("relu", "gelu"):
            with zoo.replace_relu(activation):
                columns = measure_reading(folder, case, number)
            say(f"| {case_name} | {activation} | {' | '.join(columns)} |")


def has_norms(net):
    return any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in net.modules())


def measure_reading(folder, case, number):
    """The columns of a net: the `number` decides how its images are normalised."""
    images = load_images_of_size(folder, case)
    normalisations = controller.list_normalisations(images)
    normalisation = normalisations[number % len(normalisations)]
    used = images.normalised_by(normalisation.mean, normalisation.std)
    torch.manual_seed(0)
    net = train_to_the_end(case.make(), READ_PLAN, used, None).eval()
    x = used.batch(torch.arange(500))
    with torch.no_grad():
        expected = net(x)
    mismatch = controller.measure_least_norm_mismatch(net, used)
    verdicts = [judge_reading(net, images, x, expected)]
    with mock.patch.object(controller, "measure_least_norm_mismatch", lambda *_: None):
        verdicts.append(judge_reading(net, images, x, expected))
    return f"{measure_accuracy(net, used):.1%}", normalisation.name, f"{mismatch:.4f}", *verdicts


def load_images_of_size(folder, case):
    """Images of MNIST or CIFAR-10, brought to the size of a case."""
    name, augmentation = "mnist", {}
    if case.channels == 3:
        name, augmentation = "cifar10", {"crop": 4, "flip": True}
    images, _, _ = controller.load_data(name, folder, **augmentation)
    images = images.select(slice(READ_IMAGES))
    if images.size == case.size:
        return images
    x = images.pixels.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=(case.size, case.size), mode="bilinear")
    return images.replace(x.round().to(torch.uint8).permute(0, 2, 3, 1), images.labels)


def judge_reading(net, images, x, expected):
    """What `find_reading` makes of a net's state dict, in words. The net's logits for x are
    `expected`."""
    found = models.recognise_state_dict(net.state_dict(), Path("net.pt"))["readings"]
    fitting = [reading.for_size(images.size) for reading in found]
    fitting = [reading for reading in fitting if reading is not None]
    best = controller.find_reading(fitting, images, tries_activations=True)
    normalisation = best.normalisation
    own = images.normalised_by(normalisation.mean, normalisation.std).batch(torch.arange(len(x)))
    with torch.no_grad():
        logits = best.net.eval()(own)
    if zoo.largest_difference(logits, expected) < DIFFERENT_LOGITS:
        return "right"
    same = float((logits.argmax(1) == expected.argmax(1)).float().mean())
    verdict = f"wrong, {same:.1%} the same"
    return f"{verdict}, warned" if best.has_strange_norms else verdict


# ---- examples ----------------------------------------------------------------------------------


def examples(_, name=""):
    """Each net of zoo.py, as it is and with GELU in place of relu, by a file that holds some inputs
    and outputs of it beside its state dict. Is it read as the net that it is?"""
    say("| net | activation | seconds | read |")
    say("|---|---|---|---|")
    counts = Counter()
    for case_name, case in (zoo.CASES | zoo.EXAMPLE_CASES).items():
        for activation in ("relu", "gelu") if name in case_name else ():
            with zoo.replace_relu(activation), tempfile.TemporaryDirectory() as folder:
                seconds, verdict = measure_example(Path(folder) / "net.pth", case)
            counts[verdict] += 1
            say(f"| {case_name} | {activation} | {seconds:.1f} | {verdict} |")
    say(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


@torch.no_grad()
def measure_example(path, case):
    """(seconds that the reading takes, what comes of it)."""
    net, _ = zoo.make_lively(case)
    inputs, others = torch.randn(2, 8, case.channels, case.size, case.size)
    torch.save({"state_dict": net.state_dict(), "inputs": inputs, "outputs": net(inputs)}, path)
    start = time.perf_counter()
    try:
        found, _ = sep.load(path)
    except models.UserError as error:
        return time.perf_counter() - start, f"refused: {error}"
    seconds = time.perf_counter() - start
    is_right = zoo.largest_difference(found.eval()(others), net(others)) < DIFFERENT_LOGITS
    return seconds, "right" if is_right else "wrong"


# ---- photographs -------------------------------------------------------------------------------


def photographs(folder, name):
    """torchvision's ResNet-18 at 96 x 96 from pictures in a folder to a small exported net.

    The pictures are those of CIFAR-10, enlarged: 400 of each class to train with, 200 to test. The
    same command goes on where it was stopped.
    """
    work_folder = Path(name).resolve()
    if not (work_folder / "pictures").exists():
        save_enlarged(folder, work_folder / "unfinished")
        (work_folder / "unfinished").rename(work_folder / "pictures")
    net = ["--arch", "resnet18", "--size", "96", "--schedule", "fast"]
    for command in (
        ["train", *net, "--data-dir", "pictures", "--output", "net.pt"],
        ["prune", "net.pt", "--target", "0.5"],
        ["evaluate", "net-pruned.pt"],
        ["export", "net.pt", "net.onnx", "--force"],
        ["export", "net-pruned.pt", "net-pruned.onnx", "--force"],
    ):
        say(f"$ python wtp.py {' '.join(command)}")
        start = time.perf_counter()
        say(run_command(work_folder, *command))
        say(f"{time.perf_counter() - start:.0f} s")
    nets = [sep.load(work_folder / file)[0] for file in ("net.pt", "net-pruned.pt")]
    exported = [ExportedNet(net, "onnx") for net in nets]
    seconds = measure_one_by_one(exported, make_random_images(nets[0]), 1)
    sizes = [(work_folder / file).stat().st_size / 1e6 for file in ("net.onnx", "net-pruned.onnx")]
    say(f".onnx: {ratio(*seconds)} an image, {sizes[0]:.1f} -> {sizes[1]:.1f} MB")


def save_enlarged(data_folder, folder):
    """Pictures of CIFAR-10 as JPEG, their sides 96 to 160 pixels."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 400), ("test", 200)):
        dataset = datasets.CIFAR10(data_folder, train=part == "train")
        counts = Counter()
        for number, (picture, label) in enumerate(dataset):
            if counts[label] == count:
                continue
            counts[label] += 1
            class_folder = folder / part / dataset.classes[label]
            class_folder.mkdir(parents=True, exist_ok=True)
            sides = torch.randint(96, 161, (2,), generator=generator).tolist()
            picture.resize(sides).save(class_folder / f"{number}.jpg", quality=90)


# ---- the command -------------------------------------------------------------------------------

USUAL = (exactness, speed, size, search)
OTHERS = (
    *(ablation, narrow, structures, recipes, gates, gates_by_validation),
    *(signals, budgets, seeds, finalists, leads, imitation, rivals),
    *(small, families, readings, examples, photographs),
)


def main(folder="", name="", *arguments):
    measures = {measure.__name__: measure for measure in (*USUAL, *OTHERS)}
    if not folder or folder.startswith("-") or name not in ("", *measures):
        sys.exit(__doc__)
    for measure in [measures[name]] if name else USUAL:
        try:
            measure(Path(folder), *arguments)
        except models.UserError as error:
            sys.exit(f"bench.py: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
