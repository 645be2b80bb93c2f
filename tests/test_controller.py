import itertools
import json
import math
import os
import shutil
from copy import deepcopy
from functools import lru_cache

import pytest
import torch
from test_models import NETS

import controller
import models
import sep
from controller import Images, Plan, Run, Settings, Watch, accuracy, fit, sgd, stream

QUICK = Plan(2, 0.05, True)


def few(count=600, seed=0):
    return Images(*controller.digits(count, seed), mean=(0.16,), std=(0.33,))


def lenet(widths=(6, 8, 20)):
    torch.manual_seed(0)
    return models.build("lenet5", widths, channels=1, size=28)


def trained(net, images, plan=QUICK, **kind):
    return [loss for _, loss in fit(net, images, plan, optimizer=sgd(net, plan.lr), **{"seed": 0, **kind})]


# ---- data


def test_a_batch_is_what_crop_flip_and_normalisation_make_of_the_images():
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (50, 9, 7, 3), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    images = Images(pixels, torch.arange(50), mean=mean, std=std, crop=2, flip=True)
    order, place = images.view(seed=1, epoch=4)
    assert sorted(order.tolist()) == list(range(50))
    assert {tuple(p) for p in place.tolist()} > set() and place[:, :2].max() == 4 and place[:, :2].min() == 0 and set(place[:, 2].tolist()) == {0, 1}
    x = images.batch(order[:20], place)
    for i, got in zip(order[:20].tolist(), x):
        padded = torch.zeros(13, 11, 3)
        padded[2:11, 2:9] = pixels[i].float() / 255
        top, left, flip = place[i].tolist()
        want = padded[top : top + 9, left : left + 7]
        want = ((want.flip(1) if flip else want) - torch.tensor(mean)) / torch.tensor(std)
        assert torch.allclose(got.permute(1, 2, 0), want, atol=1e-5)
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_common_random_numbers_hang_on_seed_and_epoch_alone():
    images = Images(torch.zeros(40, 8, 8, 3, dtype=torch.uint8), torch.zeros(40), mean=(0.0,) * 3, std=(1.0,) * 3, crop=4, flip=True)
    for a, b in zip(images.view(1, 2), images.view(1, 2)):
        assert torch.equal(a, b)
    assert not torch.equal(images.view(1, 2)[0], images.view(1, 3)[0]) and not torch.equal(images.view(1, 2)[1], images.view(2, 2)[1])


def test_the_split_takes_a_tenth_by_seed():
    images = few(300)
    train, validation = controller.split(images, 0)
    assert (len(train), len(validation)) == (270, 30)
    rows = lambda i: {p.numpy().tobytes() for p in i.pixels}
    assert not rows(train) & rows(validation) and rows(train) | rows(validation) == rows(images)
    assert rows(controller.split(images, 0)[1]) == rows(validation) != rows(controller.split(images, 1)[1])


def test_digits_are_ten_learnable_classes():
    images = few(1500)
    assert images.pixels.shape == (1500, 28, 28, 1) and torch.bincount(images.labels, minlength=10).min() > 100
    net = lenet((20, 50, 100))
    trained(net, images, Plan(4, 0.05, True))
    assert accuracy(net, few(500, seed=9)) > 0.8


# ---- the teacher-student loop


def test_the_loss_is_the_scripts():
    logits, teacher, labels = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([2])
    p = torch.tensor([2.718281828, 1.0, 7.389056]) / (2.718281828 + 1 + 7.389056)
    mse = sum((a - b) ** 2 for a, b in zip(p, teacher[0])) / 3
    assert controller.loss_of(logits, labels, teacher).item() == pytest.approx((mse - 0.1 * p[2].log()).item(), rel=1e-5)
    assert controller.loss_of(logits, labels, None).item() == pytest.approx(-p[2].log().item(), rel=1e-5)


def test_a_temperature_tells_what_a_sure_teacher_knows_of_the_other_classes():
    labels, sure = torch.tensor([0]), torch.tensor([[30.0, 8.0, 0.0]])
    loss = lambda logits, t: (controller.loss_of(logits, labels, sure.softmax(1), t) - 0.1 * torch.nn.functional.cross_entropy(logits, labels)).item()
    like, unlike = torch.tensor([[30.0, 8.0, 0.0]]), torch.tensor([[30.0, 0.0, 8.0]])
    assert loss(like, 4.0) == pytest.approx(0, abs=1e-5) and loss(unlike, 4.0) > 0.01
    assert abs(loss(unlike, None) - loss(like, None)) < 1e-9
    t, s = [2.718281828 ** (v / 4) for v in (30, 8, 0)], [2.718281828 ** (v / 4) for v in (30, 0, 8)]
    kl = sum(a / sum(t) * math.log(a / sum(t) / (b / sum(s))) for a, b in zip(t, s))
    assert loss(unlike, 4.0) == pytest.approx(16 * kl, rel=1e-3)


