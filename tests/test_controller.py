import errno
import itertools
import json
import math
import os
import pickle
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from test_models import NETS, find_right_reading
from torch import nn
from torch.nn import functional as F

import controller
import models
import sep
from controller import (
    Goal,
    Images,
    RecoveredNet,
    Reporter,
    Run,
    Settings,
    Trainer,
    TrainingPlan,
    fit,
    make_optimizer,
    measure_accuracy,
    seed_for,
)
from models import UserError

SHORT_PLAN = TrainingPlan(2, 0.05, is_one_cycle=True)


def make_digits(count=600, seed=0):
    return Images(*controller.draw_digits(count, seed), mean=(0.16,), std=(0.33,))


def make_lenet(widths=(6, 8, 20)):
    torch.manual_seed(0)
    return models.build("lenet5", widths, channels=1, size=28)


def train_net(net, images, plan=SHORT_PLAN, **options):
    """The loss of each epoch."""
    options = {"seed": 0} | options
    optimizer = make_optimizer(net, plan.lr)
    return [loss for _, loss in fit(net, images, plan, optimizer=optimizer, **options)]


def clone_state(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


# ---- images


def test_a_batch_is_what_crop_flip_and_normalisation_make_of_the_images():
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (50, 9, 7, 3), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    images = Images(pixels, torch.arange(50), mean=mean, std=std, crop=2, flip=True)

    order, crops = images.draw_epoch(seed=1, epoch=4)
    x = images.batch(order[:20], crops)

    assert sorted(order.tolist()) == list(range(50))
    assert crops[:, :2].max() == 4
    assert crops[:, :2].min() == 0
    assert set(crops[:, 2].tolist()) == {0, 1}
    assert x.is_contiguous(memory_format=torch.channels_last)
    for i, image in zip(order[:20].tolist(), x):
        padded = torch.zeros(13, 11, 3)
        padded[2:11, 2:9] = pixels[i].float() / 255
        top, left, is_flipped = crops[i].tolist()
        expected = padded[top : top + 9, left : left + 7]
        if is_flipped:
            expected = expected.flip(1)
        expected = (expected - torch.tensor(mean)) / torch.tensor(std)
        assert torch.allclose(image.permute(1, 2, 0), expected, atol=1e-5)


def test_common_random_numbers_depend_on_seed_and_epoch_alone():
    pixels = torch.zeros(40, 8, 8, 3, dtype=torch.uint8)
    options = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop": 4, "flip": True}
    images = Images(pixels, torch.zeros(40), **options)

    order, crops = images.draw_epoch(1, 2)

    assert torch.equal(images.draw_epoch(1, 2)[0], order)
    assert torch.equal(images.draw_epoch(1, 2)[1], crops)
    assert not torch.equal(images.draw_epoch(1, 3)[0], order)
    assert not torch.equal(images.draw_epoch(2, 2)[1], crops)


def make_ramps(count=400, size=64):
    """Images whose three channels are the column, the row, and their sum, from 0 to 250."""
    ramp = torch.linspace(0, 250, size)
    columns, rows = ramp.expand(size, size), ramp[:, None].expand(size, size)
    image = torch.stack([columns, rows, (columns + rows) / 2], 2).to(torch.uint8)
    return image.expand(count, -1, -1, -1)


def test_zooms_show_parts_of_images_at_full_size():
    pixels = make_ramps()
    images = Images(
        pixels, torch.zeros(400), mean=(0.0,) * 3, std=(1.0,) * 3, zooms=True, flip=True
    )
    order, parts = images.draw_epoch(seed=1, epoch=4)
    again = images.draw_epoch(seed=1, epoch=4)[1]

    x = images.batch(torch.arange(400), parts)

    assert torch.equal(parts, again)
    assert sorted(order.tolist()) == list(range(400))
    assert x.shape == (400, 3, 64, 64)
    middle_x, middle_y, half_width, half_height, direction = parts.unbind(1)
    # A part's middle and width are seen in the first channel, its height in the second.
    scale = 250 / 255
    assert torch.allclose(x[:, 0].mean((1, 2)), scale * (middle_x + 1) / 2, atol=0.01)
    assert torch.allclose(x[:, 1].mean((1, 2)), scale * (middle_y + 1) / 2, atol=0.01)
    widths = (x[:, 0, :, -4] - x[:, 0, :, 3]).mean(1) * 63 / 57
    assert torch.allclose(widths, scale * half_width * direction, atol=0.02)
    area = half_width * half_height
    assert area.min() > 0.3 and area.max() <= 1
    assert 0.5 < area.mean() < 0.75
    assert 150 < (direction < 0).sum() < 250
    unchanged = images.batch(torch.arange(5))
    assert torch.allclose(unchanged, pixels[:5].permute(0, 3, 1, 2) / 255, atol=1e-6)


def save_noise(folder, count=10, size=20):
    """Pictures of noise as PNG, and their pixels (N, H, W, C)."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path, picture in zip(paths, pixels):
        Image.fromarray(picture.numpy()).save(path)
    return paths, pixels


def test_a_sample_without_its_last_class_has_as_many_classes_as_the_user_named():
    options = {"mean": (0.5,), "std": (0.2,)}
    pixels = torch.zeros(2, 8, 8, 1, dtype=torch.uint8)

    named = Images(pixels, torch.tensor([0, 1]), class_names=["a", "b", "c"], **options)
    unnamed = Images(pixels, torch.tensor([0, 1]), **options)

    assert (named.classes, named.select([0]).classes) == (3, 3)
    assert unnamed.classes == 2


def test_a_net_that_needs_too_much_memory_is_not_taken_for_one_that_does_not_fit():
    class Net(torch.nn.Module):
        def __init__(self, message):
            super().__init__()
            self.message = message

        def forward(self, x):
            raise RuntimeError(self.message)

    images = Images(torch.zeros(4, 8, 8, 1, dtype=torch.uint8), torch.zeros(4), mean=(0,), std=(1,))

    score = controller.score_net(Net("size mismatch"), images)
    assert (score.accuracy, score.loss, score.norm_mismatch) == (0.0, math.inf, None)
    for message in (
        "CUDA out of memory",
        "DefaultCPUAllocator: can't allocate memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
        "FIND was unable to find an engine to execute this computation",
        "CUDA error: an illegal memory access was encountered",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    ):
        with pytest.raises(RuntimeError, match=message):
            controller.score_net(Net(message), images)


@pytest.mark.parametrize("zooms", [False, True])
def test_images_in_files_are_what_they_are_in_memory(tmp_path, zooms):
    paths, pixels = save_noise(tmp_path)
    options = {"mean": (0.4,) * 3, "std": (0.2,) * 3, "crop": 2, "zooms": zooms, "flip": True}
    in_memory = Images(pixels, torch.arange(10), **options)
    files = controller.PixelsInFiles(paths, 20, None, is_gray=False)
    in_files = controller.ImagesInFiles(files, torch.arange(10), **options)
    chunks = torch.tensor([3, 1, 9, 0, 4]).split(2)

    for one, other in ((in_memory, in_files), (in_memory.select([7, 2, 9, 9, 1]), None)):
        other = other or in_files.select([7, 2, 9, 9, 1])
        crops = one.draw_epoch(0, 1)[1]
        assert len(one) == len(other)
        assert torch.equal(other.draw_epoch(0, 1)[1], crops)
        index = chunks[0] % len(one)
        assert torch.equal(one.batch(index, crops), other.batch(index, crops))

    crops = in_memory.draw_epoch(0, 1)[1]
    expected = list(in_memory.batches(chunks, crops))
    batches = list(in_files.batches(chunks, crops))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert all(map(torch.equal, batches, expected))
    assert torch.equal(in_files.batch(torch.arange(3)), in_memory.batch(torch.arange(3)))


def test_a_damaged_image_that_is_met_in_training_is_named(tmp_path):
    paths, _ = save_noise(tmp_path)
    files = controller.PixelsInFiles(paths, 20, None, is_gray=False)
    images = controller.ImagesInFiles(files, torch.zeros(10), mean=(0.5,) * 3, std=(0.2,) * 3)
    mark = controller.fingerprint(images)
    paths[6].write_bytes(paths[6].read_bytes()[:500])

    with pytest.raises(UserError) as raised:
        list(images.batches(torch.arange(10).split(2)))

    message = "cannot be read as an image of 8 bits a channel, or is damaged; remove or replace it"
    assert str(raised.value) == f"{paths[6]} {message}"
    assert controller.fingerprint(images) != mark


def test_an_empty_image_and_a_broken_link_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").symlink_to("nowhere.png")

    with pytest.raises(UserError, match=r"a\.png is empty"):
        controller.measure_image(str(tmp_path / "a.png"))
    with pytest.raises(UserError, match=r"b\.png cannot be read: No such file"):
        controller.measure_image(str(tmp_path / "b.png"))


def test_images_that_cannot_be_read_are_named_at_once(tmp_path):
    paths, _ = save_noise(tmp_path)
    files = controller.PixelsInFiles(paths, 20, None, is_gray=False)
    for path in paths[:2]:
        path.write_bytes(path.read_bytes()[:500])

    with pytest.raises(UserError) as raised:
        files[torch.arange(10)]

    assert str(raised.value).startswith(f"{paths[0]} cannot be read as an image")
    assert str(raised.value).endswith(f"; 1 other cannot be read either: {paths[1]}")


def test_of_many_unreadable_images_some_are_named(tmp_path):
    for part, name in itertools.product(("train", "test"), ("cat", "dog")):
        folder = tmp_path / part / name
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / f"{number}.png").write_bytes(b"")

    with pytest.raises(UserError) as raised:
        controller.open_image_folder(tmp_path, 32, is_gray=False)

    cats, dogs = tmp_path / "train" / "cat", tmp_path / "train" / "dog"
    names = [cats / "1.png", cats / "2.png", dogs / "0.png", dogs / "1.png", "..."]
    expected = f"{cats / '0.png'} is empty; 11 others cannot be read either: "
    assert str(raised.value) == expected + ", ".join(map(str, names))


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_an_image_is_read_upright(tmp_path, ending):
    exif = Image.Exif()
    exif[0x0112] = 6  # its orientation: turned by 90 degrees
    plain, turned = tmp_path / f"plain.{ending}", tmp_path / f"turned.{ending}"
    image = Image.fromarray(np.zeros((12, 20, 3), np.uint8))
    image.save(plain)
    image.save(turned, exif=exif)

    assert controller.measure_image(str(plain)) == (20, 12)
    assert controller.read_image(str(plain), is_gray=False).shape[:2] == (12, 20)
    assert controller.read_image(str(turned), is_gray=False).shape[:2] == (20, 12)


def test_an_image_of_16_bits_is_refused_by_its_header(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(path)

    with pytest.raises(UserError, match="cannot be read as an image of 8 bits a channel"):
        controller.measure_image(str(path))


def test_a_download_is_told(tmp_path, monkeypatch):
    parts, lines = [], []

    class FakeDataset:
        def __init__(self, folder, *, train, download=False):
            if not download:
                raise RuntimeError("Dataset not found")
            parts.append("train" if train else "test")
            self.data, self.targets = torch.zeros(3, 28, 28, dtype=torch.uint8), [0, 1, 2]

    monkeypatch.setattr("torchvision.datasets.MNIST", FakeDataset)

    train, test, name = controller.load_data("mnist", tmp_path, only_test=True, say=lines.append)

    assert (train, len(test), name) == (None, 3, "mnist")
    assert parts == ["test"]
    assert lines == [f"mnist was not in {tmp_path} and has been downloaded to it"]


def test_a_folder_that_may_not_be_read_is_passed_over(tmp_path, monkeypatch):
    """As root everything may be read, so the errors are made here."""
    (tmp_path / "private").mkdir()
    list_folder, look_up = os.listdir, os.stat

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def list_all_but_private(path="."):
        return refuse(path) if Path(path).name == "private" else list_folder(path)

    def look_up_all_but_private(path, **options):
        return refuse(path) if "private/" in str(path) else look_up(path, **options)

    monkeypatch.setattr(os, "listdir", list_all_but_private)
    monkeypatch.setattr(os, "stat", look_up_all_but_private)
    with pytest.raises(PermissionError):
        (tmp_path / "private" / "train").is_dir()

    assert not controller.has_images(tmp_path / "private")
    controller.check_is_no_image_folder(tmp_path)
    assert controller.suggest_image_folder(tmp_path) == ""


def pixel_rows(images):
    return {pixels.numpy().tobytes() for pixels in images.pixels}


def test_the_split_takes_a_tenth_by_seed():
    images = make_digits(300)

    train, validation = controller.split_images(images, 0)

    assert (len(train), len(validation)) == (270, 30)
    assert not pixel_rows(train) & pixel_rows(validation)
    assert pixel_rows(train) | pixel_rows(validation) == pixel_rows(images)
    assert pixel_rows(controller.split_images(images, 0)[1]) == pixel_rows(validation)
    assert pixel_rows(controller.split_images(images, 1)[1]) != pixel_rows(validation)


def test_a_small_run_validates_on_images_that_a_large_one_validates_on():
    images, test = make_digits(1000), make_digits(300, seed=3)

    large = controller.make_data_split(images, test, 0)
    small = controller.make_data_split(images, test, 0, max_images=200)

    assert (len(small.train), len(small.validation), len(small.test)) == (180, 20, 200)
    assert pixel_rows(small.validation) < pixel_rows(large.validation)
    assert pixel_rows(small.train) < pixel_rows(large.train)
    assert pixel_rows(small.all) == pixel_rows(small.train) | pixel_rows(small.validation)
    assert pixel_rows(small.test) < pixel_rows(test)


def test_a_small_run_of_few_images_is_a_whole_one():
    images, test = make_digits(150), make_digits(100, seed=3)

    whole = controller.make_data_split(images, test, 0)
    small = controller.make_data_split(images, test, 0, max_images=150)

    for name in ("all", "train", "validation", "test"):
        assert torch.equal(getattr(small, name).pixels, getattr(whole, name).pixels)


def test_digits_are_ten_learnable_classes():
    images = make_digits(1500)
    net = make_lenet((20, 50, 100))

    train_net(net, images, TrainingPlan(4, 0.05, is_one_cycle=True))

    assert images.pixels.shape == (1500, 28, 28, 1)
    assert torch.bincount(images.labels, minlength=10).min() > 100
    assert measure_accuracy(net, make_digits(500, seed=9)) > 0.8


@pytest.mark.parametrize("option", [{"crop": 2}, {"flip": True}, {"zooms": True}])
def test_copies_of_images_keep_their_augmentation(option):
    images = Images(*controller.draw_digits(20, 0), mean=(0.16,), std=(0.33,), **option)

    others = (
        images.select(torch.arange(5)),
        images.to("cpu"),
        images.normalised_by((0.5,), (0.5,)),
    )

    for other in others:
        assert (other.crop, other.zooms, other.flip) == (images.crop, images.zooms, images.flip)


@pytest.mark.parametrize("options", [{"crop": 2}, {"zooms": True}])
def test_without_flip_no_crop_and_no_zoom_is_flipped(options):
    images = Images(*controller.draw_digits(50, 0), mean=(0.16,), std=(0.33,), **options)

    crops = images.draw_epoch(0, 0)[1]

    # The last number of a crop says whether it is flipped; of a zoom it is the direction, -1 if
    # flipped.
    assert set(crops[:, -1].tolist()) == ({1.0} if images.zooms else {0})


def test_a_split_that_is_moved_is_the_same_split():
    split = tiny_data()

    moved = split.to("cpu")

    assert moved.seed == split.seed
    for name in ("all", "train", "validation", "test"):
        before, after = getattr(split, name), getattr(moved, name)
        assert torch.equal(before.pixels, after.pixels), name
        assert torch.equal(before.labels, after.labels), name


def test_a_hundred_images_are_enough_to_split():
    assert len(controller.split_images(make_digits(100), 0)[1]) == 10
    with pytest.raises(UserError, match="99 training images are too few"):
        controller.split_images(make_digits(99), 0)


def test_imagenets_statistics_are_torchvisions():
    from torchvision.models import ResNet18_Weights

    preset = ResNet18_Weights.DEFAULT.transforms()

    found = controller.COMMON_NORMALISATIONS[3]["ImageNet's mean and std"]
    assert found == (tuple(preset.mean), tuple(preset.std))


# ---- training


def test_the_loss_is_the_scripts():
    logits = torch.tensor([[1.0, 0.0, 2.0]])
    teacher_probs = torch.tensor([[0.2, 0.3, 0.5]])
    labels = torch.tensor([2])
    exponentials = torch.tensor([2.718281828, 1.0, 7.389056])
    probs = exponentials / exponentials.sum()
    mse = sum((a - b) ** 2 for a, b in zip(probs, teacher_probs[0])) / 3

    loss = controller.distillation_loss(logits, labels, teacher_probs).item()
    cross_entropy = controller.distillation_loss(logits, labels).item()

    assert loss == pytest.approx((mse - 0.1 * probs[2].log()).item(), rel=1e-5)
    assert cross_entropy == pytest.approx(-probs[2].log().item(), rel=1e-5)


def test_a_temperature_tells_what_a_sure_teacher_knows_of_the_other_classes():
    labels = torch.tensor([0])
    teacher_logits = torch.tensor([[30.0, 8.0, 0.0]])
    other_logits = torch.tensor([[30.0, 0.0, 8.0]])

    def distance(logits, temperature):
        probs = teacher_logits.softmax(1)
        loss = controller.distillation_loss(logits, labels, probs, temperature)
        return (loss - 0.1 * F.cross_entropy(logits, labels)).item()

    assert distance(teacher_logits, 4.0) == pytest.approx(0, abs=1e-5)
    assert distance(other_logits, 4.0) > 0.01
    assert abs(distance(other_logits, None) - distance(teacher_logits, None)) < 1e-9
    teacher = [math.exp(logit / 4) for logit in (30, 8, 0)]
    student = [math.exp(logit / 4) for logit in (30, 0, 8)]
    kl = sum(
        a / sum(teacher) * math.log(a / sum(teacher) / (b / sum(student)))
        for a, b in zip(teacher, student)
    )
    assert distance(other_logits, 4.0) == pytest.approx(16 * kl, rel=1e-3)


def test_a_training_that_began_on_a_gpu_goes_on_with_the_cpus_optimizer():
    net = make_lenet()
    optimizer = controller.make_optimizer(net, 0.1)
    optimizer.param_groups[0].update(fused=True, lr=torch.tensor(0.1))
    step = controller.make_train_step(net, optimizer)

    step.start_epoch()
    step(torch.randn(4, 1, 28, 28), torch.arange(4), None, 0.05)

    assert (optimizer.param_groups[0]["fused"], optimizer.param_groups[0]["lr"]) == (None, 0.05)


def test_the_teacher_runs_once_for_an_epochs_crops_and_stays_as_it_is():
    teacher_net, images = make_lenet((20, 50, 100)), make_digits(300)
    before = clone_state(teacher_net)
    calls = []
    teacher_net.register_forward_hook(lambda *_: calls.append(1))
    chunks = len(controller.split_into_chunks(images))

    teacher = controller.Teacher(teacher_net, images, 0)
    for _ in range(2):
        train_net(make_lenet(), images, TrainingPlan(3, 0.05), teacher=teacher)
    assert len(calls) == chunks  # the images are not augmented: the same in all epochs
    for key, value in teacher_net.state_dict().items():
        assert torch.equal(value, before[key])

    images.flip = True
    teacher = controller.Teacher(teacher_net, images, 0)
    calls.clear()
    for _ in range(2):
        train_net(make_lenet(), images, TrainingPlan(3, 0.05), teacher=teacher)
    assert len(calls) == 3 * chunks
    _, crops = images.draw_epoch(0, 2)
    index = torch.arange(50)
    with torch.no_grad():
        expected = teacher_net(images.batch(index, crops)).softmax(1)
    probabilities = teacher.probabilities(2, len(images))[:50]
    assert torch.allclose(probabilities, expected, atol=0.02)


def test_a_short_epoch_asks_the_teacher_for_what_it_shows():
    images = make_digits(600)
    images.flip = True
    teacher = controller.Teacher(make_lenet((20, 50, 100)), images, 0)
    lengths = []

    def record_length(steps):
        lengths.append(len(steps))
        return steps

    plan = TrainingPlan(1, 0.05, max_steps=2)
    train_net(make_lenet(), images, plan, teacher=teacher, wrap_steps=record_length)

    shown = images.draw_epoch(0, 0)[0][:256]
    some, every = teacher.probabilities(0, 256), teacher.probabilities(0, 600)
    assert lengths == [2]
    assert len(teacher.kept_probabilities) == 2
    assert torch.allclose(some[shown], every[shown], atol=0.02)
    assert (some.sum(1) > 0).sum() == 256
    assert (every.sum(1) > 0).all()


def test_learning_rates_follow_the_plan():
    fixed, cycle = TrainingPlan(5, 0.1), TrainingPlan(5, 0.1, is_one_cycle=True)

    assert [fixed.lr_at(progress) for progress in (0.01, 0.5, 0.99)] == [0.1] * 3
    rates = [cycle.lr_at(progress) for progress in (0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0.05, 0.1, 0.05, 0.0])


def test_a_cycle_goes_over_all_epochs(monkeypatch):
    rates = []
    update = controller.TrainStep.update

    def record(self, *arguments):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return update(self, *arguments)

    monkeypatch.setattr(controller.TrainStep, "update", record)
    plan = TrainingPlan(5, 0.1, is_one_cycle=True)

    train_net(make_lenet(), make_digits(256), plan)  # two steps in each epoch

    assert rates == pytest.approx([plan.lr_at((step + 0.5) / 10) for step in range(10)])


def test_the_same_seed_gives_the_same_numbers():
    nets = [make_lenet() for _ in range(3)]

    losses = [train_net(net, make_digits(), seed=seed) for net, seed in zip(nets, (0, 0, 1))]

    assert losses[0] == losses[1]
    assert losses[1] != losses[2]
    assert torch.equal(nets[0].fc2.weight, nets[1].fc2.weight)
    assert losses[0][1] < losses[0][0]


def test_bfloat16_agrees_with_float32_within_noise(monkeypatch):
    images, test = make_digits(1200), make_digits(1000, seed=5)
    accuracies = []

    for is_native in (True, False):
        monkeypatch.setattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda is_native=is_native: is_native
        )
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert controller.autocast_for(torch.device("cpu"))._enabled == is_native
        net = make_lenet((8, 20, 50))
        train_net(net, images, TrainingPlan(6, 0.1, is_one_cycle=True))
        accuracies.append(measure_accuracy(net, test))

    in_bfloat16, in_float32 = accuracies
    deviation = (2 * in_float32 * (1 - in_float32) / 1000) ** 0.5
    assert abs(in_bfloat16 - in_float32) < 3 * deviation
    assert min(accuracies) > 0.8


def test_only_a_usable_normalisation_is_taken_from_the_facts():
    net = make_lenet()

    stored = controller.stored_normalisation(net, {"mean": [0.5], "std": [0.25]})
    assert stored == ([0.5], [0.25])

    unusable = [
        {"mean": mean, "std": [0.5]} for mean in ([0.5] * 3, [math.nan], [math.inf], (0.5,))
    ]
    unusable += [{}, {"mean": [0.5], "std": [0.0]}, {"mean": [1], "std": [2]}, {"mean": [0.5]}]
    for facts in unusable:
        assert controller.stored_normalisation(net, facts) is None


@torch.no_grad()
def label_by(net, images):
    """What the net says of each image."""
    return net(images.batch(torch.arange(len(images)))).argmax(1)


@pytest.mark.parametrize(
    ("name", "statistics"),
    [
        ("LeNet, averaged, tanh", "mean and std 0.5"),
        ("CNN of large kernels, averaged", "mean and std of mnist"),
        ("VGG-19 pruned, average at its end", "mean and std 0.5"),
        ("ResNet, averaged shortcut", "ImageNet's mean and std"),
        ("bottlenecks, stride first", "mean and std 0.5"),
        ("wide ResNet", "pixels in [0, 1]"),
    ],
)
def test_of_all_that_weights_may_be_the_right_net_and_normalisation_are_found(name, statistics):
    case = take_case(name)
    net, _ = zoo.make_lively(case)
    images = make_images_for(net, case, statistics)

    found = find_reading_of(net, case, images)

    x = images.batch(torch.arange(8))
    with torch.no_grad():
        assert torch.allclose(found.net.eval()(x), net(x), atol=1e-4)
    assert found.net.architecture.activation in ("relu", "tanh")
    assert found.normalisation.name == statistics
    assert found.accuracy > 0.99
    assert found.is_only_best


def make_score(accuracy, loss, mismatch):
    """The score of an attempt that gets the first of a thousand images right."""
    return controller.AttemptScore(torch.arange(1000) < 1000 * accuracy, loss, mismatch)


def test_of_equal_accuracies_the_smaller_loss_comes_first_if_it_counts(monkeypatch):
    measured = iter([(0.9, math.inf), (0.9, 0.7), (0.9, 0.6), (1.0, 0.09), (1.0, 0.01)])
    monkeypatch.setattr(
        controller,
        "score_net",
        lambda *_, **__: make_score(*next(measured), None),
    )
    normalisations = controller.list_normalisations(make_digits())
    readings = [controller.KnownNet(make_lenet()) for _ in range(5)]
    attempts = controller.list_attempts(readings, normalisations[:1])

    ranked = controller.rank_attempts(attempts, make_digits(), 32, show_progress=iter)

    assert [attempt.rank for attempt, _ in ranked] == [3, 4, 2, 1, 0]


@pytest.mark.parametrize("norms_tell", [False, True])
def test_of_readings_that_get_as_many_right_the_most_usual_is_taken(norms_tell):
    case = zoo.CASES["ResNet, option A"]
    net, _ = zoo.make_lively(case)
    pixels = torch.randint(256, (120, 32, 32, 3), dtype=torch.uint8)
    statistics = dict(zip(("mean", "std"), controller.STATISTICS["cifar10"]))
    images = Images(pixels, torch.full((120,), 3), **statistics)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    if norms_tell:
        with torch.no_grad():
            net.train()(images.batch(torch.arange(120)))
    state = net.state_dict()
    key = next(key for key in reversed(state) if key.endswith("bias"))
    state[key] = 20.0 * F.one_hot(torch.tensor(3), 10)  # it says 3 of all images, and is sure
    readings = models.recognise_state_dict(state, Path("a.pt"))["readings"]

    found = controller.find_reading(readings, images)

    assert len(readings) > 1
    assert found.net.architecture == readings[0].architecture
    assert found.normalisation.name == "mean and std of cifar10"
    assert (found.accuracy, found.image_count, found.is_only_best) == (1, 120, norms_tell)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("CNN in blocks, averaged", "gelu"),
        ("bottlenecks", "leaky_relu_0.2"),
        ("VGG-16, one linear layer", "elu"),
        ("wide ResNet", "leaky_relu_0.1"),
        ("ResNet, option A", "silu"),
    ],
)
def test_a_rare_activation_is_found_where_images_show_it(name, activation):
    case = take_case(name)
    with zoo.replace_relu(activation):
        net, _ = zoo.make_lively(case)
        images = make_images_for(net, case, "mean and std 0.5")
        x = images.batch(torch.arange(8))
        expected = net(x).detach()

    found = find_reading_of(net, case, images)

    with torch.no_grad():
        assert torch.allclose(found.net.eval()(x), expected, atol=1e-4)
    assert found.net.architecture.activation == activation
    assert found.normalisation.name == "mean and std 0.5"
    assert found.accuracy > 0.99


@torch.no_grad()
def test_the_mismatch_of_a_norm_is_the_divergence_of_what_it_reads():
    torch.manual_seed(0)
    norms = nn.Sequential(nn.BatchNorm2d(5), nn.Flatten(), nn.BatchNorm1d(80)).eval()
    for norm in (norms[0], norms[2]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = 1.5 * torch.randn(300, 5, 4, 4) + 0.3

    with controller.record_norm_inputs(norms) as norm_inputs:
        norms(x[:100])
        norms(x[100:])
    mismatch = controller.measure_norm_mismatch(norm_inputs)

    divergences = []
    for norm, read in ((norms[0], x.transpose(0, 1).flatten(1)), (norms[2], norms[:2](x).T)):
        now = torch.distributions.Normal(read.mean(1), (read.var(1, correction=0) + 1e-5).sqrt())
        then = torch.distributions.Normal(norm.running_mean, (norm.running_var + 1e-5).sqrt())
        divergences.append(torch.distributions.kl_divergence(now, then).median())
    assert mismatch == pytest.approx(float((divergences[0] * divergences[1]).sqrt()), rel=1e-4)
    assert not norms[0]._forward_pre_hooks


def test_norms_are_read_on_images_as_they_are_and_as_a_training_augments_them():
    class Net(nn.Sequential):
        gates = None

    options = {"mean": (0.5,), "std": (0.5,)}
    pixels = torch.randint(100, 256, (80, 8, 8, 1), dtype=torch.uint8)
    plain = Images(pixels, torch.zeros(80, dtype=torch.long), **options)
    cropped = Images(pixels, torch.zeros(80, dtype=torch.long), crop=2, **options)
    net = Net(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten())
    net[1].momentum = 1.0
    with torch.no_grad():
        net.train()(cropped.batch(torch.arange(20), cropped.draw_epoch(0, 0)[1]))

    assert controller.score_net(net, plain).norm_mismatch > 0.01
    assert controller.score_net(net, cropped).norm_mismatch < 0.001
    few = cropped.select(slice(79))
    assert controller.score_net(net, few).norm_mismatch is None


def test_norms_that_have_learned_nothing_do_not_tell():
    norms = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).eval()

    with controller.record_norm_inputs(norms) as norm_inputs:
        norms(torch.randn(4, 3, 8, 8))

    assert controller.measure_norm_mismatch(norm_inputs) is None


@lru_cache
def train_net_with_norms(activation):
    """A small trained net with batch norms, and the images that trained it."""
    torch.manual_seed(0)
    convolution = models.Convolution(5, 0, has_bias=False, has_norm=True, pooling="max")
    architecture = models.ChainArchitecture(
        "lenet",
        10,
        1,
        28,
        convolutions=(convolution, convolution),
        hidden_norms=(True,),
        head_size=4,
        is_averaged=False,
        activation=activation,
        has_flat_names=True,
    )
    net = models.build_net(architecture, (8, 16, 32))
    images = make_digits(1500)
    used = images.normalised_by((0.5,), (0.5,))
    train_net(net, used, TrainingPlan(6, 0.1, is_one_cycle=True))
    return net.eval(), used


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_batch_norms_tell_how_a_net_is_read_where_accuracies_hardly_do(activation):
    net, images = train_net_with_norms(activation)
    case = SimpleNamespace(size=28)

    found = find_reading_of(net, case, images, controller.MIN_TRIED_IMAGES)

    assert found.net.architecture == net.architecture
    assert (found.normalisation.mean, found.normalisation.std) == ((0.5,), (0.5,))
    assert found.norm_mismatch < 0.1
    assert not found.has_strange_norms
    # Of the same weights, relu in place of GELU gets nearly as many right.
    relu_net = models.build_net(replace(net.architecture, activation="relu"), net.widths)
    relu_net.load_state_dict(net.state_dict())
    assert measure_accuracy(relu_net, images) > found.accuracy - controller.MIN_HANDICAP


@pytest.mark.parametrize(
    ("scores", "order"),
    [
        # (accuracy, loss, mismatch of norms): none matches, so the accuracy counts.
        ([(0.88, 9.0, 0.3), (0.9, 9.0, 0.8)], [1, 0]),
        ([(0.88, 9.0, None), (0.9, 9.0, None)], [1, 0]),
        # One matches and is not clearly less accurate.
        ([(0.897, 9.0, 0.02), (0.9, 9.0, 0.04)], [0, 1]),
        # It is clearly less accurate: the other has five images more right, and all of the same.
        ([(0.895, 9.0, 0.02), (0.9, 9.0, 0.04)], [1, 0]),
        # Both match alike: the smaller loss, then the accuracy.
        ([(0.897, 5.0, 0.024), (0.9, 9.0, 0.02)], [0, 1]),
        ([(0.897, 9.0, 0.02), (0.9, 9.0, 0.024)], [1, 0]),
    ],
)
def test_norms_decide_between_attempts_that_are_about_as_accurate(scores, order):
    scores = [make_score(*each) for each in scores]
    readings = [controller.KnownNet(make_lenet()) for _ in scores]
    attempts = controller.list_attempts(readings, ["any"])

    ranked = controller.sort_attempts(list(zip(attempts, scores)), 1000)

    assert [attempt.rank for attempt, _ in ranked] == order


@pytest.mark.parametrize("is_pooled_last", [True, False])
def test_norms_tell_whether_they_stand_before_or_after_a_pooling(is_pooled_last):
    torch.manual_seed(0)
    net = zoo.make_cnn_with_late_norms(is_pooled_last=is_pooled_last)
    images = Images(
        smooth(torch.randint(0, 256, (600, 32, 32, 3), dtype=torch.uint8)),
        torch.zeros(600, dtype=torch.long),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(images.batch(torch.arange(600)))
        x = images.batch(torch.arange(4))
        example = models.Example(x, net.eval()(x))
    reading = models.find_reading_by_example(net.state_dict(), example)

    found = controller.choose_norm_place(reading.build(), images)

    place = "after activation" if is_pooled_last else "after pooling"
    assert {each.norm_place for each in found.architecture.convolutions} == {place}
    with torch.no_grad():
        assert torch.allclose(found.eval()(x), net(x), atol=1e-4)


def test_late_norms_are_judged_by_images_of_all_classes(monkeypatch):
    torch.manual_seed(0)
    net = zoo.make_cnn_with_late_norms(is_pooled_last=True)
    with torch.no_grad():
        net(torch.randn(64, 3, 32, 32))  # so that the norms change what they read
    net.eval()
    x = torch.randn(4, 3, 32, 32)
    reading = models.find_reading_by_example(net.state_dict(), models.Example(x, net(x).detach()))
    pixels = torch.randint(256, (2000, 32, 32, 3), dtype=torch.uint8)
    labels = torch.arange(10).repeat_interleave(200)  # as files in folders come
    images = Images(pixels, labels, mean=(0.5,) * 3, std=(0.25,) * 3)
    labels_read = []
    monkeypatch.setattr(
        controller,
        "measure_least_norm_mismatch",
        lambda net, images: labels_read.append(set(images.labels[:128].tolist())),
    )

    controller.choose_norm_place(reading.build(), images)

    assert labels_read == [set(range(10))] * 2


def take_case(name):
    """A case of the zoo. Residual nets take images of any size, and small ones take less time."""
    case = zoo.CASES[name]
    is_chain = name.startswith(("LeNet", "CNN", "VGG", "perceptron"))
    return case if is_chain else replace(case, size=16)


def make_images_for(net, case, statistics):
    """Images labelled with what a net says of them, if they are normalised by `statistics`."""
    pixels = torch.randint(0, 256, (1500, case.size, case.size, case.channels), dtype=torch.uint8)
    pixels = smooth(pixels)
    own = controller.STATISTICS["mnist" if case.channels == 1 else "cifar10"]
    images = Images(pixels, torch.zeros(len(pixels)), mean=own[0], std=own[1])
    normalisations = {each.name: each for each in controller.list_normalisations(images)}
    used = images.normalised_by(normalisations[statistics].mean, normalisations[statistics].std)
    zoo.spread_logits(net, used.batch(torch.arange(500)))
    return images.replace(pixels, label_by(net, used))


def find_reading_of(net, case, images, min_tried=100):
    """What a net's state dict is taken for; with fewer images than usual, to save time."""
    readings = models.recognise_state_dict(net.state_dict(), Path("a.pt"))["readings"]
    fitting = [reading.for_size(case.size) for reading in readings]
    rounds = [controller.AttemptRound(24, survivors=50), controller.AttemptRound(100, survivors=12)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controller, "ATTEMPT_ROUNDS", rounds)
        patch.setattr(controller, "MIN_TRIED_IMAGES", min_tried)
        return controller.find_reading(
            [reading for reading in fitting if reading], images, tries_activations=True
        )


def smooth(pixels):
    """Noise that is alike in neighbouring places, as images are, each image at its own contrast."""
    x = pixels.permute(0, 3, 1, 2).float()
    x = F.interpolate(F.avg_pool2d(x, 4), size=x.shape[2:], mode="bilinear")
    contrast = torch.rand(len(x), 1, 1, 1) * 3
    x = ((x - 128) * contrast + 128 * torch.rand(len(x), x.shape[1], 1, 1) * 2).clamp(0, 255)
    return x.permute(0, 2, 3, 1).to(torch.uint8)


def make_net_with_norms():
    """(a net with batch norms in training mode, images for it)."""
    torch.manual_seed(0)
    net = models.build("resnet8", (4, 4, 4)).train()
    pixels = torch.randint(0, 256, (256, 32, 32, 3), dtype=torch.uint8)
    images = Images(pixels, torch.arange(256) % 10, mean=(0.5,) * 3, std=(0.25,) * 3)
    return net, images


def compute_as_teacher(net, images):
    return controller.Teacher(net, images, 0).probabilities(0, len(images))


@pytest.mark.parametrize("compute", [controller.compute_logits, compute_as_teacher])
def test_an_evaluation_uses_running_statistics_and_leaves_them(compute):
    net, images = make_net_with_norms()
    before = clone_state(net)

    computed = compute(net, images)

    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(computed, compute(deepcopy(net).eval(), images))


def test_norms_go_on_learning_after_a_validation():
    net, images = make_net_with_norms()
    norm = next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    batch_counts = []

    epochs = fit(net, images, TrainingPlan(3, 0.01), optimizer=make_optimizer(net, 0.01), seed=0)
    for _ in epochs:
        batch_counts.append(int(norm.num_batches_tracked))
        measure_accuracy(net, images)

    assert batch_counts == [2, 4, 6]


def test_a_batch_has_the_labels_and_the_teachers_outputs_of_its_images():
    images = make_digits(10)
    order = torch.tensor([7, 2, 9, 0, 4])
    teacher_probs = torch.arange(10.0)[:, None].expand(10, 10)

    batches = controller.draw_batches(images, teacher_probs, order, None, 2)

    for index, (x, labels, probs) in zip(order.split(2), batches, strict=True):
        assert torch.equal(x, images.batch(index))
        assert torch.equal(labels, images.labels[index])
        assert torch.equal(probs, teacher_probs[index])


def test_a_training_has_the_temperature_of_its_plan(monkeypatch):
    compute = controller.distillation_loss
    temperatures = []

    def record(logits, labels, teacher_probs=None, temperature=None):
        temperatures.append(temperature)
        return compute(logits, labels, teacher_probs, temperature)

    monkeypatch.setattr(controller, "distillation_loss", record)
    images = make_digits(128)
    teacher = controller.Teacher(make_lenet(), images, 0)

    train_net(make_lenet(), images, replace(SHORT_PLAN, temperature=4.0), teacher=teacher)

    assert temperatures == [4.0, 4.0]


def test_a_teacher_keeps_no_more_than_it_may(monkeypatch):
    images = make_digits(100)
    images.flip = True
    monkeypatch.setattr(controller, "TEACHER_BYTES", 2 * 100 * 10 * 4)  # the outputs of two epochs
    teacher = controller.Teacher(make_lenet(), images, 0)

    for epoch in range(4):
        teacher.probabilities(epoch, 100)

    assert list(teacher.kept_probabilities) == [(0, 100), (1, 100)]


def test_readings_are_tried_on_images_of_all_classes(monkeypatch):
    images = make_digits(2000)
    images = images.select(images.labels.argsort())  # as the files of class folders come
    labels_read = []

    def score(net, images):
        labels_read.append(set(images.labels.tolist()))
        return controller.AttemptScore(torch.ones(len(images), dtype=torch.bool), 0.0, None)

    monkeypatch.setattr(controller, "score_net", score)
    controller.find_reading([controller.KnownNet(make_lenet())], images)

    assert labels_read[-1] == set(range(10))


# ---- training on a GPU, as far as a CPU can show it


@pytest.mark.parametrize("arch", ["lenet5", "resnet20"])
def test_weights_whose_gradients_are_computed_in_a_side_stream_learn_the_same(arch):
    torch.manual_seed(0)
    options = {"channels": 1, "size": 28} if arch == "lenet5" else {}
    net = models.build(arch, **options).to(memory_format=torch.channels_last).train()
    x = torch.randn(16, net.channels, net.size, net.size)
    labels, teacher_probs = torch.randint(0, 10, (16,)), torch.full((16, 10), 0.1)
    results = []

    for has_side_stream in (False, True):
        student = deepcopy(net)
        side_stream = controller.SideStreamWeightGrads(student) if has_side_stream else None
        step = controller.TrainStep(student, make_optimizer(student, 0.01))
        losses = [step.update(x, labels, teacher_probs, side_stream).item() for _ in range(3)]
        results.append([torch.tensor(losses), *student.state_dict().values()])

    assert results[0][0][-1] < results[0][0][0]
    # On a CPU a bias is added before the sum is rounded to bfloat16.
    tolerance = 2e-4 if arch == "lenet5" else 0
    for plain, in_side_stream in zip(*results):
        assert torch.allclose(plain, in_side_stream, rtol=0, atol=tolerance)
    assert not side_stream.pending
    for weight, cast_weight in side_stream.cast_weights.items():
        assert weight.grad is not None
        assert weight.dtype == torch.float32
        # Autograd would read these before they are computed.
        assert cast_weight.grad is None


@pytest.mark.parametrize(
    ("arch", "widths"),
    [
        ("lenet5", (6, 13, 20)),
        ("resnet20", (5, 16, 9, 20, 32, 1, 64, 33, 40)),
        ("vgg11", (7, 20, 8, 9, 10, 11, 12, 13)),
    ],
)
def test_a_net_padded_with_zeros_learns_the_same(arch, widths, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(
        controller, "autocast_for", lambda device: torch.autocast(device.type, enabled=False)
    )
    options = {"channels": 1, "size": 28} if arch == "lenet5" else {}
    net = models.build(arch, widths, **options).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.bias.normal_(0, 0.1)
    x = torch.randn(2, 16, net.channels, net.size, net.size)
    labels = torch.randint(0, 10, (2, 16))
    teacher_probs = torch.full((16, 10), 0.1)

    def take_step(net, optimizer, batch):
        step = controller.TrainStep(net.train(), optimizer)
        return step.update(x[batch], labels[batch], teacher_probs).item()

    other = deepcopy(net)
    optimizer, other_optimizer = make_optimizer(net, 0.01), make_optimizer(other, 0.01)
    losses = [take_step(net, optimizer, i % 2) for i in range(4)]
    padded_losses = [take_step(other, other_optimizer, 0)]
    # With what the optimizer knows by then.
    padded, padded_optimizer = controller.pad_widths(other, other_optimizer)
    padded_losses += [take_step(padded, padded_optimizer, i % 2) for i in range(1, 4)]
    controller.copy_training_state(padded, padded_optimizer, other, other_optimizer)

    assert padded.widths == tuple(-(-width // 8) * 8 for width in widths)
    assert padded_losses == pytest.approx(losses, rel=1e-4)
    for a, b in zip(net.state_dict().values(), other.state_dict().values()):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    for a, b in zip(net.parameters(), other.parameters()):
        momentum = optimizer.state[a]["momentum_buffer"]
        other_momentum = other_optimizer.state[b]["momentum_buffer"]
        assert torch.allclose(momentum, other_momentum, rtol=1e-2, atol=1e-4)
    for large, small in zip(padded.parameters(), other.parameters()):
        assert large.count_nonzero() <= small.numel()  # zeros are zeros still
    gated = sep.prune_softly(net, [max(1, width // 2) for width in net.widths], [x[0]])
    for each in (padded, gated):
        assert controller.pad_widths(each, padded_optimizer) == (each, padded_optimizer)


@pytest.mark.parametrize(
    "name",
    [
        "LeNet, averaged, tanh",
        "VGG-16, batch norm in its head",
        "bottlenecks",
        "pre-activated bottlenecks",
        "LeNet, padded, averaged, sigmoid",
    ],
)
def test_padded_nets_of_all_families_train_alike(name, monkeypatch):
    # bfloat16's three digits would hide what is to be seen.
    monkeypatch.setattr(controller, "has_bfloat16", lambda device: False)
    net, x, _ = find_right_reading(name)
    x = torch.randn(32, *x.shape[1:])
    net, other = deepcopy(net).requires_grad_(True), deepcopy(net).requires_grad_(True)
    labels = torch.arange(len(x)) % 10
    optimizer, other_optimizer = make_optimizer(net, 0.01), make_optimizer(other, 0.01)

    padded, padded_optimizer = controller.pad_widths(other, other_optimizer)
    losses = [
        [controller.TrainStep(each.train(), its).update(x, labels, None).item() for _ in range(4)]
        for each, its in ((net, optimizer), (padded, padded_optimizer))
    ]

    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]
    is_padded = "sigmoid" not in name
    assert (padded is not other) == is_padded


@pytest.mark.parametrize("in_float32", [False, True])
def test_float32_is_no_tf32(monkeypatch, in_float32):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    net, allowed = make_lenet(), []
    net.register_forward_hook(lambda *_: allowed.append(torch.backends.cudnn.allow_tf32))

    controller.compute_logits(net, make_digits(9), in_float32=in_float32)

    assert allowed == [not in_float32]
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
def test_a_gpu_run_goes_on_with_the_same_numbers():
    images = make_digits(1000).to("cuda")
    plan = TrainingPlan(4, 0.05, is_one_cycle=True)
    states = []

    for stops in ((4,), (2, 4)):
        net = make_lenet((6, 13, 20)).to("cuda", memory_format=torch.channels_last)
        optimizer = make_optimizer(net, 0.05)
        for first_epoch, stop in zip((0, *stops), stops):
            epochs = range(first_epoch, stop)
            for _ in fit(net, images, plan, optimizer=optimizer, seed=0, epochs=epochs):
                pass
            net_state, optimizer_state = deepcopy((net.state_dict(), optimizer.state_dict()))
            net = make_lenet((6, 13, 20)).to("cuda", memory_format=torch.channels_last)
            optimizer = make_optimizer(net, 0.05)
            net.load_state_dict(net_state)
            optimizer.load_state_dict(optimizer_state)
        states.append(net_state)

    for undisturbed, resumed in zip(*(state.values() for state in states)):
        assert torch.equal(undisturbed, resumed)


@pytest.mark.gpu
def test_a_gpu_trains_a_net_without_convolutions():
    images = make_digits(1000).to("cuda")
    architecture = replace(make_lenet().architecture, convolutions=(), head_size=28)
    net = models.build_net(architecture, (64,)).to("cuda")

    train_net(net, images, TrainingPlan(4, 0.05, is_one_cycle=True))

    assert measure_accuracy(net, images) > 0.5


@pytest.mark.gpu
def test_a_gpu_run_ends_with_a_net_like_the_cpus():
    images, test = make_digits(2000), make_digits(1000, seed=5)
    accuracies = []

    for device in ("cuda", "cpu"):
        device_images = images.to(device)
        net = make_lenet((20, 50, 100)).to(device)
        train_net(net, device_images, TrainingPlan(4, 0.05, is_one_cycle=True))
        soft = sep.prune_softly(net, (20, 25, 50), [device_images.batch(torch.arange(500))])
        teacher = controller.Teacher(net, device_images, 0)
        train_net(soft, device_images, TrainingPlan(1, 0.01), teacher=teacher)
        accuracies.append(measure_accuracy(soft, test.to(device)))

    assert abs(accuracies[0] - accuracies[1]) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("is_gated", "layout"),
    [
        (False, torch.channels_last),
        (True, torch.channels_last),
        (False, torch.contiguous_format),
    ],
)
def test_a_replayed_step_trains_as_plain_ones_do(is_gated, layout):
    torch.manual_seed(0)
    net = models.build("resnet20").to("cuda", memory_format=layout)
    if is_gated:
        images = torch.randn(64, 3, 32, 32, device="cuda")
        net = sep.prune_softly(net, [width // 2 for width in net.widths], [images])
    batch = (
        torch.randn(128, 3, 32, 32, device="cuda"),
        torch.randint(0, 10, (128,), device="cuda"),
        torch.full((128, 10), 0.1, device="cuda"),
    )
    all_losses = []

    for is_replayed in (True, False):
        student = deepcopy(net).train()
        optimizer = make_optimizer(student, 0.0)
        step = controller.GraphTrainStep(student, optimizer)
        losses = []
        for lr in [0.0] * 3 + [0.01] * 6:
            if is_replayed:
                losses.append(step(*batch, lr).item())
            else:
                optimizer.param_groups[0]["lr"] = lr
                losses.append(step.update(*batch).item())
        all_losses.append(torch.tensor(losses))
        # As a resumed run goes on from a file.
        optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
        assert controller.GraphTrainStep(student, optimizer)(*batch, 0.0) < losses[-1]

    assert torch.allclose(*all_losses, rtol=0.02)
    for losses in all_losses:
        # A rate of 0 moves nothing.
        assert torch.allclose(losses[:4], losses[0].expand(4), rtol=1e-3)
        assert losses[-1] < 0.98 * losses[0]


def test_after_an_epoch_the_net_has_the_weights_of_its_padded_copy():
    net = make_lenet((6, 13, 20))
    before = clone_state(net)
    step = controller.GraphTrainStep(net, make_optimizer(net, 0.1))

    step.start_epoch()
    step.update(torch.randn(4, 1, 28, 28), torch.arange(4), None)
    step.finish_epoch()

    assert step.net is not net
    assert not torch.equal(net.fc2.weight, before["fc2.weight"])
    assert torch.equal(net.fc2.weight, step.net.fc2.weight[:, :20])


# ---- timing


def test_latencies_are_measured_in_turns_on_other_images_each_time():
    images = make_digits(40)
    calls = []

    class RecordingNet:
        def __init__(self, name):
            self.name = name

        def eval(self):
            calls.append((self.name, "eval"))

        def __call__(self, x):
            calls.append((self.name, x.sum().item()))

    latencies = controller.measure_latencies([RecordingNet("a"), RecordingNet("b")], images, 2)

    assert calls[:2] == [("a", "eval"), ("b", "eval")]
    assert [name for name, _ in calls[2:]] == ["a", "b"] * 30
    of_a, of_b = ([x for name, x in calls[2:] if name == each] for each in "ab")
    assert of_a == of_b
    assert len(set(of_a)) > 1
    assert len(latencies) == 2
    assert min(latencies) > 0


def test_a_latency_is_that_of_its_net_when_warm(monkeypatch):
    clock = 0.0
    monkeypatch.setattr(controller, "read_clock", lambda device: clock)

    class SlowNet:
        def __init__(self, seconds):
            self.seconds = seconds
            self.calls = 0

        def eval(self):
            pass

        def __call__(self, x):
            nonlocal clock
            self.calls += 1
            clock += self.seconds if self.calls > 10 else 100.0

    nets = [SlowNet(1.0), SlowNet(2.0)]

    assert controller.measure_latencies(nets, make_digits(40), 2) == [1.0, 2.0]


# ---- structures


def reduction_for(net, count_macs=models.count_macs):
    whole = models.count_macs(net)
    return lambda widths: 1 - count_macs(net, widths) / whole


def test_a_step_keeps_the_whole_part_of_four_fifths():
    assert controller.shrink((64, 10, 5, 2, 1), (1, 1, 1, 1, 1), 0.2) == (51, 8, 4, 1, 1)
    assert controller.shrink((64, 10, 5), (0, 1, 0), 0.5) == (64, 5, 5)
    for width in range(1, 600):
        assert controller.shrink((width,), (1,), 0.2) == (max(1, width * 4 // 5),)


@pytest.mark.parametrize("arch", ["lenet5", "vgg19", "resnet56"])
def test_uniform_structures_land_on_the_target(arch):
    net = models.build(arch, **NETS[arch])
    reduction_of = reduction_for(net)
    targets = [percent / 100 for percent in range(10, 95, 5)] if arch == "lenet5" else (0.3, 0.475)

    for target in targets:
        structure = controller.uniform_structure(net.widths, reduction_of, target)
        assert abs(reduction_of(structure) - target) <= 0.005, target
        shares = [width / whole for width, whole in zip(structure, net.widths)]
        assert max(shares) - min(shares) <= 1 / min(net.widths) + 0.03


def test_a_uniform_structure_is_even_where_few_channels_are_left():
    net = models.build("lenet5", **NETS["lenet5"])
    reduction_of = reduction_for(net)

    structure = controller.uniform_structure(net.widths, reduction_of, 0.985)

    # (2, 1, 35) is nearer to the target, but keeps 10, 2 and 7 % of the channels.
    assert abs(reduction_of((2, 1, 35)) - 0.985) < abs(reduction_of(structure) - 0.985) < 0.002
    assert structure == (1, 6, 65)


def test_the_last_channel_of_a_layer_does_not_make_a_structure_uneven():
    assert controller.has_similar_shares((1, 5, 3), (4, 100, 60))
    assert not controller.has_similar_shares((2, 5, 3), (8, 100, 60))
    assert not controller.has_similar_shares((5, 1), (20, 20))
    assert controller.has_similar_shares((1, 1), (2, 50))


@pytest.mark.parametrize("arch", ["lenet5", "vgg19", "resnet56"])
def test_a_pruned_step_lands_on_the_target(arch):
    net = models.build(arch, **NETS[arch])
    reduction_of = reduction_for(net)
    parent = net.widths
    child = controller.shrink_all(parent, 0.2)

    structure = controller.prune_to_target(parent, child, reduction_of, 0.2)

    assert 0.2 <= reduction_of(structure) < reduction_of(child)
    assert reduction_of(structure) < 0.23
    for least, width, most in zip(child, structure, parent):
        assert least <= width <= most
    for layer in range(len(parent)):  # nothing too much
        if structure[layer] < parent[layer]:
            assert reduction_of(controller.add_at(structure, layer)) < 0.2
    assert controller.prune_to_target(parent, child, reduction_of, 0.99) == child


def test_channels_come_back_layer_by_layer_as_long_as_the_target_is_reached():
    def reduction_of(structure):
        return 1 - (5 * structure[0] + 2 * structure[1] + structure[2]) / 80

    def give_channels_back(layers):
        return controller.give_channels_back((2, 2, 2), (8, 8, 8), layers, reduction_of, 0.7)

    assert reduction_of((2, 2, 2)) == 0.8  # so that a cost of 8 is free
    assert give_channels_back([2, 1, 0]) == (2, 3, 8)
    assert give_channels_back([0, 1, 2]) == (3, 3, 3)
    assert give_channels_back([1]) == (2, 6, 2)
    assert controller.give_channels_back((3, 5, 2), (8, 8, 8), [0, 1, 2], reduction_of, 0.7) == (
        3,
        5,
        2,
    )


@pytest.mark.parametrize("arch", ["lenet5", "vgg19"])
def test_a_structure_lands_with_its_gates_on_the_target(arch):
    net = models.build(arch, **NETS[arch])
    reduction_of = reduction_for(net, sep.count_macs)
    last = net.widths[-1]
    structure = (*(width // 2 for width in net.widths[:-1]), last)
    target = reduction_for(net)(structure)

    found = controller.prune_further(structure, net.widths, reduction_of, target, 0.2)

    assert reduction_of(structure) < target
    assert target <= reduction_of(found) < target + 0.03
    assert found[-1] == last
    for layer in range(len(found)):  # nothing too much
        if found[layer] < structure[layer]:
            assert reduction_of(controller.add_at(found, layer)) < target
    assert controller.prune_further(found, net.widths, reduction_of, target, 0.2) == found
    # LeNet-5: beyond what the structure's pruned layers have.
    deepest = (*[1] * (len(found) - 1), last)
    further = controller.prune_further(deepest, net.widths, reduction_of, 0.99, 0.2)
    assert reduction_of(further) >= 0.99
    with pytest.raises(UserError, match="cannot cut"):
        controller.prune_further(structure, net.widths, reduction_of, 0.9999, 0.2)


def test_one_layer_pays_for_gates_where_it_can():
    net = models.build("lenet5", **NETS["lenet5"])
    reduction_of = reduction_for(net, sep.count_macs)
    structure = (1, 9, 132)
    target = reduction_for(net)(structure)

    found = controller.prune_further(structure, net.widths, reduction_of, target, 0.2)

    # A kernel of the second layer would be a ninth of it.
    assert found[:2] == (1, 9)
    assert 120 < found[2] < 132
    assert reduction_of(found) >= target
    assert reduction_of((1, 9, found[2] + 1)) < target
    # The last layer alone cannot do it, with half its channels.
    structure = (20, 50, 4)
    assert controller.narrow_one_layer(structure, net.widths, reduction_of, 0.5) is None
    assert (
        reduction_of(controller.prune_further(structure, net.widths, reduction_of, 0.5, 0.2)) > 0.5
    )


@pytest.mark.parametrize(
    ("arch", "multiple", "target"),
    [("vgg19", 8, 0.701), ("resnet56", 8, 0.475), ("resnet56", 4, 0.3), ("lenet5", 8, 0.7)],
)
def test_rounded_widths_are_multiples_that_still_reach_the_target(arch, multiple, target):
    net = models.build(arch, **NETS[arch])
    reduction_of = reduction_for(net)
    odd = make_odd_structure(net, reduction_of, target)

    found = controller.round_structure(odd, net.widths, reduction_of, target, multiple)

    assert target <= reduction_of(found)
    for layer, (width, whole) in enumerate(zip(found, net.widths)):
        assert width % multiple == 0 or width == whole
        # No layer that has less than it should could have had more.
        more = (*found[:layer], min(whole, width + multiple), *found[layer + 1 :])
        assert width >= odd[layer] or reduction_of(more) < target
        assert width <= odd[layer] + multiple
        assert abs(width - odd[layer]) / odd[layer] < 1
    again = controller.round_structure(found, net.widths, reduction_of, target, multiple)
    assert again == found

    nearest = controller.round_structure(odd, net.widths, reduction_of, None, multiple)
    for width, old_width, whole in zip(nearest, odd, net.widths):
        is_near = abs(width - old_width) <= multiple / 2
        assert is_near or width == whole or old_width < multiple

    with pytest.raises(UserError, match=r"cannot cut 99\.9%"):
        controller.round_structure(odd, net.widths, reduction_of, 0.999, multiple)
    with pytest.raises(UserError, match="no layer of this net is 513 wide"):
        controller.round_structure(odd, net.widths, reduction_of, 0.1, 513)


@pytest.mark.parametrize(
    ("structure", "target", "nearest"),
    [
        # 8-32-312 would remove 70 %.
        ((15, 32, 311), 0.5, (16, 24, 312)),
        # 8-50-424 would remove 52 %: the first layer is halfway between two multiples.
        ((12, 50, 424), 0.338, (16, 40, 400)),
        # Many small steps of the last layer would lead to 8-16-24.
        ((2, 37, 248), 0.8568, (8, 8, 248)),
    ],
)
def test_rounded_widths_stay_near_where_all_steps_are_large(structure, target, nearest):
    net = models.build("lenet5", **NETS["lenet5"])

    found = controller.round_structure(structure, net.widths, reduction_for(net), target, 8)

    assert found == nearest


def make_odd_structure(net, reduction_of, target):
    """A structure of that target whose layers lose different shares."""
    generator = torch.Generator().manual_seed(0)
    uniform = controller.uniform_structure(net.widths, reduction_of, target)
    smaller = [
        max(1, width - int(width * 0.3 * torch.rand(1, generator=generator))) for width in uniform
    ]
    return controller.prune_to_target(net.widths, smaller, reduction_of, target)


# ---- the LSTM


@pytest.mark.parametrize("arch", NETS)
def test_the_lstm_reads_type_and_size_of_each_layer_and_the_next(arch):
    net = models.build(arch, **NETS[arch])

    features = controller.layer_features(net, net.widths)

    assert controller.Policy()(features).shape == (len(net.widths), 2)
    assert features.max() <= 2
    if arch == "lenet5":
        in_channels = (features * torch.tensor([1, 500, 1, 500])).tolist()
        assert in_channels == [[0, 20, 2, 2], [0, 50, 2, 2], [1, 500, 1, 10]]
    if arch == "resnet20":
        in_channels = features * torch.tensor([1, 64, 1, 64])
        assert in_channels[3].tolist() == [0, 32, 0, 32]


def test_the_lstm_reads_the_widths_that_are_left():
    net = models.build("vgg16")
    structure = tuple(range(1, 14))

    features = controller.layer_features(net, structure) * torch.tensor([1, 512, 1, 512])

    assert features[:, 1].tolist() == list(structure)
    assert features[4].tolist() == [0, 5, 0, 6]


def test_the_lstm_learns_which_layers_to_spare():
    net = models.build("vgg16")
    features = controller.layer_features(net, net.widths)
    # Pruning the first three layers hurts.
    costs = torch.tensor([0.06 if layer < 3 else -0.02 for layer in range(13)])
    torch.manual_seed(0)
    policy = controller.Policy()
    optimizer = torch.optim.Adam(policy.parameters(), controller.POLICY_LR)

    for _ in range(400):
        logits = policy(features)
        actions = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
        advantage = -(costs * actions).sum().item()
        controller.take_reinforce_step(optimizer, logits, actions, advantage)

    policy.eval()
    probabilities = policy(features).softmax(1)[:, 1]
    assert probabilities[:3].max() < 0.4
    assert probabilities[3:].min() > 0.6


def test_reward_and_complexity():
    reward = controller.compute_reward

    assert reward(0.9, 0.0, None) == pytest.approx(0.9 - 0.16)
    # The script's 4e-10 for each MAC, on its VGG-19.
    assert pytest.approx(398.136e6 * 4e-10, rel=0.01) == controller.COMPLEXITY_WEIGHT
    assert reward(0.9, 0.6, 0.7) == pytest.approx(0.9 - 0.16 * 0.4)
    assert reward(0.9, 0.9, 0.7) == reward(0.9, 0.7, 0.7)
    assert reward(0.9, 0.7, 0.7) < reward(0.9, 0.9, None)


def make_candidate(structure, accuracy, macs_reduction, target=None):
    return controller.Candidate(
        structure=structure,
        validation_accuracy=accuracy,
        macs=0,
        macs_reduction=macs_reduction,
        reward=controller.compute_reward(accuracy, macs_reduction, target),
        parent=(),
        actions=(),
        lstm_epoch=1,
        seconds=0.0,
    )


def test_the_best_network_is_the_best_at_or_past_the_target():
    scored = [
        make_candidate((9,), 0.99, 0.0, 0.5),
        make_candidate((6,), 0.95, 0.51, 0.5),
        make_candidate((5,), 0.96, 0.6, 0.5),
        make_candidate((3,), 0.97, 0.49, 0.5),
    ]
    without_target = [make_candidate((9,), 0.99, 0.0), make_candidate((6,), 0.98, 0.5)]

    assert controller.choose_best(scored, 0.5).structure == (5,)
    assert controller.choose_best(scored, 0.9).structure == (5,)
    assert controller.choose_best(without_target, None).structure == (6,)


def test_the_best_network_is_that_of_the_lowest_loss_where_there_were_trials():
    scored = [
        make_candidate((6,), 0.95, 0.51, 0.5),
        make_candidate((5,), 0.93, 0.6, 0.5),
        make_candidate((4,), 0.94, 0.6, 0.5),
    ]
    scored[1].trial_loss, scored[2].trial_loss = 0.0, 0.1

    assert controller.choose_best(scored, 0.5).structure == (5,)


def test_the_finalists_are_the_best_candidates_and_the_first_one():
    problem = MadeUpProblem(0)
    search = problem.run_search(12)
    candidates = list(search.candidates.values())
    for number, candidate in enumerate(candidates):
        candidate.reward = number  # the first is the worst
    candidates[-1].macs_reduction = 0.4  # does not reach the target

    finalists = search.list_finalists()

    assert finalists == [*candidates[-2:-6:-1], candidates[0]]
    assert search.structures_in_use() >= {candidate.structure for candidate in finalists}
    candidates[0].reward = 99
    assert search.list_finalists() == [candidates[0], *candidates[-2:-5:-1]]
    assert problem.run_search(None, search_class=controller.ReinforceSearch).list_finalists() == []


def test_no_walk_leaves_out_a_channel_that_the_target_allows():
    problem = MadeUpProblem(0, "lenet5", target=0.6)

    candidates = list(problem.run_search(6).candidates)

    for structure in candidates[1:]:  # the first is uniform's
        for layer, width in enumerate(structure):
            wider = controller.add_at(structure, layer)
            if width < problem.net.widths[layer]:
                assert problem.reduction_of(wider) < 0.6, (structure, layer)


def test_chance_leads_a_search_that_finds_nothing_new():
    problem = MadeUpProblem(0)
    search = problem.run_search(5)
    structure = search.net.widths
    smaller = controller.shrink_all(structure, 0.2)
    saved = torch.linspace(0.01, 0.02, len(structure))

    def probabilities_after(share_of_idle_walks):
        search.idle_walks = round(share_of_idle_walks * search.max_idle_walks)
        return search.move_probabilities(structure, smaller, saved)

    by_lstm, half, by_chance = (probabilities_after(share) for share in (0, 0.5, 1))
    assert by_lstm.max() > 0.5
    assert torch.allclose(by_chance, torch.full_like(saved, 0.25))
    assert torch.allclose(half, (by_lstm + by_chance) / 2)


def test_candidates_that_lose_nothing_teach_the_lstm_nothing():
    problem = MadeUpProblem(0)
    search = problem.make_search(5)
    search.add_candidate(make_candidate(controller.shrink_all(search.net.widths, 0.2), 1.0, 0.3))
    weights = deepcopy(search.policy.state_dict())

    search.fit_policy()

    for before, after in zip(weights.values(), search.policy.state_dict().values()):
        assert torch.equal(before, after)


def test_the_lstm_learns_only_where_there_is_something_new():
    problem = MadeUpProblem(0)
    search = problem.run_search(6)
    known = list(search.candidates.values())
    search.walks, search.idle_walks = 6, 0
    epoch, weights = search.lstm_epoch, deepcopy(search.policy.state_dict())

    def has_learned_from(scores):
        for score in scores:
            search.record(controller.Proposal((), (), score.structure), score)
        return any(
            not torch.equal(before, after)
            for before, after in zip(weights.values(), search.policy.state_dict().values())
        )

    assert not has_learned_from(known[:3])
    assert search.lstm_epoch == epoch
    new = problem.measure(controller.shrink_all(known[0].structure, 0.3))
    assert has_learned_from([new, *known[:2]])
    assert search.lstm_epoch == epoch + 1


class MadeUpProblem:
    """A net whose accuracy is made up: few layers matter, most do not; a new structure measures
    with noise."""

    def __init__(self, seed, arch="resnet20", target=0.5, power=1.5):
        self.net = models.build(arch)
        self.target = target
        self.power = power
        self.generator = torch.Generator().manual_seed(seed)
        layers = len(self.net.widths)
        weights = torch.exp(1.2 * torch.randn(layers, generator=self.generator))
        self.weights = 0.1 * weights / weights.sum()
        self.reduction_of = reduction_for(self.net)

    def true_accuracy(self, structure):
        removed = 1 - torch.tensor(structure) / torch.tensor(self.net.widths)
        return 0.93 - (self.weights * removed**self.power).sum().item()

    def measure(self, structure):
        noise = 0.001 * torch.randn(1, generator=self.generator).item()
        accuracy = self.true_accuracy(structure) + noise
        return make_candidate(structure, accuracy, self.reduction_of(structure), self.target)

    def make_search(
        self,
        max_candidates,
        *,
        search_class=controller.RegressionSearch,
        is_random=False,
        candidates_per_lstm_epoch=3,
        patience=3,
        handicap=0.0,
        seed=1,
    ):
        """A search; the baseline measures worse by `handicap`. `seed` is of its random numbers."""
        settings = replace(
            TINY,
            pruning_rate=0.2,
            max_candidates=max_candidates,
            candidates_per_lstm_epoch=candidates_per_lstm_epoch,
            patience=patience,
            seed=seed,
        )
        baseline_score = self.measure(self.net.widths)
        baseline_score.validation_accuracy -= handicap
        return search_class(
            self.net,
            baseline_score,
            settings,
            self.target,
            self.reduction_of,
            method="",
            is_random=is_random,
        )

    def run_search(self, max_candidates, **options):
        search = self.make_search(max_candidates, **options)
        while self.take_turn(search):
            pass
        return search

    def take_turn(self, search):
        """Whether the search had something to propose."""
        proposal = search.propose()
        if proposal is None:
            return False
        score = search.known_scores.get(proposal.structure) or self.measure(proposal.structure)
        search.record(proposal, score)
        return True

    def search_greedily(self):
        """Who knows the true accuracies: one layer at a time, the step that costs the least of them
        per MAC saved."""
        structure = self.net.widths

        def cost_per_mac(step):
            lost = self.true_accuracy(structure) - self.true_accuracy(step)
            return lost / (self.reduction_of(step) - self.reduction_of(structure))

        layers = range(len(structure))
        while self.reduction_of(structure) < self.target:
            one_layer = [[i == layer for i in layers] for layer in layers]
            steps = [controller.shrink(structure, actions, 0.2) for actions in one_layer]
            step = min((step for step in steps if step != structure), key=cost_per_mac)
            structure = controller.prune_to_target(structure, step, self.reduction_of, self.target)
        return structure


def test_a_regression_search_learns_where_to_prune_also_where_candidates_beat_the_baseline():
    accuracies = []

    for seed in range(2):
        problem = MadeUpProblem(seed)
        kinds = ({"is_random": True}, {}, {"handicap": 0.05})
        searches = [problem.run_search(20, **kind) for kind in kinds]
        for search in searches:
            assert len(search.candidates) == 20
            for candidate in search.candidates.values():  # every walk lands on the target
                assert 0.5 <= candidate.macs_reduction < 0.51
        uniform = controller.uniform_structure(
            problem.net.widths, problem.reduction_of, problem.target
        )
        structures = [uniform, *(search.best.structure for search in searches)]
        accuracies.append([problem.true_accuracy(structure) for structure in structures])

    uniform, by_dice, by_lstm, beaten = torch.tensor(accuracies).mean(0).tolist()
    assert min(by_lstm, beaten) > max(by_dice + 0.002, uniform + 0.008), accuracies


SEARCHES = [
    (controller.RegressionSearch, 9),
    (controller.ReinforceSearch, None),
]


def test_the_files_of_unfinished_searches_keep_their_keys():
    # With other keys the searches of users would begin anew, after days.
    common = {"lstm_epoch", "layer_scores", "policy", "optimizer", "candidates"}
    own_keys = {
        controller.ReinforceSearch: {"waiting_parents", "best_reward", "idle_epochs"},
        controller.RegressionSearch: {"walks", "idle_walks"},
    }

    for search_class, keys in own_keys.items():
        search = MadeUpProblem(0).make_search(5, search_class=search_class)
        assert search.state_dict().keys() == common | keys


@pytest.mark.parametrize(("search_class", "max_candidates"), SEARCHES)
def test_a_search_goes_on_as_if_never_stopped(search_class, max_candidates):
    options = {"search_class": search_class}
    undisturbed = MadeUpProblem(0).run_search(max_candidates, **options)
    problem = MadeUpProblem(0)
    search = problem.make_search(max_candidates, **options)

    while problem.take_turn(search):
        state = deepcopy(search.state_dict())
        search = search_class(
            problem.net,
            search.baseline_score,
            search.settings,
            problem.target,
            problem.reduction_of,
            method="",
        )
        search.load_state_dict(state)

    assert list(search.candidates.values()) == list(undisturbed.candidates.values())
    assert search.layer_scores == undisturbed.layer_scores


@pytest.mark.parametrize(("search_class", "max_candidates"), SEARCHES)
def test_what_the_lstm_thinks_is_kept_and_changes_no_number(
    search_class, max_candidates, monkeypatch
):
    search = MadeUpProblem(0).run_search(max_candidates, search_class=search_class)
    monkeypatch.setattr(search_class, "score_layers", lambda self: [])
    without_scores = MadeUpProblem(0).run_search(max_candidates, search_class=search_class)

    assert len(search.layer_scores) == search.lstm_epoch - 1 > 1
    for scores in search.layer_scores:
        assert len(scores) == len(search.net.widths)
    assert search.layer_scores[0] != search.layer_scores[-1]
    assert list(search.candidates.values()) == list(without_scores.candidates.values())


def test_reinforce_learns_from_the_reward_less_the_parents(monkeypatch):
    search = MadeUpProblem(0).make_search(None, search_class=controller.ReinforceSearch)
    widths = search.net.widths
    parent = make_candidate(controller.shrink_all(widths, 0.2), 0.8, 0.3)
    child = make_candidate(controller.shrink_all(parent.structure, 0.2), 0.8, 0.5)
    parent.reward, child.reward = 0.5, 0.7
    search.add_candidate(parent)
    search.waiting_parents = [parent.structure, widths]
    steps = []
    monkeypatch.setattr(controller, "take_reinforce_step", lambda *step: steps.append(step))
    actions = (1,) * len(widths)

    search.record(controller.Proposal(parent.structure, actions, child.structure, "logits"), child)

    ((optimizer, logits, taken, advantage),) = steps
    assert (optimizer, logits, tuple(taken.tolist())) == (search.optimizer, "logits", actions)
    assert advantage == pytest.approx(0.2)


@pytest.mark.parametrize("target", [0.5, 0.6])
def test_a_search_goes_on_for_its_own_target_alone(tmp_path, target):
    folder = controller.RunFolder(tmp_path, Reporter())
    problem = MadeUpProblem(0)
    search = problem.make_search(5)
    problem.take_turn(search)
    controller.save_search(search, folder)
    other = MadeUpProblem(0, target=target).make_search(5)

    controller.load_search(other, folder)

    assert bool(other.candidates) == (target == 0.5)


# ---- the run

TINY = Settings(
    baseline=TrainingPlan(6, 0.1, is_one_cycle=True),
    recovery=TrainingPlan(2, 0.1),
    final=TrainingPlan(2, 0.01),
    pruning_rate=0.3,
    target=None,
    candidates_per_lstm_epoch=2,
    patience=3,
    max_candidates=None,
    seed=0,
)
DESCRIPTION = {"experiment": "tiny", "schedule": "test", "data": "digits", "source": None}


class Interrupted(BaseException):
    pass


class Spy(Reporter):
    """Notes the trainings, and interrupts the run after so many epochs."""

    def __init__(self, epochs_left=None):
        self.titles = []
        self.epochs = 0
        self.epochs_left = epochs_left
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    def start_training(self, title, epochs, first_epoch):
        self.titles.append(title)

    def finish_epoch(self, *_):
        self.epochs += 1
        if self.epochs_left is not None:
            self.epochs_left -= 1
            if self.epochs_left <= 0:
                raise Interrupted


@lru_cache
def tiny_data(split_seed=0):
    train, test = make_digits(1000), make_digits(150, seed=3)
    return controller.make_data_split(train, test, split_seed)


def make_run(folder, spy=None, settings=TINY, **options):
    return Run(folder, settings, DESCRIPTION, tiny_data(), spy or Spy(), **options)


def let_gates_win(monkeypatch):
    """Nets with gates have the lower validation loss."""
    monkeypatch.setattr(
        Trainer, "measure_validation_loss", lambda self, net: float(net.gates is None)
    )


def let_gates_lose(monkeypatch):
    """Nets without gates have the lower validation loss."""
    monkeypatch.setattr(
        Trainer, "measure_validation_loss", lambda self, net: float(net.gates is not None)
    )


def make_rows(folder, spy, settings=TINY, methods=("lstm", "sep", "uniform"), round_to=None):
    """The results of a run with these rows."""
    run = make_run(folder, spy, settings, round_to=round_to)
    run.make_baseline(make_lenet())
    for method in methods:
        run.make_row(method, run.goal_for(method))
    return run.results


def without_seconds(results):
    """Results less what differs from run to run."""

    def drop(values):
        return {key: value for key, value in values.items() if key != "seconds"}

    return json.loads(json.dumps(results), object_hook=drop)


def rows_by_method(results):
    return {row["method"]: row for row in results["rows"]}


def sorted_rows(results):
    return sorted(without_seconds(results)["rows"], key=lambda row: row["method"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(results, spy, folder) of a run that nothing stopped."""
    spy, folder = Spy(), tmp_path_factory.mktemp("undisturbed")
    return make_rows(folder, spy), spy, folder


def test_cifar_is_read_pixel_by_pixel_and_hashed(tmp_path, monkeypatch):
    # A file of CIFAR holds images as (3, 32, 32), one after the other.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (20, 3072), dtype=torch.uint8, generator=generator)
    batch = {"data": rows.numpy(), "labels": list(range(10)) * 2}
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch))
    meta = {"label_names": [str(label) for label in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)

    train, test, _ = controller.load_data("cifar10", tmp_path)

    assert train.pixels.shape == (100, 32, 32, 3)
    assert torch.equal(test.pixels.permute(0, 3, 1, 2).flatten(1), rows)
    assert controller.fingerprint(train, test) != controller.fingerprint(test, test)


def test_usage_is_counted_class_by_class():
    torch.manual_seed(0)
    images = controller.load_data("digits", Path("data"))[0]
    images = images.select(torch.arange(200))
    images = images.select(images.labels != 3)
    net = models.build("lenet5", channels=1, size=28)
    net = sep.prune_softly(net, (20, 25, 100), [images.batch(torch.arange(len(images)))])

    usage = controller.measure_usage_by_class(net, images)

    assert usage["classes"] == [str(label) for label in range(10) if label != 3]
    assert list(usage["layers"]) == ["conv2", "fc1"]
    conv2, fc1 = (torch.tensor(shares) for shares in usage["layers"].values())
    assert conv2.shape == (9, 50)
    assert fc1.shape == (9, 500)
    assert torch.allclose(conv2.sum(1), torch.full((9,), 25.0), atol=0.03)
    assert ((fc1 > 0) & (fc1 < 1)).any()
    fours = images.batch((images.labels == 4).nonzero()[:, 0])
    expected = sep.measure_usage(net, [fours])[1].share_of_kernel.float()
    assert torch.allclose(conv2[usage["classes"].index("4")], expected, atol=1e-3)


def test_a_run_leaves_its_results(undisturbed):
    results, _, folder = undisturbed

    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    keys = {"experiment", "schedule", "seed", "data", "device", "versions", "seconds"}
    assert {*keys, "rows", "search"} <= results.keys()
    for row in results["rows"]:
        words = {"method", "widths", "device", "versions"}
        assert row.keys() == {*words, *controller.ROW_NUMBERS}
        net, facts = sep.load(folder / f"{row['method']}.pt")
        assert sep.count_macs(net) == row["macs"]
        assert row["macs"] == facts["macs"]
        assert models.count_parameters(net) == row["params"]
        assert list(net.structure) == row["widths"]
        accuracy = measure_accuracy(net, tiny_data().test, in_float32=True)
        assert accuracy == row["test_accuracy"]
    rows = rows_by_method(results)
    assert list(rows) == ["baseline", "lstm", "sep", "uniform"]
    assert rows["lstm"]["macs_reduction"] > 0.3
    assert abs(rows["uniform"]["macs_reduction"] - rows["lstm"]["macs_reduction"]) < 0.1
    assert not list(folder.glob("*.part"))


def test_the_search_keeps_the_published_rules(undisturbed):
    results, spy, folder = undisturbed
    baseline = sep.load(folder / "baseline.pt")[0].structure
    baseline_reward = controller.compute_reward(
        rows_by_method(results)["baseline"]["validation_accuracy"], 0.0, None
    )

    assert len(set(spy.titles)) == len(spy.titles)
    for method, goal in (("lstm", None), ("sep", results["rows"][1]["macs_reduction"])):
        log = results["search"][method]
        candidates = log["candidates"]
        assert log["rule"] == "reinforce"
        assert len(candidates) > 3
        structures = [baseline, *(tuple(candidate["structure"]) for candidate in candidates)]
        titles = [title for title in spy.titles if title.startswith(f"{method}: candidate")]
        assert len(set(structures)) == len(structures) == 1 + len(titles)
        if goal is not None:
            accuracy = rows_by_method(results)["baseline"]["validation_accuracy"]
            baseline_reward = controller.compute_reward(accuracy, 0.0, goal)
        known = {baseline: baseline_reward}
        largest_reward, last_rise = baseline_reward, 0
        for epoch, born in itertools.groupby(candidates, key=lambda c: c["lstm_epoch"]):
            born = list(born)
            best = sorted(known.values(), reverse=True)[: TINY.candidates_per_lstm_epoch]
            assert len(born) <= TINY.candidates_per_lstm_epoch
            assert all(known[tuple(child["parent"])] in best for child in born), epoch
            known |= {tuple(child["structure"]): child["reward"] for child in born}
            if max(known.values()) > largest_reward:
                largest_reward, last_rise = max(known.values()), epoch
        assert len(log["layer_scores"]) == last_rise + TINY.patience
        for child in candidates:
            structure = controller.shrink(child["parent"], child["actions"], TINY.pruning_rate)
            assert tuple(child["structure"]) == structure


def test_a_training_that_diverges_says_so_and_stops(tmp_path):
    settings = replace(TINY, baseline=TrainingPlan(3, 1e9))

    with pytest.raises(
        controller.DivergenceError, match="baseline: the training diverged in epoch 1, its loss"
    ) as caught:
        make_run(tmp_path, settings=settings).make_baseline(make_lenet())

    assert 0 < caught.value.seconds < 100
    assert not (tmp_path / "baseline.pt").exists()


def test_a_training_whose_last_step_makes_weights_infinite_has_diverged(tmp_path, monkeypatch):
    train = controller.fit

    def fit_to_infinity(net, *arguments, **options):
        for epoch, loss in train(net, *arguments, **options):
            with torch.no_grad():
                next(net.parameters()).view(-1)[0] = torch.inf
            yield epoch, loss

    monkeypatch.setattr(controller, "fit", fit_to_infinity)
    run = make_run(tmp_path)

    with pytest.raises(controller.DivergenceError):
        run.make_baseline(make_lenet())
    assert not (tmp_path / "baseline-pool" / "progress.pt").exists()


def test_a_candidate_that_diverges_is_judged_as_it_was_before_its_recovery(tmp_path):
    settings = replace(TINY, recovery=TrainingPlan(1, 1e9), target=0.5)
    run = make_run(tmp_path, settings=settings)
    run.make_baseline(make_lenet())

    run.make_row("uniform", run.goal_for("uniform"))

    candidate = run.results["search"]["uniform"]["candidates"][0]
    pruned = models.prune_channels(sep.load(tmp_path / "baseline.pt")[0], candidate["structure"])
    accuracy = measure_accuracy(pruned, run.data.validation)
    assert candidate["validation_accuracy"] == pytest.approx(accuracy, abs=0.011)


def test_images_in_files_are_another_data_set_at_another_size(tmp_path):
    paths, _ = save_noise(tmp_path)
    statistics = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    prints = set()
    for size, is_gray in ((20, False), (16, False), (16, True)):
        files = controller.PixelsInFiles(paths, size, size, is_gray)
        images = controller.ImagesInFiles(files, torch.zeros(10), **statistics)
        prints.add(controller.fingerprint(images))
    assert len(prints) == 3


def test_the_test_images_are_read_once_per_row(tmp_path, monkeypatch):
    measure = measure_accuracy
    sizes = []

    def measure_and_record(net, images, **options):
        sizes.append(len(images))
        return measure(net, images, **options)

    monkeypatch.setattr(controller, "measure_accuracy", measure_and_record)

    results = make_rows(tmp_path, Spy(), methods=("lstm",))

    assert len(results["rows"]) == 2
    assert sizes.count(150) == 2
    assert sizes.count(100) > 2


def test_a_row_has_to_reach_the_target_or_the_cut_of_another_row(tmp_path):
    run = make_run(tmp_path / "without")
    assert run.goal_for("lstm") == Goal(None)
    run.results["rows"] += [
        {"method": "baseline", "macs_reduction": 0.0},
        {"method": "random", "macs_reduction": 0.5},
    ]
    for method in ("lstm", "sep", "static", "uniform"):
        assert run.goal_for(method) == Goal(0.5, is_required=False)
    # The row that was made first stays the one to compare with.
    run.results["rows"].append({"method": "lstm", "macs_reduction": 0.6})
    assert run.goal_for("uniform") == Goal(0.5)

    run = make_run(tmp_path / "with", settings=replace(TINY, target=0.7))
    for method in ("lstm", "sep", "uniform"):
        assert run.goal_for(method) == Goal(0.7, is_required=True)
    run.results["rows"].append({"method": "lstm", "macs_reduction": 0.71})
    assert run.goal_for("sep") == Goal(0.7, is_required=True)
    assert run.goal_for("uniform") == Goal(0.71, is_required=False)  # lands where `lstm` landed


def test_student_and_teacher_see_the_same_crops_by_the_runs_seed(tmp_path, monkeypatch):
    run = make_run(tmp_path, settings=replace(TINY, seed=5))
    run.make_baseline(make_lenet(), is_trained=True)
    images = run.data.train.select(slice(None))
    images.flip = True
    draw_epoch = Images.draw_epoch
    drawn = []

    def record(self, seed, epoch):
        drawn.append((seed, epoch))
        return draw_epoch(self, seed, epoch)

    monkeypatch.setattr(Images, "draw_epoch", record)
    run.trainer.train("lstm: any", make_lenet(), images, TrainingPlan(2, 0.05))

    assert drawn == [(5, 0), (5, 0), (5, 1), (5, 1)]


def test_all_nets_but_the_baseline_learn_from_it(tmp_path, monkeypatch):
    train = controller.fit
    teachers = []
    spy = Spy()

    def record(*arguments, teacher, **options):
        teachers.append(teacher and teacher.net)
        return train(*arguments, teacher=teacher, **options)

    monkeypatch.setattr(controller, "fit", record)
    run = make_run(tmp_path, spy, replace(TINY, target=0.4))
    baseline = run.make_baseline(make_lenet())
    run.make_row("uniform", run.goal_for("uniform"))

    assert len(teachers) == len(spy.titles) > 2
    assert teachers[0] is None
    assert all(net is baseline for net in teachers[1:])


def test_trials_are_compared_by_the_loss_of_the_final_training(tmp_path):
    settings = replace(TINY, final=replace(TINY.final, temperature=4.0))
    run = make_run(tmp_path, settings=settings)
    baseline = run.make_baseline(make_lenet(), is_trained=True)
    net, images = make_lenet((3, 4, 10)), run.data.validation

    loss = run.trainer.measure_validation_loss(net)

    logits = controller.compute_logits(net, images)
    teacher_probs = controller.compute_logits(baseline, images).softmax(1)
    expected = controller.distillation_loss(logits, images.labels, teacher_probs, 4.0).item()
    assert loss == pytest.approx(expected, abs=2e-5)
    net.fc2.bias.data.fill_(math.nan)
    assert run.trainer.measure_validation_loss(net) is None


def test_a_candidate_is_scored_by_the_images_that_validate_and_by_its_target(tmp_path):
    run = make_run(tmp_path)
    baseline = run.make_baseline(make_lenet())

    net, candidate = run.trainer.make_candidate(
        "lstm",
        run.trainer.load_baseline(),
        (3, 4, 10),
        actions=(1, 1, 1),
        target=0.2,
        lstm_epoch=1,
        number=1,
    )

    validation = run.data.validation
    row_accuracy = run.find_row("baseline")["validation_accuracy"]
    assert row_accuracy == measure_accuracy(baseline, validation)
    assert candidate.validation_accuracy == measure_accuracy(net, validation)
    assert candidate.macs_reduction > 0.5
    assert candidate.reward == pytest.approx(candidate.validation_accuracy - 0.16 * 0.8)


@pytest.mark.parametrize("temperature", [None, 4.0])
def test_only_a_diverging_training_of_our_schedules_is_advised_to_take_published(temperature):
    plan = TrainingPlan(2, 0.1, temperature=temperature)

    text = controller.explain_divergence("lstm: final", 1, plan)

    assert ("--schedule published" in text) == (temperature is not None)


# ---- the run: stopped, resumed, fresh


def test_a_run_interrupted_after_every_epoch_ends_like_an_undisturbed_one(tmp_path, undisturbed):
    expected, undisturbed_spy, _ = undisturbed
    total = 0

    def make_results():
        nonlocal total
        spy = Spy(epochs_left=1)
        try:
            return make_rows(tmp_path, spy)
        finally:
            total += spy.epochs

    results = run_until_done(make_results)

    assert without_seconds(results) == without_seconds(expected)
    assert total == undisturbed_spy.epochs  # no finished epoch is trained again


def run_until_done(make_results, *, attempts=400):
    """The results of a run that is interrupted again and again."""
    for _ in range(attempts):
        try:
            return make_results()
        except Interrupted:
            pass
    raise AssertionError("the run does not come to its end")


def test_a_run_killed_after_every_second_file_ends_like_an_undisturbed_one(
    tmp_path, undisturbed, monkeypatch
):
    replace_file = os.replace
    files_left = 0

    def replace_and_interrupt(source, target):
        nonlocal files_left
        replace_file(source, target)
        files_left -= 1
        if files_left == 0:
            raise Interrupted

    def make_results():
        nonlocal files_left
        files_left = 3  # the first file of each start is results.json
        return make_rows(tmp_path, Spy())

    monkeypatch.setattr(os, "replace", replace_and_interrupt)
    results = run_until_done(make_results)

    written = json.loads((tmp_path / "results.json").read_text())
    assert without_seconds(results) == without_seconds(undisturbed[0])
    assert without_seconds(written) == without_seconds(results)


def test_a_killed_run_with_rounded_widths_and_a_plain_net_ends_like_an_undisturbed_one(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(controller, "measure_latencies", lambda nets, *_: [0.001] * len(nets))
    settings = replace(TINY, max_candidates=3, target=0.5)
    options = {"methods": ("random", "static", "uniform"), "round_to": 2}
    expected = make_rows(tmp_path / "a", Spy(), settings, **options)
    replace_file = os.replace
    seen = set()

    def replace_and_interrupt_once(source, target):
        replace_file(source, target)
        if target not in seen:
            seen.add(target)
            raise Interrupted

    monkeypatch.setattr(os, "replace", replace_and_interrupt_once)
    results = run_until_done(lambda: make_rows(tmp_path / "b", Spy(), settings, **options))

    rows = rows_by_method(expected)
    for row in rows.values():
        assert all(width % 2 == 0 for width in row["widths"])
    assert rows["static"]["widths"] == rows["sep"]["widths"]
    assert rows["static"]["validation_accuracy"] == rows["sep"]["validation_accuracy"]
    assert set(expected["rounded"]) == {"random", "sep", "uniform"}
    assert without_seconds(results) == without_seconds(expected)


def test_fresh_removes_what_a_run_left_and_nothing_else(tmp_path):
    make_rows(tmp_path, Spy(), methods=("lstm",))
    (tmp_path / "baseline-pruned.pt").write_text("the user's")
    (tmp_path / "lstm.pt.part").write_text("half written")

    make_run(tmp_path, is_fresh=True)

    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["baseline-pruned.pt", "lock", "results.json"]
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == []


def test_fresh_forgets_a_training_that_was_stopped(tmp_path):
    with pytest.raises(Interrupted):
        make_run(tmp_path, Spy(2)).make_baseline(make_lenet())
    assert (tmp_path / "baseline-pool" / "progress.pt").exists()

    make_run(tmp_path, is_fresh=True)

    assert not (tmp_path / "baseline-pool").exists()


class SpyOfOneTraining(Spy):
    """Interrupts the run after the first epoch of the training of that title, and notes from which
    epoch on it went."""

    def __init__(self, title, *, interrupts):
        super().__init__()
        self.title = title
        self.interrupts = interrupts
        self.first_epoch = None

    def start_training(self, title, epochs, first_epoch):
        if title == self.title:
            self.first_epoch = first_epoch

    def finish_epoch(self, title, *_):
        if self.interrupts and title == self.title:
            raise Interrupted


def test_a_training_goes_on_although_other_rows_were_made_since_it_was_stopped(tmp_path):
    settings = replace(TINY, target=0.4)
    with pytest.raises(Interrupted):
        stopped = SpyOfOneTraining("lstm: final", interrupts=True)
        make_rows(tmp_path, stopped, settings, methods=("lstm",))
    make_rows(tmp_path, Spy(), settings, methods=("uniform",))
    spy = SpyOfOneTraining("lstm: final", interrupts=False)

    make_rows(tmp_path, spy, settings, methods=("lstm",))

    assert spy.first_epoch == 1


def test_a_finished_run_keeps_no_unfinished_work(undisturbed):
    _, _, folder = undisturbed

    # What gates chose is there only if trials found that gates help.
    names = {path.name for path in folder.iterdir()} - {"sep-usage.json"}

    assert names == {"baseline.pt", "lstm.pt", "sep.pt", "uniform.pt", "results.json", "lock"}


def test_a_stopped_training_keeps_its_seconds(tmp_path, monkeypatch):
    clock = itertools.count(step=100.0)
    monkeypatch.setattr(controller.time, "time", lambda: next(clock))
    spy = Spy()
    spy.epochs_left = 2
    with pytest.raises(Interrupted):
        make_run(tmp_path, spy).make_baseline(make_lenet())

    results = json.loads((tmp_path / "results.json").read_text())

    assert results["rows"] == []
    assert results["seconds"] > 200
    progress = torch.load(tmp_path / "baseline-pool" / "progress.pt")
    monkeypatch.setattr(controller.time, "time", lambda: 0.0)  # the rest takes no time

    run = make_run(tmp_path)
    run.make_baseline(make_lenet())

    assert run.find_row("baseline")["seconds"] == round(progress["seconds"], 1) > 100
    assert run.results["seconds"] == results["seconds"]


def test_another_net_is_named_and_not_its_images(tmp_path):
    make_run(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    results |= {"source": "a.pt", "images": "others"}
    (tmp_path / "results.json").write_text(json.dumps(results))

    with pytest.raises(UserError, match=r"holds a run with another checkpoint \(source\); give"):
        make_run(tmp_path)


@pytest.mark.parametrize("key, value", [("source", "b.pt"), ("images", "others")])
def test_a_folder_without_results_gives_no_net_to_another_run(key, value, tmp_path, monkeypatch):
    make_run(tmp_path).make_baseline(make_lenet())
    (tmp_path / "results.json").unlink()
    monkeypatch.setitem(DESCRIPTION, key, value)
    if key == "images":
        monkeypatch.setattr(controller, "fingerprint", lambda *_: value)

    with pytest.raises(UserError, match="is no net that this run made as its baseline"):
        make_run(tmp_path).make_baseline(make_lenet())


def test_a_baseline_that_is_gone_is_not_trained_anew_for_its_rows(tmp_path):
    make_run(tmp_path).make_baseline(make_lenet())
    (tmp_path / "baseline.pt").unlink()
    spy = Spy()

    with pytest.raises(UserError, match=r"baseline\.pt is gone, and another training would give"):
        make_run(tmp_path, spy).make_baseline(make_lenet())

    assert spy.epochs == 0


def test_another_target_is_another_search(tmp_path):
    spy = Spy()
    run = make_run(tmp_path, spy)
    run.make_baseline(make_lenet())

    for method in ("uniform", "lstm"):
        spy.epochs_left = 5
        with pytest.raises(Interrupted):
            run.make_row(method, Goal(0.8))
        spy.epochs_left = None
        run.make_row(method, Goal(0.4))
        assert run.find_row(method)["macs_reduction"] > 0.35
        assert method == "lstm" or run.find_row(method)["macs_reduction"] < 0.5


def test_a_finished_run_trains_nothing_more(undisturbed):
    results, _, folder = undisturbed
    spy = Spy()

    again = make_rows(folder, spy)

    assert without_seconds(again) == without_seconds(results)
    assert spy.epochs == 0


def test_where_a_file_system_has_no_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(controller.fcntl, "flock", refuse)
    reporter = Reporter()
    reporter.say = (lines := []).append

    controller.RunFolder(tmp_path, reporter).claim(is_fresh=False)

    assert lines == [f"the file system of {tmp_path} has no locks: let no other process work there"]


def test_a_search_whose_state_is_damaged_says_that_it_begins_anew(tmp_path):
    with pytest.raises(Interrupted):
        make_rows(tmp_path, Spy(12), methods=("lstm",))
    state = tmp_path / "lstm-pool" / "search.pt"
    candidates = torch.load(state, weights_only=True)["candidates"]
    state.write_bytes(state.read_bytes()[:300])
    first, second = Spy(4), Spy(4)

    for spy in (first, second):
        with pytest.raises(Interrupted):
            make_rows(tmp_path, spy, methods=("lstm",))

    assert len(candidates) > 0
    line = f"{state} is damaged, or was for another target or version: that search begins anew"
    assert [said for said in first.lines if "begins anew" in said] == [line]
    # The new state is a sound one.
    assert not any("begins anew" in said for said in second.lines)


# ---- the run: whose folder it is


def test_what_validated_a_baseline_validates_again(tmp_path):
    settings = replace(TINY, seed=1)
    run = make_run(tmp_path, settings=settings)

    run.make_baseline(make_lenet(), is_trained=True)

    facts = sep.load(tmp_path / "baseline.pt")[1]
    assert (facts["seed"], facts["split"]) == (1, 0)
    validation = controller.split_images(run.data.all, facts["split"])[1]
    assert torch.equal(run.data.validation.pixels, validation.pixels)


def test_a_folder_of_another_run_is_left_alone(undisturbed):
    _, _, folder = undisturbed
    before = (folder / "results.json").read_bytes()

    with pytest.raises(UserError, match="settings") as refusal:
        make_rows(folder, Spy(), settings=replace(TINY, pruning_rate=0.4))

    assert refusal.value.status == 2
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    "key",
    # Written out, so that an entry that is missing in controller.IDENTITY is noticed.
    [
        "experiment",
        "schedule",
        "seed",
        "data",
        "train_images",
        "test_images",
        "images",
        "settings",
        "source",
        "normalisation",
        "round_to",
    ],
)
def test_a_run_that_differs_in_one_entry_is_refused(tmp_path, key):
    make_run(tmp_path)
    path = tmp_path / "results.json"
    results = json.loads(path.read_text())
    numbers = {"train_images": 7, "test_images": 7}
    others = numbers | {"settings": results["settings"] | {"patience": 99}}
    path.write_text(json.dumps(results | {key: others.get(key, "another")}))

    with pytest.raises(UserError, match="holds a run with"):
        make_run(tmp_path)


@pytest.mark.parametrize("part", ["pixels", "labels"])
def test_other_test_images_are_another_run(tmp_path, part):
    make_run(tmp_path)
    test = tiny_data().test
    pixels, labels = test.pixels, test.labels
    if part == "pixels":
        pixels = pixels.flip(0)
    else:
        labels = labels.flip(0)
    data = replace(tiny_data(), test=test.replace(pixels, labels))

    with pytest.raises(UserError, match="holds a run with other images"):
        Run(tmp_path, TINY, DESCRIPTION, data, Spy())


def test_results_of_another_version_are_refused_and_kept(undisturbed, tmp_path):
    shutil.copytree(undisturbed[2], tmp_path, dirs_exist_ok=True)
    results = json.loads((tmp_path / "results.json").read_text())
    log = results["search"]["lstm"]["candidates"]
    results["search"]["lstm"] = log  # as it was kept before
    content = json.dumps(results)
    (tmp_path / "results.json").write_text(content)

    with pytest.raises(UserError, match="or is of another version: it is not what a run writes"):
        make_rows(tmp_path, Spy())

    assert (tmp_path / "results.json").read_text() == content


def make_foreign(kind, path, folder):
    """Put a net at `path` that the run did not make."""
    net, facts = sep.load(path)
    if kind == "another row's":
        shutil.copy(folder / "lstm.pt", path)
        return
    if kind == "a foreign state dict":
        torch.save(net.state_dict(), path)
        return
    if kind == "another net":
        net = models.build("resnet20", channels=1, size=28)
    elif kind == "another baseline's":
        facts["baseline"] = facts["baseline"] | {"validation_accuracy": 0.5}
    elif kind == "less":
        del facts["seconds"]
    elif kind == "another target's":
        facts["settings"] = facts["settings"] | {"target": 0.123}
    elif kind == "another rounding's":
        facts["round_to"] = 4
    else:
        facts["seed"] = 9
    models.save_checkpoint(path, net, facts)


@pytest.mark.parametrize(
    "kind",
    [
        "another row's",
        "another seed's",
        "another baseline's",
        "another net",
        "a foreign state dict",
        "less",
        "another target's",
        "another rounding's",
        "baseline",
    ],
)
def test_a_net_that_the_run_did_not_make_gets_no_row(undisturbed, tmp_path, kind):
    results, _, folder = undisturbed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    name = "baseline" if kind == "baseline" else "uniform"
    path = tmp_path / f"{name}.pt"
    without_row = json.loads((folder / "results.json").read_text())
    without_row["rows"] = [row for row in without_row["rows"] if row["method"] != name]
    (tmp_path / "results.json").write_text(json.dumps(without_row))
    make_foreign(kind, path, tmp_path)
    before = path.read_bytes()
    spy = Spy()

    with pytest.raises(UserError, match=f"no net that this run made as its {name}"):
        make_rows(tmp_path, spy)

    assert spy.epochs == 0
    assert path.read_bytes() == before
    shutil.copy(folder / f"{name}.pt", path)
    assert sorted_rows(make_rows(tmp_path, spy)) == sorted_rows(results)
    assert spy.epochs == 0


@pytest.mark.parametrize("name", ["uniform", "static", "baseline"])
def test_a_net_that_came_to_lie_where_a_rows_net_was_is_not_delivered(undisturbed, tmp_path, name):
    shutil.copytree(undisturbed[2], tmp_path, dirs_exist_ok=True)
    make_rows(tmp_path, Spy(), methods=("static",))
    net, facts = sep.load(tmp_path / f"{name}.pt")
    models.save_checkpoint(tmp_path / f"{name}.pt", net, facts | {"validation_accuracy": 0.5})

    with pytest.raises(UserError, match=f"no net that this run made as its {name}"):
        make_rows(tmp_path, Spy(), methods=("uniform", "lstm", "sep", "static"))


def test_unfinished_work_is_not_taken_where_nothing_says_whose_it_is(undisturbed, tmp_path):
    with pytest.raises(Interrupted):
        make_rows(tmp_path, Spy(epochs_left=9), methods=("lstm",))
    pool = tmp_path / "lstm-pool"
    assert (pool / "progress.pt").exists() and (pool / "search.pt").exists()
    # A user who wants to begin anew removes what he sees, but not the folder of the pool.
    for name in ("results.json", "baseline.pt"):
        (tmp_path / name).unlink()
    spy = Spy()

    results = make_rows(tmp_path, spy, methods=("lstm",))

    assert any("what was unfinished begins anew" in line for line in spy.lines)
    undisturbed_spy = Spy()
    expected = make_rows(tmp_path / "other", undisturbed_spy, methods=("lstm",))
    assert spy.epochs == undisturbed_spy.epochs
    assert without_seconds(results) == without_seconds(expected)


def test_rows_stay_where_the_baseline_is_made_anew_on_another_day(undisturbed, tmp_path):
    results, _, folder = undisturbed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in ("results.json", "baseline.pt"):
        (tmp_path / name).unlink()
    net, facts = sep.load(tmp_path / "uniform.pt")
    slower_baseline = facts["baseline"] | {"seconds": 9.9}
    models.save_checkpoint(tmp_path / "uniform.pt", net, facts | {"baseline": slower_baseline})
    spy = Spy()

    again = make_rows(tmp_path, spy)

    assert sorted_rows(again) == sorted_rows(results)
    assert spy.epochs == TINY.baseline.epochs


def test_a_baseline_serves_runs_with_another_target_and_other_multiples(undisturbed, tmp_path):
    shutil.copy(undisturbed[2] / "baseline.pt", tmp_path)
    spy = Spy()
    run = make_run(tmp_path, spy, replace(TINY, target=0.5), round_to=4)

    run.make_baseline(make_lenet())

    assert spy.epochs == 0


def test_each_row_says_which_machine_made_it(undisturbed, tmp_path, monkeypatch):
    shutil.copytree(undisturbed[2], tmp_path, dirs_exist_ok=True)
    machine = {"device": "another device", "versions": {"torch": "3.0"}}
    monkeypatch.setattr(controller, "describe_machine", lambda device: machine)

    results = make_rows(tmp_path, Spy(), methods=("lstm", "sep", "uniform", "random"))

    rows = rows_by_method(results)
    assert rows["random"]["device"] == "another device"
    assert rows["random"]["versions"] == {"torch": "3.0"}
    device = undisturbed[0]["device"]
    assert device.startswith("cpu, ") and device.endswith(("bfloat16", "float32"))
    assert results["device"] == rows["lstm"]["device"] == rows["uniform"]["device"] == device


def lose_optimizer(path):
    """A file of unfinished work, as another version may have written it."""
    content = torch.load(path, weights_only=True)
    del content["optimizer"]
    models.write_tensors(path, content)


def test_a_training_of_another_version_starts_over(tmp_path):
    with pytest.raises(Interrupted):
        make_run(tmp_path, Spy(2)).make_baseline(make_lenet())
    lose_optimizer(tmp_path / "baseline-pool" / "progress.pt")
    spy = Spy()

    make_run(tmp_path, spy).make_baseline(make_lenet())

    assert spy.epochs == TINY.baseline.epochs


@pytest.mark.parametrize("is_other_lstm", [False, True])
def test_a_search_of_another_version_starts_over(tmp_path, is_other_lstm):
    with pytest.raises(Interrupted):
        make_rows(tmp_path, Spy(12), methods=("lstm",))
    path = tmp_path / "lstm-pool" / "search.pt"
    if is_other_lstm:
        state = torch.load(path)
        name, weights = next(iter(state["policy"].items()))
        torch.save(state | {"policy": state["policy"] | {name: weights[1:]}}, path)
    else:
        lose_optimizer(path)
    spy = Spy()

    make_rows(tmp_path, spy, methods=("lstm",))

    assert any("begins anew" in line for line in spy.lines)


# ---- the run: its rows


def test_only_final_trainings_see_the_images_that_validate(tmp_path, monkeypatch):
    images_of = {}
    train = controller.Trainer.train

    def record(self, title, net, images, *arguments, **options):
        images_of[title] = images
        return train(self, title, net, images, *arguments, **options)

    monkeypatch.setattr(controller.Trainer, "train", record)
    # Gates win, so that `sep` has a final training of its own.
    let_gates_win(monkeypatch)
    run = make_run(tmp_path, settings=TINY_FAST)
    run.make_baseline(make_lenet())

    for method in ("lstm", "sep", "uniform"):
        run.make_row(method, run.goal_for(method))

    kinds = ("lstm: candidate", "lstm: trial", "sep: candidate", "sep: gates, trial", "sep: final")
    for kind in kinds:
        assert any(title.startswith(kind) for title in images_of), kind
    for title, images in images_of.items():
        assert images is (run.data.all if ": final" in title else run.data.train), title


def test_a_cut_that_multiples_cannot_reach_is_refused_only_where_it_is_required(tmp_path):
    settings = replace(TINY, recovery=TrainingPlan(1, 0.05))
    run = make_run(tmp_path, settings=settings, round_to=4)
    run.make_baseline(make_lenet(), is_trained=True)  # 4-4-4 cuts less than half

    with pytest.raises(UserError, match="with widths at multiples of 4"):
        run.make_row("uniform", Goal(0.6, is_required=True))
    run.make_row("uniform", Goal(0.6))

    for width, whole in zip(run.find_row("uniform")["widths"], (6, 8, 20)):
        assert width % 4 == 0 or width == whole


def test_a_candidate_has_the_weights_of_its_best_epoch(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    run.make_baseline(make_lenet())
    states = []
    accuracies = iter([0.9, 0.2])  # of its two epochs

    def measure(net, images):
        states.append(clone_state(net))
        return next(accuracies)

    monkeypatch.setattr(controller, "measure_accuracy", measure)

    net, candidate = run.trainer.make_candidate(
        "lstm",
        run.trainer.load_baseline(),
        (5, 7, 15),
        actions=(1, 1, 1),
        target=None,
        lstm_epoch=1,
        number=1,
    )

    assert candidate.validation_accuracy == 0.9
    assert torch.equal(net.fc2.weight, states[0]["fc2.weight"])
    assert not torch.equal(net.fc2.weight, states[1]["fc2.weight"])


def test_the_teacher_stays_the_baseline_even_where_the_baseline_itself_is_chosen(tmp_path):
    settings = replace(TINY, recovery=TrainingPlan(1, 0.0))
    run = make_run(tmp_path, settings=settings)
    baseline = run.make_baseline(make_lenet())
    before = clone_state(baseline)

    for method, target in (("lstm", None), ("uniform", 1e-9)):
        run.make_row(method, Goal(target))

    for key, value in baseline.state_dict().items():
        assert torch.equal(value, before[key])
    assert run.find_row("uniform")["widths"] == list(baseline.widths)


@pytest.mark.parametrize("helps", [True, False])
def test_the_recovery_of_a_plain_net_stays_only_where_it_helps(tmp_path, monkeypatch, helps):
    train, to_static = controller.Trainer.train, sep.to_static
    weights = []

    def train_and_record(self, title, net, *arguments, **options):
        if not title.startswith("static"):
            return train(self, title, net, *arguments, **options)
        weights.append(net.fc2.weight.detach().clone())
        trained = train(self, title, net, *arguments, **options)
        if not helps:
            trained.net.fc2.weight.data.zero_()
        weights.append(trained.net.fc2.weight.detach().clone())
        return trained

    def make_worse(*arguments):
        net = to_static(*arguments)
        if helps:
            net.fc2.weight.data.neg_()
        return net

    monkeypatch.setattr(controller.Trainer, "train", train_and_record)
    monkeypatch.setattr(sep, "to_static", make_worse)
    let_gates_win(monkeypatch)

    results = make_rows(tmp_path, Spy(), methods=("static",))

    before, after = weights
    static = sep.load(tmp_path / "static.pt")[0]
    assert not torch.equal(before, after)
    assert torch.equal(static.fc2.weight, after if helps else before)
    assert bool(results["curves"]["static"]) == helps


def test_a_search_by_regression_serves_lstm_and_sep(tmp_path):
    settings = replace(
        TINY,
        max_candidates=3,
        target=0.6,
        recovery=TrainingPlan(1, 0.05),
        baseline=TrainingPlan(3, 0.1, is_one_cycle=True),
    )
    found = []

    for name, methods in (("both", ("lstm", "sep")), ("alone", ("sep", "lstm"))):
        spy = Spy()
        run = make_run(tmp_path / name, spy, settings)
        baseline = run.make_baseline(make_lenet())
        for method in methods:
            run.make_row(method, Goal(0.6, is_required=True))
        found.append(without_seconds({method: run.find_row(method) for method in methods}))
        assert sum(title.startswith("lstm: candidate") for title in spy.titles) == 3
        assert sum(title.startswith("sep: candidate") for title in spy.titles) == 1
        assert run.results["search"]["sep"]["rule"] == "shared"

    hard, soft = found[0]["lstm"], found[0]["sep"]
    assert found[0] == found[1]
    assert soft["macs_reduction"] >= 0.6
    for hard_width, soft_width, whole in zip(hard["widths"], soft["widths"], baseline.widths):
        assert hard_width >= soft_width
        assert (hard_width < whole) == (soft_width < whole)


TINY_FAST = replace(TINY, max_candidates=4, target=0.5, recovery=TrainingPlan(1, 0.05))


def test_a_pruned_net_far_above_its_baseline_is_named_once(tmp_path):
    spy = Spy()
    run = make_run(tmp_path, spy, TINY_FAST)
    run.make_baseline(make_lenet())
    run.find_row("baseline")["validation_accuracy"] = 0.05  # as of a net that is read wrongly

    run.make_row("lstm", Goal(0.5, is_required=True))

    lines = [line for line in spy.lines if "the baseline is read wrongly" in line]
    assert len(lines) == 1
    assert "the baseline 5.00%" in lines[0]


def prefer_narrow_first_layers(monkeypatch):
    """The fewer channels a trained net has in its first layer, the lower is its loss."""
    monkeypatch.setattr(
        Trainer, "measure_validation_loss", lambda self, net: float(net.structure[0])
    )


def test_trials_choose_among_the_best_candidates_for_lstm_and_sep(tmp_path, monkeypatch):
    prefer_narrow_first_layers(monkeypatch)
    spy = Spy()
    run = make_run(tmp_path, spy, TINY_FAST)
    run.make_baseline(make_lenet())

    run.make_row("lstm", Goal(0.5, is_required=True))

    candidates = run.folder.searched_candidates("lstm")
    finalists = [candidate for candidate in candidates if candidate.trial_loss is not None]
    assert 2 <= len(finalists) <= 5
    assert candidates[0] in finalists
    chosen = min(finalists, key=lambda finalist: finalist.structure[0])
    row = run.find_row("lstm")
    assert tuple(row["widths"]) == chosen.structure
    assert row["validation_accuracy"] == chosen.validation_accuracy
    assert row["seconds"] > sum(candidate.seconds for candidate in candidates) - 0.1
    assert sum(title.startswith("lstm: trial ") for title in spy.titles) == len(finalists)
    assert sum(line.startswith("lstm: the search has ended; ") for line in spy.lines) == 1
    assert any(line.startswith("lstm: trials choose ") for line in spy.lines)
    assert run.sep_row.find_lstm_structure(0.5) == chosen.structure


def test_a_run_with_trials_that_is_interrupted_ends_like_an_undisturbed_one(tmp_path):
    undisturbed_spy = Spy()
    expected = make_rows(tmp_path / "whole", undisturbed_spy, TINY_FAST, methods=("lstm", "sep"))
    assert any(title.startswith("lstm: trial 2") for title in undisturbed_spy.titles)
    total = 0

    def make_results():
        nonlocal total
        spy = Spy(3)
        try:
            return make_rows(tmp_path / "stopped", spy, TINY_FAST, methods=("lstm", "sep"))
        finally:
            total += spy.epochs

    results = run_until_done(make_results)

    assert without_seconds(results) == without_seconds(expected)
    assert total == undisturbed_spy.epochs


def test_a_finalist_whose_trial_diverges_is_not_chosen(tmp_path, monkeypatch):
    trainer = make_run(tmp_path, settings=TINY_FAST).trainer
    finalists = [make_candidate((3,), 0.95, 0.9), make_candidate((2,), 0.9, 0.9)]
    search = SimpleNamespace(method="lstm", list_finalists=lambda: finalists)
    weights = tmp_path / "weights.pt"
    models.save_checkpoint(weights, make_lenet(), {})
    monkeypatch.setattr(controller, "weights_path_for", lambda *_: weights)
    monkeypatch.setattr(controller, "update_search_results", lambda *_: None)
    monkeypatch.setattr(controller, "describe_trials", lambda *_: "told")
    monkeypatch.setattr(trainer, "measure_validation_loss", lambda net: 0.3)
    titles = []

    def train_or_diverge(title, net, *_, **options):
        titles.append(title)
        if "trial 1 of 2" in title:
            raise controller.DivergenceError(title, seconds=4.0)
        return controller.TrainedNet(net, None, 1.5)

    monkeypatch.setattr(trainer, "train", train_or_diverge)
    for _ in range(2):  # the second time both come from their files
        for finalist in finalists:
            finalist.trial_loss, finalist.seconds = None, 0.5
        controller.run_trials(trainer, search)

        assert [finalist.trial_loss for finalist in finalists] == [None, 0.3]
        assert [finalist.seconds for finalist in finalists] == [4.5, 2.0]
        assert controller.choose_best(finalists, 0.9).structure == (2,)
        assert titles == ["lstm: trial 1 of 2, 3", "lstm: trial 2 of 2, 2"]
        assert trainer.reporter.lines.count("told") == 1


def test_what_the_trials_came_to_is_told():
    finalists = [make_candidate((3, 2), 0.95, 0.9), make_candidate((2, 9), 0.9, 0.9)]
    search = SimpleNamespace(method="lstm", best=finalists[1])

    assert controller.describe_trials(search, finalists) == (
        "lstm: all trials diverged, so the largest reward decides"
    )
    finalists[1].trial_loss = 0.25
    assert controller.describe_trials(search, finalists) == (
        "lstm: trials choose 2-9, with a validation loss of 0.2500"
    )
    finalists[0].trial_loss = 0.3
    assert controller.describe_trials(search, finalists) == (
        "lstm: trials choose 2-9, with a validation loss of 0.2500; others 0.3000"
    )


def let_diverge(monkeypatch, beginning):
    """The trainings whose titles begin so diverge after 1000 seconds."""
    train = controller.Trainer.train

    def diverge(self, title, *arguments, **options):
        if title.startswith(beginning):
            raise controller.DivergenceError(title, seconds=1000.0)
        return train(self, title, *arguments, **options)

    monkeypatch.setattr(controller.Trainer, "train", diverge)


def test_a_plain_net_whose_recovery_diverges_stays_as_it_was(tmp_path, monkeypatch):
    let_diverge(monkeypatch, "static")
    let_gates_win(monkeypatch)
    spy = Spy()

    results = make_rows(tmp_path, spy, methods=("static",))

    assert [row["method"] for row in results["rows"]] == ["baseline", "sep", "static"]
    assert any("its recovery diverged" in line for line in spy.lines)
    of_sep, of_static = (row["seconds"] for row in results["rows"][1:])
    assert of_static == pytest.approx(of_sep + 1000, abs=0.1)


def test_sep_gates_the_structure_that_lstm_chose_for_the_cut_of_another_row(tmp_path, monkeypatch):
    let_gates_win(monkeypatch)
    settings = replace(TINY, max_candidates=2, recovery=TrainingPlan(1, 0.05))
    run = make_run(tmp_path, Spy(), settings)
    baseline = run.make_baseline(make_lenet())
    # No target is asked for; this is the cut of a row of `random` that was made before.
    run.make_row("lstm", Goal(0.6))

    goal = run.goal_for("sep")
    run.make_row("sep", goal)

    hard = tuple(run.find_row("lstm")["widths"])
    # A gate has MACs of its own, for which some more kernels go.
    reduction_of = run.trainer.make_reduction_of("sep")
    cut = goal.target
    soft = controller.prune_further(hard, baseline.widths, reduction_of, cut, TINY.pruning_rate)
    assert run.find_row("sep")["widths"] == list(soft)


@pytest.mark.parametrize("max_candidates", [None, 3])
def test_a_gated_row_goes_as_near_as_it_can_to_a_cut_that_only_channels_without_gates_reach(
    max_candidates, tmp_path, monkeypatch
):
    def measure_loss(self, net):
        return 2.0 if net.gates is None else 1.0

    monkeypatch.setattr(Trainer, "measure_validation_loss", measure_loss)
    settings = replace(
        TINY,
        max_candidates=max_candidates,
        recovery=TrainingPlan(1, 0.05),
        final=TrainingPlan(1, 0.01),
        baseline=TrainingPlan(1, 0.1, is_one_cycle=True),
    )
    spy = Spy()
    run = make_run(tmp_path, spy, settings)
    baseline = run.make_baseline(make_lenet())
    deepest = [1] * len(baseline.widths)

    run.make_row("sep", Goal(run.trainer.make_reduction_of("lstm")(deepest)))

    most = run.trainer.make_reduction_of("sep")(deepest)
    # `most` is with all gates that have room; measured to help may be fewer.
    assert max_candidates is None or run.find_row("sep")["macs_reduction"] >= most
    assert max_candidates is None or run.find_row("sep")["widths"] == deepest
    assert any(line.startswith("sep cannot cut") for line in spy.lines)

    asked = make_run(tmp_path / "asked", spy, replace(settings, target=0.9999))
    asked.make_baseline(baseline, is_trained=True)
    with pytest.raises(UserError, match="give a smaller --target"):
        asked.make_row("sep", asked.goal_for("sep"))


def test_gates_are_tried_in_the_last_layers_first():
    size = sep.GateSize(0, 3, 2)
    largest = [size, None, size, size, None]

    assert controller.list_gate_counts(largest) == [1, 2, 3]
    assert controller.list_gate_counts([size] * 16) == [1, 2, 4, 8, 16]
    assert controller.list_gate_counts([size]) == [1]
    assert controller.keep_last_gates(largest, 0) == [None] * 5
    assert controller.keep_last_gates(largest, 2) == [None, None, size, size, None]
    assert controller.keep_last_gates(largest, 3) == largest


@pytest.mark.parametrize(
    ("epochs", "images", "expected"),
    [
        (1, 50_000, 1),
        (10, 54_000, 2),
        (20, 45_000, 2),
        (60, 45_000, 6),
        (250, 45_000, 10),
        (100, 5_400, 10),
        (10, 5_400, 10),  # 42 steps an epoch
        (40, 5_120, 10),
        (10, 25_600, 2),
        (20, 12_800, 4),
        (20, 90, 20),
    ],
)
def test_a_trial_of_gates_is_the_final_training_in_few_epochs(epochs, images, expected):
    final = TrainingPlan(epochs, 0.02, is_one_cycle=True, temperature=4.0)

    trial = controller.plan_trial(final, images)

    assert trial == replace(final, epochs=expected)
    before, after = controller.split_epochs(trial)
    assert [*before, *after] == list(range(expected))
    assert len(before) <= len(after)


@pytest.mark.parametrize("best", [0, 1, 2])
def test_gates_go_where_the_validation_loss_is_lowest(tmp_path, monkeypatch, best):
    def measure_loss(self, net):
        gates = sum(gate is not None for gate in sep.gates_of(net))
        return abs(gates - best) + 0.25

    monkeypatch.setattr(Trainer, "measure_validation_loss", measure_loss)
    spy = Spy()
    settings = replace(TINY, final=TrainingPlan(4, 0.01))
    run = make_run(tmp_path, spy, settings)
    baseline = run.make_baseline(make_lenet())
    structure = (baseline.widths[0], *(width // 2 for width in baseline.widths[1:]))
    run.folder.set_search_results("sep", "shared", 0.5, [])

    net = models.prune_channels(baseline, structure)
    recovered = RecoveredNet(net, run.trainer.make_baseline_score(None), 0.0)
    trained = run.sep_row.train(recovered, None)

    gates = sep.gates_of(trained.net)
    assert [gate is not None for gate in gates] == [False, best == 2, best > 0]
    assert trained.net.structure == structure
    assert len(trained.curve) == 4
    trials = run.results["search"]["sep"]["gate_trials"]
    assert [trial["gates"] for trial in trials] == [0, 1, 2]
    words = ("so none is put on", "on the last layer of those", "on the last 2 layers of those")
    assert any(line.startswith("sep: gates ") and words[best] in line for line in spy.lines)


def test_a_trial_of_gates_that_diverges_loses(tmp_path, monkeypatch):
    let_diverge(monkeypatch, "sep: gates, trial with 2")
    run = make_run(tmp_path, settings=replace(TINY, final=TrainingPlan(2, 0.01)))
    baseline = run.make_baseline(make_lenet())
    structure = (baseline.widths[0], *(width // 2 for width in baseline.widths[1:]))
    run.folder.set_search_results("sep", "shared", 0.5, [])

    net = models.prune_channels(baseline, structure)
    _, seconds = run.sep_row.choose_gates(net, net)

    assert 1000 < seconds < 1100
    losses = [t["validation_loss"] for t in run.results["search"]["sep"]["gate_trials"]]
    assert losses[2] is None
    assert all(loss > 0 for loss in losses[:2])


@pytest.mark.parametrize("title", ["sep: gates, trial without", "sep: gates, before the trials"])
def test_a_trial_that_diverges_without_gates_ends_the_row(tmp_path, monkeypatch, title):
    let_diverge(monkeypatch, title)
    run = make_run(tmp_path, settings=replace(TINY, final=TrainingPlan(4, 0.01)))
    baseline = run.make_baseline(make_lenet(), is_trained=True)
    net = models.prune_channels(baseline, [width // 2 for width in baseline.widths])
    run.folder.set_search_results("sep", "shared", 0.5, [])

    with pytest.raises(controller.DivergenceError):
        run.sep_row.choose_gates(net, net)


def test_a_run_goes_on_where_other_gates_were_stopped(tmp_path, monkeypatch):
    settings = replace(TINY, final=TrainingPlan(4, 0.01))
    best = 2

    def measure_loss(self, net):
        return abs(sum(gate is not None for gate in sep.gates_of(net)) - best) + 0.25

    monkeypatch.setattr(Trainer, "measure_validation_loss", measure_loss)

    def train(spy):
        run = make_run(tmp_path, spy, settings)
        baseline = run.make_baseline(make_lenet())
        structure = (baseline.widths[0], *(width // 2 for width in baseline.widths[1:]))
        run.folder.set_search_results("sep", "shared", 0.5, [])
        try:
            net = models.prune_channels(baseline, structure)
            return run.sep_row.train(
                RecoveredNet(net, run.trainer.make_baseline_score(None), 0.0), None
            )
        finally:
            run.folder.lock.close()

    # It is stopped in its last part, with two gates, after the baseline, the trials (each with as
    # many epochs as the final training, for images are few), and the part without gates.
    epochs = settings.baseline.epochs + 4 + 1 + 2 * 3 + 1 + 1
    with pytest.raises(Interrupted):
        train(Spy(epochs))
    assert torch.load(tmp_path / "sep-pool" / "progress.pt")["title"] == "sep: final"
    for path in (tmp_path / "sep-pool").glob("sep-gates*"):
        path.unlink()
    best = 1

    trained = train(Spy())

    assert [gate is not None for gate in trained.net.gates] == [False, False, True]
    assert len(trained.curve) == 4


@pytest.mark.parametrize("methods", [("lstm", "sep"), ("sep",)])
def test_without_gates_sep_is_the_net_of_lstm(tmp_path, monkeypatch, methods):
    let_gates_lose(monkeypatch)
    settings = replace(TINY, max_candidates=2, target=0.7)
    lstm_run = make_run(tmp_path / "lstm", settings=settings)
    run = make_run(tmp_path / "sep", spy := Spy(), settings)
    for each, its_methods in ((lstm_run, ("lstm",)), (run, methods)):
        each.make_baseline(make_lenet())
        for method in its_methods:
            each.make_row(method, each.goal_for(method))

    expected = sep.load(tmp_path / "lstm" / "lstm.pt")[0].state_dict()
    net = sep.load(tmp_path / "sep" / "sep.pt")[0]
    assert net.gates is None
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())
    assert ("sep has no gates, so it is lstm's net" in spy.lines) == ("lstm" in methods)
    assert run.results["curves"]["sep"] == lstm_run.results["curves"]["lstm"]
    row, lstm_row = run.find_row("sep"), lstm_run.find_row("lstm")
    for key in ("validation_accuracy", "macs", "test_accuracy"):
        assert row[key] == lstm_row[key]


def test_without_gates_sep_takes_what_the_papers_search_found(tmp_path, monkeypatch):
    let_gates_lose(monkeypatch)
    run = make_run(tmp_path, settings=replace(TINY, max_candidates=2))
    run.make_baseline(make_lenet())

    for method in ("lstm", "sep"):  # without a target `lstm` searches as the papers do
        run.make_row(method, run.goal_for(method))

    assert run.results["search"]["lstm"]["rule"] == "reinforce"
    row, lstm_row = run.find_row("sep"), run.find_row("lstm")
    for key in ("widths", "validation_accuracy", "test_accuracy"):
        assert row[key] == lstm_row[key]
    assert row["seconds"] >= lstm_row["seconds"]


@pytest.mark.parametrize("helps", [False, True])
def test_without_gates_nothing_pays_for_them(tmp_path, monkeypatch, helps):
    measured = {False: set(), True: set()}  # the structures without and with gates

    def measure_loss(self, net):
        has_gates = net.gates is not None
        measured[has_gates].add(net.structure)
        return 1.0 if has_gates == helps else 2.0

    def remove_one_kernel(structure, *_):
        return (*structure[:-1], structure[-1] - 1)

    monkeypatch.setattr(Trainer, "measure_validation_loss", measure_loss)
    monkeypatch.setattr(controller, "prune_further", remove_one_kernel)
    settings = replace(TINY, max_candidates=2, target=0.7)
    run = make_run(tmp_path, settings=settings)
    run.make_baseline(make_lenet())

    for method in ("lstm", "sep"):
        run.make_row(method, run.goal_for(method))

    lstm, row = run.find_row("lstm"), run.find_row("sep")
    assert (sep.load(tmp_path / "sep.pt")[0].gates is not None) == helps
    assert helps or row["widths"] == lstm["widths"]
    assert row["macs_reduction"] >= 0.7
    # The trial without gates has the kernels that gates would cost.
    lstm_structure = tuple(lstm["widths"])
    assert lstm_structure in measured[False]
    assert measured[True] == {remove_one_kernel(lstm_structure)}
    # And it is logged with its own MACs.
    candidates = run.results["search"]["sep"]["candidates"]
    tried = {tuple(candidate["structure"]): candidate["macs"] for candidate in candidates}
    assert tried[lstm_structure] == lstm["macs"]
    assert len(run.results["search"]["sep"]["gate_trials"]) > 1
    # `lstm`'s pool stays away: the trial's work is that of `sep`.
    assert not list(tmp_path.glob("*-pool"))


def test_static_is_seps_net_where_that_has_no_gates(tmp_path, monkeypatch):
    let_gates_lose(monkeypatch)
    spy = Spy()
    settings = replace(TINY, max_candidates=2, target=0.7)
    run = make_run(tmp_path, spy, settings)
    run.make_baseline(make_lenet())

    run.make_row("static", run.goal_for("static"))

    gated, static = (sep.load(tmp_path / f"{row}.pt")[0] for row in ("sep", "static"))
    for name, value in gated.state_dict().items():
        assert torch.equal(value, static.state_dict()[name])
    assert "sep has no gates, so static is the same net" in spy.lines


def test_a_layer_that_lost_few_kernels_gets_no_gate(tmp_path):
    spy = Spy()
    run = make_run(tmp_path, spy)
    baseline = run.make_baseline(make_lenet())

    whole = RecoveredNet(run.trainer.load_baseline(), run.trainer.make_baseline_score(None), 0.0)
    trained = run.sep_row.train(whole, None)

    assert trained.net.gates is None
    assert trained.net.widths == baseline.widths
    assert "sep: no layer lost enough kernels to have room for a gate" in spy.lines


def test_dice_learn_nothing_and_find_something(tmp_path):
    results = make_rows(tmp_path, Spy(), methods=("random",))

    row = results["rows"][1]
    assert row["method"] == "random"
    assert row["macs_reduction"] > 0
    assert results["search"]["random"]["layer_scores"] == []


def test_seeds_differ_by_place():
    places = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1)]

    assert len({seed_for(*place) for place in places}) == 4
    # The same on every machine, in every process.
    assert seed_for(0, "a") == 5_775_574_390_210_881
