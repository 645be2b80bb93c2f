import ast
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import typer
from PIL import Image
from test_controller import timeless
from test_models import broken_files

import controller
import models
import sep
import wtp

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def signals():
    kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for n, handler in kept.items():
        signal.signal(n, handler)


def call(capsys, *arguments):
    """(exit status, standard output, standard error) of a command."""
    capsys.readouterr()
    status = wtp.main([str(a) for a in arguments])
    return status, *capsys.readouterr()


def shell(*arguments, **kind):
    return subprocess.run(
        [sys.executable, ROOT / "wtp.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **kind,
    )


# ---- experiments


@pytest.mark.parametrize("name", wtp.EXPERIMENTS)
def test_every_experiment_binds(name):
    e = wtp.EXPERIMENTS[name]
    net = models.build(e.arch, classes=e.classes, channels=e.channels, size=e.size)
    structure = controller.shrink(
        net.widths, controller.Policy()(controller.cells(net, net.widths)).argmax(1).tolist(), 0.2
    )
    x = torch.zeros(2, e.channels, e.size, e.size)
    for make, cost in controller.METHODS.values():
        small = make(net, structure)
        assert small.eval()(x).shape == (2, e.classes) and sep.macs(small) == cost(net, structure)
    assert e.data in controller.STATISTICS and len(controller.STATISTICS[e.data][0]) == e.channels
    for schedule in wtp.SCHEDULES.values():
        settings = wtp.settings_of(e, schedule, 0)
        assert settings.recovery.epochs >= 1 and settings.final.epochs >= 1 and settings.rate == 0.2


@pytest.mark.parametrize("name", wtp.EXPERIMENTS)
def test_a_checkpoint_is_pruned_as_the_experiment_of_its_kind_and_data(name, tmp_path):
    e = wtp.EXPERIMENTS[name]
    net = models.build(e.arch, classes=e.classes, channels=e.channels, size=e.size)
    found = [wtp.data_of(net, facts, tmp_path) for facts in ({"data": e.data}, {})]
    assert found[0].data == e.data
    assert all(
        (f.classes, f.channels, f.cycle_final, f.cycle_lr)
        == (e.classes, e.channels, e.cycle_final, e.cycle_lr)
        for f in found
    )
    fast = wtp.settings_of(e, wtp.SCHEDULES["fast"], 0).final
    assert (fast.epochs, fast.lr) == {"lenet5": (10, 0.02), "resnet56": (20, 0.005)}.get(
        e.arch, (20, 0.01)
    )
    assert fast.temperature == 4


def test_the_published_schedule_is_the_papers():
    cifar, mnist = (
        wtp.settings_of(wtp.EXPERIMENTS[n], wtp.SCHEDULES["published"], 0)
        for n in ("vgg-cifar10", "mnist")
    )
    assert (cifar.rate, cifar.parents, cifar.patience, cifar.candidates, cifar.target) == (
        0.2,
        5,
        10,
        None,
        0.701,
    )
    assert (cifar.recovery, cifar.final) == (
        controller.Plan(30, 0.001),
        controller.Plan(250, 0.001),
    )
    assert (mnist.recovery, mnist.final, mnist.target) == (
        controller.Plan(10, 0.001),
        controller.Plan(100, 0.001),
        None,
    )
    assert wtp.EXPERIMENTS["resnet56-cifar10"].target == 0.475
    assert (controller.MOMENTUM, controller.DECAY, controller.BATCH, controller.VALIDATION) == (
        0.9,
        5e-4,
        128,
        0.1,
    )
    assert (controller.HIDDEN, controller.LAYERS, controller.DROPOUT, controller.ADVANTAGE) == (
        100,
        2,
        0.8,
        10,
    )


def test_what_a_run_may_take_is_counted():
    e = wtp.EXPERIMENTS["resnet56-cifar10"]
    count = lambda name, *methods: wtp.epochs_of(
        wtp.settings_of(e, wtp.SCHEDULES[name], 0), methods, 45_000, baseline=False
    )
    assert count("published", "lstm") == pytest.approx(20 * 5 * 30 + 250 / 0.9) and count(
        "published", "uniform"
    ) == pytest.approx(10 * 30 + 250 / 0.9)
    assert count("fast", "lstm") == pytest.approx(60 * 50 * 128 / 45_000 + 20 / 0.9)
    assert count("fast", "uniform") == pytest.approx(50 * 128 / 45_000 + 20 / 0.9)
    digits = wtp.settings_of(
        wtp.EXPERIMENTS["digits"], wtp.SCHEDULES["smoke"], 0
    )  # no target: the papers' rules
    assert (
        wtp.epochs_of(digits, ["sep"], 2700, False)
        > wtp.epochs_of(digits, ["sep"], 2700, False, landed=True)
        == 1 + 1 / 0.9
    )  # after `lstm`
    assert count("fast", "lstm", "sep") == pytest.approx(61 * 50 * 128 / 45_000 + 40 / 0.9)


# ---- the house


def test_help_comes_without_torch():
    code = "import sys, wtp; status = wtp.main(['--help']); assert status == 0 and 'torch' not in sys.modules and 'rich.progress' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_imports_never_point_back():
    order = ["models", "sep", "controller", "wtp"]
    for name in order:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not found & set(order[order.index(name) :]), name


def readme(language=""):
    """The code blocks of that language in the README."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_every_command_of_the_readme_is_one():
    group = typer.main.get_command(wtp.app)
    found = [
        line.partition("#")[0].split()
        for block in readme() + readme("sh")
        for line in re.findall(r"python wtp\.py (.*)", block)
    ]
    assert {c[0] for c in found} >= {"reproduce", "train", "prune", "evaluate", "export", "report"}
    for name, *arguments in found:
        group.commands[name].make_context(
            name, arguments
        )  # raises where an option or a value is unknown
        assert name != "reproduce" or not arguments or arguments[0] in wtp.EXPERIMENTS


def test_the_readmes_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = sep.soften(models.build("resnet8"), (8, 16, 32))
    models.save(tmp_path / "net-pruned.pt", net, dict(mean=[0.5] * 3, std=[0.2] * 3))
    models.export(net, tmp_path / "net.pt2", [0.5] * 3, [0.2] * 3, 32)
    found = []
    for snippet in readme("python"):
        space = {
            "torch": torch,
            "images": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        }
        exec(snippet, space)
        found.append(space["logits"])
    assert len(found) == 2 and found[0].shape == (2, 10) and torch.allclose(*found, atol=1e-4)
    assert torch.allclose(space["first"], found[1][:1], atol=1e-4)


# ---- the commands, from end to end


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(run folder, standard output, standard error) of a whole smoke run."""
    folder = tmp_path_factory.mktemp("smoke")
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        assert (
            wtp.main(["reproduce", "digits", "--schedule", "smoke", "--out", str(folder)]) == 0
        ), err.getvalue()
    return folder / "digits-smoke-s0", out.getvalue(), err.getvalue()


def test_reproduce_makes_every_row(smoke):
    folder, out, err = smoke
    results = json.loads((folder / "results.json").read_text())
    assert [r["method"] for r in results["rows"]] == ["baseline", "lstm", "sep", "uniform"]
    assert (results["experiment"], results["schedule"], results["data"], results["seed"]) == (
        "digits",
        "smoke",
        "digits",
        0,
    )
    rows = {r["method"]: r for r in results["rows"]}
    assert min(r["test_accuracy"] for r in rows.values()) > 0.6 and rows["lstm"]["cut"] > 0.2
    assert (
        abs(rows["uniform"]["cut"] - rows["lstm"]["cut"]) < 0.005
        and abs(rows["sep"]["cut"] - rows["lstm"]["cut"]) < 0.05
    )
    title = "digits, smoke schedule, data digits (2,000 test images), seed 0"
    assert out.count("smoke: a test of the machinery; these accuracies are no result\n") == 1
    for words in (
        title,
        "uniform keeps conv1 ",
        "lstm tried",
        f"{rows['lstm']['test_accuracy']:.2%}",
    ):
        assert words in out
    assert (
        "up to about 44 epochs" in err
        and "for this epoch" in err
        and "baseline: epoch 1/6" in err
        and "\x1b" not in err
    )


def test_kill_and_go_on(capsys, smoke, tmp_path, monkeypatch):
    expected = json.loads((smoke[0] / "results.json").read_text())
    command = ["reproduce", "digits", "--schedule", "smoke", "--method", "lstm", "--out", tmp_path]
    with subprocess.Popen(
        [sys.executable, ROOT / "wtp.py", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as p:
        lines = []
        for line in p.stderr:
            lines.append(line)
            if line.startswith("baseline: epoch 4"):
                p.kill()
        assert p.wait() == -signal.SIGKILL and "Traceback" not in "".join(lines)
    with monkeypatch.context() as patch:
        stage = wtp.Screen.stage
        patch.setattr(
            wtp.Screen,
            "stage",
            lambda *a: (
                stage(*a)
                or (a[1].startswith("lstm: candidate 3") and signal.raise_signal(signal.SIGTERM))
            ),
        )
        status, _, err = call(capsys, *command)
    assert (
        status == 143
        and "baseline: goes on after epoch" in err
        and "goes on where it was" in err.splitlines()[-1]
    )
    status, _, err = call(capsys, *command)
    assert status == 0 and "baseline: epoch" not in err and "lstm: candidate 2" not in err, err
    found, whole = (
        timeless(r)
        for r in (json.loads((tmp_path / "digits-smoke-s0" / "results.json").read_text()), expected)
    )
    assert found["rows"] == whole["rows"][:2] and found["search"]["lstm"] == whole["search"]["lstm"]
    assert found["curves"] == {m: whole["curves"][m] for m in ("baseline", "lstm")} and list(
        found["curves"]
    ) == ["baseline", "lstm"]


def test_two_processes_do_not_share_a_folder(capsys, tmp_path):
    (tmp_path / "digits-smoke-s0").mkdir()
    lock = (tmp_path / "digits-smoke-s0" / "lock").open("w")
    controller.fcntl.flock(lock, controller.fcntl.LOCK_EX)
    status, _, err = call(capsys, "train", "digits", "--schedule", "smoke", "--out", tmp_path)
    assert status == 1 and "in use by another process" in err


@pytest.mark.parametrize("method", ["lstm", "sep"])
def test_prune_and_evaluate_a_checkpoint_of_the_users(capsys, smoke, tmp_path, method):
    net, facts = sep.load(smoke[0] / "baseline.pt")
    models.save(tmp_path / "my.pt", net, {"data": facts["data"]})
    given = (tmp_path / "my.pt").read_bytes()
    command = [
        "prune",
        tmp_path / "my.pt",
        "--rate",
        "0.5",
        "--target",
        "0.6",
        "--method",
        method,
        "--schedule",
        "smoke",
        "--out",
        tmp_path / "runs",
    ]
    status, out, err = call(capsys, *command)
    assert status == 0, err
    small, facts = sep.load(tmp_path / "my-pruned.pt")
    cut = 1 - sep.macs(small) / sep.macs(net)
    assert (
        0.6 <= cut < 0.66
        and (small.gates is not None) == (method == "sep")
        and "my-pruned.pt" in out
    )
    assert (tmp_path / "my.pt").read_bytes() == given
    status, out, _ = call(capsys, "evaluate", tmp_path / "my-pruned.pt")
    assert status == 0 and "latency, batch 128" in out
    pruned = [p.layer for p, k, w in zip(net.prunable, small.structure, net.widths) if k < w]
    shown = re.search("kernels used for no image / some / all: (.*)", out)
    assert pruned and (
        re.findall(r"(\w+) \d+/\d+/\d+", shown[1]) == pruned if method == "sep" else shown is None
    )
    for value in (
        f"{facts['macs'] / 1e6:.3f} M",
        "2.293 M",
        f"{1 - cut:.3f}",
        f"{facts['parameters']:,}",
    ):
        assert value in out
    status, _, err = call(capsys, *command)
    assert status == 2 and "exists already" in err


def test_gates_become_a_plain_small_net(capsys, smoke, tmp_path):
    shutil.copyfile(smoke[0] / "baseline.pt", tmp_path / "my.pt")
    common = ["--rate", "0.5", "--target", "0.6", "--schedule", "smoke", "--out", tmp_path / "runs"]
    status, out, err = call(
        capsys, "prune", tmp_path / "my.pt", *common, "--method", "sep", "--static"
    )
    assert status == 0 and "static begins with sep's net" in out, err
    small = sep.load(tmp_path / "my-pruned.pt")[0]
    folder = next((tmp_path / "runs").iterdir())
    gated, rows = (
        sep.load(folder / "sep.pt")[0],
        {r["method"]: r for r in json.loads((folder / "results.json").read_text())["rows"]},
    )
    assert (
        small.gates is None
        and small.widths == gated.structure
        and models.parameters(small) < models.parameters(gated) / 1.5
    )
    assert (
        rows["static"]["cut"] > rows["sep"]["cut"]
        and abs(rows["static"]["test_accuracy"] - rows["sep"]["test_accuracy"]) < 0.15
    )
    status, out, err = call(capsys, "export", folder / "sep.pt", tmp_path / "plain.pt2", "--static")
    assert (
        status == 0
        and "after 46 steps of recovery" in out
        and "wrote" in out
        and "masks them" not in out
    ), err
    status, out, err = call(capsys, "export", folder / "sep.pt", tmp_path / "gated.pt2")
    assert status == 0 and "masks them; --static makes" in out, err
    assert (tmp_path / "plain.pt2").stat().st_size < (tmp_path / "gated.pt2").stat().st_size / 1.5


def test_widths_that_machines_like(capsys, smoke, tmp_path):
    shutil.copyfile(smoke[0] / "baseline.pt", tmp_path / "my.pt")
    command = [
        "prune",
        tmp_path / "my.pt",
        "--method",
        "uniform",
        "--target",
        "0.6",
        "--schedule",
        "smoke",
        "--out",
        tmp_path / "runs",
        "--round-to",
    ]
    status, out, err = call(capsys, *command, "4")
    small = sep.load(tmp_path / "my-pruned.pt")[0]
    assert (
        status == 0
        and all(k % 4 == 0 for k in small.widths)
        and 1 - sep.macs(small) / 2293000 >= 0.6
    ), err
    side = r"(\d+-\d+-\d+), validation accuracy [\d.]+%, cut [\d.]+%, [\d.]+ ms an image, [\d.]+ ms for 128"
    found = re.search(f"uniform, widths at multiples of 4: {side} -> {side}\n", out)
    assert found and found[2] == "-".join(map(str, small.widths)) != found[1]
    for multiple, words in (
        ("20", "cannot cut 60%"),
        ("1000", "no layer of this net is 1000 wide"),
    ):
        status, out, err = call(capsys, *command, multiple, "--output", tmp_path / "b.pt")
        assert (
            status == 2
            and words in err
            and "smaller --round-to" in err
            and err.count("\n") == 1
            and not out
        )


def test_a_report_shows_a_run_again(capsys, smoke, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(smoke[0], folder)
    made = (folder / "report.svg").read_bytes()
    (folder / "report.svg").unlink()
    status, out, err = call(capsys, "report", folder)
    assert status == 0 and (folder / "report.svg").read_bytes() == made, err
    assert out.splitlines()[:-1] == smoke[1].splitlines()[:-1]
    picture = "".join(ElementTree.fromstring(made).itertext()).replace("\xa0", " ")
    for words in (
        "channels kept in each layer",
        "conv2 ",
        "lstm: validation accuracy of each candidate",
        "◆",
        "baseline, loss",
        "digits, smoke",
    ):
        assert words in picture, words
    results = json.loads((folder / "results.json").read_text())
    results["curves"]["lstm"] = [[0.1, 0.9], [float("nan"), 0.1], [float("inf"), None]]
    del results["layers"]  # as a run of an earlier version has none
    wtp.draw(results, folder / "report.svg")
    assert "conv2" not in (folder / "report.svg").read_text()
    assert b"http" not in made.replace(b"http://www.w3.org/2000/svg", b"").replace(
        b"https://www.textualize.io", b""
    )
    results = json.loads((smoke[0] / "results.json").read_text())
    lacking = results | {
        "rows": [{k: v for k, v in r.items() if k != "widths"} for r in results["rows"]]
    }
    odd = results | {
        "search": {"lstm": [c | {"structure": [1]} for c in results["search"]["lstm"]]}
    }
    wrong = results | {"rows": [results["rows"][0] | {"cut": "x"}]}
    for content in (
        {},
        [],
        {"rows": [{}], "search": {}, "seconds": 1},
        lacking,
        odd,
        wrong,
        results | {"seconds": "x"},
    ):
        (folder / "results.json").write_text(json.dumps(content))
        status, out, err = call(capsys, "report", folder)
        assert (
            status == 1 and "is damaged, or was edited" in err and err.count("\n") == 1 and not out
        ), err
    (tmp_path / "digits-smoke-s0").mkdir()
    (tmp_path / "digits-smoke-s0" / "results.json").write_text(json.dumps(lacking))
    status, out, err = call(capsys, "reproduce", "digits", "--schedule", "smoke", "--out", tmp_path)
    assert (
        status == 1
        and "is damaged, or was edited: it is not what a run writes; --fresh" in err
        and not out
    )


def test_export_writes_what_other_programs_run(capsys, smoke, tmp_path):
    shutil.copyfile(smoke[0] / "lstm.pt", tmp_path / "net.pt")
    command = ["export", tmp_path / "net.pt", tmp_path / "net.pt2"]
    status, out, err = call(capsys, *command)
    assert (
        status == 0
        and "images (batch, 1, 28, 28) in [0, 1] to logits (batch, 10)" in out
        and "largest difference" in out
    ), err
    net, facts = sep.load(tmp_path / "net.pt")
    images = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        want = net.eval()((images - facts["mean"][0]) / facts["std"][0])
        assert torch.allclose(
            torch.export.load(tmp_path / "net.pt2").module()(images), want, atol=1e-4
        )
    (tmp_path / "net.pt2").write_text("mine")
    (tmp_path / "net.pt2.part").write_text("mine")
    status, out, err = call(capsys, *command)
    assert (
        status == 2
        and "--force overwrites it" in err
        and (tmp_path / "net.pt2.part").read_text() == "mine"
        and (tmp_path / "net.pt2").read_text() == "mine"
    )
    assert (
        call(capsys, *command, "--force")[0] == 0 and (tmp_path / "net.pt2").stat().st_size > 1000
    )


def test_train_writes_the_baseline_and_keeps_results_that_cannot_be_read(capsys, smoke, tmp_path):
    command = [
        "train",
        "digits",
        "--schedule",
        "smoke",
        "--out",
        tmp_path,
        "--output",
        tmp_path / "net.pt",
    ]
    (tmp_path / "digits-smoke-s0").mkdir()
    for content in ("[]", "{half"):
        (tmp_path / "digits-smoke-s0" / "results.json").write_text(content)
        status, _, err = call(capsys, *command)
        assert (
            status == 1
            and "results.json" in err
            and "--fresh" in err
            and (tmp_path / "digits-smoke-s0" / "results.json").read_text() == content
        )
    status, out, err = call(capsys, *command, "--fresh")
    assert status == 0 and "net.pt" in out, err
    a, b = (sep.load(f)[0].state_dict() for f in (tmp_path / "net.pt", smoke[0] / "baseline.pt"))
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and a.keys() == b.keys()


def test_a_long_epoch_says_before_its_end_how_long_a_run_may_take(capsys, monkeypatch):
    monkeypatch.setattr(wtp, "SILENCE", -1)
    screen = wtp.Screen()
    screen.plan(10, 4)
    screen.stage("a", 2, 0)
    steps = screen.steps(range(4))
    next(steps), next(steps)
    assert re.fullmatch(
        r"0\.0 s for this epoch: 0 s for all, less as the nets get smaller\n",
        capsys.readouterr().err,
    )
    list(steps), list(screen.steps(range(4)))
    assert not capsys.readouterr().err  # once


def test_the_first_of_many_short_trainings_is_no_measure(capsys):
    screen = wtp.Screen()
    screen.plan(10, 8)
    for seconds, told in (
        (9.0, ""),
        (1.0, "1.0 s for 50% of an epoch: 20 s for all, less as the nets get smaller"),
        (1.0, ""),
    ):
        screen.stage("a", 1, 0)
        list(screen.steps(range(4)))
        screen.epoch("a", 0, 1, 0.1, 0.9, seconds)
        assert capsys.readouterr().err.splitlines()[1:] == [told] * bool(told)


def test_a_search_that_goes_on_is_reported_as_such(capsys, smoke, tmp_path):
    results = json.loads((smoke[0] / "results.json").read_text())
    results["rows"] = [r for r in results["rows"] if r["method"] != "lstm"]
    results["search"]["random"] = results["search"]["lstm"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    status, out, err = call(capsys, "report", tmp_path)
    assert (
        status == 0
        and re.search(r"random tried \d+ candidates so far", out)
        and not re.search(r"(lstm|sep) tried \d+ candidates so far", out)
    ), err
    picture = "".join(
        ElementTree.fromstring((tmp_path / "report.svg").read_text()).itertext()
    ).replace("\xa0", " ")
    assert (
        "random: validation accuracy of each candidate; o among" in picture and "◆" not in picture
    )  # nothing is chosen yet


def test_reproduce_alone_lists_the_experiments(capsys, monkeypatch):
    assert (
        controller.speed(models.build("lenet5", channels=1, size=28), torch.device("cpu")) > 100
    )  # images a second
    monkeypatch.setattr(controller, "speed", lambda net, device: 1000.0)
    status, out, _ = call(capsys, "reproduce")
    assert status == 0 and all(name in out for name in wtp.EXPERIMENTS) and "70.1%" in out
    assert max(map(len, out.splitlines())) <= 80


def picture_folder(folder, classes=3, count=40, size=28):
    from torchvision.utils import save_image

    torch.manual_seed(0)
    for part in ("train", "test"):
        for c in range(classes):
            (folder / part / f"class{c}").mkdir(parents=True)
            for i in range(count):
                image = torch.rand(1, size, size) * 0.3
                image[0, :, c * size // classes : (c + 1) * size // classes] += 0.7
                save_image(image, folder / part / f"class{c}" / f"{i}.png")


def test_a_users_own_images_are_a_data_set(capsys, tmp_path, monkeypatch):
    picture_folder(tmp_path / "pictures")
    places = ["--out", tmp_path / "runs", "--data-dir", tmp_path / "pictures"]
    for hidden in (
        "train/.ipynb_checkpoints/a.png",
        "train/class0/._1.png",
        "test/class0/.DS_Store",
        "train/class0/.old/a.png",
    ):
        (tmp_path / "pictures" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "pictures" / hidden).write_bytes(b"not an image")
    monkeypatch.chdir(tmp_path)
    status, out, err = call(
        capsys, "reproduce", "mnist", "--method", "lstm", "--schedule", "smoke", *places
    )
    assert status == 0, err
    made = tmp_path / "runs/mnist-on-pictures-smoke-s0/lstm.pt"
    assert (
        f"data images in {tmp_path / 'pictures'} (120 test images)" in out
        and sep.load(made)[0].classes == 3
    )
    status, out, err = call(capsys, "evaluate", made, "--data-dir", "pictures")  # the same folder
    assert status == 0 and "120 test images" in out and "trained on" not in err, err
    status, out, err = call(capsys, "evaluate", made)
    assert (
        status == 2
        and f"the net was trained on images in {tmp_path / 'pictures'}; name that folder" in err
        and err.count("\n") == 1
        and not out
    ), err
    a, b = (next((tmp_path / f"pictures/train/class{c}").glob("*.png")) for c in (0, 1))
    a.rename(tmp_path / "a.png"), b.rename(a), (tmp_path / "a.png").rename(b)  # as many as before
    status, out, err = call(
        capsys, "reproduce", "mnist", "--method", "lstm", "--schedule", "smoke", *places
    )
    assert status == 2 and "holds a run with other images;" in err and err.count("\n") == 1, err
    a.unlink()
    status, out, err = call(
        capsys, "reproduce", "mnist", "--method", "lstm", "--schedule", "smoke", *places
    )
    assert status == 2 and "holds a run with other train_images" in err and err.count("\n") == 1, (
        err
    )
    for part in ("train", "test"):
        (tmp_path / "pictures" / part / "class1").rename(tmp_path / "pictures" / part / "other")
    status, out, err = call(capsys, "evaluate", made, "--data-dir", "pictures")
    assert (
        status == 1
        and "not the classes that the net was trained on (other, class1 in one of the two alone)"
        in err
        and err.count("\n") == 1
    ), err


def damage(folder, how):
    from torchvision.utils import save_image

    if how == "sizes":
        for f in (folder / "test").rglob("*.png"):
            save_image(torch.rand(1, 32, 32), f)
    elif how == "oblong":
        for f in folder.rglob("*.png"):
            save_image(torch.rand(1, 28, 40), f)
    elif how == "classes":
        shutil.rmtree(folder / "test" / "class0")
    elif how == "one":
        for name in ("class1", "class2"):
            shutil.rmtree(folder / "train" / name), shutil.rmtree(folder / "test" / name)
    elif how == "hidden":
        for part in ("train", "test"):
            shutil.rmtree(folder / part)
            (folder / part / ".class").mkdir(parents=True)
    elif how == "empty":
        for f in (folder / "train" / "class1").iterdir():
            f.unlink()
    elif how == "deep":
        Image.fromarray(torch.full((28, 28), 3000).numpy().astype("uint16")).save(
            next((folder / "train" / "class1").iterdir())
        )
    else:
        next((folder / "train" / "class1").iterdir()).write_bytes(b"no image")


@pytest.mark.parametrize(
    "how, words",
    [
        ("sizes", "has 32 x 32 pixels"),
        ("oblong", "has 40 x 28 pixels"),
        ("classes", "different classes (class0)"),
        ("empty", "class1"),
        ("one", "has one class alone, class0"),
        ("hidden", "no folder of a class"),
        ("bytes", "cannot be read as an image"),
        ("deep", "cannot be read as an image of 8 bits a channel"),
        ("few", "12 training images are too few: 10% of them validate, so at least 100"),
    ],
)
def test_own_images_that_do_not_fit_get_one_line(capsys, tmp_path, how, words):
    picture_folder(tmp_path / "p", count=4)
    damage(tmp_path / "p", how) if how != "few" else None
    run = tmp_path / "runs/mnist-on-p-smoke-s0"
    run.mkdir(parents=True)
    (run / "baseline.pt").write_text("kept")
    status, out, err = call(
        capsys,
        "train",
        "mnist",
        "--schedule",
        "smoke",
        "--out",
        tmp_path / "runs",
        "--data-dir",
        tmp_path / "p",
        "--fresh",
    )
    assert (run / "baseline.pt").read_text() == "kept"
    assert (
        status == 1
        and (how == "few" or str(tmp_path / "p") in err)
        and words in err
        and err.count("\n") == 1
        and not out
    )


def test_a_folder_that_was_not_there_is_not_left_behind(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    status, _, err = call(
        capsys, "train", "mnist", "--out", tmp_path / "runs", "--data-dir", tmp_path / "typo" / "er"
    )
    assert status == 1 and "no complete mnist data" in err and not (tmp_path / "typo").exists()
    (tmp_path / "MNIST").mkdir()
    status, _, err = call(
        capsys, "train", "mnist", "--out", tmp_path / "runs", "--data-dir", tmp_path / "MNIST"
    )
    assert (
        status == 1
        and "the folder above that one" in err
        and not any((tmp_path / "MNIST").iterdir())
    )


def test_a_strangers_net_is_read_with_the_statistics_that_serve_it_best(
    capsys, smoke, tmp_path, monkeypatch
):
    net = sep.load(smoke[0] / "baseline.pt")[0]
    mean, std = controller.STATISTICS["digits"]
    with torch.no_grad():  # the same net for pixels that are normalised with mean and std 0.5
        net.conv1.bias += net.conv1.weight.sum((1, 2, 3)) * (0.5 - mean[0]) / std[0]
        net.conv1.weight *= 0.5 / std[0]
    torch.save({"net": net.state_dict()}, tmp_path / "a.pt")
    images = controller.load_data("digits", tmp_path)[0]
    text, *found = controller.statistics_of(net, images, 0)
    assert found == [(0.5,), (0.5,)] and "mean and std 0.5" in text
    shutil.copyfile(
        smoke[0] / "baseline.pt", tmp_path / "given.pt"
    )  # to `digits`: a state dict alone would be taken for MNIST's
    command = [
        "reproduce",
        "digits",
        "--schedule",
        "smoke",
        "--method",
        "uniform",
        "--method",
        "lstm",
        "--out",
        tmp_path,
        "--baseline",
        tmp_path / "given.pt",
    ]
    status, _, err = call(capsys, *command)
    assert status == 0 and "baseline: epoch" not in err and "was trained on" not in err, err
    rows = [
        json.loads((f / "results.json").read_text())["rows"]
        for f in (smoke[0], tmp_path / "digits-smoke-s0-from-given")
    ]
    for key in ("test_accuracy", "validation_accuracy", "widths"):
        assert [r[key] for r in rows[0] if r["method"] != "sep"] == [r[key] for r in rows[1]], key
    found = models.read(tmp_path / "given.pt")
    models.write(tmp_path / "mnists.pt", found | dict(facts=found["facts"] | dict(data="mnist")))
    command[-3], command[-1] = tmp_path / "other", tmp_path / "mnists.pt"
    monkeypatch.setattr(controller.Run, "baseline", lambda *_, **__: sys.exit(3))
    with pytest.raises(SystemExit):
        call(capsys, *command)
    assert "the net was trained on mnist, and is pruned on digits\n" in capsys.readouterr().err


def test_weights_for_other_classes_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        controller,
        "from_torchvision",
        lambda *_: (torch.zeros(200, 32, 32, 3, dtype=torch.uint8), torch.arange(200) % 10),
    )
    torch.save(
        {"state_dict": models.build("resnet56", classes=100).state_dict()}, tmp_path / "hundred.th"
    )
    command = [
        "reproduce",
        "resnet56-cifar10",
        "--baseline",
        tmp_path / "hundred.th",
        "--out",
        tmp_path / "runs",
        "--data-dir",
        tmp_path,
    ]
    status, out, err = call(capsys, *command)
    assert (
        status == 1
        and "images of 100 classes; cifar10 has 3 x 32 x 32 images of 10 classes" in err
        and err.count("\n") == 1
        and not out
    ), err
    assert not (tmp_path / "runs").exists()


def test_a_damaged_run_says_what_to_do(capsys, smoke, tmp_path):
    folder = tmp_path / "digits-smoke-s0"
    shutil.copytree(smoke[0], folder)
    again = ["reproduce", "digits", "--schedule", "smoke", "--out", tmp_path]
    (folder / "lstm.pt").unlink()
    status, out, err = call(capsys, *again)
    assert status == 0 and "lstm.pt is gone or damaged" in err and "sep keeps" in out
    content = bytearray((folder / "baseline.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "baseline.pt").write_bytes(content)
    status, out, err = call(capsys, *again)
    assert (
        status == 1
        and "baseline.pt is damaged" in err
        and "--fresh starts the run over" in err
        and not out
    )


EDITS = [
    lambda r: r.pop("settings"),
    lambda r: r.pop("device"),
    lambda r: r["settings"].pop("target"),
    lambda r: r["rows"][0].update(method="mine"),
    lambda r: r["search"]["lstm"][0].update(cuts=1),
    lambda r: r["search"]["lstm"][0].pop("epoch"),
    lambda r: r.update(curves={"lstm": [1]}),
    lambda r: r.update(rows=""),
    lambda r: r.update(layers=7),
    lambda r: r.update(layers=["conv1", "conv2"]),
]


@pytest.mark.parametrize("edit", EDITS)
def test_edited_results_are_no_traceback(capsys, smoke, tmp_path, edit):
    folder = tmp_path / "digits-smoke-s0"
    shutil.copytree(smoke[0], folder)
    results = json.loads((folder / "results.json").read_text())
    edit(results)
    (folder / "results.json").write_text(json.dumps(results))
    for command in (
        ["report", folder],
        ["reproduce", "digits", "--schedule", "smoke", "--out", tmp_path],
    ):
        status, _, err = call(capsys, *command)
        assert status == 1 and "results.json is damaged" in err and err.count("\n") == 1, err


def test_a_damaged_row_is_not_delivered(capsys, smoke, tmp_path):
    shutil.copyfile(smoke[0] / "lstm.pt", tmp_path / "made.pt")
    wtp.deliver(tmp_path / "made.pt", tmp_path / "a.pt")
    content = bytearray((tmp_path / "made.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "made.pt").write_bytes(content)
    for name in ("made.pt", "gone.pt"):
        with pytest.raises(models.Failure, match=f"{name} is gone or damaged; --fresh"):
            wtp.deliver(tmp_path / name, tmp_path / "b.pt")
    assert (tmp_path / "a.pt").exists() and not (tmp_path / "b.pt").exists()


def test_a_runs_own_files_are_no_output(capsys, smoke, tmp_path):
    before = sorted(smoke[0].iterdir())
    shutil.copyfile(smoke[0] / "baseline.pt", tmp_path / "net.pt")
    own = tmp_path / "runs/prune-net-lstm-target0.5-smoke-s0"
    for command in (
        ["train", "digits", "--output", smoke[0] / "static.pt"],
        [
            "train",
            "digits",
            "--schedule",
            "smoke",
            "--out",
            tmp_path / "runs",
            "--output",
            tmp_path / "runs/digits-smoke-s0/baseline.pt",
        ],
        [
            "prune",
            tmp_path / "net.pt",
            "--target",
            "0.5",
            "--schedule",
            "smoke",
            "--out",
            tmp_path / "runs",
            "--output",
            own / "lstm.pt",
        ],
    ):
        status, out, err = call(capsys, *command)
        assert (
            status == 2
            and "is a run's own file; give another --output" in err
            and err.count("\n") == 1
            and not out
        ), err
    assert sorted(smoke[0].iterdir()) == before and not (tmp_path / "runs").exists()


def test_a_terminal_without_utf_8_is_no_traceback(smoke, tmp_path):
    shutil.copyfile(smoke[0] / "lstm.pt", tmp_path / "網.pt")
    for coding in ("ascii", "latin-1"):
        done = shell(
            "export",
            tmp_path / "網.pt",
            tmp_path / "網.pt",
            env=os.environ | {"PYTHONIOENCODING": coding},
        )
        assert done.returncode == 2 and "?.pt" in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )


def test_a_target_out_of_reach_is_refused(capsys, smoke, tmp_path):
    shutil.copyfile(smoke[0] / "baseline.pt", tmp_path / "my.pt")
    status, out, err = call(
        capsys,
        "prune",
        tmp_path / "my.pt",
        "--target",
        "0.9999",
        "--schedule",
        "smoke",
        "--out",
        tmp_path,
    )
    assert (
        status == 2
        and "with one channel left in every layer this net cannot cut 99.99%, 99." in err
        and err.count("\n") == 1
        and not out
    )


# ---- bad input: one clear line, the right status, nothing overwritten


def tree(folder):
    return {
        p: hashlib.md5(p.read_bytes()).hexdigest() for p in Path(folder).rglob("*") if p.is_file()
    }


WRONG = [
    (2, "unknown experiment 'imagenet'", ["reproduce", "imagenet"]),
    (2, "unknown experiment 'imagenet'", ["train", "imagenet"]),
    (
        2,
        "uniform needs a cut to land on; give --target",
        ["prune", "net.pt", "--method", "uniform"],
    ),
    (2, "no checkpoint gone.pt", ["prune", "gone.pt"]),
    (2, "no checkpoint gone.pt", ["evaluate", "gone.pt"]),
    (2, "folder is a folder, not a checkpoint", ["evaluate", "folder"]),
    (2, "1.0 is not between 0 and 1", ["prune", "net.pt", "--rate", "1"]),
    (2, "-0.1 is not between 0 and 1", ["prune", "net.pt", "--rate", "-0.1"]),
    (2, "nan is not between 0 and 1", ["prune", "net.pt", "--rate", "nan"]),
    (2, "0.0 is not between 0 and 1", ["prune", "net.pt", "--target", "0"]),
    (2, "7.0 is not between 0 and 1", ["prune", "net.pt", "--target", "7"]),
    (2, "--rate", ["prune", "net.pt", "--rate", "lots"]),
    (2, "--speed", ["reproduce", "mnist", "--speed"]),
    (2, "quick", ["reproduce", "mnist", "--schedule", "quick"]),
    (2, "magic", ["reproduce", "mnist", "--method", "magic"]),
    (2, "magic", ["magic"]),
    (2, "name an experiment: ", ["reproduce", "--method", "lstm"]),
    (
        2,
        "cannot take images of 40 x 40 pixels",
        ["export", "soft.pt", "a.pt2", "--static", "--size", "40"],
    ),
    (2, "give one --method", ["prune", "net.pt", "--method", "sep", "--method", "lstm"]),
    (2, "--seed", ["reproduce", "digits", "--seed", "-1"]),
    (2, ". is a folder", ["prune", "."]),
    (2, "device 'meta' cannot be used", ["reproduce", "digits", "--device", "meta"]),
    (2, "device 'tpu9' cannot be used", ["reproduce", "digits", "--device", "tpu9"]),
    (2, "taken.pt exists already", ["prune", "net.pt", "--output", "taken.pt"]),
    (2, "taken.pt exists already", ["train", "digits", "--output", "taken.pt"]),
    (2, "no folder nowhere", ["prune", "net.pt", "--output", "nowhere/a.pt"]),
    (1, "cannot write", ["reproduce", "digits", "--schedule", "smoke", "--out", "taken.pt"]),
    (1, "cannot write", ["prune", "drawn.pt", "--schedule", "smoke", "--out", "/proc/nothing"]),
    (1, "no complete mnist data", ["evaluate", "net.pt", "--data-dir", "folder"]),
    (1, "no complete mnist data", ["reproduce", "mnist", "--data-dir", "folder"]),
    (1, "no complete cifar10 data", ["reproduce", "vgg-cifar10", "--data-dir", "taken.pt"]),
    (1, "no data set here has 2 channels", ["evaluate", "odd.pt"]),
    (1, "the net reads 1 x 32 x 32 images", ["evaluate", "large.pt"]),
    (
        2,
        "uniform needs a cut",
        ["reproduce", "digits", "--schedule", "smoke", "--method", "uniform"],
    ),
    (
        2,
        "uniform needs a cut",
        [
            "reproduce",
            "digits",
            "--schedule",
            "smoke",
            "--method",
            "uniform",
            "--fresh",
            "--out",
            "old",
        ],
    ),
    (1, "vgg16 needs images of at least 32 x 32", ["evaluate", "vgg.pt", "--data-dir", "small"]),
    (2, "soft-pruned already", ["prune", "soft.pt"]),
    (2, "no checkpoint gone.pt", ["reproduce", "digits", "--baseline", "gone.pt"]),
    (2, "is a lenet5", ["reproduce", "vgg-cifar10", "--baseline", "net.pt"]),
    (2, "is a lenet5 of widths (10, 20, 30)", ["reproduce", "digits", "--baseline", "small.pt"]),
    (
        1,
        "the net reads 1 x 28 x 28 images of 7 classes",
        ["reproduce", "digits", "--baseline", "seven.pt"],
    ),
    (1, "half has train/ alone", ["evaluate", "net.pt", "--data-dir", "half"]),
    (
        2,
        "a.tflite: the ending says the format, .pt2 (torch.export) or .onnx",
        ["export", "net.pt", "a.tflite"],
    ),
    (2, "dir.onnx is a folder", ["export", "net.pt", "dir.onnx"]),
    (2, "taken.onnx is an export, not a checkpoint", ["evaluate", "taken.onnx"]),
    (
        2,
        "a.onnx would be a checkpoint under an export's ending",
        ["prune", "drawn.pt", "--output", "a.onnx"],
    ),
    (2, "taken.onnx exists already and is kept; --force", ["export", "net.pt", "taken.onnx"]),
    (2, "dangling.pt2 exists already and is kept; --force", ["export", "net.pt", "dangling.pt2"]),
    (2, "no folder nowhere", ["export", "net.pt", "nowhere/a.pt2"]),
    (2, "no checkpoint gone.pt", ["export", "gone.pt", "a.pt2"]),
    (2, "cannot take images of 40 x 40 pixels", ["export", "drawn.pt", "a.pt2", "--size", "40"]),
    (2, "drawn.pt has no gates", ["export", "drawn.pt", "a.pt2", "--static"]),
    (2, "lstm has no gates", ["prune", "drawn.pt", "--static"]),
    (2, "--round-to", ["prune", "drawn.pt", "--round-to", "0"]),
    (2, "folder is no run folder", ["report", "folder"]),
    (2, "gone is no run folder", ["report", "gone"]),
    (2, "digits are drawn", ["evaluate", "drawn.pt", "--data-dir", "pictures"]),
]


@pytest.mark.parametrize(
    ("status", "words", "arguments"),
    WRONG,
    ids=lambda v: "-".join(v) if isinstance(v, list) else "",
)
def test_wrong_calls_get_one_line(capsys, smoke, tmp_path, monkeypatch, status, words, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    net = models.build("lenet5", channels=1, size=28)
    models.save(tmp_path / "net.pt", net, {})
    models.save(tmp_path / "drawn.pt", net, {"data": "digits", "mean": [0.16], "std": [0.33]})
    models.save(tmp_path / "soft.pt", sep.soften(net, (10, 20, 30)), {})
    models.save(tmp_path / "odd.pt", models.build("vgg16", [2] * 13, channels=2), {})
    models.save(
        tmp_path / "large.pt", models.build("lenet5", channels=1, size=32), {"data": "digits"}
    )
    models.save(
        tmp_path / "small.pt", models.build("lenet5", (10, 20, 30), channels=1, size=28), {}
    )
    models.save(tmp_path / "seven.pt", models.build("lenet5", channels=1, size=28, classes=7), {})
    (tmp_path / "taken.pt").write_text("mine")
    (tmp_path / "taken.onnx").write_text("mine")
    (tmp_path / "dangling.pt2").symlink_to("unmounted/net.pt2")
    for name in ("folder", "dir.onnx", "half/train", "pictures/train", "pictures/test"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copytree(smoke[0], tmp_path / "old" / "digits-smoke-s0")
    torch.save(models.build("vgg16", [2] * 13, classes=2).state_dict(), tmp_path / "vgg.pt")
    picture_folder(tmp_path / "small", classes=2, count=6)
    before = tree(tmp_path)
    got, out, err = call(capsys, *arguments)
    assert got == status and words in err and "Traceback" not in err and not out, err
    assert err.count("\n") == 1
    assert before.items() <= tree(tmp_path).items()


def no_network(*_, **__):
    raise OSError("there is no network")


def test_broken_checkpoints_get_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in broken_files(tmp_path):
        for command in ("evaluate", "prune"):
            status, out, err = call(capsys, command, name)
            assert status == 1 and name in err and err.count("\n") == 1 and not out, err
    assert not (tmp_path / "hacked").exists() and not list(tmp_path.glob("*-pruned.pt"))


def test_ctrl_c_while_nothing_runs_yet(tmp_path):
    with subprocess.Popen(
        [sys.executable, ROOT / "wtp.py", "reproduce", "digits", "--out", tmp_path],
        stderr=subprocess.PIPE,
        text=True,
    ) as p:
        first = p.stderr.readline()
        p.send_signal(signal.SIGINT)
        p.send_signal(signal.SIGINT)
        assert p.wait() == 130 and "Traceback" not in first + p.stderr.read()


def test_ctrl_c_at_once(tmp_path):
    """However early it comes: once Python has read the first lines of wtp.py, it gets one line at most, and no promise of a run."""
    for last in (
        "| typing",
        "| typing",
        "torch.torch_version",
    ):  # the last of the quick imports; one of torch's first
        command = [
            sys.executable,
            "-X",
            "importtime",
            ROOT / "wtp.py",
            "reproduce",
            "digits",
            "--out",
            tmp_path,
        ]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as p:
            while "| signal" not in p.stderr.readline():
                pass
            while last not in p.stderr.readline():
                pass
            time.sleep(0.005)
            p.send_signal(signal.SIGINT)
            said = p.stderr.read()
            assert (
                "Traceback" not in said
                and "terminate" not in said
                and "goes on" not in said
                and p.wait() == 130
            )


@pytest.mark.parametrize("package", ["typer", "torch", "rich"])
def test_a_missing_package_is_named(tmp_path, package):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise ModuleNotFoundError(name='{package}')")
    done = shell("reproduce", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (
        done.returncode == 1
        and done.stderr == f"wtp: {package} is missing; pip install -r requirements.txt\n"
    )


def test_without_arguments_there_is_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["wtp.py"])
    assert wtp.main() == 0 and "reproduce" in capsys.readouterr().out


def test_names_in_brackets_are_no_markup(capsys, smoke, tmp_path):
    shutil.copyfile(smoke[0] / "lstm.pt", tmp_path / "my[old].pt")
    status, out, _ = call(capsys, "evaluate", tmp_path / "my[old].pt")
    assert status == 0 and "my[old].pt" in out
    (tmp_path / "d[").mkdir()
    shutil.copyfile(smoke[0] / "lstm.pt", tmp_path / "d[" / "a].pt")
    assert call(capsys, "evaluate", tmp_path / "d[" / "a].pt")[0] == 0


@pytest.mark.parametrize(
    "facts",
    [
        None,
        7,
        [],
        {"baseline": 7},
        {"baseline": {"test_accuracy": "x"}},
        {"mean": "x", "std": [0.0]},
        {"data": 3},
        {"test_images": torch.ones(2)},
    ],
)
def test_odd_facts_in_a_checkpoint_cause_no_traceback(capsys, smoke, tmp_path, facts):
    torch.save(torch.load(smoke[0] / "lstm.pt") | {"facts": facts}, tmp_path / "a.pt")
    status, _, err = call(capsys, "evaluate", tmp_path / "a.pt", "--data-dir", tmp_path)
    assert status == 1 and err.count("\n") == 1, err


def test_no_environment_is_needed():
    assert shell("--help", env={"PATH": os.environ["PATH"], "TERM": "dumb"}).returncode == 0