def test_the_teacher_runs_once_for_a_view_and_stays_as_it_is():
    teacher, images = lenet((20, 50, 100)), few(300)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    guide = controller.Teacher(teacher, images, 0)
    for _ in range(2):
        trained(lenet(), images, Plan(3, 0.05), teacher=guide)
    assert len(calls) == len(controller.chunks(images))  # the images are not augmented: one view in all
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    images.flip = True
    guide = controller.Teacher(teacher, images, 0)
    calls.clear()
    for _ in range(2):
        trained(lenet(), images, Plan(3, 0.05), teacher=guide)
    assert len(calls) == 3 * len(controller.chunks(images))
    place, i = images.view(0, 2)[1], torch.arange(50)
    with torch.no_grad():
        assert torch.allclose(guide.probabilities(2, len(images))[:50], teacher(images.batch(i, place)).softmax(1), atol=0.02)


def test_a_short_epoch_asks_the_teacher_for_what_it_shows():
    teacher, images = lenet((20, 50, 100)), few(600)
    images.flip = True
    guide, seen = controller.Teacher(teacher, images, 0), []
    trained(lenet(), images, Plan(1, 0.05, steps=2), teacher=guide, track=lambda steps: seen.append(len(steps)) or steps)
    shown = images.view(0, 0)[0][:256]
    part, whole = guide.probabilities(0, 256), guide.probabilities(0, 600)
    assert seen == [2] and len(guide.kept) == 2 and torch.allclose(part[shown], whole[shown], atol=0.02)
    assert (part.sum(1) > 0).sum() == 256 and (whole.sum(1) > 0).all()


def test_learning_rates_follow_the_plan():
    assert [Plan(5, 0.1).rate(x) for x in (0.01, 0.5, 0.99)] == [0.1] * 3
    cycle = Plan(5, 0.1, True)
    assert (cycle.rate(0.1), cycle.rate(0.2), cycle.rate(0.6), cycle.rate(1.0)) == pytest.approx((0.05, 0.1, 0.05, 0.0))


def test_the_same_seed_gives_the_same_numbers():
    runs = [(trained(net := lenet(), few(), seed=seed), net.fc2.weight.detach()) for seed in (0, 0, 1)]
    assert runs[0][0] == runs[1][0] != runs[2][0] and torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0][1] < runs[0][0][0]


def test_bfloat16_agrees_with_float32_within_noise(monkeypatch):
    images, other = few(1200), few(1000, seed=5)
    found = []
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert controller.half(torch.device("cpu"))._enabled == native
        net = lenet((8, 20, 50))
        trained(net, images, Plan(6, 0.1, True))
        found.append(accuracy(net, other))
    assert abs(found[0] - found[1]) < 3 * (2 * found[1] * (1 - found[1]) / 1000) ** 0.5 and min(found) > 0.8


# ---- the LSTM and the structures


@pytest.mark.parametrize("arch", NETS)
def test_the_lstm_reads_type_and_size_of_each_layer_and_the_next(arch):
    net = models.build(arch, **NETS[arch])
    cells = controller.cells(net, net.widths)
    assert controller.Policy()(cells).shape == (len(net.widths), 2) and cells.max() <= 2
    if arch == "lenet5":
        assert (cells * torch.tensor([1, 500, 1, 500])).tolist() == [[0, 20, 2, 2], [0, 50, 2, 2], [1, 500, 1, 10]]
    if arch == "resnet20":
        assert (cells * torch.tensor([1, 64, 1, 64]))[3].tolist() == [0, 32, 0, 32]


def test_the_lstm_learns_which_layers_to_spare():
    net = models.build("vgg16")
    cost = torch.tensor([0.06 if i in (0, 1, 2) else -0.02 for i in range(13)])  # pruning the first three layers hurts
    torch.manual_seed(0)
    policy = controller.Policy()
    adam = torch.optim.Adam(policy.parameters(), controller.POLICY_LR)
    for _ in range(400):
        logits = policy(controller.cells(net, net.widths))
        scheme = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
        controller.learn(policy, adam, logits, scheme, -(cost * scheme).sum().item())
    policy.eval()
    odds = policy(controller.cells(net, net.widths)).softmax(1)[:, 1]
    assert odds[:3].max() < 0.4 and odds[3:].min() > 0.6


class Surrogate:
    """A net whose accuracy is made up: few layers matter, most do not; a new structure measures with noise."""

    def __init__(self, seed, arch="resnet20", target=0.5, power=1.5):
        self.net, self.target, self.power, self.g = models.build(arch), target, power, torch.Generator().manual_seed(seed)
        weight = torch.exp(1.2 * torch.randn(len(self.net.widths), generator=self.g))
        self.weight, self.full = 0.1 * weight / weight.sum(), models.macs(self.net)

    def cut(self, structure):
        return 1 - models.macs(self.net, structure) / self.full

    def true(self, structure):
        removed = 1 - torch.tensor(structure) / torch.tensor(self.net.widths)
        return 0.93 - (self.weight * removed**self.power).sum().item()

    def measure(self, structure):
        return candidate(structure, self.true(structure) + 0.001 * torch.randn(1, generator=self.g).item(), self.cut(structure), self.target)

    def search(self, count, dice=False, kind=controller.Guided, parents=3, patience=3, handicap=0.0):
        settings = Settings(**(vars(TINY) | dict(rate=0.2, candidates=count, parents=parents, patience=patience, seed=1)))
        start = self.measure(self.net.widths)
        start.validation_accuracy -= handicap
        search = kind(self.net, start, settings, self.target, self.cut, dice=dice)
        while (step := search.next()) is not None:
            search.tell(search.tried.get(step[2]) or self.measure(step[2]))
        return search

    def greedy(self):
        """Who knows the true accuracies: one layer at a time, the step that costs the least of them per MAC saved."""
        now = self.net.widths
        while self.cut(now) < self.target:
            steps = [s for i in range(len(now)) if (s := controller.shrink(now, [i == j for j in range(len(now))], 0.2)) != now]
            step = min(steps, key=lambda s: (self.true(now) - self.true(s)) / (self.cut(s) - self.cut(now)))
            now = controller.trim(now, step, self.cut, self.target)
        return now


