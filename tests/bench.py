#!/usr/bin/env python3
"""Measurements, not tests: python tests/bench.py [DATA_DIR]. Run it on an idle machine; DATA_DIR holds torchvision's MNIST.

Speed: LeNet-5 recovery, batch 128, against the loop that a user would write (DataLoader with 2 workers, transforms, float32,
the teacher run on every batch), the two in turns in one run. Exactness: removing channels against masking them, and a
frozen SEP net against the hard-pruned one, per net. Size: the time of --help, the memory of a MNIST run.
"""
import resource
import subprocess
import sys
import tempfile
import time
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

STEPS, ROUNDS = 300, 5


class Pictures(TensorDataset):
    """The drawn digits as a user's data set: an image object and a label, transformed one by one."""

    def __init__(self, images, transform):
        super().__init__(images.pixels, images.labels)
        self.transform = transform

    def __getitem__(self, i):
        return self.transform(transforms.functional.to_pil_image(self.tensors[0][i].permute(2, 0, 1))), int(self.tensors[1][i])


def plain(data, teacher, student):
    """Images per second of the plain loop."""
    optimizer = torch.optim.SGD(student.parameters(), 0.001, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(data, batch_size=128, shuffle=True, num_workers=2)
    student.train(), teacher.eval()
    for step, (x, y) in enumerate(loader):
        if step == 20:  # the workers are up
            began = time.perf_counter()
        if step == 20 + STEPS:
            return STEPS * 128 / (time.perf_counter() - began)
        with torch.no_grad():
            soft = teacher(x).softmax(1)
        logits = student(x)
        loss = F.mse_loss(logits.softmax(1), soft) + 0.1 * F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ours(images, guide, student):
    """Images per second of `fit`, as a recovery calls it, the teacher's outputs at hand."""
    student = student.to(memory_format=torch.channels_last)
    guide.probabilities(0, len(images))

    def track(steps):
        for step in steps:
            if step == 20:
                marks.append(time.perf_counter())
            if step == 20 + STEPS:
                marks.append(time.perf_counter())
                return
            yield step

    marks = []
    next(controller.fit(student, images, controller.Plan(1, 0.001), optimizer=controller.sgd(student, 0.001), seed=0, teacher=guide, track=track))
    return STEPS * 128 / (marks[1] - marks[0])


def speed(folder):
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    try:
        data, images = datasets.MNIST(folder, transform=normalise), controller.load_data("mnist", folder)[0]
    except (RuntimeError, models.Failure):
        images = controller.Images(*controller.digits(48000, 0), mean=(0.16,), std=(0.33,))
        data = Pictures(images, normalise)
    print(f"LeNet-5 recovery on {type(data).__name__}, batch 128, {STEPS} steps, {torch.get_num_threads()} threads, median of {ROUNDS} rounds in turns")
    nets = [models.build("lenet5", channels=1, size=28) for _ in range(3)]
    guide = controller.Teacher(nets[0], images, 0)
    rows = [(plain(data, nets[0], nets[1]), ours(images, guide, nets[2])) for _ in range(ROUNDS)]
    a, b = (median(r) for r in zip(*rows))
    print(f"plain loop {a:,.0f} images/s -> fit {b:,.0f} images/s ({b / a:.2f}x); each round {', '.join(f'{y / x:.2f}x' for x, y in rows)}")
    native = controller.half(torch.device("cpu"))._enabled
    print(f"bfloat16 {'is' if native else 'is not'} native here")


def exactness():
    from test_models import NETS, lively, some

    print("largest difference of the logits (largest logit): masked - removed; SEP frozen to the criterion's choice - hard-pruned")
    for arch in NETS:
        net, x = lively(arch)
        structure = some(net)
        kept = models.most_important(net, structure)
        hard, soft = models.prune(net, structure).eval(), sep.soften(net, structure).eval()
        sep.freeze(soft, kept)
        models.compensate(net, kept)
        for p, w, stay in zip(net.prunable, net.widths, kept):
            lost = torch.ones(w, dtype=torch.bool).index_fill(0, stay, False)
            weight = net.get_submodule(p.next).weight.data
            models.per_channel(weight, w)[:, lost] = 0
        with torch.no_grad():
            a, b, c = net(x), hard(x), soft(x)
        print(f"{arch:9} {(a - b).abs().max():.1e}   {(c - b).abs().max():.1e}   ({b.abs().max():.2f})")


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
            done = subprocess.run([*wtp, *command, "--data-dir", str(folder), "--out", out], capture_output=True)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            print(f"{' '.join(command)}: " + (f"at most {max(before, peak) / 1e6:.2f} GB" if done.returncode == 0 else f"exit {done.returncode}, no figure"))


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else "data")
    exactness()
    speed(where)
    size(where)
