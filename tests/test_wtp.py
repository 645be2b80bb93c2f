import ast
import errno
import filecmp
import hashlib
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import typer
import zoo
from PIL import Image
from rich.console import Console
from test_controller import rows_by_method, train_net_with_norms, without_seconds
from test_models import write_broken_files
from torch import nn

import controller
import models
import sep
import wtp
from models import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def signal_handlers():
    """wtp.main sets handlers; every test begins with the usual ones."""
    handlers = {number: signal.getsignal(number) for number in wtp.STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def call(capsys, *arguments):
    """(exit status, standard output, standard error) of a command."""
    capsys.readouterr()
    status = wtp.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def run_program(*arguments, **options):
    """The command in a process of its own."""
    command = [sys.executable, ROOT / "wtp.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def is_one_line(text):
    return text.count("\n") == 1


def build_net(experiment):
    return wtp.build_net(wtp.EXPERIMENTS[experiment])


def settings_of(experiment, schedule):
    return wtp.settings_for(wtp.EXPERIMENTS[experiment], wtp.SCHEDULES[schedule], 0)


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


# ---- experiments


@pytest.mark.parametrize("name", wtp.EXPERIMENTS)
def test_every_experiment_binds(name):
    experiment = wtp.EXPERIMENTS[name]
    net = build_net(name)
    logits = controller.Policy()(controller.layer_features(net, net.widths))
    structure = controller.shrink(net.widths, logits.argmax(1).tolist(), 0.2)
    x = torch.zeros(2, experiment.channels, experiment.size, experiment.size)

    for prune in (models.prune_channels, partial(sep.prune_softly, batches=[x])):
        small = prune(net, structure)
        assert small.eval()(x).shape == (2, experiment.classes)
        is_gated = small.gates is not None
        count_macs = sep.count_macs if is_gated else models.count_macs
        assert sep.count_macs(small) == count_macs(net, structure)
    assert experiment.data in controller.STATISTICS
    assert len(controller.STATISTICS[experiment.data][0]) == experiment.channels
    for schedule in wtp.SCHEDULES:
        settings = settings_of(name, schedule)
        assert settings.recovery.epochs >= 1
        assert settings.final.epochs >= 1
        assert settings.pruning_rate == 0.2


@pytest.mark.parametrize("name", wtp.EXPERIMENTS)
def test_a_checkpoint_is_pruned_as_the_experiment_of_its_kind_and_data(name, tmp_path):
    experiment = wtp.EXPERIMENTS[name]
    net = build_net(name)

    found = [
        wtp.find_experiment_for(wtp.UserNet(tmp_path / "a.pt", net, facts, []), tmp_path)
        for facts in ({"data": experiment.data}, {})
    ]

    assert found[0].data == experiment.data
    for each in found:
        assert each.classes == experiment.classes
        assert each.channels == experiment.channels
        assert each.short_final_epochs == experiment.short_final_epochs
        assert each.short_final_lr == experiment.short_final_lr
        assert each.long_final_lr == experiment.long_final_lr
    final = settings_of(name, "fast").final
    expected = {"lenet5": (10, 0.02), "resnet56": (20, 0.005)}.get(experiment.arch, (20, 0.01))
    assert (final.epochs, final.lr) == expected
    assert final.temperature == 4


def test_a_preactivated_net_is_trained_as_a_resnet(tmp_path):
    net = models.build("resnet20")
    architecture = replace(net.architecture, name="preresnet20", is_preactivated=True)
    preactivated = models.build_net(architecture, net.widths)

    for each, arch in ((preactivated, "resnet56"), (models.build("vgg11"), "vgg19")):
        user_net = wtp.UserNet(tmp_path / "a.pt", each, {}, [])
        assert wtp.find_experiment_for(user_net, tmp_path).arch == arch


def test_the_published_schedule_is_the_papers():
    cifar, mnist = settings_of("vgg-cifar10", "published"), settings_of("mnist", "published")
    plan = controller.TrainingPlan

    assert cifar.pruning_rate == 0.2
    assert (cifar.candidates_per_lstm_epoch, cifar.patience, cifar.max_candidates) == (5, 10, None)
    assert cifar.target == 0.701
    assert (cifar.recovery, cifar.final) == (plan(30, 0.001), plan(250, 0.001))
    assert (mnist.recovery, mnist.final) == (plan(10, 0.001), plan(100, 0.001))
    assert mnist.target is None
    assert wtp.EXPERIMENTS["resnet56-cifar10"].target == 0.475
    optimizer = controller.make_optimizer(build_net("mnist"), 0.1)
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.9, 5e-4)
    lstm = controller.Policy().lstm
    assert (lstm.hidden_size, lstm.num_layers, lstm.dropout) == (100, 2, 0.8)
    assert (controller.BATCH_SIZE, controller.VALIDATION_SHARE) == (128, 0.1)
    assert controller.ADVANTAGE_SCALE == 10


@pytest.mark.parametrize("name", wtp.EXPERIMENTS)
def test_the_full_schedule_searches_as_fast_and_trains_as_long_as_the_papers(name):
    full, fast, published = (settings_of(name, each) for each in ("full", "fast", "published"))

    assert replace(full, baseline=fast.baseline, final=fast.final) == fast
    assert full.baseline == published.baseline
    assert full.final.epochs == published.final.epochs
    assert full.final.is_one_cycle
    assert full.final.temperature == 4


def test_the_experiments_are_those_of_the_papers_and_their_data():
    numbers = {
        name: (
            each.classes,
            each.channels,
            each.size,
            each.crop,
            each.flip,
            each.train_images,
            each.target,
        )
        for name, each in wtp.EXPERIMENTS.items()
    }

    assert numbers == {
        "mnist": (10, 1, 28, 0, False, 60_000, None),
        "vgg-cifar10": (10, 3, 32, 4, True, 50_000, 0.701),
        "vgg16-cifar10": (10, 3, 32, 4, True, 50_000, 0.701),
        "vgg-cifar100": (100, 3, 32, 4, True, 50_000, 0.701),
        "resnet56-cifar10": (10, 3, 32, 4, True, 50_000, 0.475),
        "resnet56-cifar100": (100, 3, 32, 4, True, 50_000, 0.475),
        "digits": (10, 1, 28, 0, False, 6_000, None),
    }


def test_our_own_schedules_keep_their_numbers():
    plan = controller.TrainingPlan

    baselines = [settings_of(name, "published").baseline for name in ("vgg-cifar10", "mnist")]
    fast, full = (settings_of("resnet56-cifar10", schedule) for schedule in ("fast", "full"))

    assert baselines == [plan(200, 0.1, is_one_cycle=True), plan(20, 0.05, is_one_cycle=True)]
    assert fast.baseline == plan(20, 0.1, is_one_cycle=True)
    assert fast.recovery == plan(1, 0.02, is_one_cycle=True, max_steps=50)
    assert (fast.candidates_per_lstm_epoch, fast.patience, fast.max_candidates) == (3, 3, 60)
    assert full.final == plan(250, 0.02, is_one_cycle=True, temperature=4.0)


def test_listed_times_are_half_of_what_all_planned_epochs_take(monkeypatch):
    monkeypatch.setattr(controller, "measure_training_speed", lambda *_: 1000.0)

    smoke_seconds = wtp.measure_durations(torch.device("cpu"))["digits"][-1]

    # 12 epochs of the baseline, 24 of lstm's search, 2 + 7 of sep's recoveries and trials, 10 of
    # uniform, each of 1,800 images; and three final ones of 2,000.
    assert smoke_seconds == pytest.approx((55 + 3 / 0.9) * 1.8 / 2)


def test_what_a_run_may_take_is_counted():
    def count(schedule, *methods):
        settings = settings_of("resnet56-cifar10", schedule)
        return wtp.estimate_epochs(settings, methods, 45_000, trains_baseline=False)

    recovery = 50 * 128 / 45_000
    assert count("published", "lstm") == pytest.approx(20 * 5 * 30 + 250 / 0.9)
    assert count("published", "uniform") == pytest.approx(10 * 30 + 250 / 0.9)
    # Five finalists have a trial of two epochs.
    assert count("fast", "lstm") == pytest.approx(60 * recovery + 5 * 2 + 20 / 0.9)
    assert count("fast", "uniform") == pytest.approx(recovery + 20 / 0.9)
    # 9 epochs are for where to put gates: two for the trial without, one before all those with
    # gates, then one for each of up to six.
    assert count("fast", "lstm", "sep") == pytest.approx(62 * recovery + 5 * 2 + 40 / 0.9 + 9)

    digits = settings_of("digits", "smoke")  # no target: the papers' rules
    alone = wtp.estimate_epochs(digits, ["sep"], 1800, trains_baseline=False)
    after_lstm = wtp.estimate_epochs(
        digits, ["sep"], 1800, trains_baseline=False, finished_methods=["lstm"]
    )
    assert alone > after_lstm
    assert after_lstm == 2 + 1 / 0.9 + 7
    # `sep` searches for itself what `lstm` would have found, at the cut of the other row.
    after_uniform = wtp.estimate_epochs(
        digits, ["sep"], 1800, trains_baseline=False, finished_methods=["uniform"]
    )
    assert after_uniform == after_lstm + 4 + 4 * 1


# ---- the house


def test_help_comes_without_torch():
    code = (
        "import sys, wtp; status = wtp.main(['--help']); assert status == 0; "
        "assert 'torch' not in sys.modules and 'rich.progress' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_imports_never_point_back():
    order = ["models", "sep", "controller", "wtp"]

    for position, name in enumerate(order):
        nodes = list(ast.walk(ast.parse((ROOT / f"{name}.py").read_text())))
        imported = {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not imported & set(order[position:]), name


def read_code_blocks(document, language=""):
    """The code blocks of that language in a document."""
    text = (ROOT / document).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def read_commands(document, program="wtp.py"):
    """The arguments of every call of a program in a document, in code blocks and in the text."""
    text = (ROOT / document).read_text()
    commands = re.findall(rf"python {re.escape(program)} ([^`\n]*)", text)
    return [command.partition("#")[0].split() for command in commands]


DOCUMENTS = [
    "README.md",
    "RESULTS.md",
    "docs/differences.md",
    "docs/using.md",
    "docs/your-net.md",
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_of_a_document_leads_somewhere(document):
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)

    for link in links:
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        assert not heading or heading in list_anchors(target), link


def list_anchors(document):
    """The names by which links reach the headings of a document, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_a_document_is_one(document):
    group = typer.main.get_command(wtp.app)
    commands = read_commands(document)

    for name, *arguments in commands:
        if name == "COMMAND":
            continue
        # Placeholders stand for numbers.
        arguments = [re.sub(r"^(CUT|S|METHOD)$", stand_in, argument) for argument in arguments]
        group.commands[name].make_context(name, arguments)  # raises where an option is unknown
        assert name != "reproduce" or not arguments or arguments[0] in wtp.EXPERIMENTS
    if document == "README.md":
        names = {"reproduce", "train", "prune", "evaluate", "export", "report"}
        assert {command[0] for command in commands} >= names


def stand_in(placeholder):
    return {"CUT": "0.5", "S": "1", "METHOD": "lstm"}[placeholder[0]]


def test_only_digits_leave_the_data_folder_of_the_environment_alone(monkeypatch):
    monkeypatch.setenv("WTP_DATA", "elsewhere")

    folders = {
        (experiment, data): str(wtp.find_data_dir(None, {"data": data}, experiment))
        for experiment in ("", "digits", "mnist")
        for data in (None, "digits", "mnist")
    }

    are_drawn = {(name, data) for (name, data), folder in folders.items() if folder == os.devnull}
    assert are_drawn == {("", "digits"), *(("digits", data) for data in (None, "digits", "mnist"))}
    assert set(folders.values()) == {os.devnull, "elsewhere"}


def test_a_folder_of_images_that_is_half_gone_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.delenv("WTP_DATA", raising=False)
    (tmp_path / "train").mkdir()
    facts = {"data": f"{controller.OWN_IMAGES}{tmp_path}"}

    assert wtp.find_data_dir(None, facts) == Path("data")
    (tmp_path / "test").mkdir()
    assert wtp.find_data_dir(None, facts) == tmp_path


@pytest.mark.parametrize(("name", "can_show"), [("xterm", True), ("dumb", False)])
def test_bars_are_drawn_where_a_terminal_can_show_them(monkeypatch, name, can_show):
    monkeypatch.setenv("TERM", name)

    assert wtp.can_show_bars(Console(force_terminal=True)) == can_show
    assert not wtp.can_show_bars(Console(force_terminal=False))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (5, "5 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (7200, "2.0 h"),
        (172_800, "2 days"),
    ],
)
def test_a_duration_has_the_largest_unit_that_fits_twice(seconds, text):
    assert wtp.format_duration(seconds) == text


@pytest.mark.parametrize("name", ["auto", "gpu", "cuda"])
def test_a_gpu_is_taken_where_there_is_one(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)

    assert wtp.select_device(name).type == "cuda"


@pytest.mark.parametrize("name", typer.main.get_command(wtp.app).commands)
def test_every_command_has_help(capsys, name):
    status, out, err = call(capsys, name, "--help")

    assert (status, err) == (0, "")
    assert "--help" in out


def test_a_sep_without_trials_says_that_there_was_no_room_for_gates():
    tried = [{"gates": 0, "validation_loss": 0.1}, {"gates": 1, "validation_loss": 0.2}]

    assert "no gates, for none helped" in wtp.describe_gates(tried, is_rounded=False)
    words = "no gates, for no layer lost enough kernels"
    assert words in wtp.describe_gates([], is_rounded=False)
    assert words in wtp.describe_gates([], is_rounded=True)


def test_every_measurement_of_results_is_one_of_the_bench():
    import bench

    measures = {measure.__name__: measure for measure in (*bench.USUAL, *bench.OTHERS)}
    commands = read_commands("RESULTS.md", "tests/bench.py")

    for folder, name, *arguments in commands:
        inspect.signature(measures[name]).bind(folder, *arguments)  # raises where they do not fit
    assert {name for _, name, *_ in commands} == measures.keys()


def test_the_bench_uses_only_what_the_modules_have():
    # Most of its measurements take too long for a test.
    modules = {"controller": controller, "models": models, "sep": sep}
    tree = ast.parse((ROOT / "tests" / "bench.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used = {
        (node.value.id, node.attr)
        for node in nodes
        if isinstance(node.value, ast.Name) and node.value.id in modules
    }

    assert len(used) > 20
    assert [name for name in sorted(used) if not hasattr(modules[name[0]], name[1])] == []


def test_the_snippets_of_the_documents_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = sep.prune_softly(models.build("resnet8"), (8, 16, 32), [torch.randn(8, 3, 32, 32)])
    facts = {"mean": [0.5] * 3, "std": [0.2] * 3}
    models.save_checkpoint(tmp_path / "mine-pruned.pt", net, facts)
    models.export_net(net, tmp_path / "net.pt2", [0.5] * 3, [0.2] * 3, 32)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=generator)

    spaces = []
    documents = ("README.md", "docs/using.md")
    snippets = [snippet for name in documents for snippet in read_code_blocks(name, "python")]
    for snippet in snippets:
        space = {"torch": torch, "images": images, "net": models.build("resnet8")}
        exec(snippet, space)
        spaces.append(space)

    _, exported, module = spaces
    assert exported["logits"].shape == (2, 10)
    assert torch.allclose(exported["logits"], module["logits"], atol=1e-4)
    assert torch.allclose(module["first"], module["logits"][:1], atol=1e-4)
    assert sep.load(tmp_path / "mine-2.pt")[0].gates is not None


# ---- the commands, from end to end


def put_gates_everywhere(monkeypatch):
    """Let the trials of gates find that the more there are the better."""

    def count_missing_gates(self, net):
        return sum(gate is None for gate in sep.gates_of(net))

    monkeypatch.setattr(controller.Trainer, "measure_validation_loss", count_missing_gates)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(run folder, standard output, standard error) of a whole smoke run, whose `sep` has gates."""
    folder = tmp_path_factory.mktemp("smoke")
    command = ["reproduce", "digits", "--schedule", "smoke", "--out", str(folder)]
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
    ):
        put_gates_everywhere(patch)
        assert wtp.main(command) == 0, err.getvalue()
    return folder / "digits-smoke-s0", out.getvalue(), err.getvalue()


def copy_row(smoke, row, path):
    """A checkpoint of the smoke run as a user's own file."""
    shutil.copyfile(smoke[0] / f"{row}.pt", path)
    return path


def read_columns(table):
    """The cells of each column of a table, by its heading."""
    return {column.header: [*column.cells] for column in table.columns}


def test_each_number_of_a_row_stands_under_its_name(smoke):
    row = {"method": "lstm", "test_accuracy": 0.9, "validation_accuracy": 0.8}
    row |= {"macs": 1_234_000, "macs_reduction": 0.25, "params": 4321, "seconds": 7200}

    table = wtp.results_table(read_results(smoke[0]), [row], is_wide=True)

    assert read_columns(table) == {
        "method": ["lstm"],
        "test accuracy": ["90.00%"],
        "validation": ["80.00%"],
        "MACs": ["1.234 M"],
        "cut": ["25.0%"],
        "parameters": ["4,321"],
        "time": ["2.0 h"],
    }


def test_the_channels_that_are_left_stand_before_those_of_the_baseline():
    layers = ["conv1", "fc1"]

    assert wtp.describe_widths(layers, [20, 500], [1, 65]) == "conv1 1/20, fc1 65/500"
    assert wtp.describe_widths(layers, None, [1, 65]) == "conv1 1, fc1 65"


def test_evaluate_shows_each_measure_under_its_net():
    own = {"test_accuracy": 0.9, "macs": 1e6, "params": 10, "bytes": 100}
    own |= {"latency_1": 0.001, "latency_128": 0.02}
    baseline = {"test_accuracy": 0.95, "macs": 2e6, "latency_1": 0.004}

    columns = read_columns(wtp.evaluation_table("a", own, baseline))

    assert list(columns) == ["", "baseline", "this net", "ratio"]
    assert columns["baseline"] == ["95.00%", "2.000 M", "", "", "4.00 ms", ""]
    assert columns["this net"] == ["90.00%", "1.000 M", "10", "100", "1.00 ms", "20.00 ms"]
    assert columns["ratio"] == ["0.947", "0.500", "", "", "0.250", ""]


def test_latencies_are_those_of_1_and_of_128_images(monkeypatch):
    def measure(nets, images, count):
        return [count * (number + 1) for number in range(len(nets))]

    monkeypatch.setattr(sep, "tune", lambda net: net)
    monkeypatch.setattr(controller, "measure_latencies", measure)
    images = SimpleNamespace(device=torch.device("cpu"))

    own, baseline = wtp.compare_latencies("net", "baseline", images)

    assert own == {"latency_1": 1, "latency_1_tuned": 3, "latency_128": 128}
    assert baseline == {"latency_1": 2, "latency_1_tuned": 4, "latency_128": 256}


@pytest.mark.parametrize("is_same", [False, True])
def test_a_search_that_chose_what_uniform_has_says_so(smoke, is_same):
    results = read_results(smoke[0])
    rows = rows_by_method(results)
    rows["uniform"]["widths"] = [5, 10, 100]
    rows["lstm"]["widths"] = [5, 10, 100] if is_same else [5, 10, 101]

    lines = list(wtp.describe_results(results, list(rows.values())))

    line = "lstm chose exactly the structure of uniform: they differ by chance alone"
    assert (line in lines) == is_same


def test_reproduce_makes_the_rows_of_a_table(smoke):
    folder, out, err = smoke
    results = read_results(folder)
    rows = rows_by_method(results)

    assert list(rows) == ["baseline", "lstm", "sep", "uniform"]
    assert (results["experiment"], results["schedule"]) == ("digits", "smoke")
    assert (results["data"], results["seed"]) == ("digits", 0)
    assert min(row["test_accuracy"] for row in rows.values()) > 0.6
    cut = rows["lstm"]["macs_reduction"]
    assert cut > 0.2
    assert abs(rows["uniform"]["macs_reduction"] - cut) < 0.005
    assert abs(rows["sep"]["macs_reduction"] - cut) < 0.05
    line = "smoke: a test of the machinery; these accuracies are no result\n"
    assert out.count(line) == 1
    title = "digits, smoke schedule, data digits (2,000 test images), seed 0"
    accuracy = f"{rows['lstm']['test_accuracy']:.2%}"
    for words in (title, "uniform keeps conv1 ", "lstm tried", accuracy):
        assert words in out
    for words in ("up to about 58 epochs", "for this epoch", "baseline: epoch 1/12"):
        assert words in err
    assert "\x1b" not in err


def kill_after(command, beginning):
    """Kill a command once it prints a line that begins so; (exit status, what it printed)."""
    program = [sys.executable, ROOT / "wtp.py", *map(str, command)]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    lines = []
    with subprocess.Popen(program, **pipes) as process:
        for line in process.stderr:
            lines.append(line)
            if line.startswith(beginning):
                process.kill()
        return process.wait(), "".join(lines)


def test_kill_and_go_on(capsys, smoke, tmp_path, monkeypatch):
    expected = read_results(smoke[0])
    command = ["reproduce", "digits", "--schedule", "smoke", "--method", "lstm", "--out", tmp_path]
    start_training = wtp.ScreenReporter.start_training

    def stop_at_candidate_3(self, title, *arguments):
        start_training(self, title, *arguments)
        if title.startswith("lstm: candidate 3"):
            signal.raise_signal(signal.SIGTERM)

    status, printed = kill_after(command, "baseline: epoch 4")
    assert status == -signal.SIGKILL
    assert "Traceback" not in printed

    with monkeypatch.context() as patch:
        patch.setattr(wtp.ScreenReporter, "start_training", stop_at_candidate_3)
        status, _, err = call(capsys, *command)
    assert status == 143
    assert "baseline: goes on after epoch" in err
    assert "goes on where it was" in err.splitlines()[-1]

    status, _, err = call(capsys, *command)
    assert status == 0, err
    assert "baseline: epoch" not in err
    assert "lstm: candidate 2" not in err

    found = without_seconds(read_results(tmp_path / "digits-smoke-s0"))
    whole = without_seconds(expected)
    assert found["rows"] == whole["rows"][:2]
    assert found["search"]["lstm"] == whole["search"]["lstm"]
    assert list(found["curves"]) == ["baseline", "lstm"]
    for method, curve in found["curves"].items():
        assert curve == whole["curves"][method]


def test_a_run_folder_in_use_is_refused(capsys, tmp_path):
    (tmp_path / "digits-smoke-s0").mkdir()
    lock = (tmp_path / "digits-smoke-s0" / "lock").open("w")
    controller.fcntl.flock(lock, controller.fcntl.LOCK_EX)

    status, _, err = call(capsys, "train", "digits", "--schedule", "smoke", "--out", tmp_path)

    assert status == 1
    assert "in use by another process" in err


def test_train_is_as_published_by_default(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(wtp, "train_baseline", lambda *each: seen.append(each[2].schedule))

    assert call(capsys, "train", "digits")[0] == 0

    assert seen == ["published"]


def test_the_options_of_reproduce_reach_the_run(capsys, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(wtp, "run_experiment", lambda *each: seen.append(each))
    options = "--schedule fast --seed 3 --round-to 8 --final-epochs 7 --device cpu --fresh"
    command = ["reproduce", "digits", "--target", "0.5", "--method", "lstm", *options.split()]

    assert call(capsys, *command, "--out", tmp_path)[0] == 0

    expected = wtp.RunOptions(
        schedule="fast",
        data_dir=Path(os.devnull),
        out=tmp_path,
        device="cpu",
        seed=3,
        fresh=True,
        final_epochs=7,
        round_to=8,
    )
    assert seen == [("digits", ["lstm"], expected, None, 0.5)]


def test_the_size_option_reaches_prune(capsys, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(wtp, "prune_user_net", lambda net, *_: seen.append(net.photograph_size))
    torch.save(models.build("resnet8").state_dict(), tmp_path / "net.pth")

    assert call(capsys, "prune", tmp_path / "net.pth", "--target", "0.5", "--size", 48)[0] == 0

    assert seen == [48]


def test_prune_with_a_target_is_fast_and_without_one_the_papers(capsys, smoke, monkeypatch):
    seen = []
    monkeypatch.setattr(
        wtp, "prune_user_net", lambda *arguments: seen.append(arguments[3].schedule)
    )
    net = smoke[0] / "baseline.pt"

    for options in (["--target", "0.5"], ["--rate", "0.3"], ["--target", "0.5", "--rate", "0.3"]):
        assert call(capsys, "prune", net, *options)[0] == 0
    assert call(capsys, "prune", net, "--target", "0.5", "--schedule", "published")[0] == 0

    assert seen == ["fast", "published", "fast", "published"]


def test_prune_without_a_target_says_that_the_long_schedule_runs(
    capsys, smoke, tmp_path, monkeypatch
):
    def stop_here(*arguments, **keywords):
        raise UserError("stopped")

    monkeypatch.setattr(wtp, "announce", stop_here)
    command = ["prune", smoke[0] / "baseline.pt", "--out", tmp_path, "--output", tmp_path / "a.pt"]

    for options, is_told in (([], True), (["--target", "0.5"], False)):
        _, _, err = call(capsys, *command, *options)
        assert "wtp: stopped" in err
        assert ("without --target the papers' schedule runs" in err) == is_told


def save_guessing_net(path):
    """A net that says the same class of every image."""
    net = models.build("lenet5", (4, 4, 4), channels=1, size=28)
    nn.init.zeros_(net.fc2.weight)
    models.save_checkpoint(path, net, {"data": "digits"})


def test_a_foreign_net_is_read_as_its_run_folder_does(
    capsys, smoke, pictures, tmp_path, monkeypatch
):
    state = sep.load(smoke[0] / "baseline.pt")[0].state_dict()
    torch.save(state, tmp_path / "net.pt")
    command = ["prune", tmp_path / "net.pt", "--method", "uniform", "--target", "0.5", "--force"]
    command += ["--schedule", "smoke", "--out", tmp_path / "runs", "--data-dir", pictures]
    assert call(capsys, *command)[0] == 0

    def find_another(*_):
        raise AssertionError("readings are tried again")

    monkeypatch.setattr(controller, "find_reading", find_another)
    (tmp_path / "net-pruned.pt").unlink()
    status, _, err = call(capsys, *command)

    assert status == 0, err
    assert (tmp_path / "net-pruned.pt").exists()


def test_a_net_that_only_guesses_is_pruned_by_force_alone(capsys, tmp_path):
    save_guessing_net(tmp_path / "net.pt")
    command = ["prune", tmp_path / "net.pt", "--target", "0.3", "--schedule", "smoke"]
    command += ["--out", tmp_path / "runs"]

    status, _, err = call(capsys, *command)
    assert status == 1
    assert "hardly more than guessing among 10 classes" in err
    assert "--force to prune it all the same" in err
    assert not (tmp_path / "net-pruned.pt").exists()

    status, _, err = call(capsys, *command, "--force")
    assert status == 0, err
    assert "hardly more than guessing among 10 classes" in err
    assert (tmp_path / "net-pruned.pt").exists()


@pytest.mark.parametrize("target", [0.5, None])
@pytest.mark.parametrize(("schedule", "is_said"), [("fast", True), ("smoke", False)])
def test_a_pruned_net_that_only_guesses_is_named(capsys, schedule, is_said, target):
    rows = [
        {"method": "baseline", "test_accuracy": 0.9},
        {"method": "uniform", "test_accuracy": 0.12},
        {"method": "lstm", "test_accuracy": 0.8},
    ]
    run = SimpleNamespace(
        results={"schedule": schedule, "rows": rows, "settings": {"target": target}},
        find_row=lambda name: rows[0],
        trainer=SimpleNamespace(baseline=SimpleNamespace(classes=10)),
    )

    wtp.warn_of_lost_nets(run)

    out = capsys.readouterr().out
    assert ("uniform gets 12.00% of the test images right, hardly more than" in out) == is_said
    assert ("a smaller --target helps" in out) == (is_said and target is not None)
    assert "lstm" not in out


def test_a_checkpoint_of_this_tool_is_evaluated_without_the_training_images(
    capsys, smoke, tmp_path
):
    save_pictures(tmp_path / "pictures", classes=10, count=12)
    for path in (tmp_path / "pictures" / "train").glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:60])  # its header alone
    torch.save(sep.load(smoke[0] / "lstm.pt")[0].state_dict(), tmp_path / "foreign.pt")
    folder = ["--data-dir", tmp_path / "pictures"]

    status, out, err = call(capsys, "evaluate", smoke[0] / "lstm.pt", *folder)
    assert status == 0, err
    assert "120 test images" in out

    status, _, err = call(capsys, "evaluate", tmp_path / "foreign.pt", *folder)
    assert status == 1
    assert "119 others cannot be read either" in err


def test_photographs_for_a_foreign_net_are_brought_to_the_size_that_the_user_says(
    capsys, photographs, tmp_path, monkeypatch
):
    monkeypatch.setattr(controller, "measure_latencies", lambda nets, *_: [0.001] * len(nets))
    torch.manual_seed(0)
    # Without a mean and a std, and the activation, a net that only guesses would be tried with all.
    normalisation = {"mean": [0.5] * 3, "std": [0.25] * 3}
    net = zoo.make_resnet(shortcut="downsample", classes=2)
    torch.save({"net": net.state_dict()} | normalisation, tmp_path / "net.pth")
    command = ["evaluate", tmp_path / "net.pth", "--data-dir", photographs, "--size"]
    relu = ["--activation", "relu"]

    status, _, err = call(capsys, *command, 48, *relu)
    assert status == 0, err
    assert "in their middle to 48 x 48\n" in err
    status, _, err = call(capsys, *command[:-1], *relu)
    assert "in their middle to 32 x 32; the net may have been trained at another size" in err

    net_of_48 = models.build("resnet8", classes=2, size=48)
    models.save_checkpoint(tmp_path / "net.pth", net_of_48, {})
    assert call(capsys, *command, 48)[0] == 0
    status, _, err = call(capsys, *command, 40)
    assert status == 2
    assert "says its size, 48 x 48 pixels; leave out --size" in err


def test_a_foreign_net_with_an_example_is_read_without_a_guess(capsys, smoke, pictures, tmp_path):
    net, _ = sep.load(smoke[0] / "baseline.pt")
    inputs = torch.randn(8, 1, 28, 28)
    content = {"state_dict": net.state_dict(), "inputs": inputs, "outputs": net.eval()(inputs)}
    command = ["evaluate", tmp_path / "net.pt", "--data-dir", pictures]
    statistics = {"mean": [0.5], "std": [0.5]}

    for facts, is_guessed in ((statistics, False), ({}, True)):
        torch.save(content | facts, tmp_path / "net.pt")
        status, _, err = call(capsys, *command)
        assert status == 0, err
        assert "relu; so it computes the outputs in the file" in err
        assert ("tries what is usual" in err) == is_guessed
        assert "--activation" not in err

    status, _, err = call(capsys, *command, "--activation", "gelu")
    assert status == 2
    assert "says its activation, relu; leave out --activation" in err


@pytest.mark.parametrize("is_strange", [False, True])
def test_batch_norms_that_read_something_else_than_in_training_are_named(tmp_path, is_strange):
    net, images = train_net_with_norms("relu")
    state = {key: value.clone() for key, value in net.state_dict().items()}
    if is_strange:
        state["bn1.running_mean"] += 2 * state["bn1.running_var"].sqrt()
        state["bn2.running_var"] *= 9
    torch.save(state, tmp_path / "net.pt")
    lines = []

    wtp.choose_reading(wtp.load_user_net(tmp_path / "net.pt"), images, lines.append)

    words = "of its batch norms do not match these images"
    assert any(words in line for line in lines) == is_strange


def test_a_foreign_net_that_only_guesses_is_exported_by_force_alone(capsys, pictures, tmp_path):
    save_guessing_net(tmp_path / "net.pt")
    torch.save(torch.load(tmp_path / "net.pt")["state"], tmp_path / "net.pt")
    folder = ["--data-dir", pictures]

    status, _, err = call(capsys, "export", tmp_path / "net.pt", tmp_path / "net.pt2", *folder)
    assert status == 1
    assert "--force to export it all the same" in err
    assert not (tmp_path / "net.pt2").exists()

    force = [*folder, "--force"]
    status, out, err = call(capsys, "export", tmp_path / "net.pt", tmp_path / "net.pt2", *force)
    assert status == 0, err
    assert "tries what is usual on some of the training images" in err
    assert "hardly more than guessing among 10 classes" in err
    assert re.fullmatch(r"wrote .* read as lenet5?, .*\n", out)  # results alone

    status, _, err = call(capsys, "evaluate", tmp_path / "net.pt", *folder)
    assert status == 0, err
    assert "hardly more than guessing" in err


def test_force_overwrites_the_output_but_not_the_net_itself(capsys, smoke, tmp_path):
    net = copy_row(smoke, "baseline", tmp_path / "net.pt")
    output = tmp_path / "small.pt"
    output.write_text("mine")
    command = ["prune", net, "--method", "uniform", "--target", "0.5", "--schedule", "smoke"]
    command += ["--out", tmp_path / "runs", "--output"]

    status, _, err = call(capsys, *command, output)
    assert status == 2
    assert "give another --output, or --force overwrites it" in err
    assert output.read_text() == "mine"

    (tmp_path / "runs").mkdir()
    for same_net in (net, tmp_path / "runs" / ".." / "net.pt"):
        status, _, err = call(capsys, *command, same_net, "--force")
        assert status == 2
        assert "is the net that is to be pruned" in err

    status, _, err = call(capsys, *command, output, "--force")
    assert status == 0, err
    assert sep.load(output)[0].structure != sep.load(net)[0].structure


@pytest.mark.parametrize("method", ["lstm", "sep"])
def test_prune_and_evaluate_a_checkpoint_of_the_users(capsys, smoke, tmp_path, monkeypatch, method):
    put_gates_everywhere(monkeypatch)
    net, facts = sep.load(smoke[0] / "baseline.pt")
    models.save_checkpoint(tmp_path / "my.pt", net, {"data": facts["data"]})
    given = (tmp_path / "my.pt").read_bytes()
    options = ["--rate", "0.5", "--target", "0.6", "--method", method, "--schedule", "smoke"]
    command = ["prune", tmp_path / "my.pt", *options, "--out", tmp_path / "runs"]

    status, out, err = call(capsys, *command)

    assert status == 0, err
    small, facts = sep.load(tmp_path / "my-pruned.pt")
    cut = 1 - sep.count_macs(small) / sep.count_macs(net)
    assert 0.6 <= cut < 0.66
    assert (small.gates is not None) == (method == "sep")
    assert "my-pruned.pt" in out
    assert (tmp_path / "my.pt").read_bytes() == given

    status, out, err = call(capsys, "evaluate", tmp_path / "my-pruned.pt")
    assert status == 0
    assert "measuring on 2,000 test images of digits" in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert not list(folder.glob("*-pool"))
    row = rows_by_method(read_results(folder))[method]
    assert re.search(rf"test accuracy .*{row['test_accuracy']:.2%}", out)
    assert "latency, batch 128" in out
    assert re.search(r"widths: conv1 \d+/20, conv2 \d+/50, fc1 \d+/500", out)
    ratio = f"{1 - cut:.3f}"
    for value in (f"{facts['macs'] / 1e6:.3f} M", "2.293 M", ratio, f"{facts['parameters']:,}"):
        assert value in out
    usage = re.search(r"kernels used for no image / some / all \(groups in use\): (.*)", out)
    if method == "sep":
        gated_layers = [
            prunable.layer_name
            for prunable, gate in zip(small.prunable, small.gates)
            if gate is not None
        ]
        assert gated_layers
        assert re.findall(r"(\w+) \d+/\d+/\d+ \(\d+\)", usage[1]) == gated_layers
    else:
        assert usage is None

    status, out, _ = call(capsys, *command)
    assert status == 0
    assert "nothing is left to do" in out

    (tmp_path / "my-pruned.pt").write_text("mine")
    status, _, err = call(capsys, *command)
    assert status == 2
    assert "exists already" in err
    assert (tmp_path / "my-pruned.pt").read_text() == "mine"


def prune_command(folder):
    options = ["--target", "0.6", "--method", "uniform", "--schedule", "smoke"]
    return ["prune", folder / "my.pt", *options, "--out", folder / "runs"]


@pytest.fixture(scope="module")
def pruned(smoke, tmp_path_factory):
    """(folder, standard output) of a `prune_command` that is done."""
    folder = tmp_path_factory.mktemp("pruned")
    copy_row(smoke, "baseline", folder / "my.pt")
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        assert wtp.main([str(word) for word in prune_command(folder)]) == 0, err.getvalue()
    return folder, out.getvalue()


def test_prune_that_finds_its_work_done_shows_the_table_again(capsys, pruned):
    folder, first_out = pruned
    output = folder / "my-pruned.pt"
    made = output.read_bytes()

    status, out, err = call(capsys, *prune_command(folder))

    assert status == 0
    assert not err
    table = first_out.partition(str(folder / "runs"))[0]
    assert "uniform" in table
    assert out.startswith(table)
    line = f"nothing is left to do: {output} is the net that this command made"
    assert out.splitlines()[-1] == line
    assert output.read_bytes() == made


def test_train_that_finds_its_work_done_shows_the_table_again(capsys, smoke, tmp_path):
    shutil.copytree(smoke[0], tmp_path / "digits-smoke-s0")
    output = tmp_path / "net.pt"
    command = ["train", "digits", "--schedule", "smoke", "--out", tmp_path, "--output", output]
    status, first_out, err = call(capsys, *command)
    assert status == 0, err

    status, out, err = call(capsys, *command)

    assert status == 0
    assert not err
    assert "baseline" in out
    line = f"nothing is left to do: {output} is the net that this command made"
    assert out.splitlines()[-1] == line
    assert first_out.splitlines()[-1] == f"wrote {output}"
    for other in ([*command, "--fresh"], [*command, "--seed", "1"]):
        status, _, err = call(capsys, *other)
        assert status == 2
        assert "exists already" in err


def test_a_run_without_the_row_is_not_finished(capsys, smoke, tmp_path):
    folder = tmp_path / "digits-smoke-s0"
    shutil.copytree(smoke[0], folder)
    results = read_results(folder)
    edited = results | {"rows": [], "search": {}, "curves": {}, "rounded": {}}
    (folder / "results.json").write_text(json.dumps(edited))
    shutil.copy(folder / "baseline.pt", tmp_path / "net.pt")
    command = ["train", "digits", "--schedule", "smoke", "--out", tmp_path, "--output"]

    for output in (tmp_path / "net.pt", folder / "baseline.pt"):
        status, out, err = call(capsys, *command, output)
        assert status == 2
        assert "exists already" in err or "is a run's own file" in err
        assert not out


def test_a_finished_run_with_other_settings_is_another_run(capsys, smoke, tmp_path):
    folder = tmp_path / "digits-smoke-s0"
    shutil.copytree(smoke[0], folder)
    results = read_results(folder)
    results["settings"]["patience"] += 1
    (folder / "results.json").write_text(json.dumps(results))
    shutil.copy(folder / "baseline.pt", tmp_path / "net.pt")
    command = ["train", "digits", "--schedule", "smoke", "--out", tmp_path]

    status, out, err = call(capsys, *command, "--output", tmp_path / "net.pt")

    assert status == 2
    assert "holds a run with other settings" in err
    assert not out


@pytest.mark.parametrize(
    "change", ["another file", "another checkpoint", "other images", "lost results", "fresh"]
)
def test_prune_over_what_it_did_not_make_is_refused(capsys, pruned, tmp_path, change):
    shutil.copytree(pruned[0], tmp_path, dirs_exist_ok=True)
    command = prune_command(tmp_path)
    if change == "another file":
        (tmp_path / "my-pruned.pt").write_text("mine")
    elif change == "another checkpoint":
        net, facts = sep.load(tmp_path / "my.pt")
        models.save_checkpoint(tmp_path / "my.pt", net, facts | {"seconds": 9.9})
    elif change == "other images":
        (path,) = (tmp_path / "runs").glob("*/results.json")
        results = json.loads(path.read_text())
        path.write_text(json.dumps(results | {"data": "images in elsewhere"}))
    elif change == "lost results":
        for path in (tmp_path / "runs").glob("*/results.json"):
            path.unlink()
    else:
        command.append("--fresh")
    before = fingerprint_files(tmp_path)

    status, _, err = call(capsys, *command)

    assert status == 2
    assert "exists already" in err
    assert before.items() <= fingerprint_files(tmp_path).items()


def test_gates_become_a_plain_small_net(capsys, smoke, tmp_path, monkeypatch):
    put_gates_everywhere(monkeypatch)
    copy_row(smoke, "baseline", tmp_path / "my.pt")
    options = ["--rate", "0.5", "--target", "0.6", "--schedule", "smoke"]
    options += ["--out", tmp_path / "runs", "--method", "sep", "--static"]

    status, out, err = call(capsys, "prune", tmp_path / "my.pt", *options)

    assert status == 0, err
    assert "static begins with sep's net" in out
    small = sep.load(tmp_path / "my-pruned.pt")[0]
    folder = next((tmp_path / "runs").iterdir())
    gated = sep.load(folder / "sep.pt")[0]
    rows = rows_by_method(read_results(folder))
    assert small.gates is None
    assert small.widths == gated.structure
    assert models.count_parameters(small) < models.count_parameters(gated) / 1.5
    assert rows["static"]["macs_reduction"] > rows["sep"]["macs_reduction"]
    assert abs(rows["static"]["test_accuracy"] - rows["sep"]["test_accuracy"]) < 0.15

    command = ["export", folder / "sep.pt", tmp_path / "plain.pt2", "--static"]
    status, out, err = call(capsys, *command)
    assert status == 0, err
    assert "after 46 steps of recovery" in out
    assert "wrote" in out
    assert "masks them" not in out

    status, out, err = call(capsys, "export", folder / "sep.pt", tmp_path / "gated.pt2")
    assert status == 0, err
    assert "masks them; --static makes" in out
    plain_size, gated_size = ((tmp_path / f"{n}.pt2").stat().st_size for n in ("plain", "gated"))
    assert plain_size < gated_size / 1.5


def raise_full_disk(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_widths_that_machines_like(capsys, smoke, tmp_path):
    copy_row(smoke, "baseline", tmp_path / "my.pt")
    options = ["--method", "uniform", "--target", "0.6", "--schedule", "smoke"]
    command = ["prune", tmp_path / "my.pt", *options, "--out", tmp_path / "runs", "--round-to"]

    status, out, err = call(capsys, *command, "4")

    assert status == 0, err
    small = sep.load(tmp_path / "my-pruned.pt")[0]
    assert all(width % 4 == 0 for width in small.widths)
    assert 1 - sep.count_macs(small) / 2293000 >= 0.6
    side = (
        r"(\d+-\d+-\d+), validation accuracy [\d.]+%, cut [\d.]+%, "
        r"[\d.]+ ms an image, [\d.]+ ms for 128"
    )
    found = re.search(f"uniform, widths at multiples of 4: {side} -> {side}\n", out)
    assert found[2] == "-".join(map(str, small.widths))
    assert found[1] != found[2]
    # Where the last lines cannot be printed, the net is there all the same.
    (tmp_path / "my-pruned.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wtp, "finish_run", raise_full_disk)
        assert call(capsys, *command, "4")[0] == 1
    assert (tmp_path / "my-pruned.pt").exists()
    for multiple, words in (
        ("20", "cannot cut 60%"),
        ("1000", "no layer of this net is 1000 wide"),
    ):
        status, out, err = call(capsys, *command, multiple, "--output", tmp_path / "b.pt")
        assert status == 2
        assert words in err
        assert "smaller --round-to" in err
        assert is_one_line(err)
        assert not out


def test_a_file_from_a_state_dict_reads_images_of_the_size_that_were_tried(capsys, tmp_path):
    save_pictures(tmp_path / "pictures", size=64)
    net = zoo.make_resnet(shortcut="downsample", classes=3)
    # Without them a net that only guesses would be tried with all normalisations and activations.
    normalisation = {"mean": [0.5] * 3, "std": [0.25] * 3}
    torch.save({"net": net.state_dict()} | normalisation, tmp_path / "net.pt")
    command = ["export", "--force", tmp_path / "net.pt", tmp_path / "net.pt2"]
    command += ["--activation", "relu", "--data-dir", tmp_path / "pictures"]

    status, out, err = call(capsys, *command)

    assert status == 0, err
    assert "(batch, 3, 64, 64)" in out
    exported = torch.export.load(tmp_path / "net.pt2").module()
    assert exported(torch.rand(2, 3, 64, 64)).shape == (2, 3)


def test_export_writes_what_other_programs_run(capsys, smoke, tmp_path):
    copy_row(smoke, "lstm", tmp_path / "net.pt")
    exported = tmp_path / "net.pt2"
    command = ["export", tmp_path / "net.pt", exported]

    status, out, err = call(capsys, *command)

    assert status == 0, err
    assert "images (batch, 1, 28, 28) in [0, 1] to logits (batch, 10)" in out
    assert "largest difference" in out
    net, facts = sep.load(tmp_path / "net.pt")
    images = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        expected = net.eval()((images - facts["mean"][0]) / facts["std"][0])
        logits = torch.export.load(exported).module()(images)
    assert torch.allclose(logits, expected, atol=1e-4)

    exported.write_text("mine")
    (tmp_path / "net.pt2.part").write_text("mine")
    status, out, err = call(capsys, *command)
    assert status == 2
    assert "--force overwrites it" in err
    assert exported.read_text() == "mine"
    assert call(capsys, *command, "--force")[0] == 0
    assert exported.stat().st_size > 1000
    assert (tmp_path / "net.pt2.part").read_text() == "mine"


def test_train_writes_the_baseline_and_keeps_results_that_cannot_be_read(capsys, smoke, tmp_path):
    output = tmp_path / "net.pt"
    command = ["train", "digits", "--schedule", "smoke", "--out", tmp_path, "--output", output]
    results = tmp_path / "digits-smoke-s0" / "results.json"
    results.parent.mkdir()

    for content in ("[]", "{half"):
        results.write_text(content)
        status, _, err = call(capsys, *command)
        assert status == 1
        assert "results.json" in err
        assert "--fresh" in err
        assert results.read_text() == content
    status, out, err = call(capsys, *command, "--fresh")

    assert status == 0, err
    assert "net.pt" in out
    state = sep.load(output)[0].state_dict()
    expected = sep.load(smoke[0] / "baseline.pt")[0].state_dict()
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert torch.equal(value, expected[key])


def test_the_speed_of_training_is_measured():
    net = models.build("lenet5", channels=1, size=28)

    assert controller.measure_training_speed(net, torch.device("cpu")) > 0


@pytest.mark.parametrize("options", [[], ["--time"]])
def test_reproduce_alone_lists_the_experiments(capsys, monkeypatch, options):
    measured = []

    def measure(net, device):
        measured.append(net.arch)
        return 1000.0

    monkeypatch.setattr(controller, "measure_training_speed", measure)

    status, out, _ = call(capsys, "reproduce", *options)

    assert status == 0
    assert all(name in out for name in wtp.EXPERIMENTS)
    assert "70.1%" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert bool(measured) == bool(options)
    assert ("by a few steps just timed" in out) == bool(options)


def test_few_images_of_ones_own_train_for_enough_steps():
    experiment = wtp.EXPERIMENTS["resnet56-cifar10"]

    for name in ("published", "full", "fast"):
        # 216 train and 24 validate: a step of 128 images in each epoch.
        settings = wtp.settings_for(experiment, wtp.SCHEDULES[name], 0, train_images=240)
        assert (settings.baseline.epochs, settings.final.epochs) == (2000, 1000)
    # 2,304 train: 18 steps in each epoch, and 2,000 in all.
    settings = wtp.settings_for(experiment, wtp.SCHEDULES["fast"], 0, train_images=2560)
    assert settings.baseline.epochs == 112
    usual = settings_of("resnet56-cifar10", "fast")
    assert (usual.baseline.epochs, usual.final.epochs) == (20, 20)
    smoke = wtp.settings_for(experiment, wtp.SCHEDULES["smoke"], 0, train_images=240)
    assert smoke == settings_of("resnet56-cifar10", "smoke")
    # A step in each epoch: at least 200 steps, and of `fast` about 50 of 128 images.
    for name, epochs in (("published", 200), ("fast", 30)):
        few = wtp.settings_for(experiment, wtp.SCHEDULES[name], 0, train_images=240)
        assert few.recovery.epochs == epochs


@pytest.mark.parametrize(("part", "other_part"), [("final", "baseline"), ("baseline", "final")])
def test_the_users_own_epochs_take_the_place_of_the_schedules(part, other_part):
    experiment = wtp.EXPERIMENTS["resnet56-cifar10"]

    for name, schedule in wtp.SCHEDULES.items():
        usual = settings_of("resnet56-cifar10", name)
        epochs = {f"{part}_epochs": 7}
        own = wtp.settings_for(experiment, schedule, 0, **epochs, train_images=240)
        assert getattr(own, part) == replace(getattr(usual, part), epochs=7)
        assert getattr(own, other_part).epochs != 7


def test_a_baseline_has_as_many_epochs_as_one_says(capsys, tmp_path):
    command = ["train", "digits", "--schedule", "smoke", "--epochs", 2, "--out", tmp_path]

    status, _, err = call(capsys, *command)

    assert status == 0, err
    results = read_results(tmp_path / "digits-baseline2-smoke-s0")
    assert len(results["curves"]["baseline"]) == 2


# ---- what a run says while it works


def test_a_long_epoch_says_before_its_end_how_long_a_run_may_take(capsys, monkeypatch):
    monkeypatch.setattr(wtp, "SECONDS_UNTIL_ESTIMATE", -1)
    reporter = wtp.ScreenReporter()
    reporter.plan(10, 4)
    reporter.start_training("a", 2, 0)
    steps = reporter.wrap_steps(range(4))

    next(steps)
    next(steps)

    line = r"0\.0 s for this epoch: up to 0 s for all\n"
    assert re.fullmatch(line, capsys.readouterr().err)
    list(steps)
    list(reporter.wrap_steps(range(4)))
    assert not capsys.readouterr().err  # once


def test_the_time_of_the_teacher_counts_where_an_epoch_is_long(capsys, monkeypatch):
    monkeypatch.setattr(wtp, "SECONDS_UNTIL_ESTIMATE", -1)
    lines = [
        "5.0 s for this epoch: up to 50 s for all",
        "0.0 s for 50% of an epoch: up to 0 s for all",
    ]
    for steps, line in zip((4, 2), lines):
        reporter = wtp.ScreenReporter()
        reporter.plan(10, 4)
        reporter.start_training("a", 2, 0)
        reporter.epoch_start -= 5  # so long it ran

        list(reporter.wrap_steps(range(steps)))

        assert capsys.readouterr().err.splitlines() == [line]


def test_the_bar_of_a_run_leaves_out_the_epochs_that_an_earlier_process_trained(capsys):
    reporter = wtp.ScreenReporter()
    reporter.plan(10, 4)

    reporter.start_training("a", 6, 4)
    for _ in range(2):
        list(reporter.wrap_steps(range(2)))

    # Four epochs of two steps are two full epochs of four.
    assert reporter.bars.tasks[reporter.run_bar].total == 8
    assert "a: goes on after epoch 4 of 6" in capsys.readouterr().err


def test_the_first_of_many_short_trainings_is_no_measure(capsys):
    reporter = wtp.ScreenReporter()
    reporter.plan(10, 8)
    line = "1.0 s for 50% of an epoch: up to 20 s for all"

    for seconds, expected in ((9.0, []), (1.0, [line]), (1.0, [])):
        reporter.start_training("a", 1, 0)
        list(reporter.wrap_steps(range(4)))
        reporter.finish_epoch("a", 0, 1, 0.1, 0.9, seconds)
        assert capsys.readouterr().err.splitlines()[1:] == expected


def test_off_a_terminal_long_attempts_say_how_many_are_done(capsys, monkeypatch):
    assert list(wtp.show_attempts(["a", "b"])) == ["a", "b"]
    assert not capsys.readouterr().err  # they were quick

    monkeypatch.setattr(wtp, "SECONDS_BETWEEN_LINES", -1)
    assert list(wtp.show_attempts(["a", "b"])) == ["a", "b"]

    lines = ["attempts: 0 of 2 in this round", "attempts: 1 of 2 in this round"]
    assert capsys.readouterr().err.splitlines() == lines


# ---- report


def read_words(path):
    """The text in a picture."""
    return " ".join("".join(ElementTree.fromstring(path.read_text()).itertext()).split())


def test_a_report_leaves_other_files_as_they_are(capsys, smoke, tmp_path):
    other = tmp_path / "a.svg.part"
    other.write_text("mine")

    assert call(capsys, "report", smoke[0], "--output", tmp_path / "a.svg")[0] == 0

    assert other.read_text() == "mine"


def test_a_report_shows_a_run_again(capsys, smoke, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    shutil.copytree(smoke[0], folder)

    status, out, err = call(capsys, "report", folder)

    assert status == 0, err
    assert out.splitlines()[:-1] == smoke[1].splitlines()[:-1]
    words = read_words(folder / "report.svg")
    for expected in (
        "digits, smoke schedule, data digits",
        "channels kept in each layer",
        "conv2",
        "lstm: each candidate after its recovery",
        "cut (% of MACs removed)",
        "chosen",
        "lstm: what the LSTM thinks of each layer",
        "probability of pruning",
        "training loss",
        "epoch",
        "learning curve",
        "validation accuracy (%)",
        "baseline",
        "kernels vary by image",
    ):
        assert expected in words, expected
    # The picture loads nothing from elsewhere: these addresses are names of standards.
    picture = (folder / "report.svg").read_text()
    assert 'href="http' not in picture
    hosts = set(re.findall(r"https?://([\w.]+)", picture))
    assert hosts <= {"www.w3.org", "purl.org", "creativecommons.org", "matplotlib.org"}
    first = folder / "first.svg"
    (folder / "report.svg").rename(first)
    assert call(capsys, "report", folder)[0] == 0
    assert call(capsys, "report", folder)[0] == 0  # its own picture may be written again
    assert filecmp.cmp(folder / "report.svg", first, shallow=False)


def test_trials_are_named_beside_the_candidates(smoke, tmp_path):
    pytest.importorskip("matplotlib")
    results = read_results(smoke[0])
    for candidate in results["search"]["lstm"]["candidates"][:2]:
        candidate["trial_loss"] = 0.5

    line = wtp.describe_search(results, "lstm", has_ended=True)
    unfinished_line = wtp.describe_search(results, "lstm", has_ended=False)

    assert re.match(r"lstm tried \d+ candidates, 2 of them also in trials;", line)
    assert re.match(r"lstm tried \d+ candidates so far, 2 of them also in trials;", unfinished_line)
    wtp.draw_report(results, tmp_path / "report.svg")
    assert "in a trial, too" in read_words(tmp_path / "report.svg")


def test_a_report_draws_what_the_gates_choose_for_each_class(tmp_path, smoke):
    pytest.importorskip("matplotlib")
    shares = [[1, 0, 0.75, 0.25, 0], [1, 0, 0.25, 0.75, 0]]
    # Python reads a name that is no UTF-8 so.
    usage = {"classes": ["cat", "d\udce9g"], "layers": {"fc1": shares}}
    results = read_results(smoke[0]) | {"experiment": "prune caf\udce9.pt"}

    wtp.draw_report(results, tmp_path / "report.svg", usage)

    words = read_words(tmp_path / "report.svg")
    assert "prune caf?.pt, smoke schedule" in words
    for expected in ("sep, fc1: 2 of 5 kernels vary by image", "cat", "d?g", "share of images"):
        assert expected in words, expected


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"classes": ["a"]}',
        '{"classes": ["a"], "layers": {"fc1": [[0.5], [0.5]]}}',
        '{"classes": ["a"], "layers": {"fc1": [[2]]}}',
        '{"classes": ["a"], "layers": {"fc1": [["x"]]}}',
        '{"classes": ["a"], "layers": {"fc1": [[NaN]]}}',
    ],
)
def test_damaged_usage_is_left_out_of_the_pictures(capsys, smoke, tmp_path, content):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    shutil.copytree(smoke[0], folder)
    (folder / "sep-usage.json").write_text(content)

    status, _, err = call(capsys, "report", folder)

    assert status == 0
    assert "sep-usage.json is damaged; the pictures of what the gates choose are left out" in err
    assert "vary by image" not in read_words(folder / "report.svg")


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_a_report_is_drawn_in_other_formats(capsys, smoke, tmp_path, ending, magic):
    pytest.importorskip("matplotlib")
    output = tmp_path / f"a.{ending}"

    status, out, err = call(capsys, "report", smoke[0], "--output", output)

    assert status == 0, err
    assert out.splitlines()[-1] == f"wrote {output}"
    content = output.read_bytes()
    assert content.startswith(magic)
    output.write_bytes(b"mine")
    status, _, err = call(capsys, "report", smoke[0], "--output", output)
    assert status == 2
    assert "exists already" in err
    assert output.read_bytes() == b"mine"
    status, _, err = call(capsys, "report", smoke[0], "--output", output, "--force")
    assert status == 0, err
    assert output.read_bytes().startswith(magic)


def test_without_matplotlib_a_report_shows_its_tables_and_says_what_is_missing(
    capsys, smoke, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    status, out, err = call(capsys, "report", smoke[0], "--output", tmp_path / "a.svg")

    assert status == 1
    assert out.splitlines() == smoke[1].splitlines()[:-1]
    assert err == "wtp: pictures need matplotlib: pip install matplotlib\n"
    assert not (tmp_path / "a.svg").exists()


def test_nothing_but_report_imports_matplotlib(smoke, tmp_path):
    folder = tmp_path / "digits-smoke-s0"
    shutil.copytree(smoke[0], folder)
    commands = [
        ["evaluate", str(folder / "lstm.pt")],
        ["reproduce", "digits", "--schedule", "smoke", "--out", str(tmp_path)],
    ]
    code = (
        "import json, sys, controller, wtp\n"
        "controller.measure_latencies = lambda nets, *_: [0.001] * len(nets)\n"  # saves seconds
        "for command in json.loads(sys.argv[1]):\n"
        "    assert wtp.main(command) == 0\n"
        "    assert 'matplotlib' not in sys.modules\n"
    )

    program = [sys.executable, "-c", code, json.dumps(commands)]
    subprocess.run(program, check=True, cwd=ROOT, capture_output=True)


def test_curves_that_are_no_numbers_are_drawn(capsys, smoke, tmp_path):
    pytest.importorskip("matplotlib")
    results = read_results(smoke[0])
    results["curves"]["lstm"] = [[0.1, 0.9], [float("nan"), 0.1], [float("inf"), None]]

    wtp.draw_report(results, tmp_path / "report.svg")

    assert "training loss" in read_words(tmp_path / "report.svg")


def test_a_search_that_goes_on_is_reported_as_such(capsys, smoke, tmp_path):
    pytest.importorskip("matplotlib")
    results = read_results(smoke[0])
    results["rows"] = [row for row in results["rows"] if row["method"] != "lstm"]
    results["search"]["random"] = results["search"]["lstm"]
    (tmp_path / "results.json").write_text(json.dumps(results))

    status, out, err = call(capsys, "report", tmp_path)

    assert status == 0, err
    assert re.search(r"random tried \d+ candidates so far", out)
    assert not re.search(r"(lstm|sep) tried \d+ candidates so far", out)
    words = read_words(tmp_path / "report.svg")
    assert "random: each candidate after its recovery" in words
    assert "chosen" not in words  # nothing is chosen yet


def test_a_run_without_a_row_has_no_picture(capsys, smoke, tmp_path):
    results = read_results(smoke[0]) | {"rows": [], "curves": {}, "search": {}, "rounded": {}}
    (tmp_path / "results.json").write_text(json.dumps(results))

    status, out, err = call(capsys, "report", tmp_path)

    assert status == 0, err
    assert "no row is finished yet" in out
    assert "so there is no picture yet" in err
    assert not (tmp_path / "report.svg").exists()


def test_the_search_that_sep_shares_has_ended_with_sep(capsys, smoke, tmp_path):
    results = read_results(smoke[0])
    results["rows"] = [row for row in results["rows"] if row["method"] != "lstm"]
    assert results["search"]["sep"]["rule"] == "shared"
    (tmp_path / "results.json").write_text(json.dumps(results))

    _, out, _ = call(capsys, "report", tmp_path)

    assert "lstm tried" in out
    assert not re.search(r"(lstm|sep) tried \d+ candidates so far", out)


def without_widths(results):
    for row in results["rows"]:
        del row["widths"]


def with_short_structures(results):
    for candidate in results["search"]["lstm"]["candidates"]:
        candidate["structure"] = [1]


def with_lists_of_candidates(results):
    for method, log in results["search"].items():
        results["search"][method] = log["candidates"]


EDITS = {
    "no settings": lambda results: results.pop("settings"),
    "no device": lambda results: results.pop("device"),
    "no target": lambda results: results["settings"].pop("target"),
    "another row": lambda results: results["rows"][0].update(method="mine"),
    "more facts": lambda results: results["search"]["lstm"]["candidates"][0].update(cuts=1),
    "fewer facts": lambda results: results["search"]["lstm"]["candidates"][0].pop("lstm_epoch"),
    "no curve": lambda results: results.update(curves={"lstm": [1]}),
    "all rows gone": lambda results: results["rows"].clear(),
    "no rule": lambda results: results["search"]["lstm"].pop("rule"),
    "no layer scores": lambda results: results["search"]["lstm"].pop("layer_scores"),
    "a word for images": lambda results: results.update(test_images="x"),
    "a word for epochs": lambda results: results["settings"]["final"].update(epochs="x"),
    "no end of epochs": lambda results: results["settings"]["final"].update(epochs=math.inf),
    "a word for a target": lambda results: results["settings"].update(target="x"),
    "no accuracy": lambda results: results["search"]["lstm"]["candidates"][0].update(
        validation_accuracy=None
    ),
    "no rows": lambda results: results.update(rows=""),
    "no layers": lambda results: results.update(layers=7),
    "fewer layers": lambda results: results.update(layers=["conv1", "conv2"]),
    "layers left out": lambda results: results.pop("layers"),
    "no widths": without_widths,
    "short structures": with_short_structures,
    "a word for a cut": lambda results: results["rows"][0].update(macs_reduction="x"),
    "a word for seconds": lambda results: results.update(seconds="x"),
    "a number beyond all bounds": lambda results: results["rows"][0].update(macs=10**400),
    "a word for a trial": lambda results: results["search"]["lstm"]["candidates"][0].update(
        trial_loss=""
    ),
    "no trial": lambda results: results["search"]["lstm"]["candidates"][0].pop("trial_loss"),
    "a word for gates": lambda results: results["search"]["sep"].update(
        gate_trials=[{"gates": "x"}]
    ),
    "another version": with_lists_of_candidates,
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_edited_results_are_no_traceback(capsys, smoke, tmp_path, edit):
    folder = tmp_path / "digits-smoke-s0"
    shutil.copytree(smoke[0], folder)
    results = read_results(folder)
    edit(results)
    (folder / "results.json").write_text(json.dumps(results))
    message = (
        "results.json is damaged, or was edited, or is of another version: "
        "it is not what a run writes"
    )

    status, out, err = call(capsys, "report", folder)
    assert status == 1
    assert message in err
    assert "--fresh" not in err  # `report` has no such option
    assert is_one_line(err)
    assert not out

    command = ["reproduce", "digits", "--schedule", "smoke", "--out", tmp_path]
    status, out, err = call(capsys, *command)
    assert status == 1
    assert f"{message}; --fresh" in err
    assert is_one_line(err)
    assert not out


@pytest.mark.parametrize("content", [{}, [], {"rows": [{}], "search": {}, "seconds": 1}])
def test_results_that_are_none_are_no_traceback(capsys, tmp_path, content):
    (tmp_path / "results.json").write_text(json.dumps(content))

    status, out, err = call(capsys, "report", tmp_path)

    assert status == 1
    assert "is damaged, or was edited" in err
    assert is_one_line(err)
    assert not out


# ---- the user's own images and nets


def save_pictures(folder, classes=3, count=40, size=28):
    """A data set of a user's own: a bright stripe at another place in each class."""
    from torchvision.utils import save_image

    torch.manual_seed(0)
    for part in ("train", "test"):
        for number in range(classes):
            class_folder = folder / part / f"class{number}"
            class_folder.mkdir(parents=True)
            stripe = slice(number * size // classes, (number + 1) * size // classes)
            for i in range(count):
                image = torch.rand(1, size, size) * 0.3
                image[0, :, stripe] += 0.7
                save_image(image, class_folder / f"{i}.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data set of ten classes. Tests only read it; those that change one make their own."""
    folder = tmp_path_factory.mktemp("ten-classes") / "pictures"
    save_pictures(folder, classes=10, count=12)
    return folder


def stop_at_announcement(monkeypatch):
    """Let runs stop before their work; the list that gets the settings of each."""
    settings = []

    def stop_here(run, *_):
        settings.append(run.settings)
        raise UserError("stopped")

    monkeypatch.setattr(wtp, "announce", stop_here)
    return settings


def test_a_run_on_few_images_has_enough_steps(capsys, tmp_path, monkeypatch):
    stopped_settings = stop_at_announcement(monkeypatch)
    save_pictures(tmp_path / "pictures")
    command = ["train", "--arch", "resnet8", "--schedule", "fast"]

    call(capsys, *command, "--data-dir", tmp_path / "pictures", "--out", tmp_path / "runs")

    (settings,) = stopped_settings
    # 108 of 120 images train, in one step an epoch.
    assert (settings.baseline.epochs, settings.final.epochs) == (2000, 1000)


@pytest.mark.parametrize("has_example", [True, False])
def test_images_decide_where_norms_stand_only_if_the_file_has_an_example(
    tmp_path, monkeypatch, has_example
):
    monkeypatch.setattr(controller, "choose_norm_place", lambda *_: "moved")
    net, facts = build_net("digits"), {"mean": [0.5], "std": [0.5]}
    user_net = wtp.UserNet(tmp_path / "a.pt", net, facts, [], has_example)
    images = controller.Images(*controller.draw_digits(200, 0), mean=(0.16,), std=(0.33,))

    found = wtp.choose_reading(user_net, images, print).net

    assert found == ("moved" if has_example else net)


@pytest.mark.parametrize("activation", ["tanh", None])
def test_other_activations_are_tried_only_if_the_user_names_none(
    smoke, tmp_path, monkeypatch, activation
):
    def stop_here(*_, tries_activations, **__):
        raise UserError(f"tries: {tries_activations}")

    torch.save(sep.load(smoke[0] / "baseline.pt")[0].state_dict(), tmp_path / "a.pt")
    monkeypatch.setattr(controller, "find_reading", stop_here)
    user_net = wtp.load_user_net(tmp_path / "a.pt", activation=activation)

    with pytest.raises(UserError, match=f"tries: {activation is None}"):
        wtp.choose_reading(user_net, None, print)


def test_a_lenet_on_ones_own_images_is_trained_with_mnists_numbers(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()

    experiment = wtp.choose_training("", "lenet5", None, tmp_path)[1]

    assert (experiment.channels, experiment.size, experiment.baseline_epochs) == (1, 28, 20)


def test_images_that_no_reading_takes_are_refused(capsys, smoke, tmp_path):
    torch.save(sep.load(smoke[0] / "baseline.pt")[0].state_dict(), tmp_path / "a.pt")
    save_pictures(tmp_path / "pictures", classes=10, count=12, size=40)

    status, out, err = call(
        capsys, "evaluate", tmp_path / "a.pt", "--data-dir", tmp_path / "pictures"
    )

    assert (status, out) == (1, "")
    assert "no reading of its weights takes images of 40 x 40 pixels; if it has strides" in err


def test_classes_in_another_order_are_refused():
    names = list("abcdefghij")
    pixels = torch.zeros(1, 28, 28, 1)
    images = SimpleNamespace(pixels=pixels, size=28, classes=10, class_names=names)

    with pytest.raises(UserError, match="they are in another order"):
        wtp.check_net_fits(build_net("digits"), {"names": names[::-1]}, images, "images")


@pytest.mark.parametrize("is_only_best", [True, False])
def test_a_reading_that_is_not_sure_says_so(smoke, tmp_path, is_only_best):
    torch.save(sep.load(smoke[0] / "baseline.pt")[0].state_dict(), tmp_path / "a.pt")
    user_net = wtp.load_user_net(tmp_path / "a.pt")
    found = SimpleNamespace(
        net=user_net.net,
        normalisation=SimpleNamespace(name="x"),
        accuracy=0.9,
        image_count=400,
        has_strange_norms=False,
        is_only_best=is_only_best,
    )

    first, *_ = wtp.describe_found_reading(user_net, found)

    assert "90.00% of 400 training images right" in first
    assert ("others are about as accurate" in first) != is_only_best


@pytest.mark.parametrize("document", ["README.md", "docs/your-net.md"])
def test_the_file_of_the_sure_way_is_read(tmp_path, monkeypatch, document):
    monkeypatch.chdir(tmp_path)
    snippet = read_code_blocks(document, "python")[0]
    names = {"torch": torch, "net": models.build("resnet8")}

    exec(snippet, names)

    user_net = wtp.load_user_net(Path("mine.pth"))
    assert user_net.has_example
    assert user_net.facts["mean"] == [0.49, 0.48, 0.45]
    outputs = user_net.net.eval()(names["inputs"])
    assert torch.allclose(outputs, names["outputs"], atol=1e-4)


def test_a_users_own_images_are_a_data_set(capsys, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"  # its own, for it changes them
    save_pictures(pictures)
    for hidden in (
        "train/.ipynb_checkpoints/a.png",
        "train/class0/._1.png",
        "test/class0/.DS_Store",
        "train/class0/.old/a.png",
    ):
        (pictures / hidden).parent.mkdir(exist_ok=True)
        (pictures / hidden).write_bytes(b"not an image")
    monkeypatch.chdir(tmp_path)
    command = ["reproduce", "mnist", "--method", "lstm", "--schedule", "smoke"]
    command += ["--out", tmp_path / "runs", "--data-dir", pictures]

    status, out, err = call(capsys, *command)
    assert status == 0, err
    checkpoint = tmp_path / "runs/mnist-on-pictures-smoke-s0/lstm.pt"
    assert f"data images in {pictures} (120 test images)" in out
    assert sep.load(checkpoint)[0].classes == 3

    status, out, err = call(capsys, "evaluate", checkpoint, "--data-dir", "pictures")
    assert status == 0, err
    assert "120 test images" in out
    assert "trained on" not in err  # it is the same folder

    status, out, err = call(capsys, "evaluate", checkpoint)
    assert status == 0, err  # the checkpoint names the folder
    assert "120 test images" in out

    pictures.rename(tmp_path / "elsewhere")
    status, out, err = call(capsys, "evaluate", checkpoint)
    assert status == 2
    assert f"the net was trained on images in {pictures}; name that folder" in err
    assert is_one_line(err)
    assert not out
    monkeypatch.setenv("WTP_DATA", str(tmp_path / "elsewhere"))
    status, out, err = call(capsys, "evaluate", checkpoint)
    assert status == 0, err
    monkeypatch.delenv("WTP_DATA")
    (tmp_path / "elsewhere").rename(pictures)

    moved = tmp_path / "scratch" / "pictures"
    moved.parent.mkdir()
    pictures.rename(moved)
    rows = read_results(checkpoint.parent)["rows"]
    status, out, err = call(capsys, *command[:-1], moved)
    assert status == 0, err
    assert f"data images in {moved} (120 test images)" in out
    assert read_results(checkpoint.parent)["rows"] == rows  # nothing was trained again
    moved.rename(pictures)

    # As many as before, two of them exchanged.
    first, second = (next((pictures / f"train/class{n}").glob("*.png")) for n in (0, 1))
    first.rename(tmp_path / "a.png")
    second.rename(first)
    (tmp_path / "a.png").rename(second)
    status, out, err = call(capsys, *command)
    assert status == 2
    assert "holds a run with other images, or the same at another size;" in err
    assert is_one_line(err)

    first.unlink()
    status, out, err = call(capsys, *command)
    assert status == 2
    assert "holds a run with other images, or the same at another size;" in err
    assert is_one_line(err)

    for part in ("train", "test"):
        (pictures / part / "class1").rename(pictures / part / "other")
    status, out, err = call(capsys, "evaluate", checkpoint, "--data-dir", "pictures")
    assert status == 1
    words = "only in the images or only in the checkpoint: other, class1"
    assert f"not the classes that the net was trained on ({words})" in err
    assert is_one_line(err)


def damage_pictures(folder, how):
    """Make a data set of a user's own one that does not fit, in one of several ways."""

    def remove_class(number):
        for part in ("train", "test"):
            shutil.rmtree(folder / part / f"class{number}")

    some_image = next((folder / "train" / "class1").iterdir())
    if how == "classes":
        shutil.rmtree(folder / "test" / "class0")
    elif how == "one":
        remove_class(1)
        remove_class(2)
    elif how == "hidden":
        for part in ("train", "test"):
            shutil.rmtree(folder / part)
            (folder / part / ".class").mkdir(parents=True)
    elif how == "empty":
        for file in (folder / "train" / "class1").iterdir():
            file.unlink()
    elif how == "deep":
        pixels = torch.full((28, 28), 3000).numpy().astype("uint16")
        Image.fromarray(pixels).save(some_image)
    elif how == "bytes":
        some_image.write_bytes(b"no image")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("classes", "different classes (class0 in train alone)"),
        ("empty", "class1"),
        ("one", "has one class alone, class0"),
        ("hidden", "no folder of a class"),
        ("bytes", "cannot be read as an image"),
        ("deep", "cannot be read as an image of 8 bits a channel"),
        ("few", "12 training images are too few: 10% of them validate, so at least 100"),
    ],
)
def test_own_images_that_do_not_fit_get_one_line(capsys, tmp_path, how, words):
    save_pictures(tmp_path / "p", count=4)
    damage_pictures(tmp_path / "p", how)
    run = tmp_path / "runs/mnist-on-p-smoke-s0"
    run.mkdir(parents=True)
    (run / "baseline.pt").write_text("kept")
    folders = ["--out", tmp_path / "runs", "--data-dir", tmp_path / "p"]

    status, out, err = call(capsys, "train", "mnist", "--schedule", "smoke", *folders, "--fresh")

    assert status == 1
    assert words in err
    assert how == "few" or str(tmp_path / "p") in err
    assert is_one_line(err)
    assert not out
    assert (run / "baseline.pt").read_text() == "kept"


def make_photograph(number, mode="RGB"):
    """A picture in four colours whose upper left quarter says the class; oblong, of many sizes."""
    width, height = 50 + 10 * (number % 3), 40 + 7 * (number % 2)
    pixels = np.zeros((height, width, 3), "uint8")
    pixels[: height // 2, : width // 2] = (200, 60, 60)
    pixels[height // 2 :, width // 2 :] = (60, 200, 60)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Photographs as people have them: JPEG and PNG, lying ones, gray, alpha, CMYK, a palette.
    Tests only read them."""
    folder = tmp_path_factory.mktemp("photographs")
    exif = Image.Exif()
    exif[274] = 6  # Orientation: to be turned by 90 degrees
    for part in ("train", "test"):
        for name, angle in (("cats", 0), ("dogs", 180)):
            class_folder = folder / part / name
            class_folder.mkdir(parents=True)
            for number in range(60):
                picture = make_photograph(number).rotate(angle)
                picture.save(class_folder / f"{number}.jpg", quality=95)
            picture.rotate(90, expand=True).save(class_folder / "lying.jpg", exif=exif)
            for mode, ending in (("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"), ("L", "png")):
                picture.convert(mode).save(class_folder / f"{mode}.{ending}")
    return folder


def test_a_few_images_of_another_size_are_named():
    examples = {(28, 28): "a.png", (32, 30): "b.png", (9, 9): "c.png"}

    def describe(*counts):
        return controller.describe_sizes(Counter(dict(zip(examples, counts))), examples)

    assert describe(30) == "28 x 28"
    assert describe(30, 2, 1) == "28 x 28, but for 3, for example b.png with 32 x 30"
    assert describe(30, 3, 1) == "most often 28 x 28"


def test_photographs_of_many_sizes_and_kinds_are_resized_and_cropped(photographs):
    lines = []
    options = {"flip": True, "size": 72, "say": lines.append}

    train, test, _ = controller.load_data("cifar10", photographs, **options)

    assert train.pixels.shape == (130, 72, 72, 3)
    assert lines == [
        "260 photographs (most often 70 x 47 pixels) are resized and cropped in their middle to "
        "72 x 72"
    ]
    for images in (train, test):
        corner = images.pixels[:, 5:30, 5:30].float().mean((1, 2))
        is_red = corner[:, 0] > corner[:, 1] + 50
        is_gray = (corner[:, 0] - corner[:, 1]).abs() < 3
        # Upright: the lying one, too. The gray ones, one of each class, have no colour.
        assert torch.equal(is_red[~is_gray], images.labels[~is_gray] == 0)
        assert is_gray.sum() == 2
    assert (train.zooms, train.flip, test.zooms) == (True, True, False)


def test_pipes_and_links_back_in_an_image_folder_do_no_harm(tmp_path):
    save_pictures(tmp_path, classes=2, count=3)
    os.mkfifo(tmp_path / "train/class0/x.png")
    (tmp_path / "train/class0/again").symlink_to(tmp_path / "train/class0")
    # Two links that lead back: a walk that follows them would take each way through them.
    for name in ("above", "above too"):
        (tmp_path / "train/class1" / name).symlink_to(tmp_path / "train")

    paths, _, _ = controller.list_image_files(tmp_path / "train")

    own = [path for path in paths if "above" not in path]
    assert len(own) == 6
    assert len(paths) <= 12  # what the link shows, once


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("pets/train", "is one level too deep: give --data-dir FOLDER/pets, which has train/"),
        ("pets/train/class0", "is two levels too deep: give --data-dir FOLDER/pets, which has"),
        ("classes", "holds images, but no train/ and test/: move them to FOLDER/classes/train/"),
    ],
)
def test_a_folder_of_images_named_at_the_wrong_level_is_said(capsys, tmp_path, folder, words):
    save_pictures(tmp_path / "pets", classes=2, count=2)
    shutil.copytree(tmp_path / "pets/test", tmp_path / "classes")
    before = sorted(tmp_path.rglob("*"))

    check_folder_is_refused(capsys, tmp_path, "mnist", folder, words)

    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("pets/train", "is one level too deep: give --data-dir FOLDER/pets"),
        (".", "for the images in FOLDER/pets give --data-dir FOLDER/pets"),
        ("none", "there is no folder FOLDER/none"),
    ],
)
def test_a_net_for_ones_own_images_wants_the_right_folder(capsys, tmp_path, folder, words):
    save_pictures(tmp_path / "pets", classes=2, count=2)

    check_folder_is_refused(capsys, tmp_path, "--arch=resnet8", folder, words)


def check_folder_is_refused(capsys, tmp_path, what, folder, words):
    status, _, err = call(capsys, "train", what, "--data-dir", tmp_path / folder)

    assert status == 2
    assert words.replace("FOLDER", str(tmp_path)) in err
    assert is_one_line(err)


def test_a_folder_above_ones_own_images_is_named_where_the_download_fails(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse_download)
    save_pictures(tmp_path / "pets", classes=2, count=2)

    status, _, err = call(capsys, "train", "mnist", "--data-dir", tmp_path)

    assert status == 1
    assert f"for the images in {tmp_path}/pets give --data-dir {tmp_path}/pets" in err
    assert is_one_line(err)


def train_and_prune(capsys, photographs, folder):
    """The lines on the screen and the numbers of a run on photographs."""
    options = ["--out", folder, "--schedule", "smoke"]
    folder.mkdir()
    net = folder / "net.pt"
    train = ["train", "--arch", "resnet8", "--size", "64", "--data-dir", photographs]
    assert call(capsys, *train, *options, "--output", net)[0] == 0
    prune = ["prune", net, "--target", "0.3", "--method", "uniform", "--force"]
    status, _, err = call(capsys, *prune, *options)
    assert status == 0, err
    numbers = []
    for path in sorted(folder.rglob("results.json")):
        results = json.loads(path.read_text())
        numbers.append(results["curves"])
        numbers += [(row["test_accuracy"], row["validation_accuracy"]) for row in results["rows"]]
    return err, numbers


def test_images_that_fill_the_memory_are_read_from_their_files_to_the_same_numbers(
    capsys, photographs, tmp_path, monkeypatch
):
    err, numbers = train_and_prune(capsys, photographs, tmp_path / "memory")
    assert "read from their files" not in err

    monkeypatch.setattr(controller, "MAX_IMAGE_BYTES", 1000)
    err, numbers_from_files = train_and_prune(capsys, photographs, tmp_path / "files")

    assert "would take 0.0 GB of memory: they are read from their files in every epoch" in err
    assert len(numbers) > 2
    assert numbers == numbers_from_files


def test_any_net_is_trained_on_images_of_ones_own(capsys, tmp_path):
    save_pictures(tmp_path / "p", size=32)
    folders = ["--out", tmp_path / "runs", "--data-dir", tmp_path / "p", "--schedule", "smoke"]
    output = tmp_path / "net.pt"

    command = ["train", "--arch", "resnet8", "--size", "40", *folders, "--output", output]
    status, out, err = call(capsys, *command)

    assert status == 0, err
    assert "--size is for photographs; these images are read as they are, 32 x 32" in err
    net, facts = sep.load(output)
    assert (net.arch, net.classes, net.size) == ("resnet8", 3, 32)
    assert (tmp_path / "runs/resnet8-on-p-smoke-s0/baseline.pt").exists()

    status, out, err = call(capsys, "prune", output, "--target", "0.3", *folders, "--force")
    assert status == 0, err
    assert facts["data"] in out


def test_a_net_of_the_drawn_digits_reads_images_of_ones_own(capsys, smoke, pictures, tmp_path):
    net = copy_row(smoke, "baseline", tmp_path / "net.pt")

    status, _, err = call(capsys, "evaluate", net, "--data-dir", pictures)

    assert status == 0, err
    assert "measuring on 120 test images in" in err
    assert "the net was trained on digits" in err


def test_a_net_and_images_that_are_an_experiment_have_its_numbers(tmp_path):
    name, experiment = wtp.choose_training("vgg-cifar10", "resnet56", None, tmp_path)

    assert name == "resnet56-cifar10"
    assert experiment == wtp.EXPERIMENTS[name]
    _, experiment = wtp.choose_training("vgg-cifar10", "resnet56", 40, tmp_path)
    assert experiment.size == 40


def test_torchvisions_nets_take_photographs_at_a_size_that_one_names(photographs):
    for experiment_name, arch in (("vgg-cifar10", "vgg19"), ("mnist", "lenet5")):
        name, experiment = wtp.choose_training(experiment_name, arch, None, photographs)
        assert (name, experiment) == (experiment_name, wtp.EXPERIMENTS[experiment_name])
    name, experiment = wtp.choose_training("", "resnet18", None, photographs)
    assert (name, experiment.arch, experiment.size) == ("resnet18", "resnet18", 224)
    assert wtp.choose_training("", "resnet18", 96, photographs)[1].size == 96
    assert wtp.choose_training("", "resnet20", None, photographs)[1].size == 32
    name, experiment = wtp.choose_training("vgg-cifar10", "resnet20", None, photographs / "none")
    assert (name, experiment.arch, experiment.data) == ("resnet20-cifar10", "resnet20", "cifar10")


def refuse_download(*_, **__):
    raise OSError("there is no network")


def test_a_folder_that_was_not_there_is_not_left_behind(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse_download)
    command = ["train", "mnist", "--out", tmp_path / "runs", "--data-dir"]

    status, _, err = call(capsys, *command, tmp_path / "typo" / "er")
    assert status == 1
    assert f"there is no folder {tmp_path}/typo/er with mnist data, and it could not" in err
    assert not (tmp_path / "typo").exists()

    (tmp_path / "MNIST").mkdir()
    status, _, err = call(capsys, *command, tmp_path / "MNIST")
    assert status == 1
    assert "the folder above that one" in err
    assert not any((tmp_path / "MNIST").iterdir())


def test_a_foreign_net_is_read_with_the_statistics_that_serve_it_best(smoke, tmp_path):
    net = sep.load(smoke[0] / "baseline.pt")[0]
    (mean,), (std,) = controller.STATISTICS["digits"]
    with torch.no_grad():  # the same net for pixels that are normalised with mean and std 0.5
        net.conv1.bias += net.conv1.weight.sum((1, 2, 3)) * (0.5 - mean) / std
        net.conv1.weight *= 0.5 / std
    torch.save({"net": net.state_dict()}, tmp_path / "a.pt")
    foreign = sep.load(tmp_path / "a.pt")[0]
    images = controller.load_data("digits", tmp_path)[0]

    known = controller.KnownNet(foreign)
    found = controller.find_reading([known], images)

    assert found.normalisation.name == "mean and std 0.5"
    assert found.accuracy > 0.9


def test_the_mean_and_std_in_a_file_are_used_without_inputs_and_outputs(
    capsys, smoke, pictures, tmp_path
):
    net = sep.load(smoke[0] / "baseline.pt")[0]
    (mean,), (std,) = controller.STATISTICS["digits"]
    with torch.no_grad():  # the same net for pixels that are normalised in a way nobody tries
        net.conv1.bias += net.conv1.weight.sum((1, 2, 3)) * (0.9 - mean) / std
        net.conv1.weight *= 0.05 / std
    content = {"net": net.state_dict(), "mean": [0.9], "std": [0.05]}
    torch.save(content, tmp_path / "a.pt")

    status, _, err = call(capsys, "evaluate", tmp_path / "a.pt", "--data-dir", pictures)

    assert status == 0, err
    assert "the weights alone do not tell all of the net" in err
    assert "images normalised by the mean and std in the file, and the net read as" in err
    data = controller.load_data("digits", tmp_path)[0]
    user_net = wtp.load_user_net(tmp_path / "a.pt")
    chosen = wtp.choose_reading(user_net, data, print)
    assert (chosen.mean, chosen.std) == ((0.9,), (0.05,))
    assert chosen.accuracy > 0.9


def test_export_uses_the_mean_and_std_in_a_file(capsys, pictures, tmp_path):
    torch.manual_seed(0)
    net = models.build("lenet5", channels=1, size=28)
    content = {"net": net.state_dict(), "mean": [0.9], "std": [0.05]}
    torch.save(content, tmp_path / "a.pt")

    # A net that only guesses would be tried with all activations.
    command = ["export", tmp_path / "a.pt", tmp_path / "a.pt2", "--force", "--activation", "relu"]
    status, _, err = call(capsys, *command, "--data-dir", pictures)

    assert status == 0, err
    assert "images normalised by the mean and std in the file, and the net read as" in err
    train = controller.load_data("mnist", pictures)[0]
    user_net = wtp.load_user_net(tmp_path / "a.pt", activation="relu")
    chosen = wtp.choose_reading(user_net, train, print)
    images = train.normalised_by([0.0], [1.0]).batch(torch.arange(4))
    logits = chosen.net.eval()((images - chosen.mean[0]) / chosen.std[0])
    exported = torch.export.load(tmp_path / "a.pt2").module()
    assert torch.allclose(exported(images), logits, rtol=1e-4, atol=1e-4)


def test_reproduce_makes_its_rows_at_another_cut(capsys, tmp_path):
    command = ["reproduce", "digits", "--schedule", "smoke", "--method", "uniform"]

    status, out, err = call(capsys, *command, "--target", "0.5", "--out", tmp_path)

    assert status == 0, err
    results = read_results(tmp_path / "digits-target0.5-smoke-s0")
    assert [row["method"] for row in results["rows"]] == ["baseline", "uniform"]
    assert results["rows"][1]["macs_reduction"] == pytest.approx(0.5, abs=0.02)
    assert "uniform" in out
    assert "before its final training of 1 epoch\n" in out


@pytest.mark.parametrize("command", ["reproduce digits", "prune mine.pt"])
def test_a_final_training_has_as_many_epochs_as_one_says(
    capsys, smoke, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    baseline = copy_row(smoke, "baseline", tmp_path / "mine.pt")
    options = ["--method", "uniform", "--target", "0.5", "--schedule", "smoke"]
    if command.startswith("reproduce"):
        options += ["--baseline", baseline]

    status, out, err = call(capsys, *command.split(), *options, "--final-epochs", "3")

    assert status == 0, err
    assert "1 x 3 of them final training" in err
    assert "before its final training of 3 epochs\n" in out
    (folder,) = Path("runs").iterdir()
    assert "-epochs3-" in folder.name
    assert len(read_results(folder)["curves"]["uniform"]) == 3


def test_reproduce_goes_on_from_a_given_baseline(capsys, smoke, tmp_path, monkeypatch):
    # To `digits`: a state dict alone would be taken for MNIST's.
    given = copy_row(smoke, "baseline", tmp_path / "given.pt")
    command = ["reproduce", "digits", "--schedule", "smoke"]
    command += ["--method", "uniform", "--method", "lstm"]

    status, _, err = call(capsys, *command, "--out", tmp_path, "--baseline", given)

    assert status == 0, err
    assert "baseline: epoch" not in err
    assert "was trained on" not in err
    rows = rows_by_method(read_results(tmp_path / "digits-smoke-s0-from-given"))
    expected = rows_by_method(read_results(smoke[0]))
    for method, row in rows.items():
        for key in ("test_accuracy", "validation_accuracy", "widths"):
            assert row[key] == expected[method][key], key
    assert list(rows) == [method for method in expected if method != "sep"]

    checkpoint = models.read_checkpoint(given)
    facts = checkpoint["facts"] | {"data": "mnist"}
    models.write_tensors(tmp_path / "mnists.pt", checkpoint | {"facts": facts})
    monkeypatch.setattr(controller.Run, "make_baseline", lambda *_, **__: sys.exit(3))
    with pytest.raises(SystemExit):
        call(capsys, *command, "--out", tmp_path / "other", "--baseline", tmp_path / "mnists.pt")
    line = "the net was trained on mnist, and is pruned on digits\n"
    assert line in capsys.readouterr().err


def test_what_validated_a_baseline_validates_it_where_its_images_were_moved(capsys, tmp_path):
    save_pictures(tmp_path / "a", count=36)
    options = ["--schedule", "smoke", "--out", tmp_path / "runs", "--data-dir"]
    command = ["train", "--arch", "lenet5", "--seed", "1", "--output", tmp_path / "net.pt"]
    status, _, err = call(capsys, *command, *options, tmp_path / "a")
    assert status == 0, err
    (tmp_path / "a").rename(tmp_path / "b")

    prune = ["prune", tmp_path / "net.pt", "--target", "0.5", "--method", "uniform", "--force"]
    status, _, err = call(capsys, *prune, *options, tmp_path / "b")

    assert status == 0, err
    assert sep.load(tmp_path / "net-pruned.pt")[1]["split"] == 1


def test_a_foreign_baseline_is_read_as_its_run_folder_does(capsys, smoke, tmp_path, monkeypatch):
    torch.save(sep.load(smoke[0] / "baseline.pt")[0].state_dict(), tmp_path / "net.pt")
    command = ["reproduce", "digits", "--baseline", tmp_path / "net.pt", "--method", "uniform"]
    command += ["--target", "0.5", "--schedule", "smoke", "--out", tmp_path]
    assert call(capsys, *command)[0] == 0

    def find_another(*_):
        raise AssertionError("readings are tried again")

    monkeypatch.setattr(controller, "find_reading", find_another)
    status, _, err = call(capsys, *command, "--method", "random")

    assert status == 0, err
    assert read_results(tmp_path / "digits-target0.5-smoke-s0-from-net")["rows"]


def test_what_validated_a_baseline_validates_it_in_every_schedule(smoke):
    given = wtp.load_user_net(smoke[0] / "baseline.pt")
    images, test, _ = controller.load_data("digits", smoke[0])

    seed = wtp.split_seed_for(given, 5)
    small = controller.make_data_split(images, test, seed, max_images=2000)
    large = controller.make_data_split(images, test, seed)

    assert seed == given.facts["split"] == 0
    assert wtp.split_seed_for(None, 5) == 5
    state_dict = wtp.UserNet(given.path, given.net, {}, [])
    assert wtp.split_seed_for(state_dict, 5) == 5
    trained = {pixels.numpy().tobytes() for pixels in small.train.pixels}
    validating = {pixels.numpy().tobytes() for pixels in large.validation.pixels}
    assert not trained & validating


def test_images_too_small_for_a_net_are_refused_before_a_run_begins(capsys, tmp_path):
    save_pictures(tmp_path / "pictures", size=5)
    folders = ["--data-dir", tmp_path / "pictures", "--out", tmp_path / "runs"]

    status, out, err = call(capsys, "reproduce", "mnist", "--schedule", "smoke", *folders)

    assert status == 1
    assert "lenet5 needs images of at least 16 x 16 pixels, not 5 x 5" in err
    assert is_one_line(err)
    assert not out
    assert not (tmp_path / "runs").exists()


def test_weights_for_other_classes_are_refused(capsys, tmp_path, monkeypatch):
    def load_zeros(*_, **__):
        return torch.zeros(200, 32, 32, 3, dtype=torch.uint8), torch.arange(200) % 10

    monkeypatch.setattr(controller, "load_from_torchvision", load_zeros)
    state = models.build("resnet56", classes=100).state_dict()
    torch.save({"state_dict": state}, tmp_path / "hundred.th")
    command = ["reproduce", "resnet56-cifar10", "--baseline", tmp_path / "hundred.th"]
    folders = ["--out", tmp_path / "runs", "--data-dir", tmp_path]

    status, out, err = call(capsys, *command, *folders)

    assert status == 1
    assert "images of 100 classes; given are 3 x 32 x 32 images of 10 classes (cifar10)" in err
    assert is_one_line(err)
    assert not out
    assert not (tmp_path / "runs").exists()


# ---- run folders and outputs that are damaged or taken


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_run_says_what_to_do(capsys, smoke, tmp_path):
    folder = tmp_path / "digits-smoke-s0"
    shutil.copytree(smoke[0], folder)
    command = ["reproduce", "digits", "--schedule", "smoke", "--out", tmp_path]

    (folder / "lstm.pt").unlink()
    status, out, err = call(capsys, *command)
    assert status == 0
    assert "lstm.pt is gone or damaged" in err
    assert "sep keeps" in out

    flip_a_bit(folder / "baseline.pt")
    status, out, err = call(capsys, *command)
    assert status == 1
    assert "baseline.pt is damaged" in err
    assert "--fresh starts the run over" in err
    assert not out


def test_a_damaged_row_is_not_delivered(smoke, tmp_path):
    checkpoint = copy_row(smoke, "lstm", tmp_path / "made.pt")
    wtp.deliver(checkpoint, tmp_path / "a.pt", may_replace=False)
    flip_a_bit(checkpoint)

    for name in ("made.pt", "gone.pt"):
        with pytest.raises(UserError, match=f"{name} is gone or damaged; --fresh"):
            wtp.deliver(tmp_path / name, tmp_path / "b.pt", may_replace=False)

    assert (tmp_path / "a.pt").exists()
    assert not (tmp_path / "b.pt").exists()


def test_a_net_whose_output_came_to_be_meanwhile_is_not_lost(smoke, tmp_path):
    checkpoint = copy_row(smoke, "lstm", tmp_path / "made.pt")
    (tmp_path / "a.pt").write_text("mine")

    with pytest.raises(UserError) as raised:
        wtp.deliver(checkpoint, tmp_path / "a.pt", may_replace=False)

    advice = f"the net is in {checkpoint}; the same command with another --output copies it"
    assert str(raised.value) == f"{tmp_path / 'a.pt'} exists already and is kept; {advice}"
    assert (tmp_path / "a.pt").read_text() == "mine"


def test_the_folder_of_another_checkpoint_is_refused_before_images_are_read(
    capsys, pruned, tmp_path, monkeypatch
):
    shutil.copytree(pruned[0], tmp_path, dirs_exist_ok=True)
    net, facts = sep.load(tmp_path / "my.pt")
    models.save_checkpoint(tmp_path / "my.pt", net, facts | {"seconds": 9.9})

    def fail(*_, **__):
        raise AssertionError("images are read")

    monkeypatch.setattr(controller, "load_data", fail)
    status, _, err = call(capsys, *prune_command(tmp_path), "--output", tmp_path / "b.pt")

    assert status == 2
    assert "holds a run with another checkpoint (source); give another --out, or --fresh" in err


def test_a_runs_own_files_are_no_output(capsys, smoke, tmp_path):
    before = sorted(smoke[0].iterdir())
    copy_row(smoke, "baseline", tmp_path / "net.pt")
    runs = tmp_path / "runs"
    options = ["--schedule", "smoke", "--out", runs]
    own_lstm = runs / "prune-net-lstm-target0.5-smoke-s0/lstm.pt"
    own_baseline = runs / "digits-smoke-s0/baseline.pt"
    prune = ["prune", tmp_path / "net.pt", "--target", "0.5", *options]

    for command in (
        ["train", "digits", "--output", smoke[0] / "static.pt"],
        ["train", "digits", *options, "--output", own_baseline],
        ["train", "digits", *options, "--output", own_baseline, "--force"],
        [*prune, "--output", own_lstm],
    ):
        status, out, err = call(capsys, *command)
        assert status == 2
        assert err.endswith("is a run's own file; give another --output\n")
        assert is_one_line(err)
        assert not out
    assert sorted(smoke[0].iterdir()) == before
    assert not runs.exists()


def test_a_full_disk_ends_in_one_line_and_a_closed_output_in_none():
    command = shlex.join([sys.executable, wtp.__file__, "reproduce"])

    for redirection, status in ((">/dev/full", 1), (">&-", 0), (">&- 2>&-", 0)):
        done = subprocess.run(
            ["bash", "-c", f"{command} {redirection}"], capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        found = [line for line in done.stderr.splitlines() if line.startswith("wtp: ")]
        assert found == ["wtp: cannot write the output: No space left on device"] * status
    done = subprocess.run(["bash", "-c", f"{command} --seed x 2>/dev/full"], check=False)
    assert done.returncode == 2


def test_a_target_out_of_reach_is_refused(capsys, smoke, tmp_path):
    copy_row(smoke, "baseline", tmp_path / "my.pt")
    command = ["prune", tmp_path / "my.pt", "--target", "0.9999"]

    status, out, err = call(capsys, *command, "--schedule", "smoke", "--out", tmp_path)

    assert status == 2
    assert "with one channel left in every layer this net cannot cut 99.99%, 99." in err
    assert is_one_line(err)
    assert not out


@pytest.mark.parametrize("name", ["prune", "train"])
def test_a_file_that_came_to_the_output_during_a_run_is_kept(
    capsys, smoke, pruned, tmp_path, monkeypatch, name
):
    shutil.copytree(pruned[0], tmp_path, dirs_exist_ok=True)
    shutil.copytree(smoke[0], tmp_path / "runs" / "digits-smoke-s0")
    command = ["train", "digits", "--schedule", "smoke", "--out", tmp_path / "runs"]
    if name == "prune":
        command = prune_command(tmp_path)
    output = tmp_path / "a.pt"
    monkeypatch.setattr(wtp, "announce", lambda *_: output.write_text("mine"))

    status, _, err = call(capsys, *command, "--output", output)

    assert status == 2
    assert f"the net is in {tmp_path / 'runs'}" in err
    assert output.read_text() == "mine"


def test_a_file_that_came_to_an_exports_place_is_kept(capsys, smoke, tmp_path, monkeypatch):
    may_replace = []

    def export_net(*_, **options):
        may_replace.append(options["may_replace"])
        return 0.0

    monkeypatch.setattr(models, "export_net", export_net)

    assert call(capsys, "export", smoke[0] / "lstm.pt", tmp_path / "a.pt2")[0] == 0

    assert may_replace == [False]


@pytest.mark.parametrize("name", ["results.json", "sep-usage.json", "report.svg", "lock"])
def test_the_other_files_of_a_run_are_no_output(capsys, smoke, tmp_path, name):
    net = copy_row(smoke, "baseline", tmp_path / "net.pt")
    before = fingerprint_files(smoke[0])
    command = ["prune", net, "--target", "0.5", "--schedule", "smoke", "--out", tmp_path / "runs"]

    status, _, err = call(capsys, *command, "--output", smoke[0] / name, "--force")

    assert status == 2
    assert err.endswith("is a run's own file; give another --output\n")
    assert fingerprint_files(smoke[0]) == before


def test_the_row_of_a_finished_run_is_no_output(capsys, smoke, tmp_path):
    folder = tmp_path / "digits-smoke-s0"
    shutil.copytree(smoke[0], folder)
    command = ["train", "digits", "--schedule", "smoke", "--out", tmp_path]

    status, out, err = call(capsys, *command, "--output", folder / "baseline.pt")

    assert (status, out) == (2, "")
    assert "is a run's own file" in err


def test_train_overwrites_its_output_by_force(capsys, smoke, tmp_path):
    shutil.copytree(smoke[0], tmp_path / "digits-smoke-s0")
    (tmp_path / "a.pt").write_text("mine")
    command = ["train", "digits", "--schedule", "smoke", "--out", tmp_path, "--force"]

    status, _, err = call(capsys, *command, "--output", tmp_path / "a.pt")

    assert status == 0, err
    assert filecmp.cmp(tmp_path / "a.pt", smoke[0] / "baseline.pt", shallow=False)


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    """As root every folder may be written to, so the answer is made here."""
    monkeypatch.setattr(os, "access", lambda *_: False)

    with pytest.raises(UserError, match="its folder is read-only; give another") as raised:
        wtp.check_output(tmp_path / "a.pt")

    assert raised.value.status == 2


# ---- bad input: one clear line, the right status, nothing overwritten


def fingerprint_files(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path: hashlib.md5(path.read_bytes()).hexdigest() for path in files}


WRONG_CALLS = [
    (2, "unknown experiment 'imagenet'", "reproduce imagenet"),
    (2, "unknown experiment 'imagenet'", "train imagenet"),
    (2, "uniform needs a cut to land on; give --target", "prune net.pt --method uniform"),
    (2, "no checkpoint gone.pt; give the path of a .pt", "prune gone.pt"),
    (2, "no checkpoint sevn.pt; did you mean seven.pt?", "prune sevn.pt"),
    (2, "no checkpoint gone.pt", "evaluate gone.pt"),
    (2, "folder is a folder, not a checkpoint", "evaluate folder"),
    (2, "1 is no share above 0 and below 1", "prune net.pt --rate 1"),
    (2, "-0.1 is no share above 0 and below 1", "prune net.pt --rate -0.1"),
    (2, "nan is no share above 0 and below 1", "prune net.pt --rate nan"),
    (2, "0 is no share above 0 and below 1", "prune net.pt --target 0"),
    (
        2,
        "50 is no share above 0 and below 1, as 0.9 is for 90 %; did you mean 0.5?",
        "prune net.pt --target 50",
    ),
    (2, "50% is no number, as 0.9 is for 90 %; did you mean 0.5?", "prune net.pt --target 50%"),
    (2, "half is no number, as 0.9 is for 90 %", "prune net.pt --target half"),
    (
        2,
        "1.5 is no share above 0 and below 1, as 0.9 is for 90 %; see python",
        "prune net.pt --target 1.5",
    ),
    (2, "--time is for the list of experiments", "reproduce mnist --time"),
    (2, "unknown activation 'sine'", "evaluate net.pt --activation sine"),
    (2, "drawn.pt says its activation, relu", "prune drawn.pt --activation tanh"),
    (2, "--arch resnet20 alone is for images of your own", "train --arch resnet20"),
    (2, "unknown network 'resnet21'", "train --arch resnet21"),
    (2, "name an experiment, mnist, ", "train"),
    (2, "--rate", "prune net.pt --rate lots"),
    (2, "--speed", "reproduce mnist --speed"),
    (2, "quick", "reproduce mnist --schedule quick"),
    (2, "magic", "reproduce mnist --method magic"),
    (2, "magic", "magic"),
    (2, "name an experiment: ", "reproduce --method lstm"),
    (2, "cannot take images of 40 x 40 pixels", "export soft.pt a.pt2 --static --size 40"),
    (2, "give one --method", "prune net.pt --method sep --method lstm"),
    (2, "--seed", "reproduce digits --seed -1"),
    (2, ". is a folder", "prune ."),
    (2, "device 'meta' cannot be used", "reproduce digits --device meta"),
    (
        2,
        "device 'tpu9' cannot be used here; try cpu or auto (only cpu and cuda are known)",
        "reproduce digits --device tpu9",
    ),
    (2, "taken.pt exists already", "prune net.pt --output taken.pt"),
    (2, "taken.pt exists already", "train digits --output taken.pt"),
    (2, "no folder nowhere; make it first", "prune net.pt --output nowhere/a.pt"),
    (2, "net.pt is a file, not a folder", "prune net.pt --output net.pt/a.pt"),
    (2, "this is the folder of run folders; `prune`", "prune net.pt --out small.pt"),
    (2, "0,5 is no number, as 0.9 is for 90 %; did you mean 0.5?", "prune net.pt --target 0,5"),
    (2, "1,5 is no number, as 0.9 is for 90 %; see python", "prune net.pt --target 1,5"),
    (1, "cannot write", "reproduce digits --schedule smoke --out taken.svg"),
    (1, "cannot write", "prune drawn.pt --schedule smoke --out /proc/nothing"),
    (1, "no complete mnist data", "reproduce mnist --data-dir folder"),
    (2, "taken.pt is a file; --data-dir", "reproduce vgg-cifar10 --data-dir taken.pt"),
    (1, "no data set here has 2 channels", "evaluate odd.pt"),
    (1, "and gone is no folder; --data-dir can name", "evaluate odd.pt --data-dir gone"),
    (1, "the net reads 1 x 32 x 32 images", "evaluate large.pt"),
    (2, "uniform needs a cut", "reproduce digits --schedule smoke --method uniform"),
    (
        2,
        "uniform needs a cut",
        "reproduce digits --schedule smoke --method uniform --fresh --out old",
    ),
    (1, "vgg16 needs images of at least 32 x 32", "evaluate vgg.pt --data-dir small"),
    (2, "soft-pruned already", "prune soft.pt"),
    (2, "no checkpoint gone.pt", "reproduce digits --baseline gone.pt"),
    (2, "is a lenet5", "reproduce vgg-cifar10 --baseline net.pt"),
    (2, "is a lenet5 of widths (10, 20, 30)", "reproduce digits --baseline small.pt"),
    (1, "the net reads 1 x 28 x 28 images of 7 classes", "reproduce digits --baseline seven.pt"),
    (1, "half has train/ alone", "evaluate net.pt --data-dir half"),
    (
        2,
        "a.tflite: the ending says the format, .pt2 (torch.export) or .onnx",
        "export net.pt a.tflite",
    ),
    (2, "dir.onnx is a folder", "export net.pt dir.onnx"),
    (2, "taken.onnx is an export, not a checkpoint", "evaluate taken.onnx"),
    (2, "a.ONNX would be a checkpoint under an export's ending", "prune drawn.pt --output a.ONNX"),
    (2, "no .safetensors files; call it NAME.pt", "prune drawn.pt --output a.safetensors"),
    (2, "is the net that is to be pruned", "prune drawn.pt --output drawn.pt"),
    (2, "taken.onnx exists already and is kept; --force", "export net.pt taken.onnx"),
    (2, "dangling.pt2 exists already and is kept; --force", "export net.pt dangling.pt2"),
    (2, "no folder nowhere", "export net.pt nowhere/a.pt2"),
    (2, "no checkpoint gone.pt", "export gone.pt a.pt2"),
    (2, "cannot take images of 40 x 40 pixels", "export drawn.pt a.pt2 --size 40"),
    (2, "drawn.pt has no gates", "export drawn.pt a.pt2 --static"),
    (2, "lstm has no gates", "prune drawn.pt --static"),
    (2, "--round-to", "prune drawn.pt --round-to 1"),
    (2, "--final-epochs", "prune drawn.pt --final-epochs 0"),
    (2, "name an experiment", "reproduce --final-epochs 5"),
    (2, "name an experiment", "reproduce --device cpu"),
    (2, "name an experiment", "reproduce --out elsewhere"),
    (2, "folder is no run folder: it has no results.json", "report folder"),
    (2, "gone is no run folder: there is no such folder", "report gone"),
    (
        2,
        "a.gif: the ending says the format, .svg, .png or .pdf",
        "report old/digits-smoke-s0 --output a.gif",
    ),
    (2, "taken.svg exists already", "report old/digits-smoke-s0 --output taken.svg"),
    (2, "digits are drawn", "reproduce digits --data-dir pictures"),
    (2, "name an experiment: ", "reproduce --schedule fast"),
    (2, "name an experiment: ", "reproduce --seed 3 --time"),
    (2, "is one level too deep: give --data-dir", "evaluate net.pt --data-dir small/train"),
    (
        2,
        "(export reads images for finding out what its weights do not tell)",
        "export unread.pt a.pt2 --data-dir small/train",
    ),
    (2, "folder is a folder; name a file in it", "prune drawn.pt --output folder"),
    (1, "odd.pt reads 2 channels; only gray images (1)", "evaluate odd.pt --data-dir small"),
    (1, "of 10 classes is taken to be for mnist", "evaluate net.pt --data-dir folder"),
]


def write_nets(folder):
    """The checkpoints that the wrong calls name."""
    net = models.build("lenet5", channels=1, size=28)
    nets = {
        "net": (net, {}),
        "drawn": (net, {"data": "digits", "mean": [0.16], "std": [0.33]}),
        "soft": (sep.prune_softly(net, (10, 20, 30), [torch.randn(8, 1, 28, 28)]), {}),
        "odd": (models.build("vgg16", [2] * 13, channels=2), {}),
        "large": (models.build("lenet5", channels=1, size=32), {"data": "digits"}),
        "small": (models.build("lenet5", (10, 20, 30), channels=1, size=28), {}),
        "seven": (models.build("lenet5", channels=1, size=28, classes=7), {}),
    }
    for name, (each, facts) in nets.items():
        models.save_checkpoint(folder / f"{name}.pt", each, facts)
    torch.save(models.build("vgg16", [2] * 13, classes=2).state_dict(), folder / "vgg.pt")
    torch.save(net.state_dict(), folder / "unread.pt")


@pytest.fixture(scope="module")
def files_of_wrong_calls(smoke, tmp_path_factory):
    """A folder with all files that the wrong calls name."""
    folder = tmp_path_factory.mktemp("wrong-calls")
    write_nets(folder)
    for name in ("taken.pt", "taken.onnx", "taken.svg"):
        (folder / name).write_text("mine")
    (folder / "dangling.pt2").symlink_to("unmounted/net.pt2")
    for name in ("folder", "dir.onnx", "half/train", "pictures/train", "pictures/test"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(smoke[0], folder / "old" / "digits-smoke-s0")
    save_pictures(folder / "small", classes=2, count=6, size=8)
    return folder


@pytest.fixture
def folder_of_wrong_calls(files_of_wrong_calls):
    """The same folder; what a test adds to it is removed again."""
    before = set(files_of_wrong_calls.rglob("*"))
    yield files_of_wrong_calls
    for path in sorted(set(files_of_wrong_calls.rglob("*")) - before, reverse=True):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()


@pytest.mark.parametrize(
    ("expected", "words", "command"), WRONG_CALLS, ids=lambda value: str(value)
)
def test_wrong_calls_get_one_line(
    capsys, folder_of_wrong_calls, monkeypatch, expected, words, command
):
    monkeypatch.chdir(folder_of_wrong_calls)
    for name in ("mnist", "cifar"):
        monkeypatch.setattr(
            f"torchvision.datasets.{name}.download_and_extract_archive", refuse_download
        )
    before = fingerprint_files(folder_of_wrong_calls)

    status, out, err = call(capsys, *command.split())

    assert status == expected, err
    assert words in err
    assert "Traceback" not in err
    assert is_one_line(err)
    assert not out
    assert before.items() <= fingerprint_files(folder_of_wrong_calls).items()


def test_broken_checkpoints_get_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    for name in write_broken_files(tmp_path):
        for command in ("evaluate", "prune"):
            status, out, err = call(capsys, command, name)
            assert status == 1
            assert name in err
            assert is_one_line(err)
            assert not out
    assert not (tmp_path / "hacked").exists()
    assert not list(tmp_path.glob("*-pruned.pt"))


@pytest.mark.parametrize(
    "facts",
    [
        None,
        7,
        [],
        {"baseline": 7},
        {"baseline": {"test_accuracy": "x"}},
        {"test_images": torch.ones(2)},
    ],
)
def test_odd_facts_in_a_checkpoint_cause_no_traceback(capsys, smoke, tmp_path, facts):
    torch.save(torch.load(smoke[0] / "lstm.pt") | {"facts": facts}, tmp_path / "a.pt")

    status, _, err = call(capsys, "evaluate", tmp_path / "a.pt", "--data-dir", tmp_path)

    assert status == 1
    assert "its facts are not the values" in err
    assert is_one_line(err)


@pytest.mark.parametrize("facts", [{"mean": "x", "std": [0.0]}, {"data": 3}])
def test_facts_that_say_nothing_usable_are_passed_over(capsys, smoke, pictures, tmp_path, facts):
    torch.save(torch.load(smoke[0] / "lstm.pt") | {"facts": facts}, tmp_path / "a.pt")

    status, _, err = call(capsys, "evaluate", tmp_path / "a.pt", "--data-dir", pictures)

    assert status == 0, err


def test_what_a_gpu_says_is_one_line():
    error = RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED\nand much more")

    message, status = wtp.explain(error)

    assert message.startswith("the GPU fails: cuDNN error: CUDNN_STATUS_NOT_INITIALIZED; its")
    assert status == 1
    with pytest.raises(RuntimeError, match="size mismatch"):
        wtp.explain(RuntimeError("size mismatch"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA out of memory."), "out of memory"),
        (
            OSError(errno.EACCES, "Permission denied", "a.pt"),
            "[Errno 13] Permission denied: 'a.pt'",
        ),
    ],
)
def test_what_a_machine_refuses_is_one_line(capsys, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(wtp, "load_user_net", fail)

    assert call(capsys, "evaluate", "a.pt") == (1, "", f"wtp: {words}\n")


def test_a_baselines_accuracy_on_other_images_is_not_shown():
    facts = {"data": "mnist", "test_images": 9, "baseline": {"test_accuracy": 0.99}}

    assert "test_accuracy" in wtp.collect_baseline_measures(facts, None, 9, "mnist")
    assert "test_accuracy" not in wtp.collect_baseline_measures(facts, None, 9, "digits")
    assert "test_accuracy" not in wtp.collect_baseline_measures(facts, None, 8, "mnist")


@pytest.mark.parametrize(
    ("method", "cut", "target", "words"),
    [
        ("lstm", 0.3, 0.5, "not 50.00%; its search found nothing smaller"),
        ("uniform", 0.3, 0.5, "did not reach the target: a cut of 30.00%, not 50.00%"),
        ("lstm", 0.4996, 0.5, "a cut of 49.96%, not 50.00%"),
        ("lstm", 0.5, 0.5, None),
        ("lstm", 0.0, None, "kept the whole net"),
    ],
)
def test_a_row_that_fell_short_is_named(method, cut, target, words):
    lines = list(wtp.describe_shortfall({"method": method, "macs_reduction": cut}, target))

    assert len(lines) == (words is not None)
    assert words is None or words in lines[0]
    assert method == "lstm" or "search" not in lines[0]


def test_the_activation_that_a_user_names_is_taken(smoke, tmp_path):
    torch.save(sep.load(smoke[0] / "baseline.pt")[0].state_dict(), tmp_path / "a.pt")

    user_net = wtp.load_user_net(tmp_path / "a.pt", activation="tanh")

    assert user_net.net.architecture.activation == "tanh"
    assert {reading.architecture.activation for reading in user_net.readings} == {"tanh"}


def test_rate_and_seed_reach_the_run(capsys, smoke, tmp_path, monkeypatch):
    stopped_settings = stop_at_announcement(monkeypatch)
    net = copy_row(smoke, "baseline", tmp_path / "a.pt")

    call(capsys, "prune", net, "--rate", "0.3", "--seed", "5", "--out", tmp_path)

    (settings,) = stopped_settings
    assert (settings.pruning_rate, settings.seed) == (0.3, 5)


def test_cifar_is_augmented_in_training_alone(tmp_path, monkeypatch):
    pixels = torch.zeros(20, 32, 32, 3, dtype=torch.uint8)
    labels = torch.arange(20) % 10
    monkeypatch.setattr(controller, "load_from_torchvision", lambda *_, **__: (pixels, labels))
    experiment = wtp.EXPERIMENTS["vgg-cifar10"]

    train, test, _ = wtp.load_experiment_images(experiment, tmp_path, 32, print)

    assert (train.crop, train.flip, test.is_augmented) == (4, True, False)


@pytest.mark.parametrize("helps", [True, False])
def test_a_plain_export_keeps_its_recovery_only_where_that_helps(monkeypatch, helps):
    plain = models.build("lenet5", (2, 2, 2), channels=1, size=28)
    # With gates, without them, and after the recovery.
    accuracies = iter([0.9, 0.5, 0.6 if helps else 0.4])
    monkeypatch.setattr(controller, "make_static", lambda *_: plain)
    monkeypatch.setattr(controller, "measure_accuracy", lambda *_: next(accuracies))
    images = controller.Images(*controller.draw_digits(200, 0), mean=(0.16,), std=(0.33,))

    found = wtp.make_static_for_export(build_net("digits"), images)

    assert (found is not plain) == helps


def test_names_in_brackets_are_no_markup(capsys, smoke, tmp_path):
    copy_row(smoke, "lstm", tmp_path / "my[old].pt")
    (tmp_path / "d[").mkdir()
    copy_row(smoke, "lstm", tmp_path / "d[" / "a].pt")

    status, out, _ = call(capsys, "evaluate", tmp_path / "my[old].pt")

    assert status == 0
    assert "my[old].pt" in out
    assert call(capsys, "evaluate", tmp_path / "d[" / "a].pt")[0] == 0


# ---- signals and environments


def test_a_home_that_the_shell_has_left_is_put_in(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WTP_DATA", "~/sets")

    assert wtp.expand_home("--out=~/runs") == "--out=/home/me/runs"
    assert wtp.expand_home("~/net.pt") == "~/net.pt"  # that the shell has seen to
    assert wtp.expand_home("--out") == "--out"
    assert wtp.find_data_dir(None, {}) == Path("/home/me/sets")


def test_a_pytorch_that_cannot_be_loaded_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "models", None)  # as where a library of CUDA is missing

    message, status = wtp.explain(OSError("libcublas.so.12: cannot open shared object file"))

    assert message.startswith("PyTorch cannot be loaded: libcublas.so.12: cannot open")
    assert status == 1


def test_a_tilde_in_an_option_is_the_home_folder(capsys, smoke, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", ["wtp.py", "report", str(smoke[0]), "--output=~/a.gif"])

    assert wtp.main() == 2
    assert "/home/me/a.gif: the ending says the format" in capsys.readouterr().err


def test_ctrl_c_while_nothing_runs_yet(tmp_path):
    command = [sys.executable, ROOT / "wtp.py", "reproduce", "digits", "--out", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert "Traceback" not in first + process.stderr.read()


@pytest.mark.parametrize("last_import", ["| typing", "| typing", "torch.torch_version"])
def test_ctrl_c_at_once(tmp_path, last_import):
    """However early it comes: once Python has read the first lines of wtp.py, it gets one line at
    most, and no promise of a run. The names are the last of the quick imports, twice, and one of
    torch's first."""
    command = [sys.executable, "-X", "importtime", ROOT / "wtp.py", "reproduce", "digits"]
    command += ["--out", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for word in ("| signal", last_import):
            assert any(word in line for line in process.stderr), f"no line has {word}"
        time.sleep(0.05)  # a busy machine needs it to come from the import to the next line
        process.send_signal(signal.SIGINT)
        printed = process.stderr.read()
        assert process.wait() == 130
    for words in ("Traceback", "terminate", "goes on"):
        assert words not in printed


@pytest.mark.parametrize("package", ["typer", "torch", "rich"])
def test_a_missing_package_is_named(tmp_path, package):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise ModuleNotFoundError(name='{package}')")

    done = run_program("reproduce", env=os.environ | {"PYTHONPATH": str(tmp_path)})

    assert done.returncode == 1
    assert done.stderr == f"wtp: {package} is missing; pip install -r requirements.txt\n"


def test_a_missing_package_of_a_package_is_named():
    error = ModuleNotFoundError("No module named 'pydantic'", name="pydantic")

    assert wtp.explain(error) == ("pydantic is missing; pip install -r requirements.txt", 1)
    for name in ("torch.nn", "_lzma", "controller", ""):
        assert not wtp.is_package_to_install(name)


def test_a_torchvision_of_another_build_is_one_line():
    error = RuntimeError("operator torchvision::nms does not exist")

    message, status = wtp.explain(error)

    assert status == 1
    assert message.startswith("torch and torchvision here are of different builds; make a new")


def test_without_arguments_there_is_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["wtp.py"])

    assert wtp.main() == 0
    assert "reproduce" in capsys.readouterr().out


def test_a_terminal_without_utf_8_is_no_traceback():
    for encoding in ("ascii", "latin-1"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = run_program("evaluate", "網.pt", env=environment)
        assert done.returncode == 2
        assert "?.pt" in done.stderr
        assert "Traceback" not in done.stderr


def test_no_environment_is_needed():
    environment = {"PATH": os.environ["PATH"], "TERM": "dumb"}

    assert run_program("--help", env=environment).returncode == 0