def test_a_guided_search_learns_where_to_prune_also_where_candidates_beat_the_baseline():
    found = []
    for seed in range(2):
        problem = Surrogate(seed)
        searches = [problem.search(20, **kind) for kind in (dict(dice=True), {}, dict(handicap=0.05))]
        assert all(len(s.tried) == 21 and all(0.5 <= c.cut < 0.51 for c in [*s.tried.values()][1:]) for s in searches)  # every walk lands on the target
        found.append([problem.true(s) for s in (controller.uniform(problem.net.widths, problem.cut, problem.target), *(s.best.structure for s in searches))])
    even, dice, guided, beaten = torch.tensor(found).mean(0).tolist()
    assert min(guided, beaten) > max(dice + 0.002, even + 0.008), found


def test_a_guided_search_goes_on_as_if_never_stopped():
    problem = Surrogate(0)
    whole = problem.search(9)
    settings, problem = whole.settings, Surrogate(0)
    new = lambda start: controller.Guided(problem.net, start, settings, problem.target, problem.cut)
    search = new(problem.measure(problem.net.widths))
    while (step := search.next()) is not None:
        search.tell(search.tried.get(step[2]) or problem.measure(step[2]))
        state = search.state()
        search = new(search.tried[search.start])
        search.load(state)
    assert list(search.tried.values()) == list(whole.tried.values())


def test_reward_and_complexity():
    assert controller.reward(0.9, 0.0, None) == pytest.approx(0.9 - 0.16)
    assert pytest.approx(398.136e6 * 4e-10, rel=0.01) == controller.COMPLEXITY  # the script's 4e-10 a MAC, on its VGG-19
    assert controller.reward(0.9, 0.6, 0.7) == pytest.approx(0.9 - 0.16 * 0.4)
    assert controller.reward(0.9, 0.9, 0.7) == controller.reward(0.9, 0.7, 0.7) < controller.reward(0.9, 0.9, None)


def test_a_step_keeps_the_whole_part_of_four_fifths():
    assert controller.shrink((64, 10, 5, 2, 1), (1, 1, 1, 1, 1), 0.2) == (51, 8, 4, 1, 1)
    assert controller.shrink((64, 10, 5), (0, 1, 0), 0.5) == (64, 5, 5)
    assert all(controller.shrink((w,), (1,), 0.2) == (max(1, w * 4 // 5),) for w in range(1, 600))


@pytest.mark.parametrize("arch", ["lenet5", "vgg19", "resnet56"])
def test_uniform_and_trimmed_structures_land_on_the_target(arch):
    net = models.build(arch, **NETS[arch])
    full = models.macs(net)
    cut = lambda w: 1 - models.macs(net, w) / full
    for target in [t / 100 for t in range(10, 95, 5)] if arch == "lenet5" else (0.3, 0.475):
        w = controller.uniform(net.widths, cut, target)
        assert abs(cut(w) - target) <= 0.005, target
        shares = [k / full for k, full in zip(w, net.widths)]
        assert max(shares) - min(shares) <= 1 / min(net.widths) + 0.03
    parent = net.widths
    child = controller.shrink(parent, [1] * len(parent), 0.2)
    trimmed = controller.trim(parent, child, cut, 0.2)
    assert 0.2 <= cut(trimmed) < cut(child) and cut(trimmed) < 0.23 and all(c <= t <= p for c, t, p in zip(child, trimmed, parent))
    assert all(cut([k + (i == j) for j, k in enumerate(trimmed)]) < 0.2 for i in range(len(parent)) if trimmed[i] < parent[i])  # nothing too much
    assert controller.trim(parent, child, cut, 0.99) == child


@pytest.mark.parametrize("arch", ["lenet5", "vgg19"])
def test_a_scheme_lands_with_its_gates_on_the_target(arch):
    net = models.build(arch, **NETS[arch])
    cut = lambda w: 1 - sep.macs(net, w) / models.macs(net)
    target, whole = 1 - models.macs(net, (scheme := (*(w // 2 for w in net.widths[:-1]), net.widths[-1]))) / models.macs(net), net.widths[-1]
    found = controller.landed(scheme, net.widths, cut, target, 0.2)
    assert cut(scheme) < target <= cut(found) < target + 0.03 and found[-1] == whole
    assert all(cut([k + (i == j) for j, k in enumerate(found)]) < target for i in range(len(found)) if found[i] < scheme[i])  # nothing too much
    assert controller.landed(found, net.widths, cut, target, 0.2) == found
    assert cut(controller.landed((*[1] * (len(found) - 1), whole), net.widths, cut, 0.99, 0.2)) >= 0.99  # LeNet-5: beyond what the scheme's layers have
    with pytest.raises(models.Failure, match="cannot cut"):
        controller.landed(scheme, net.widths, cut, 0.9999, 0.2)


@pytest.mark.parametrize(("arch", "multiple", "target"), [("vgg19", 8, 0.701), ("resnet56", 8, 0.475), ("resnet56", 4, 0.3), ("lenet5", 8, 0.7)])
def test_rounded_widths_are_multiples_that_still_cut_the_target(arch, multiple, target):
    net, g = models.build(arch, **NETS[arch]), torch.Generator().manual_seed(0)
    full = models.macs(net)
    cut = lambda w: 1 - models.macs(net, w) / full
    odd = controller.uniform(net.widths, cut, target)
    odd = controller.trim(net.widths, [max(1, k - int(k * 0.3 * torch.rand(1, generator=g))) for k in odd], cut, target)
    found = controller.rounded(odd, net.widths, cut, target, multiple)
    assert all(k % multiple == 0 or k == w for k, w in zip(found, net.widths)) and target <= cut(found)
    for i, (k, w) in enumerate(zip(found, net.widths)):  # and no layer that has less than it should could have had more
        assert k >= odd[i] or cut([*found[:i], min(w, k + multiple), *found[i + 1 :]]) < target
    assert all(a <= b + multiple for a, b in zip(found, odd))
    assert max(abs(a - b) / b for a, b in zip(found, odd)) < 1 and controller.rounded(found, net.widths, cut, target, multiple) == found
    near = controller.rounded(odd, net.widths, cut, None, multiple)
    assert all(abs(a - b) <= multiple / 2 or a == w or b < multiple for a, b, w in zip(near, odd, net.widths))
    for target, n, words in ((0.999, multiple, r"cannot cut 99\.9%"), (0.1, 513, "no layer of this net is 513 wide")):
        with pytest.raises(models.Failure, match=words):
            controller.rounded(odd, net.widths, cut, target, n)


def candidate(structure, accuracy, cut, target=None):
    return controller.Candidate(structure, (), None, 1, accuracy, 0, cut, controller.reward(accuracy, cut, target), 0.0)


def test_the_best_network_is_the_best_at_or_past_the_target():
    found = [candidate((9,), 0.99, 0.0, 0.5), candidate((6,), 0.95, 0.51, 0.5), candidate((5,), 0.96, 0.6, 0.5), candidate((3,), 0.97, 0.49, 0.5)]
    assert controller.choose(found, 0.5).structure == (5,) and controller.choose(found, 0.9).structure == (5,)
    assert controller.choose([candidate((9,), 0.99, 0.0), candidate((6,), 0.98, 0.5)], None).structure == (6,)


# ---- the run

TINY = Settings(baseline=Plan(6, 0.1, True), recovery=Plan(2, 0.1), final=Plan(2, 0.01), rate=0.3, target=None, parents=2, patience=3, candidates=None, seed=0)
HEAD = dict(experiment="tiny", schedule="test", data="digits", source=None)
METHODS = ("lstm", "sep", "uniform")


class Interrupted(BaseException):
    pass


class Spy(Watch):
    """Notes the trainings, and stops the run after so many epochs."""

    def __init__(self, stop=None):
        self.titles, self.left, self.epochs, self.lines = [], stop, 0, []

    def say(self, text):
        self.lines.append(text)

    def stage(self, title, epochs, start):
        self.titles.append(title)

    def epoch(self, title, epoch, *_):
        self.epochs += 1
        if self.left is not None and self.epochs >= self.left:
            raise Interrupted


@lru_cache
def tiny_data():
    return few(1000), few(150, seed=3)


def work(folder, spy, settings=TINY, methods=METHODS, round_to=None):
    run = Run(folder, settings, HEAD, *tiny_data(), spy, round_to=round_to)
    baseline = run.baseline(fresh=lenet())
    for method in methods:
        run.method(method, baseline, next((run.row(m)["cut"] for m in ("lstm", "random") if run.row(m)), None))
    return run.results


def timeless(results):
    return json.loads(json.dumps(results), object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds"})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    spy, folder = Spy(), tmp_path_factory.mktemp("undisturbed")
    return work(folder, spy), spy, folder


def test_a_run_leaves_its_results(undisturbed):
    results, _, folder = undisturbed
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"experiment", "schedule", "seed", "data", "device", "versions", "seconds", "rows", "search"} <= results.keys()
    for row in results["rows"]:
        assert row.keys() == {"method", "test_accuracy", "validation_accuracy", "macs", "params", "cut", "widths", "seconds"}
        net, facts = sep.load(folder / f"{row['method']}.pt")
        assert sep.macs(net) == row["macs"] == facts["macs"] and models.parameters(net) == row["params"] and list(net.structure) == row["widths"]
        assert accuracy(net, tiny_data()[1], exact=True) == row["test_accuracy"]
    rows = {r["method"]: r for r in results["rows"]}
    assert list(rows) == ["baseline", "lstm", "sep", "uniform"] and rows["lstm"]["cut"] > 0.3 and abs(rows["uniform"]["cut"] - rows["lstm"]["cut"]) < 0.1
    assert not list(folder.glob("*.part"))


def test_the_search_keeps_the_published_rules(undisturbed):
    results, spy, _ = undisturbed
    assert len(set(spy.titles)) == len(spy.titles)
    for method in ("lstm", "sep"):
        log = results["search"][method]
        assert len(log) > 4
        structures = [tuple(c["structure"]) for c in log]
        assert len(set(structures)) == len(structures) == 1 + sum(t.startswith(f"{method}: candidate") for t in spy.titles)
        known = {structures[0]: log[0]["reward"]}
        for epoch, born in itertools.groupby(log[1:], key=lambda c: c["epoch"]):
            best = sorted(known.values(), reverse=True)[: TINY.parents]
            born = list(born)
            assert len(born) <= TINY.parents and all(known[tuple(c["parent"])] in best for c in born), epoch
            known |= {tuple(c["structure"]): c["reward"] for c in born}
        for c in log[1:]:
            assert tuple(c["structure"]) == controller.shrink(c["parent"], c["scheme"], TINY.rate)


def test_the_test_images_are_read_once_per_row(tmp_path, monkeypatch):
    read, plain = [], controller.accuracy
    monkeypatch.setattr(controller, "accuracy", lambda net, images, exact=False: read.append(len(images)) or plain(net, images, exact))
    results = work(tmp_path, Spy(), methods=("lstm",))
    assert read.count(150) == len(results["rows"]) == 2 and read.count(100) > 2


@pytest.mark.parametrize("stop", [1, 7])
def test_an_interrupted_run_ends_like_an_undisturbed_one(tmp_path, undisturbed, stop):
    expected, whole, _ = undisturbed
    total = 0
    for _ in range(100):
        spy = Spy(stop)
        try:
            results = work(tmp_path, spy)
            break
        except Interrupted:
            total += spy.epochs
    assert timeless(results) == timeless(expected)
    assert total + spy.epochs == whole.epochs  # no finished epoch is trained again


@pytest.mark.parametrize("stop", [3])
def test_a_run_killed_between_any_two_files_ends_like_an_undisturbed_one(tmp_path, undisturbed, monkeypatch, stop):
    replace, left = os.replace, [0]

    def killed(a, b):
        replace(a, b)
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted

    monkeypatch.setattr(os, "replace", killed)
    for _ in range(400):
        left[0] = stop  # the first file of each start is results.json
        try:
            results = work(tmp_path, Spy())
            break
        except Interrupted:
            pass
    assert timeless(results) == timeless(undisturbed[0]) == timeless(json.loads((tmp_path / "results.json").read_text()))


@pytest.mark.parametrize("helps", [True, False])
def test_the_recovery_of_a_plain_net_stays_only_where_it_helps(tmp_path, monkeypatch, helps):
    complete, harden, nets = Run.complete, sep.harden, []

    def completed(self, title, net, *a, **kind):
        if not title.startswith("static"):
            return complete(self, title, net, *a, **kind)
        nets.append(deepcopy(net))
        net, *others = complete(self, title, net, *a, **kind)
        if not helps:
            net.fc2.weight.data.zero_()
        nets.append(net)
        return net, *others

    def hardened(*a):
        net = harden(*a)
        if helps:
            net.fc2.weight.data.neg_()
        return net

    monkeypatch.setattr(Run, "complete", completed)
    monkeypatch.setattr(sep, "harden", hardened)
    results = work(tmp_path, Spy(), methods=("static",))
    made, (before, after) = sep.load(tmp_path / "static.pt")[0], nets
    assert torch.equal(made.fc2.weight, (after if helps else before).fc2.weight) and not torch.equal(before.fc2.weight, after.fc2.weight)
    assert bool(results["curves"]["static"]) == helps


def test_a_killed_run_with_rounded_widths_and_a_plain_net_ends_like_an_undisturbed_one(tmp_path, monkeypatch):
    kind = dict(methods=("random", "static", "uniform"), round_to=2)
    expected = work(tmp_path / "a", Spy(), **kind)
    rows = {r["method"]: r for r in expected["rows"]}
    assert all(k % 2 == 0 for r in rows.values() for k in r["widths"]) and rows["static"]["widths"] == rows["sep"]["widths"]
    assert rows["static"]["validation_accuracy"] == rows["sep"]["validation_accuracy"] and set(expected["rounded"]) == {"random", "sep", "uniform"}
    replace = os.replace

    def killed(a, b):
        replace(a, b)
        if b not in seen:
            seen.add(b)
            raise Interrupted

    seen = set()
    monkeypatch.setattr(os, "replace", killed)
    for _ in range(400):
        try:
            results = work(tmp_path / "b", Spy(), **kind)
            break
        except Interrupted:
            pass
    told = lambda r: {m: r["rounded"][m]["before"].partition(",")[0] for m in r["rounded"]}  # less the milliseconds
    assert told(results) == told(expected)
    assert timeless(results | {"rounded": 0}) == timeless(expected | {"rounded": 0})


def test_what_validated_a_baseline_validates_again(tmp_path):
    run = Run(tmp_path, Settings(**(vars(TINY) | {"seed": 1})), HEAD, *tiny_data(), split_seed=0)
    run.baseline(given=lenet())
    facts = sep.load(tmp_path / "baseline.pt")[1]
    assert (facts["seed"], facts["split"]) == (1, 0)
    assert torch.equal(run.validation.pixels, controller.split(tiny_data()[0], 0)[1].pixels)


def test_fresh_removes_what_a_run_left_and_nothing_else(tmp_path):
    work(tmp_path, Spy(), methods=("lstm",))
    (tmp_path / "baseline-pruned.pt").write_text("the user's")
    spy = Spy()
    Run(tmp_path, TINY, HEAD, *tiny_data(), spy, fresh=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["baseline-pruned.pt", "lock", "results.json"]
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == []


def test_another_target_is_another_search(tmp_path):
    run = Run(tmp_path, TINY, HEAD, *tiny_data())
    baseline = run.baseline(fresh=lenet())
    for method in ("uniform", "lstm"):
        run.watch = Spy(5)
        with pytest.raises(Interrupted):
            run.method(method, baseline, 0.8)
        run.watch = Spy()
        run.method(method, baseline, 0.4)
        assert run.row(method)["cut"] > 0.35 and (method == "lstm" or run.row(method)["cut"] < 0.5)


def test_a_finished_run_trains_nothing_more(undisturbed):
    results, _, folder = undisturbed
    spy = Spy()
    assert timeless(work(folder, spy)) == timeless(results) and spy.epochs == 0


def test_a_folder_of_another_run_is_left_alone(undisturbed):
    before = (undisturbed[2] / "results.json").read_bytes()
    with pytest.raises(models.Failure, match="settings") as e:
        work(undisturbed[2], Spy(), settings=Settings(**(vars(TINY) | {"rate": 0.4})))
    assert e.value.status == 2 and (undisturbed[2] / "results.json").read_bytes() == before


@pytest.mark.parametrize("what", ["another row's", "another seed's", "another baseline's", "another net", "a stranger's", "less", "another target's",
                                  "another rounding's", "baseline"])
def test_a_net_that_the_run_did_not_make_gets_no_row(undisturbed, tmp_path, what):
    results, _, folder = undisturbed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    name = "baseline" if what == "baseline" else "uniform"
    path, older = tmp_path / f"{name}.pt", json.loads((folder / "results.json").read_text())
    older["rows"] = [r for r in older["rows"] if r["method"] != name]
    (tmp_path / "results.json").write_text(json.dumps(older))
    net, facts = sep.load(path)
    if what == "another row's":
        shutil.copy(tmp_path / "lstm.pt", path)
    elif what == "a stranger's":
        torch.save(net.state_dict(), path)
    elif what == "another net":
        models.save(path, models.build("resnet20", channels=1, size=28), facts)
    elif what == "another baseline's":
        models.save(path, net, facts | dict(baseline=facts["baseline"] | dict(validation_accuracy=0.5)))
    elif what == "less":
        models.save(path, net, {k: v for k, v in facts.items() if k != "seconds"})
    elif what == "another target's":
        models.save(path, net, facts | dict(settings=facts["settings"] | dict(target=0.123)))
    elif what == "another rounding's":
        models.save(path, net, facts | dict(round_to=4))
    else:
        models.save(path, net, facts | dict(seed=9))
    spy, before = Spy(), path.read_bytes()
    with pytest.raises(models.Failure, match=f"no net that this run made as its {name}"):
        work(tmp_path, spy)
    assert spy.epochs == 0 and path.read_bytes() == before
    shutil.copy(folder / f"{name}.pt", path)
    rows = lambda found: sorted(timeless(found)["rows"], key=lambda r: r["method"])
    assert rows(work(tmp_path, spy)) == rows(results) and spy.epochs == 0


@pytest.mark.parametrize("name", ["uniform", "static", "baseline"])
def test_a_net_that_came_to_lie_where_a_rows_net_was_is_not_delivered(undisturbed, tmp_path, name):
    shutil.copytree(undisturbed[2], tmp_path, dirs_exist_ok=True)
    work(tmp_path, Spy(), methods=("static",))
    net, facts = sep.load(tmp_path / f"{name}.pt")
    models.save(tmp_path / f"{name}.pt", net, facts | dict(validation_accuracy=0.5))
    with pytest.raises(models.Failure, match=f"no net that this run made as its {name}"):
        work(tmp_path, Spy(), methods=("uniform", "lstm", "sep", "static"))


def test_rows_stay_where_the_baseline_is_made_anew_on_another_day(undisturbed, tmp_path):
    results, _, folder = undisturbed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in ("results.json", "baseline.pt"):
        (tmp_path / name).unlink()
    net, facts = sep.load(tmp_path / "uniform.pt")
    older = {k: v for k, v in facts.items() if k not in ("settings", "round_to")} | dict(baseline=facts["baseline"] | dict(seconds=9.9))
    models.save(tmp_path / "uniform.pt", net, older)
    rows = lambda found: sorted(timeless(found)["rows"], key=lambda r: r["method"])
    assert rows(work(tmp_path, spy := Spy())) == rows(results) and spy.epochs == TINY.baseline.epochs


def test_a_run_begun_before_a_setting_came_to_be_goes_on(undisturbed, tmp_path):
    results, _, folder = undisturbed
    shutil.copytree(folder, tmp_path / "run")
    older = json.loads((folder / "results.json").read_text())
    for plan in ("baseline", "recovery", "final"):
        assert older["settings"][plan].pop("temperature") is None
    (tmp_path / "run" / "results.json").write_text(json.dumps(older))
    spy = Spy()
    assert timeless(work(tmp_path / "run", spy))["rows"] == timeless(results)["rows"] and spy.epochs == 0


def test_the_teacher_stays_the_baseline_even_where_the_baseline_itself_is_chosen(tmp_path):
    settings = Settings(**(vars(TINY) | {"recovery": Plan(1, 0.0)}))
    run = Run(tmp_path, settings, HEAD, *tiny_data())
    baseline = run.baseline(fresh=lenet())
    before = {k: v.clone() for k, v in baseline.state_dict().items()}
    for method, target in (("lstm", None), ("uniform", 1e-9)):
        run.method(method, baseline, target)
    assert all(torch.equal(v, before[k]) for k, v in baseline.state_dict().items())
    assert run.row("uniform")["widths"] == list(baseline.widths)


def test_a_search_that_learns_from_all_serves_lstm_and_sep(tmp_path):
    settings, found = Settings(**(vars(TINY) | dict(candidates=3, target=0.6, recovery=Plan(1, 0.05), baseline=Plan(3, 0.1, True)))), []
    for name, methods in (("both", ("lstm", "sep")), ("alone", ("sep", "lstm"))):
        spy = Spy()
        run = Run(tmp_path / name, settings, HEAD, *tiny_data(), spy)
        baseline = run.baseline(fresh=lenet())
        for method in methods:
            run.method(method, baseline, 0.6)
        found.append(timeless({m: run.row(m) for m in methods}))
        assert sum(t.startswith("lstm: candidate") for t in spy.titles) == 3 and sum(t.startswith("sep: candidate") for t in spy.titles) == 1
    hard, soft = (found[0][m] for m in ("lstm", "sep"))
    assert found[0] == found[1] and soft["cut"] >= 0.6
    assert all(a >= b and (a < w) == (b < w) for a, b, w in zip(hard["widths"], soft["widths"], baseline.widths))


@pytest.mark.parametrize("candidates", [None, 3])
def test_a_gated_row_goes_as_near_as_it_can_to_a_cut_that_only_channels_without_gates_reach(candidates, tmp_path):
    settings, spy = Settings(**(vars(TINY) | dict(candidates=candidates, recovery=Plan(1, 0.05), final=Plan(1, 0.01), baseline=Plan(1, 0.1, True)))), Spy()
    run = Run(tmp_path, settings, HEAD, *tiny_data(), spy)
    baseline = run.baseline(fresh=lenet())
    deepest = [1] * len(baseline.widths)
    run.method("sep", baseline, run.cut(models.macs(baseline, deepest)))
    most = run.cut(sep.macs(baseline, deepest))
    assert 0 < run.row("sep")["cut"] <= most and (candidates is None or run.row("sep")["cut"] == most)
    assert any(line.startswith("sep cannot cut") for line in spy.lines)
    asked = Run(tmp_path / "asked", Settings(**(vars(settings) | dict(target=0.9999))), HEAD, *tiny_data(), spy)
    with pytest.raises(models.Failure, match="give a smaller --target"):
        asked.method("sep", asked.baseline(given=baseline), 0.9999)


def test_a_search_whose_state_is_damaged_says_that_it_begins_anew(tmp_path):
    with pytest.raises(Interrupted):
        work(tmp_path, Spy(12), methods=("lstm",))
    state = tmp_path / "lstm-pool" / "search.pt"
    tried = len(torch.load(state, weights_only=True)["tried"])
    state.write_bytes(state.read_bytes()[:300])
    again, whole = Spy(4), Spy(4)
    for spy in (again, whole):
        with pytest.raises(Interrupted):
            work(tmp_path, spy, methods=("lstm",))
    assert tried > 1 and [line for line in again.lines if "begins anew" in line] == [f"{state} is damaged, or was for another target: that search begins anew"]
    assert not any("begins anew" in line for line in whole.lines)  # the new state is a sound one


def test_dice_learn_nothing_and_find_something(tmp_path):
    results = work(tmp_path, Spy(), methods=("random",))
    assert results["rows"][1]["method"] == "random" and results["rows"][1]["cut"] > 0


def test_streams_differ_by_place():
    assert len({stream(*w) for w in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1)]}) == 4 and stream(0, "a") == stream(0, "a")


@pytest.mark.parametrize("arch", ["lenet5", "resnet20"])
def test_weights_whose_gradients_are_computed_apart_learn_the_same(arch):
    torch.manual_seed(0)
    kind = dict(channels=1, size=28) if arch == "lenet5" else {}
    net = models.build(arch, **kind).to(memory_format=torch.channels_last).train()
    x, labels, soft = torch.randn(16, net.channels, net.size, net.size), torch.randint(0, 10, (16,)), torch.full((16, 10), 0.1)
    found = []
    for wanted in (False, True):
        student = deepcopy(net)
        apart = controller.Apart(student) if wanted else None
        step = controller.Step(student, sgd(student, 0.01))
        losses = [step.run(x, labels, soft, apart).item() for _ in range(3)]
        found.append([torch.tensor(losses), *student.state_dict().values()])
    assert found[0][0][-1] < found[0][0][0]
    exact = 2e-4 if arch == "lenet5" else 0  # on a CPU a bias is added before the sum is rounded to bfloat16
    assert all(torch.allclose(a, b, rtol=0, atol=exact) for a, b in zip(*found))
    assert not apart.busy and all(w.grad is not None and w.dtype == torch.float32 for w in apart.cast)
    assert all(w.grad is None for w in apart.cast.values())  # autograd would read these before they are computed


@pytest.mark.parametrize("arch,widths", [("lenet5", (6, 13, 20)), ("resnet20", (5, 16, 9, 20, 32, 1, 64, 33, 40)), ("vgg11", (7, 20, 8, 9, 10, 11, 12, 13))])
def test_a_net_filled_with_zeros_learns_the_same(arch, widths, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(controller, "half", lambda device: torch.autocast(device.type, enabled=False))
    net = models.build(arch, widths, **(dict(channels=1, size=28) if arch == "lenet5" else {})).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.bias.normal_(0, 0.1)
    x, labels, soft = torch.randn(2, 16, net.channels, net.size, net.size), torch.randint(0, 10, (2, 16)), torch.full((16, 10), 0.1)

    def train(net, optimizer, x, labels):
        return controller.Step(net.train(), optimizer).run(x, labels, soft).item()

    other = deepcopy(net)
    optimizer, others = sgd(net, 0.01), sgd(other, 0.01)
    losses = [[train(net, optimizer, x[i % 2], labels[i % 2]) for i in range(4)]]
    losses.append([train(other, others, x[0], labels[0])])
    wide, own = controller.filled(other, others)  # with what the optimizer knows by then
    assert wide.widths == tuple(-(-w // 8) * 8 for w in widths)
    losses[1] += [train(wide, own, x[i % 2], labels[i % 2]) for i in range(1, 4)]
    controller.carry(wide, own, other, others)
    assert torch.allclose(*map(torch.tensor, losses), rtol=1e-4)
    for a, b in zip(net.state_dict().values(), other.state_dict().values()):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    for a, b in zip(net.parameters(), other.parameters()):
        assert torch.allclose(optimizer.state[a]["momentum_buffer"], others.state[b]["momentum_buffer"], rtol=1e-2, atol=1e-4)
    for big, small in zip(wide.parameters(), other.parameters()):
        assert big.count_nonzero() <= small.numel()  # zeros are zeros still
    gated = sep.soften(net, net.widths)
    assert controller.filled(wide, own) == (wide, own) and controller.filled(gated, own) == (gated, own)


@pytest.mark.gpu
def test_a_gpu_run_goes_on_with_the_same_numbers():
    images, ends = few(1000).to("cuda"), []
    for parts in ((4,), (2, 4)):
        net = lenet((6, 13, 20)).to("cuda", memory_format=torch.channels_last)
        optimizer = sgd(net, 0.05)
        for start, stop in zip((0, *parts), parts):
            for epoch, _ in fit(net, images, Plan(4, 0.05, True), optimizer=optimizer, seed=0, start=start):
                if epoch + 1 == stop:
                    break
            state = deepcopy((net.state_dict(), optimizer.state_dict()))
            net, optimizer = lenet((6, 13, 20)).to("cuda", memory_format=torch.channels_last), None
            optimizer = sgd(net, 0.05)
            net.load_state_dict(state[0]), optimizer.load_state_dict(state[1])
        ends.append(state[0])
    assert all(torch.equal(a, b) for a, b in zip(*(e.values() for e in ends)))


@pytest.mark.gpu
def test_a_gpu_run_ends_with_a_net_like_the_cpus():
    device, images = torch.device("cuda"), few(2000)
    found = []
    for where in (device, torch.device("cpu")):
        net = lenet((20, 50, 100)).to(where)
        trained(net, images.to(where), Plan(4, 0.05, True))
        soft = sep.soften(net, (20, 25, 100))
        trained(soft, images.to(where), Plan(1, 0.01), teacher=controller.Teacher(net, images.to(where), 0))
        found.append(accuracy(soft, few(1000, seed=5).to(where)))
    assert abs(found[0] - found[1]) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("gated,layout", [(False, torch.channels_last), (True, torch.channels_last), (False, torch.contiguous_format)])
def test_a_replayed_step_trains_as_plain_ones_do(gated, layout):
    torch.manual_seed(0)
    net = models.build("resnet20").to("cuda", memory_format=layout)
    net = sep.soften(net, [w // 2 for w in net.widths]) if gated else net
    x, labels, soft = torch.randn(128, 3, 32, 32, device="cuda"), torch.randint(0, 10, (128,), device="cuda"), torch.full((128, 10), 0.1, device="cuda")
    rates, losses = [0.0] * 3 + [0.01] * 6, []
    for replayed in (True, False):
        student = deepcopy(net).train()
        optimizer = sgd(student, 0.0)
        step, found = controller.Step(student, optimizer), []
        for lr in rates:
            if not replayed:
                optimizer.param_groups[0]["lr"] = lr
            found.append((step(x, labels, soft, lr) if replayed else step.run(x, labels, soft)).item())
        losses.append(torch.tensor(found))
        optimizer.load_state_dict(deepcopy(optimizer.state_dict()))  # as a resumed run goes on from a file
        assert controller.Step(student, optimizer)(x, labels, soft, 0.0) < losses[-1][-1]
    assert torch.allclose(*losses, rtol=0.02)
    assert all(torch.allclose(v[:4], v[0].expand(4), rtol=1e-3) and v[-1] < 0.98 * v[0] for v in losses)  # a rate of 0 moves nothing
