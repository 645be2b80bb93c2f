#!/usr/bin/env python3
"""Where to prune: an LSTM decides which layers of a CNN lose channels (IJCAI 2018; SEP, TIP 2021).

    python wtp.py reproduce mnist            every row of an experiment's table
    python wtp.py train mnist                the baseline alone
    python wtp.py prune --target 0.5 net.pt  a smaller net from your own checkpoint
    python wtp.py evaluate net.pt            accuracy, MACs, parameters, size, latency
    python wtp.py export net.pt net.onnx     for use without this project, .pt2 or .onnx
    python wtp.py report RUN                 the tables again, and pictures

In this order:

experiments        the table of experiments, the table of schedules, the numbers of a run
on the screen      progress on standard error, the tables on standard output
pictures           what `report` draws with matplotlib
options            those that several commands have
opening a run      the user's net, the data, how a foreign net is read, the run folder, outputs
commands           reproduce, train, prune, evaluate, report, export
errors             one line and an exit status for what a user can cause

PyTorch is imported inside the functions, so that --help is quick.
"""

import errno
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from io import StringIO
from pathlib import Path
from typing import Annotated

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_at_once(number, _):
    os.write(2, b"stopped\n")
    os._exit(128 + number)


if __name__ == "__main__":  # a Ctrl-C while the rest is imported gets one line, too
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, exit_at_once)

try:
    from enum import StrEnum
except ImportError:
    sys.exit("wtp: this needs Python 3.11 or later")
try:
    import typer
except ImportError:
    sys.exit("wtp: typer is missing; pip install -r requirements.txt")

# ---- experiments -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """What is pruned, on which data, and how long it is trained. The defaults are CIFAR's."""

    arch: str
    data: str
    classes: int = 10
    channels: int = 3
    size: int = 32
    crop: int = 4  # pixels (script)
    flip: bool = True  # (script)
    train_images: int = 50_000
    # The published cut, which is to be reached: a share of the MACs, in (0, 1). None: the papers'
    # reward decides how much is removed.
    target: float | None = None
    recovery_epochs: int = 30  # of a candidate (paper)
    final_epochs: int = 250  # of the final training (paper)
    baseline_epochs: int = 200  # ours: no source gives the baseline's training
    baseline_lr: float = 0.1  # ours
    # ours: the final trainings in one cycle (RESULTS.md, section 5).
    short_final_epochs: int = 20
    short_final_lr: float = 0.005  # the peak rate of a short one
    long_final_lr: float = 0.02  # the peak rate of a long one, which has `final_epochs`


# Of MNIST; `digits` is trained in the same way.
# ours: MNIST is neither cropped nor flipped, for a mirrored digit is another sign.
MNIST_NUMBERS = {
    "channels": 1,
    "size": 28,
    "crop": 0,
    "flip": False,
    "recovery_epochs": 10,  # (paper)
    "final_epochs": 100,  # (paper)
    "baseline_epochs": 20,
    "baseline_lr": 0.05,
    "short_final_epochs": 10,
    "short_final_lr": 0.02,
}
VGG_CUT = 0.701  # (IJCAI 2018)
RESNET_CUT = 0.475  # (IJCAI 2018)
VGG = {"target": VGG_CUT, "short_final_lr": 0.01}

LARGE_SIZE = 224  # pixels of a side, of photographs for torchvision's nets

# fmt: off
EXPERIMENTS = {
    "mnist": Experiment("lenet5", "mnist", train_images=60_000, **MNIST_NUMBERS),
    "vgg-cifar10": Experiment("vgg19", "cifar10", **VGG),
    "vgg16-cifar10": Experiment("vgg16", "cifar10", **VGG),
    "vgg-cifar100": Experiment("vgg19", "cifar100", classes=100, **VGG),
    "resnet56-cifar10": Experiment("resnet56", "cifar10", target=RESNET_CUT),
    "resnet56-cifar100": Experiment("resnet56", "cifar100", classes=100, target=RESNET_CUT),
    "digits": Experiment("lenet5", "digits", train_images=6_000, **MNIST_NUMBERS),
}
# fmt: on


@dataclass(frozen=True)
class Schedule:
    """How much is spent. The defaults are the papers'. None: the experiment's own number."""

    pruning_rate: float = 0.2  # R_prune (paper)
    lr: float = 0.001  # of recoveries and of the final training (script)
    # Whether learning rates rise and fall in one cycle: in a recovery up to `lr`, in the final
    # training up to the experiment's peak rate. Else the rate is `lr` all the time.
    is_one_cycle: bool = False
    # Which final training in one cycle: the experiment's long one, or its short one.
    has_long_final: bool = False
    temperature: float | None = None  # of the final training; None: the papers' MSE
    candidates_per_lstm_epoch: int = 5  # (paper)
    patience: int = 10  # LSTM epochs without a better network (paper)
    # Of a search by regression, where there is a target; None: the papers' REINFORCE.
    max_candidates: int | None = None
    baseline_epochs: int | None = None
    recovery_epochs: int | None = None
    # In place of `recovery_epochs`: a recovery of about so many steps. On few images these are
    # several epochs, on many images a part of one.
    recovery_steps: int | None = None
    final_epochs: int | None = None
    # At most so many images train or validate, and at most so many test. None: all.
    max_images: int | None = None
    # ours: a training on fewer images than the experiment has is lengthened to at least so many
    # steps (0: never). A recovery is lengthened only where `recovery_steps` is None.
    fewest_baseline_steps: int = 2000
    fewest_final_steps: int = 1000
    fewest_recovery_steps: int = 200


# ours; RESULTS.md says how these numbers were chosen.
FAST = Schedule(
    lr=0.02,
    is_one_cycle=True,
    temperature=4.0,
    candidates_per_lstm_epoch=3,
    patience=3,
    max_candidates=60,
    baseline_epochs=20,
    recovery_steps=50,
)
SCHEDULES = {
    "published": Schedule(),
    "full": replace(FAST, has_long_final=True, baseline_epochs=None),
    "fast": FAST,
    "smoke": Schedule(
        lr=0.1,
        is_one_cycle=True,
        temperature=4.0,
        candidates_per_lstm_epoch=2,
        patience=2,
        max_candidates=4,
        baseline_epochs=12,
        recovery_epochs=1,
        final_epochs=1,
        max_images=2000,
        fewest_baseline_steps=0,
        fewest_final_steps=0,
        fewest_recovery_steps=0,
    ),
}

ScheduleName = StrEnum("ScheduleName", list(SCHEDULES))
MethodName = StrEnum("MethodName", ["uniform", "lstm", "sep", "static", "random"])
# The rows of a table, in the order in which they are shown; controller.METHODS has the order in
# which they are made.
SHOWN_ROWS = ("baseline", "uniform", "random", "lstm", "sep", "static")
DEFAULT_METHODS = ("uniform", "lstm", "sep")


def build_net(experiment: Experiment, *, classes: int | None = None, size: int | None = None):
    """The untrained net of an experiment, by default for its own data."""
    from models import build

    return build(
        experiment.arch,
        classes=classes or experiment.classes,
        channels=experiment.channels,
        size=size or experiment.size,
    )


def epochs_for_steps(steps: int, image_count: int) -> int:
    """The number of epochs, at least 1, that comes nearest to `steps` training steps. `image_count`
    also counts those that validate, which take no part in training."""
    from controller import BATCH_SIZE, VALIDATION_SHARE

    return max(1, round(steps * BATCH_SIZE / ((1 - VALIDATION_SHARE) * image_count)))


def lengthen_for_few_images(
    experiment: Experiment, image_count: int, epochs: int, fewest_steps: int
) -> int:
    """`epochs`, or more where there are fewer images than the experiment's: then enough for at
    least `fewest_steps` steps. `image_count` also counts those that validate. With `fewest_steps` 0
    it is always `epochs`."""
    from controller import BATCH_SIZE, VALIDATION_SHARE

    if image_count >= experiment.train_images or not fewest_steps:
        return epochs
    steps_per_epoch = max(1, int((1 - VALIDATION_SHARE) * image_count) // BATCH_SIZE)
    return max(epochs, math.ceil(fewest_steps / steps_per_epoch))


def plan_baseline(experiment: Experiment, schedule: Schedule, image_count: int):
    """The training of the baseline, on so many images."""
    from controller import TrainingPlan

    epochs = schedule.baseline_epochs or experiment.baseline_epochs
    epochs = lengthen_for_few_images(
        experiment, image_count, epochs, schedule.fewest_baseline_steps
    )
    return TrainingPlan(epochs, experiment.baseline_lr, is_one_cycle=True)


def plan_recovery(experiment: Experiment, schedule: Schedule, image_count: int):
    """The recovery of a candidate, on so many images."""
    from controller import TrainingPlan

    if schedule.recovery_steps:
        epochs = epochs_for_steps(schedule.recovery_steps, image_count)
    else:
        epochs = schedule.recovery_epochs or experiment.recovery_epochs
        epochs = lengthen_for_few_images(
            experiment, image_count, epochs, schedule.fewest_recovery_steps
        )
    return TrainingPlan(
        epochs,
        schedule.lr,
        is_one_cycle=schedule.is_one_cycle,
        max_steps=schedule.recovery_steps,
    )


def plan_final_training(experiment: Experiment, schedule: Schedule, image_count: int):
    """The papers' final training, or one of ours in one cycle, on so many images."""
    from controller import TrainingPlan

    epochs, lr = experiment.final_epochs, schedule.lr
    if schedule.has_long_final:
        lr = experiment.long_final_lr
    elif schedule.is_one_cycle:
        epochs, lr = experiment.short_final_epochs, experiment.short_final_lr
    epochs = schedule.final_epochs or epochs
    epochs = lengthen_for_few_images(experiment, image_count, epochs, schedule.fewest_final_steps)
    return TrainingPlan(
        epochs, lr, is_one_cycle=schedule.is_one_cycle, temperature=schedule.temperature
    )


def settings_for(
    experiment: Experiment,
    schedule: Schedule,
    seed: int,
    *,
    pruning_rate: float | None = None,
    baseline_epochs: int | None = None,
    final_epochs: int | None = None,
    train_images: int | None = None,
):
    """The numbers of a run: the schedule's, or the experiment's where the schedule has none.

    `pruning_rate`, `baseline_epochs` and `final_epochs` are the user's own, and take precedence.
    `train_images` is the number of the run's images that train or validate; None: all of the
    experiment's.
    """
    from controller import Settings

    image_count = train_images or experiment.train_images
    baseline = plan_baseline(experiment, schedule, image_count)
    final = plan_final_training(experiment, schedule, image_count)
    return Settings(
        baseline=replace(baseline, epochs=baseline_epochs or baseline.epochs),
        recovery=plan_recovery(experiment, schedule, image_count),
        final=replace(final, epochs=final_epochs or final.epochs),
        pruning_rate=pruning_rate or schedule.pruning_rate,
        target=experiment.target,
        candidates_per_lstm_epoch=schedule.candidates_per_lstm_epoch,
        patience=schedule.patience,
        max_candidates=schedule.max_candidates,
        seed=seed,
    )


# ours: about how long searches by the papers' rules are: LSTM epochs until the rewards stop
# growing, and pruning steps until `uniform` has reached its cut.
EXPECTED_LSTM_EPOCHS = 10
EXPECTED_UNIFORM_STEPS = 10


def estimate_epochs(
    settings, methods, train_count: int, *, trains_baseline: bool = True, finished_methods=()
) -> float:
    """How many epochs the rows of `methods` may take. An epoch has `train_count` images, without
    those that validate.

    `finished_methods` are those of the pruned rows that are there already.
    """
    from controller import VALIDATION_SHARE

    total = settings.baseline.epochs if trains_baseline else 0
    finished = list(finished_methods)
    for method in methods:
        if method == "static":
            total += estimate_recovery(settings, train_count)
            continue
        total += estimate_search(settings, method, finished, train_count)
        if method == "sep":
            total += estimate_gate_trials(settings, train_count)
        total += settings.final.epochs / (1 - VALIDATION_SHARE)  # it trains on all images
        finished.append(method)
    return total


def estimate_recovery(settings, train_count: int) -> float:
    """How many epochs of so many images a recovery takes."""
    from controller import BATCH_SIZE

    share_of_epoch = 1.0
    if settings.recovery.max_steps:
        share_of_epoch = min(1.0, settings.recovery.max_steps * BATCH_SIZE / train_count)
    return settings.recovery.epochs * share_of_epoch


def estimate_search(settings, method: str, finished_methods, train_count: int) -> float:
    """How many epochs it may take to find the structure of a row, and to recover it."""
    recovery = estimate_recovery(settings, train_count)
    if method == "uniform":
        is_one_step = settings.searches_by_regression(settings.target)
        return recovery if is_one_step else EXPECTED_UNIFORM_STEPS * recovery
    # Without a target, a search aims at the cut of the row that was made first, if there is one.
    # How large that cut is does not matter here.
    target = settings.target
    if target is None and finished_methods:
        target = 0.5
    by_regression = settings.searches_by_regression(target)
    if method == "sep" and by_regression:
        # `sep` takes the structure that `lstm` found, or searches for one as `lstm` does. Then it
        # recovers two nets: one of that structure, and a smaller one that leaves MACs for gates.
        search = 0
        if "lstm" not in finished_methods:
            search = estimate_search(settings, "lstm", finished_methods, train_count)
        return search + 2 * recovery
    if by_regression:
        return settings.max_candidates * recovery + estimate_trials(settings, train_count)
    lstm_epochs = settings.patience + EXPECTED_LSTM_EPOCHS
    return lstm_epochs * settings.candidates_per_lstm_epoch * recovery


def estimate_trials(settings, train_count: int) -> float:
    """How many epochs the trials of a search's finalists may take."""
    from controller import RegressionSearch, plan_trial

    finalists = min(RegressionSearch.finalists_by_reward + 1, settings.max_candidates)
    return finalists * plan_trial(settings.final, train_count).epochs


def estimate_gate_trials(settings, train_count: int) -> float:
    """How many epochs `sep` may spend on where to put gates: one trial without gates and six with
    gates. So many has a ResNet-56, in 1, 2, 4, 8, 16 and 27 layers; LeNets and VGGs have fewer."""
    from controller import plan_trial, split_epochs

    epochs_before_gates, epochs_with_gates = split_epochs(plan_trial(settings.final, train_count))
    trial_without = len(epochs_before_gates) + len(epochs_with_gates)
    # The trials with gates begin with one net, so they share its epochs without gates.
    trials_with_gates = len(epochs_before_gates) + 6 * len(epochs_with_gates)
    return trial_without + trials_with_gates


# ---- on the screen -----------------------------------------------------------------------------

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=__doc__.split("\n\n")[0],
)


def make_console(*, is_stderr: bool = False):
    from rich.console import Console

    is_terminal = (sys.stderr if is_stderr else sys.stdout).isatty()
    return Console(
        stderr=is_stderr,
        # Not what FORCE_COLOR says: bars in a file are of no use.
        force_terminal=is_terminal,
        highlight=False,
        emoji=False,
        width=None if is_terminal else 120,
        soft_wrap=not is_terminal,
    )


def can_show_bars(console) -> bool:
    """Whether progress bars can be drawn: on a terminal, but for one with TERM=dumb."""
    return console.is_terminal and not console.is_dumb_terminal


def print_line(text: str) -> None:
    """A line of result."""
    make_console().print(text, markup=False)


def print_note(text: str) -> None:
    """A line that is no result."""
    make_console(is_stderr=True).print(text, markup=False)


def format_duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            digits = 1 if unit == "h" else 0
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


# Once an epoch has taken so many seconds, a run says how long it may take, even before it ends.
SECONDS_UNTIL_ESTIMATE = 10
# An epoch counts as long if it has more than this share of the steps of a full epoch. The first
# epoch of a training also waits for the outputs of the teacher, which are kept for later ones. In a
# short epoch they take most of the time, so an estimate leaves them out, or waits for the second
# epoch. In a long epoch they count, and the estimate is an upper bound.
LONG_EPOCH_SHARE = 0.9


class ScreenReporter:
    """A controller.Reporter on standard error: a bar with the time left on a terminal, one plain
    line per epoch elsewhere."""

    def __init__(self):
        from rich import progress

        self.console = make_console(is_stderr=True)
        self.has_bars = can_show_bars(self.console)
        # How many epochs the whole run may take, counted in full epochs. A full epoch shows every
        # image that trains once.
        self.planned_epochs = 0.0
        self.steps_per_epoch = 1  # of a full epoch
        # The steps of one epoch of the current training, as a share of those of a full epoch. It is
        # below 1 where a training has shorter epochs, as a recovery may have.
        self.epoch_share = 1.0
        self.has_finished_epoch = False
        self.has_estimated = False
        self.bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[unit]},"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("elapsed, remaining"),
            progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.has_bars,
        )
        self.run_bar = self.bars.add_task("the run", unit="epochs", total=None)
        self.training_bar = None
        self.training_epochs = 0  # all that the training under way has
        self.training_epochs_done = 0
        self.epochs_to_leave_out = 0
        self.epoch_start = time.monotonic()

    def __enter__(self):
        self.bars.start()
        return self

    def __exit__(self, *_):
        self.bars.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def plan(self, epochs: float, steps_per_epoch: int) -> None:
        """The run may take up to so many epochs, of so many steps each."""
        self.planned_epochs = epochs
        self.steps_per_epoch = max(1, steps_per_epoch)
        self.bars.update(self.run_bar, total=epochs)

    def start_training(self, title: str, epochs: int, first_epoch: int) -> None:
        if self.training_bar is not None:
            self.bars.remove_task(self.training_bar)
        self.training_bar = self.bars.add_task(title, unit="steps", total=None)
        self.training_epochs = epochs
        self.training_epochs_done = first_epoch
        self.epochs_to_leave_out = first_epoch  # of the plan: an earlier process trained them
        self.epoch_start = time.monotonic()
        if first_epoch:
            self.say(f"{title}: goes on after epoch {first_epoch} of {epochs}")

    def wrap_steps(self, steps):
        self.epoch_share = len(steps) / self.steps_per_epoch
        left_out = self.epochs_to_leave_out * self.epoch_share
        self.planned_epochs = max(0, self.planned_epochs - left_out)
        self.epochs_to_leave_out = 0
        self.bars.update(self.run_bar, total=self.planned_epochs)
        self.bars.update(
            self.training_bar,
            total=self.training_epochs * len(steps),
            completed=self.training_epochs_done * len(steps),
        )
        start = time.monotonic()
        seconds_of_teacher = 0.0
        if self.epoch_share > LONG_EPOCH_SHARE:
            seconds_of_teacher = start - self.epoch_start
        for number, step in enumerate(steps, 1):
            yield step
            self.bars.advance(self.training_bar)
            seconds = time.monotonic() - start
            if seconds > SECONDS_UNTIL_ESTIMATE:
                self.say_estimate(seconds_of_teacher + seconds / number * len(steps))
        self.training_epochs_done += 1

    def finish_epoch(self, title, epoch, epochs, loss, accuracy, seconds_per_epoch) -> None:
        self.epoch_start = time.monotonic()
        self.bars.advance(self.run_bar, self.epoch_share)
        if not self.has_bars:
            accuracy_text = ""
            if accuracy is not None:
                accuracy_text = f", validation accuracy {accuracy:.2%}"
            self.say(
                f"{title}: epoch {epoch + 1}/{epochs}, loss {loss:.4f}{accuracy_text}, "
                f"{seconds_per_epoch:.1f} s an epoch"
            )
        is_long = self.epoch_share > LONG_EPOCH_SHARE and seconds_per_epoch > SECONDS_UNTIL_ESTIMATE
        if self.has_finished_epoch or is_long:
            self.say_estimate(seconds_per_epoch)
        self.has_finished_epoch = True

    def say_estimate(self, seconds: float) -> None:
        """Say how long the whole run may take, but only once. `seconds` is the time of one epoch of
        the current training."""
        if self.has_estimated:
            return
        self.has_estimated = True
        part = "this epoch"
        if self.epoch_share <= LONG_EPOCH_SHARE:
            part = f"{self.epoch_share:.0%} of an epoch"
        duration = format_duration(self.planned_epochs * seconds / self.epoch_share)
        self.say(f"{seconds:.1f} s for {part}: up to {duration} for all")


# ---- on the screen: tables ---------------------------------------------------------------------

# `results` is what results.json holds:
#   rows      a dict per finished row, in the order in which they were made
#   search    per method: its rule, target, candidates and layer_scores; of `sep` also gate_trials.
#             The rules: "reinforce", "regression", "uniform", and "shared", where `sep` took the
#             structure of `lstm`'s search.
#   curves    per row: [training loss, validation accuracy or None] of each epoch
#   rounded   per method, with --round-to: the net "before" and "after" its widths were rounded
#   layers    the names of the prunable layers
#   and what the run is: experiment, schedule, data, source, seed, settings, device, ...

# Up to so many layers are named one by one; more would fill lines.
FEW_LAYERS = 8


def rows_in_order(results: dict) -> list[dict]:
    return sorted(results["rows"], key=lambda row: SHOWN_ROWS.index(row["method"]))


def make_table(title: str, columns, **options):
    """A Rich table; the first column is for names, the others for numbers."""
    from rich.table import Table
    from rich.text import Text

    # A Text, for a user's [name] is no markup.
    table = Table(title=Text(title), title_justify="left", **options)
    for number, column in enumerate(columns):
        # fold: nothing is cut off where the terminal is narrow.
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def show_results(results: dict) -> None:
    """The table of a run, a row per method; below, what the rows keep and what searches did."""
    console = make_console()
    rows = rows_in_order(results)
    console.print(results_table(results, rows, is_wide=console.width > 75))
    for line in describe_results(results, rows):
        console.print(line, markup=False)


def describe_run(results: dict) -> str:
    """The run that a table or a picture shows: experiment, schedule, data, seed and device."""
    return (
        f"{results['experiment']}, {results['schedule']} schedule, data {results['data']} "
        f"({results['test_images']:,} test images), seed {results['seed']}, {results['device']}"
    )


def describe_epochs(count: float) -> str:
    return "1 epoch" if round(count) == 1 else f"{count:,.0f} epochs"


def results_table(results: dict, rows: list[dict], *, is_wide: bool):
    columns = ("method", "test accuracy", "validation", "MACs", "cut", "parameters", "time")
    table = make_table(describe_run(results), columns, padding=(0, 1 if is_wide else 0))
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['test_accuracy']:.2%}",
            f"{row['validation_accuracy']:.2%}",
            f"{row['macs'] / 1e6:.3f} M",
            f"{row['macs_reduction']:.1%}",
            f"{row['params']:,}",
            format_duration(row["seconds"]),
        )
    return table


def describe_results(results: dict, rows: list[dict]):
    """The lines below the table."""
    if results["schedule"] == "smoke":
        yield "smoke: a test of the machinery; these accuracies are no result"
    if not rows:
        yield "no row is finished yet"
    if len(rows) > 1:
        final_epochs = describe_epochs(results["settings"]["final"]["epochs"])
        yield f"validation: of what the search chose, before its final training of {final_epochs}"
    for row in rows[1:]:
        kept = describe_widths(results["layers"], rows[0]["widths"], row["widths"])
        yield f"{row['method']} keeps {kept}"
    widths_of = {row["method"]: row["widths"] for row in rows}
    if {"lstm", "uniform"} <= widths_of.keys() and widths_of["lstm"] == widths_of["uniform"]:
        yield "lstm chose exactly the structure of uniform: they differ by chance alone"
    has_shared_lstm = "sep" in widths_of and has_shared_search(results)
    if has_shared_lstm:
        trials = results["search"]["sep"].get("gate_trials", [])
        yield describe_gates(trials, is_rounded="sep" in results["rounded"])
    if "static" in widths_of:
        yield "static begins with sep's net; its time includes sep's"
    ended_searches = widths_of.keys() | ({"lstm"} if has_shared_lstm else set())
    for method, log in results["search"].items():
        if log["rule"] in ("reinforce", "regression") and len(log["candidates"]) > 1:
            yield describe_search(results, method, has_ended=method in ended_searches)
    for method, sides in results["rounded"].items():
        before, after = describe_net(sides["before"]), describe_net(sides["after"])
        yield f"{method}, widths at multiples of {results['round_to']}: {before} -> {after}"
    rows_as_made = [row for row in results["rows"] if row["method"] != "baseline"]
    for row in rows[1:]:
        # After other rows `uniform` aims at the cut of the first one, not at the target.
        if row["method"] != "uniform" or row is rows_as_made[0]:
            yield from describe_shortfall(row, results["settings"]["target"])


def describe_widths(layers, baseline_widths, widths) -> str:
    """What is left of each layer, by the layers' names where they are few. Without
    `baseline_widths` only the widths are named."""
    texts = [str(width) for width in widths]
    if baseline_widths is not None:
        texts = [f"{text}/{before}" for text, before in zip(texts, baseline_widths)]
    if len(widths) > FEW_LAYERS:
        return " ".join(texts)
    return ", ".join(f"{layer} {text}" for layer, text in zip(layers, texts))


def has_shared_search(results: dict) -> bool:
    """Whether `sep` gated what `lstm`'s search found."""
    return results["search"].get("sep", {}).get("rule") == "shared"


def describe_search(results: dict, method: str, *, has_ended: bool) -> str:
    candidates = results["search"][method]["candidates"]
    line = f"{method} tried {len(candidates)} candidates"
    if not has_ended:
        line += " so far"
    finalists = sum(candidate["trial_loss"] is not None for candidate in candidates)
    if finalists:
        line += f", {finalists} of them also in trials"
    if len(results["layers"]) > FEW_LAYERS:
        return line
    return f"{line}; {describe_pruned_layers(results, method)}"


def describe_pruned_layers(results: dict, method: str) -> str:
    """What a search did to each layer, in its first half and in its second one."""
    log = results["search"][method]
    candidates = log["candidates"]
    baseline_widths = rows_in_order(results)[0]["widths"]
    if log["rule"] == "reinforce":
        measure = "how often it pruned each layer"
        shares = [candidate["actions"] for candidate in candidates]
    else:
        # A candidate of a search by regression took many steps, so nearly every layer has lost
        # channels. How often a layer was pruned says little, then; how much it lost says more.
        measure = "mean share removed of each layer"
        shares = [
            [1 - width / before for width, before in zip(candidate["structure"], baseline_widths)]
            for candidate in candidates
        ]
    middle = len(candidates) // 2
    first_half, second_half = (
        " ".join(f"{sum(layer) / len(half):.0%}" for layer in zip(*half))
        for half in (shares[:middle], shares[middle:])
    )
    return (
        f"{measure}: {first_half} (in the first half of the candidates), {second_half} (in the "
        "second half)"
    )


def describe_gates(trials: list[dict], *, is_rounded: bool) -> str:
    """How many gates `sep` has, or why it has none; for a `sep` that took the structure of `lstm`'s
    search."""
    from controller import best_gate_count

    gates = best_gate_count(trials)
    reason = "for none helped" if trials else "for no layer lost enough kernels"
    if gates == 0 and is_rounded:
        return (
            f"sep has no gates, {reason}; its widths were rounded with room for gates; its time "
            "includes lstm's search"
        )
    if gates == 0:
        return (
            f"sep has no gates, {reason}, and is the net of lstm's search; its time includes that "
            "search"
        )
    number = "one gate" if gates == 1 else f"{gates} gates"
    return (
        f"sep has {number}, and the structure of lstm's search less what gates cost; its time "
        "includes that search"
    )


def describe_net(side: dict) -> str:
    """A net before or after its widths were rounded."""
    single, batch = side["latencies"]
    text = (
        f"validation accuracy {side['validation_accuracy']:.2%}, cut {side['macs_reduction']:.1%}, "
        f"{single * 1e3:.2f} ms an image, {batch * 1e3:.1f} ms for 128"
    )
    if len(side["widths"]) > FEW_LAYERS:
        return text
    return f"{'-'.join(map(str, side['widths']))}, {text}"


def describe_shortfall(row: dict, target: float | None):
    """A line for a row that did not get where it should."""
    method = row["method"]
    cut = row["macs_reduction"]
    if target and cut < target:
        reason = "; its search found nothing smaller"
        if method in ("uniform", "static"):
            reason = ""  # these do not search
        yield f"{method} did not reach the target: a cut of {cut:.2%}, not {target:.2%}{reason}"
    elif cut == 0 and method != "uniform":
        yield f"{method} kept the whole net: by the reward, nothing smaller was better"


# ---- pictures ----------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind eyes tell apart, and a marker for each row.
ROW_STYLES = {
    "baseline": ("#000000", "x"),
    "uniform": ("#999999", "s"),
    "random": ("#e69f00", "v"),
    "lstm": ("#0072b2", "o"),
    "sep": ("#d55e00", "^"),
    "static": ("#009e73", "D"),
}
PICTURE_STYLE = {
    "font.size": 8,
    "figure.titlesize": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1,
    "lines.markersize": 4,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "wtp",  # the same picture is the same file
    "pdf.fonttype": 42,
}
PICTURE_WIDTH = 7.0  # inches: the text width of a two-column paper
PANEL_HEIGHT = 2.4
PICTURE_ENDINGS = (".svg", ".png", ".pdf")


def draw_report(results: dict, path: Path, usage: dict | None = None) -> None:
    """The pictures of a run, at `path`; `usage` is what controller.measure_usage_by_class says of
    its gates. Raises UserError where matplotlib is missing."""
    from models import UserError, temporary_path, write_atomically

    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error

    results = replace_unwritable(results)
    panels = list_panels(results, replace_unwritable(usage))
    with matplotlib.rc_context(PICTURE_STYLE):
        panel_rows = max(1, math.ceil(len(panels) / 2))  # two panels a row
        figure = Figure(figsize=(PICTURE_WIDTH, PANEL_HEIGHT * panel_rows), layout="constrained")
        figure.suptitle(describe_run(results), parse_math=False)
        all_axes = figure.subplots(panel_rows, 2, squeeze=False).flatten()
        for draw, axes in zip(panels, all_axes):
            draw(axes)
        for axes in all_axes[len(panels) :]:
            axes.axis("off")
        ending = path.suffix.lower().removeprefix(".")
        metadata = {"Date": None} if ending == "svg" else None
        write_atomically(
            path,
            lambda temporary: figure.savefig(temporary, format=ending, dpi=300, metadata=metadata),
            temporary_path(path),
        )


def replace_unwritable(content):
    """What results.json holds, with "?" for characters that no picture can hold: those of a file or
    folder whose name is no UTF-8."""
    return json.loads(json.dumps(content, ensure_ascii=False).encode(errors="replace"))


def list_panels(results: dict, usage: dict | None) -> list[Callable]:
    """A function of each panel, which draws it on Axes of matplotlib."""
    panels = []
    if len(results["rows"]) > 1:
        panels.append(partial(draw_kept_channels, results=results))
    for method, log in results["search"].items():
        if log["rule"] in ("reinforce", "regression") and len(log["candidates"]) > 1:
            panels.append(partial(draw_candidates, results=results, method=method))
            if log["layer_scores"]:
                panels.append(partial(draw_layer_scores, results=results, method=method))
    if has_curve(results, LOSS_COLUMN):
        panels.append(partial(draw_losses, results=results))
    if has_curve(results, ACCURACY_COLUMN):
        panels.append(partial(draw_validation_curves, results=results))
    if usage is not None:
        for layer, shares in usage["layers"].items():
            panels.append(partial(draw_usage, classes=usage["classes"], layer=layer, shares=shares))
    return panels


def draw_kept_channels(axes, results: dict) -> None:
    """For each layer the share of its channels that each row keeps."""
    rows = rows_in_order(results)
    baseline_widths = rows[0]["widths"]
    bar_width = 0.8 / (len(rows) - 1)
    largest_share = 0
    for number, row in enumerate(rows[1:]):
        offset = (number - (len(rows) - 2) / 2) * bar_width
        places = [layer + offset for layer in range(len(baseline_widths))]
        shares = [100 * width / before for width, before in zip(row["widths"], baseline_widths)]
        largest_share = max(largest_share, *shares)
        colour = ROW_STYLES[row["method"]][0]
        axes.bar(places, shares, bar_width, color=colour, label=row["method"])
    # Room for the legend above the bars.
    top = 1.35 * largest_share
    axes.set(title="channels kept in each layer", ylabel="channels kept (%)", ylim=(0, top))
    label_layers(axes.xaxis, results["layers"])
    axes.legend(ncols=3, loc="upper center")


def label_layers(axis, layers: list[str]) -> None:
    """Ticks for the layers: their names, or only some of them where they are many."""
    step = math.ceil(len(layers) / 28)
    places = range(0, len(layers), step)
    is_many = len(layers) > FEW_LAYERS
    rotation = 90 if is_many and axis.axis_name == "x" else 0
    labels = [layers[place] for place in places]
    fontsize = 5 if is_many else 7
    # No formulas: names of a user's classes may have $ in them.
    axis.set_ticks(list(places), labels, rotation=rotation, fontsize=fontsize, parse_math=False)


def draw_candidates(axes, results: dict, method: str) -> None:
    """The validation accuracy (%) of each candidate against its cut (% of the MACs). If all cuts
    lie within 2 points, against the order in which the candidates were tried."""
    candidates = results["search"][method]["candidates"]
    cuts = [100 * candidate["macs_reduction"] for candidate in candidates]
    accuracies = [100 * candidate["validation_accuracy"] for candidate in candidates]
    is_in_order = max(cuts) - min(cuts) < 2
    places = list(range(1, len(candidates) + 1)) if is_in_order else cuts
    colour, marker = ROW_STYLES[method]
    axes.plot(places, accuracies, marker, color=colour, alpha=0.5, label="candidate")
    finalists = [
        (place, accuracy)
        for place, accuracy, candidate in zip(places, accuracies, candidates)
        if candidate["trial_loss"] is not None
    ]
    if finalists:
        axes.plot(*zip(*finalists), "x", color="#000000", markersize=5, label="in a trial, too")
    chosen_widths = [row["widths"] for row in results["rows"] if row["method"] == method]
    for place, accuracy, candidate in zip(places, accuracies, candidates):
        if candidate["structure"] in chosen_widths:
            axes.plot(place, accuracy, "*", color="#000000", markersize=9, label="chosen")
    if is_in_order:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(
        title=f"{method}: each candidate after its recovery",
        xlabel="candidate, in the order tried" if is_in_order else "cut (% of MACs removed)",
        ylabel="validation accuracy (%)",
    )
    axes.legend()


def draw_layer_scores(axes, results: dict, method: str) -> None:
    """What the LSTM thinks of each layer of the baseline, over the search."""
    log = results["search"][method]
    by_layer = list(zip(*log["layer_scores"]))
    image = axes.imshow(by_layer, aspect="auto", cmap="cividis", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label=log["layer_score"])
    axes.set(title=f"{method}: what the LSTM thinks of each layer", xlabel="LSTM epoch")
    epochs = len(log["layer_scores"])
    places = range(0, epochs, max(1, epochs // 6))
    axes.set_xticks(list(places), [str(place + 1) for place in places])
    label_layers(axes.yaxis, results["layers"])


# Of a learning curve's points.
LOSS_COLUMN, ACCURACY_COLUMN = 0, 1


def has_curve(results: dict, column: int) -> bool:
    points = [point for curve in results["curves"].values() for point in curve]
    return any(point[column] is not None for point in points)


def draw_losses(axes, results: dict) -> None:
    """The training loss of the baseline and of each final training."""
    draw_curves(axes, results, LOSS_COLUMN, unit=1)
    axes.set(title="training loss", xlabel="epoch", ylabel="loss", yscale="log")


def draw_validation_curves(axes, results: dict) -> None:
    """The validation accuracy over the epochs, of trainings that leave validation images out."""
    draw_curves(axes, results, ACCURACY_COLUMN, unit=100)
    axes.set(title="learning curve", xlabel="epoch", ylabel="validation accuracy (%)")


def draw_curves(axes, results: dict, column: int, *, unit: float) -> None:
    """A line per row through one column of its learning curve."""
    for method, curve in results["curves"].items():
        points = [(epoch, point[column]) for epoch, point in enumerate(curve, 1)]
        points = [(epoch, unit * value) for epoch, value in points if value is not None]
        if not points:
            continue
        colour, marker = ROW_STYLES[method]
        epochs, values = zip(*points)
        axes.plot(epochs, values, color=colour, marker=marker, markersize=2, label=method)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def kernel_sort_key(shares_by_class) -> tuple:
    """The key that sorts the kernels of a gated layer in a picture: see `draw_usage`."""
    largest = max(shares_by_class)
    return min(shares_by_class) < 1, shares_by_class.index(largest), -largest


def draw_usage(axes, classes: list[str], layer: str, shares: list[list[float]]) -> None:
    """Which kernels of a gated layer serve which class: shares (classes, C) of its images.

    Kernels that serve no image are left out. From left to right: those that serve all images, then
    the others by the class that uses them most.
    """
    kernels = [shares_by_class for shares_by_class in zip(*shares) if any(shares_by_class)]
    kernels.sort(key=kernel_sort_key)
    varying_count = sum(min(shares_by_class) < 1 for shares_by_class in kernels)
    image = axes.imshow(
        list(zip(*kernels)), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.figure.colorbar(image, ax=axes, label="share of images")
    axes.set(xlabel="kernels in use, ordered by the class that uses them most", ylabel="class")
    title = f"sep, {layer}: {varying_count} of {len(shares[0])} kernels vary by image"
    axes.set_title(title, parse_math=False)
    label_layers(axes.yaxis, classes)


# ---- options -----------------------------------------------------------------------------------


MIN_LIKELY_PERCENTAGE = 5  # ours: 50 is taken for 50 %, but 1.5 hardly for 1.5 %


def check_share(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        suggestion = suggest_share(value) if value >= MIN_LIKELY_PERCENTAGE else ""
        raise typer.BadParameter(
            f"{value:g} is no share above 0 and below 1, as 0.9 is for 90 %{suggestion}"
        )
    return value


def suggest_share(percentage: float) -> str:
    return f"; did you mean {percentage / 100:g}?" if 1 < percentage < 100 else ""


NET_ENDINGS = (".pt", ".pth", ".safetensors", ".pt2", ".onnx")


def check_is_no_net_name(folder: Path) -> Path:
    """The folder of --out. Raises typer.BadParameter where --output was meant."""
    if folder.suffix.lower() in NET_ENDINGS and not folder.is_dir():
        raise typer.BadParameter(
            f"{folder} looks like a file, but this is the folder of run folders; `prune` and "
            "`train` name the file of the net by --output"
        )
    return folder


def parse_share(text: str) -> float:
    """A share, as the user writes it. Raises typer.BadParameter."""
    with suppress(ValueError):
        return float(text)
    suggestion = ""
    with suppress(ValueError):
        value = float(text.removesuffix("%").replace(",", "."))
        if 0 < value < 1 and not text.endswith("%"):
            suggestion = f"; did you mean {value:g}?"
        elif text.endswith("%") or value >= MIN_LIKELY_PERCENTAGE:
            suggestion = suggest_share(value)
    raise typer.BadParameter(f"{text} is no number, as 0.9 is for 90 %{suggestion}")


SHARE = {"parser": parse_share, "metavar": "SHARE", "callback": check_share}  # of an option
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="where the data is, or is downloaded to; default: the folder of your own images that "
        "the checkpoint names, else $WTP_DATA, else data",
        show_default=False,
    ),
]
PhotographSize = Annotated[
    int | None,
    typer.Option(
        "--size",
        min=1,
        help="pixels of a side that photographs are brought to, where a state dict from elsewhere "
        "does not say it; default: 224 for a ResNet or VGG as torchvision's, else the first usual "
        "size that its weights fit, as 28 or 32",
        show_default=False,
    ),
]
Activation = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="the activation of a net from elsewhere, for its weights do not tell it: relu, tanh, "
        "sigmoid, elu, gelu, silu, relu6, selu, hardswish, mish, leaky_relu_0.01, leaky_relu_0.1 "
        "or leaky_relu_0.2; default: what the tool finds",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="the net: a file of this tool, or a state dict, as .pt, .pth, .safetensors"
    ),
]
Out = Annotated[
    Path, typer.Option(help="where run folders are made", callback=check_is_no_net_name)
]
Device = Annotated[str, typer.Option(help="cpu, cuda (or gpu), or auto")]
Seed = Annotated[int, typer.Option(min=0, help="of everything random")]
Fresh = Annotated[bool, typer.Option("--fresh", help="remove all rows of this run, and start over")]
SCHEDULE_HELP = (
    "published: the papers' numbers; full: the search of fast, then a final training as long as "
    "the papers'; fast: a verdict in minutes to hours on a CPU; smoke: a test"
)
ScheduleOption = Annotated[ScheduleName, typer.Option(help=SCHEDULE_HELP)]
PruneScheduleOption = Annotated[
    ScheduleName | None,
    typer.Option(
        help=f"{SCHEDULE_HELP}; default: fast where a --target is given, else published",
        show_default=False,
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        **SHARE,
        help="share of a chosen layer's channels that one step removes; default: the papers', 0.2",
        show_default=False,
    ),
]
RoundTo = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="keep the widths of pruned layers at multiples of this, as machines like them; the "
        "cut may become larger",
    ),
]
FinalEpochs = Annotated[
    int | None,
    typer.Option(min=1, help="epochs of the final training, in place of the schedule's own"),
]
Target = Annotated[
    float | None,
    typer.Option(
        **SHARE,
        help="share of the MACs to remove; without it the papers' reward decides how much goes",
    ),
]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What `reproduce`, `train` and `prune` were asked for. What a command does not offer stays at
    its default."""

    schedule: str
    data_dir: Path
    out: Path
    device: str
    seed: int
    fresh: bool
    pruning_rate: float | None = None
    baseline_epochs: int | None = None
    final_epochs: int | None = None
    round_to: int | None = None
    force: bool = False

    def folder_name(self, name: str) -> str:
        """What the folder of a run of that name is called."""
        if self.baseline_epochs:
            name += f"-baseline{self.baseline_epochs}"
        if self.final_epochs:
            name += f"-epochs{self.final_epochs}"
        return f"{name}-{self.schedule}-s{self.seed}"


# ---- opening a run: the user's net -------------------------------------------------------------


@dataclass
class UserNet:
    """A net of the user's, from a checkpoint, and the facts in it.

    A foreign state dict, which this tool has not written, may be several nets: its `readings`.
    `net` is the likeliest of them until images tell which it is. Where the file has an example of
    what the net computes (models.Example), the reading that computes it is the only one.

    This object changes: `fit_size` drops readings, `load_images_and_choose_reading` sets `net` and
    `accuracy`, `use_reading_of_run` makes it a known net.
    """

    path: Path
    net: object  # models.Net
    # What the file says beside the weights. A file of this tool says data, test_images, names (of
    # the classes), split (its seed), mean, std and, of a pruned net, its baseline's row. A foreign
    # file says at most mean and std.
    facts: dict
    readings: list  # of models.Reading, the likeliest first; none for a file of this tool
    has_example: bool = False  # then the only reading is the right one
    photograph_size: int | None = None  # pixels; the user's --size
    activation: str | None = None  # the user's --activation
    # The accuracy, in [0, 1], of the chosen reading on the images that were used to choose it.
    # None: no images were needed for that.
    accuracy: float | None = None

    @property
    def is_ambiguous(self) -> bool:
        """Whether the file alone does not say which net it is."""
        return bool(self.readings) and not self.has_example

    def fit_size(self, size: int) -> None:
        """Keep the readings that take images of that size. Raises UserError where none does."""
        from models import UserError

        if not self.readings:
            return  # a file of this tool: `check_net_fits` compares the sizes
        fitting = [reading.for_size(size) for reading in self.readings]
        fitting = [reading for reading in fitting if reading is not None]
        if not fitting:
            # Too small images have an error of their own.
            self.readings[0].architecture.check_size(size)
            raise UserError(
                f"{self.path}: no reading of its weights takes images of {size} x {size} pixels; "
                f"{self.advise_on_size()}"
            )
        self.readings = fitting
        self.net = fitting[0].build()

    def advise_on_size(self) -> str:
        """What to do where no reading takes the images."""
        if self.has_example:
            return (
                f"its inputs in the file have {self.net.size} x {self.net.size}; make the images "
                "so, or name others by --data-dir"
            )
        return (
            "if it has strides, or other poolings than 2 x 2, put some inputs and outputs of it "
            "into the file (docs/your-net.md)"
        )

    @cached_property
    def source(self) -> str:
        """Name and content of the file: another file is another run."""
        import hashlib

        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return f"{self.path.name}, sha256 {digest[:16]}"


def load_user_net(
    path: Path, *, photograph_size: int | None = None, activation: str | None = None
) -> UserNet:
    """A user's checkpoint; the options say what a foreign state dict does not.

    Raises UserError.
    """
    import sep
    from models import ACTIVATIONS, UserError, change_activation

    if activation not in (None, *ACTIVATIONS):
        raise UserError(f"unknown activation '{activation}'; there are {', '.join(ACTIVATIONS)}", 2)
    net, checkpoint = sep.load_checkpoint(path)
    readings = checkpoint.get("readings", [])
    has_example = checkpoint.get("has_example", False)
    file_tells_activation = has_example or not readings
    if file_tells_activation and activation not in (None, net.architecture.activation):
        raise UserError(
            f"{path} says its activation, {net.architecture.activation}; leave out --activation", 2
        )
    if not readings and photograph_size not in (None, net.size):
        raise UserError(
            f"{path} says its size, {net.size} x {net.size} pixels; leave out --size", 2
        )
    for note in checkpoint.get("notes", []):
        print_note(note)
    if activation is not None and not file_tells_activation:
        readings = change_activation(readings, activation)
        net = readings[0].build()
    facts = checkpoint["facts"]
    return UserNet(path, net, facts, readings, has_example, photograph_size, activation)


# ---- opening a run: data and device ------------------------------------------------------------


def find_data_dir(data_dir: Path | None, facts: dict, experiment: str = "") -> Path:
    """Where the data is: as the user says, else where the checkpoint's own images still are, else
    in $WTP_DATA, else in `data`."""
    from controller import OWN_IMAGES, is_image_folder
    from models import UserError

    if data_dir is not None:
        return data_dir
    data = facts.get("data")
    if (experiment or data) == "digits":
        return Path(os.devnull)  # digits are drawn, not read: no folder is looked at
    if isinstance(data, str) and data.startswith(OWN_IMAGES):
        folder = Path(data.removeprefix(OWN_IMAGES))
        with suppress(UserError, OSError):  # half of it may be gone, or it may not be read
            if is_image_folder(folder):
                return folder
    return Path(os.path.expanduser(os.environ.get("WTP_DATA") or "data"))


def find_experiment(name: str) -> Experiment:
    from models import UserError

    if name not in EXPERIMENTS:
        raise UserError(f"unknown experiment '{name}'; there are {', '.join(EXPERIMENTS)}", 2)
    return EXPERIMENTS[name]


def find_experiment_for(user_net: UserNet, data_dir: Path) -> Experiment:
    """The experiment whose data set and augmentation a net is used with.

    Its images have as many channels and classes as the net. If `data_dir` is the user's own data
    set, the classes may differ. Of several experiments the one whose data set the checkpoint names
    is taken, else one with a net of the same family. Raises UserError where there is none.
    """
    from controller import OWN_IMAGES, is_image_folder
    from models import UserError

    net, data = user_net.net, user_net.facts.get("data")
    if is_image_folder(data_dir):
        # Digits are drawn and read no folder; mnist has the same numbers.
        fitting = [experiment for experiment in EXPERIMENTS.values() if experiment.data != "digits"]
    elif str(data).startswith(OWN_IMAGES):
        raise UserError(
            f"the net was trained on {data}; name that folder, wherever it is now, with "
            f"--data-dir ({describe_missing_parts(data_dir)})",
            2,
        )
    else:
        fitting = [
            experiment for experiment in EXPERIMENTS.values() if experiment.classes == net.classes
        ]
    fitting = [experiment for experiment in fitting if experiment.channels == net.channels]
    if not fitting:
        raise explain_missing_data_set(user_net, data_dir)

    def family(arch):
        return arch.rstrip("0123456789").removeprefix("pre")  # resnet of preresnet20

    def preference(experiment):
        has_same_data = experiment.data == data
        has_same_family = family(experiment.arch) == family(net.arch)
        return has_same_data, has_same_family  # the data set comes first; True is more than False

    return max(fitting, key=preference)


def explain_missing_data_set(user_net: UserNet, data_dir: Path):
    """The UserError for a net that no experiment's data fit, nor the user's own."""
    from controller import check_is_no_image_folder, is_image_folder, suggest_image_folder
    from models import UserError

    net = user_net.net
    channels = "1 channel" if net.channels == 1 else f"{net.channels} channels"
    if is_image_folder(data_dir):
        return UserError(
            f"{user_net.path} reads {channels}; only gray images (1) and RGB images (3) can be read"
        )
    check_is_no_image_folder(data_dir)
    return UserError(
        f"no data set here has {channels} and {net.classes} classes, and "
        f"{describe_missing_parts(data_dir)}; --data-dir can name a folder with train/CLASS and "
        f"test/CLASS{suggest_image_folder(data_dir)}"
    )


def describe_missing_parts(data_dir: Path) -> str:
    """Why a folder holds no images of the user's own."""
    state = "has no train/CLASS and test/CLASS" if data_dir.is_dir() else "is no folder"
    return f"{data_dir} {state}"


def own_images_suffix(data_dir: Path) -> str:
    """What a run folder's name says of the data, where they are the user's own."""
    from controller import is_image_folder

    return f"-on-{data_dir.absolute().name}" if is_image_folder(data_dir) else ""


def select_device(name: str):
    """The torch.device of that name. Raises UserError (status 2) where it cannot be used."""
    import torch

    from models import UserError

    advice = "try cpu" if name == "auto" else "try cpu or auto"
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "gpu" or name.startswith("gpu:"):
            name = name.replace("gpu", "cuda")
        if name.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError("only cpu and cuda are known")
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # streams and graphs are the current device's
    except Exception as error:
        raise UserError(
            f"device '{name}' cannot be used here; {advice} ({first_line_of(error)})", 2
        ) from error
    return device


def load_experiment_images(
    experiment: Experiment,
    data_dir: Path,
    size: int,
    say,
    *,
    size_advice: str = "",
    only_test: bool = False,
):
    """(training images, test images, what they are) as an experiment augments them; photographs are
    brought to `size`, and the user is told so with `size_advice`. With `only_test` the training
    images are not read, and None. Raises UserError."""
    from controller import load_data

    return load_data(
        experiment.data,
        data_dir,
        crop=experiment.crop,
        flip=experiment.flip,
        size=size,
        size_advice=size_advice,
        only_test=only_test,
        say=say,
    )


def say_where_size_is_unused(size: int | None, images, say) -> None:
    """Tell the user that --size is not used where the images have another size."""
    if size not in (None, images.size):
        say(
            "--size is for photographs; these images are read as they are, "
            f"{images.size} x {images.size}"
        )


# ---- opening a run: how a foreign net is read --------------------------------------------------


def load_images_and_choose_reading(
    user_net: UserNet, experiment: Experiment, data_dir: Path, device, say
):
    """(training images, test images, what they are) for a user's net, on the device.

    They are normalised as the net is used to. Of a foreign state dict `user_net.net` becomes the
    reading that fits them best. Raises UserError where the net cannot read the images
    or has other classes.
    """
    train, test, description = load_images_for_net(user_net, experiment, data_dir, say)
    user_net.fit_size(train.size)
    check_net_fits(user_net.net, user_net.facts, train, description)
    train, test = train.to(device), test.to(device)
    chosen = choose_reading(user_net, train, say)
    user_net.net, user_net.accuracy = chosen.net, chosen.accuracy
    mean, std = chosen.mean, chosen.std
    return train.normalised_by(mean, std), test.normalised_by(mean, std), description


def load_test_images(user_net: UserNet, experiment: Experiment, data_dir: Path, device, say):
    """(test images, what they are), on the device and normalised for a user's net.

    The training images are read, too, but only where they are needed to find out how the net is
    read or its images are normalised. Raises UserError.
    """
    from controller import stored_normalisation

    stored = stored_normalisation(user_net.net, user_net.facts)
    if user_net.readings or stored is None:
        _, test, description = load_images_and_choose_reading(
            user_net, experiment, data_dir, device, say
        )
        return test, description
    _, test, description = load_images_for_net(user_net, experiment, data_dir, say, only_test=True)
    check_net_fits(user_net.net, user_net.facts, test, description)
    return test.to(device).normalised_by(*stored), description


def load_images_for_net(
    user_net: UserNet, experiment: Experiment, data_dir: Path, say, *, only_test: bool = False
):
    """`load_experiment_images` at the size that a user's net reads. Raises UserError."""
    from controller import is_image_folder
    from models import UserError

    net = user_net.net
    size_advice = ""
    if user_net.is_ambiguous and user_net.photograph_size is None:
        size_advice = "; the net may have been trained at another size: --size names it"
    try:
        return load_experiment_images(
            experiment,
            data_dir,
            user_net.photograph_size or net.size,
            say,
            size_advice=size_advice,
            only_test=only_test,
        )
    except UserError as error:
        guess = ""
        if user_net.facts.get("data") is None and not is_image_folder(data_dir):
            guess = (
                f"; a net of {net.channels} x {net.size} x {net.size} images of {net.classes} "
                f"classes is taken to be for {experiment.data}"
            )
        raise UserError(f"{error}{guess}", error.status) from error


@dataclass(frozen=True)
class ChosenReading:
    """How a user's net is read, and how its images are normalised."""

    net: object  # models.Net
    mean: tuple
    std: tuple
    accuracy: float | None = None  # as UserNet's


def choose_reading(user_net: UserNet, train, say) -> ChosenReading:
    """How a user's net is read and its images are normalised: as the file says, else as fits the
    training images best. `say(line)` tells the user what is tried and found."""
    from controller import choose_norm_place, stored_normalisation

    stored = stored_normalisation(user_net.net, user_net.facts)
    is_normalisation_known = stored is not None
    if is_normalisation_known and not user_net.is_ambiguous:
        chosen = ChosenReading(user_net.net, *stored)
    else:
        chosen = try_readings(user_net, train, stored, say)
    if user_net.has_example:
        # Outputs do not show whether a batch norm after an activation stands before or after the
        # pooling.
        images = train.normalised_by(chosen.mean, chosen.std)
        chosen = replace(chosen, net=choose_norm_place(chosen.net, images))
    return chosen


def try_readings(user_net: UserNet, train, stored: tuple | None, say) -> ChosenReading:
    """The reading of a user's net that fits the training images best. The images are normalised by
    `stored`, the (mean, std) in the file; None: in each usual way, of which the best is taken."""
    from controller import KnownNet, Normalisation, find_reading

    normalisation = None
    if stored is not None:
        mean, std = stored
        normalisation = Normalisation("the mean and std in the file", tuple(mean), tuple(std))
    say(describe_unknowns(user_net, has_normalisation=stored is not None))
    found = find_reading(
        user_net.readings or [KnownNet(user_net.net)],
        train,
        normalisation=normalisation,
        tries_activations=user_net.is_ambiguous and user_net.activation is None,
        show_progress=show_attempts,
    )
    for line in describe_found_reading(user_net, found):
        say(line)
    return ChosenReading(
        found.net, found.normalisation.mean, found.normalisation.std, found.accuracy
    )


def describe_unknowns(user_net: UserNet, *, has_normalisation: bool) -> str:
    """What the file does not tell, so that it has to be tried."""
    if not user_net.is_ambiguous:
        return (
            "the checkpoint does not say how images were normalised; so the tool tries what is "
            "usual"
        )
    unknown = "how images were normalised, nor all of the net"
    if has_normalisation:
        unknown = "all of the net"
    return (
        f"the weights alone do not tell {unknown}; so the tool tries what is usual on some of the "
        "training images"
    )


def describe_found_reading(user_net: UserNet, found):
    """Yield what a controller.FoundReading is, how sure it is, and what would make it surer."""
    reading = ""
    if user_net.is_ambiguous:
        reading = f", and the net read as {found.net.architecture.in_words()}"
    ending = ""
    if not found.is_only_best:
        ending = "; others are about as accurate, so this may be the wrong one"
    yield (
        f"images normalised by {found.normalisation.name}{reading}: the best of all that was "
        f"tried, with {found.accuracy:.2%} of {found.image_count:,} training images right{ending}"
    )
    if found.has_strange_norms and not user_net.has_example:
        yield (
            "the running means and variances of its batch norms do not match these images: most "
            "likely the net is read wrongly, or was trained on other images"
        )
    if user_net.has_example:
        yield "if images were normalised in another way, put mean and std into the file"
    if user_net.is_ambiguous:
        advice = "is this your net?"
        if user_net.activation is None:
            advice += (
                " If it has another activation, name it by --activation: accuracy hardly tells "
                "relu from GELU or leaky relu."
            )
        yield (
            f"{advice} To be sure, put inputs, outputs, mean and std into the file "
            "(docs/your-net.md)"
        )


# Seconds between two lines about attempts, where there are no bars.
SECONDS_BETWEEN_LINES = 20


def show_attempts(attempts):
    """Pass on the attempts, with a bar on a terminal, and now and then a line elsewhere."""
    from rich.progress import track

    console = make_console(is_stderr=True)
    if can_show_bars(console):
        return track(attempts, "attempts", console=console, transient=True)
    return say_attempts(attempts)


def say_attempts(attempts):
    """Yield the attempts, and say how many are done where that takes long."""
    last_line = time.monotonic()
    for number, attempt in enumerate(attempts):
        if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
            print_note(f"attempts: {number} of {len(attempts)} in this round")
            last_line = time.monotonic()
        yield attempt


def check_net_fits(net, facts: dict, images, description: str) -> None:
    """Raise UserError where a net cannot read the images or tell their classes apart."""
    from models import UserError

    channels, size, classes = images.pixels.shape[3], images.size, images.classes
    if (size, channels, classes) != (net.size, net.channels, net.classes):
        raise UserError(
            f"the net reads {net.channels} x {net.size} x {net.size} images of {net.classes} "
            f"classes; given are {channels} x {size} x {size} images of {classes} classes "
            f"({description}); --data-dir names others"
        )
    known, names = facts.get("names"), images.class_names
    if not names or not isinstance(known, list) or not known or known == names:
        return
    others = [str(name) for name in names if name not in known]
    others += [str(name) for name in known if name not in names]
    difference = "they are in another order"
    if others:
        difference = f"only in the images or only in the checkpoint: {', '.join(others[:10])}"
    raise UserError(f"{description}: not the classes that the net was trained on ({difference})")


def use_reading_of_run(user_net: UserNet, folder: Path) -> None:
    """If this run folder has a baseline already, make that the user's net.

    A run that goes on has to keep its net: on another machine another reading might come out ahead,
    by one image. Afterwards `user_net` has no readings, and of its facts only mean and std.
    """
    import sep
    from controller import read_results
    from models import UserError

    baseline = folder / "baseline.pt"
    if not user_net.readings or not baseline.exists():
        return
    try:
        results = read_results(folder, missing_ok=True)
        if results is None or results["source"] != user_net.source:
            return
        user_net.net, facts = sep.load(baseline)
    except UserError:
        return  # `open_run` will say what is wrong with the folder
    user_net.readings = []
    user_net.has_example = False
    user_net.facts = {"mean": facts.get("mean"), "std": facts.get("std")}


# ---- opening a run: checks and warnings --------------------------------------------------------

WHY_A_NET_GUESSES = (
    "the net was hardly trained; or its strides or poolings were read wrongly, for weights do not "
    "show them; or these images, their normalisation or the order of their classes are not those "
    "of its training (docs/your-net.md)"
)


def check_is_no_guess(
    user_net: UserNet, accuracy: float, say, *, is_forced: bool, what_force_does: str
) -> None:
    """Raise UserError where a net gets hardly more images right than guessing would; if `is_forced`
    only say so."""
    from controller import is_near_guessing
    from models import UserError

    if not is_near_guessing(accuracy, user_net.net.classes):
        return
    finding = (
        f"{user_net.path} gets {accuracy:.2%} of the images right, hardly more than guessing among "
        f"{user_net.net.classes} classes: {WHY_A_NET_GUESSES}"
    )
    if not is_forced:
        raise UserError(f"{finding}; --force to {what_force_does}")
    say(finding)


def begins_with_user_net(run) -> bool:
    """Whether the baseline of a run is the user's net, not one that the run trains."""
    return run.results["source"] is not None


def warn_of_guessing(run, reporter) -> None:
    """Say so where the baseline learned nothing, or the user's net is for other images."""
    from controller import is_near_guessing

    row = run.find_row("baseline")
    classes = run.trainer.baseline.classes
    if run.results["schedule"] != "smoke" and is_near_guessing(row["validation_accuracy"], classes):
        if begins_with_user_net(run):
            advice = WHY_A_NET_GUESSES
        else:
            advice = "more images help, or a smaller net"
            if run.results["schedule"] == "fast":
                advice += ", or a longer training, by `train` with --epochs"
        reporter.say(
            f"the baseline gets {row['validation_accuracy']:.2%} of the validation images right, "
            f"hardly more than guessing among {classes} classes: {advice}"
        )


def warn_of_lost_nets(run) -> None:
    """Say which pruned nets guess, although their baseline does not."""
    from controller import is_near_guessing

    classes = run.trainer.baseline.classes
    rows = rows_in_order(run.results)
    lost = [row for row in rows if is_near_guessing(row["test_accuracy"], classes)]
    if run.results["schedule"] == "smoke" or run.find_row("baseline") in lost:
        return
    advice = "more --final-epochs help"
    if run.results["settings"]["target"] is not None:
        advice = "a smaller --target helps, or more --final-epochs"
    for row in lost:
        print_line(
            f"{row['method']} gets {row['test_accuracy']:.2%} of the test images right, hardly "
            f"more than guessing among {classes} classes: too much was removed, or its training "
            f"was too short; {advice}"
        )


def check_target(net, methods, target: float | None, round_to: int | None) -> None:
    """Refuse a target that `net` cannot reach, before anything is trained."""
    from controller import check_reachable, make_reduction_of

    for method in methods:
        reduction_of = make_reduction_of(method, net)
        check_reachable(net.widths, reduction_of, target, round_to or 1)


# ---- opening a run: the run itself -------------------------------------------------------------


def split_seed_for(user_net: UserNet | None, seed: int) -> int:
    """The seed that splits the images: the one that the user's net names, else `seed`.

    With another seed, some of the images that trained the net would validate it. Where the images
    are others than those that trained it, any seed will do.
    """
    split_seed = user_net.facts.get("split") if user_net is not None else None
    return split_seed if isinstance(split_seed, int) else seed


def load_images_for_run(experiment: Experiment, options: RunOptions, device, say, user_net=None):
    """(the net that a run prunes, training images, test images, what they are). The net is
    `user_net`'s, or one of the experiment that has shapes and no weights.

    Raises UserError where the net cannot take the images.
    """
    import torch

    if user_net is None:
        train, test, description = load_experiment_images(
            experiment, options.data_dir, experiment.size, say
        )
        with torch.device("meta"):
            net = build_net(experiment, size=train.size)  # refuses images that are too small
        return net, train, test, description
    train, test, description = load_images_and_choose_reading(
        user_net, experiment, options.data_dir, device, say
    )
    say_where_size_is_unused(user_net.photograph_size, train, say)
    if user_net.facts.get("data") not in (None, description):
        say(f"the net was trained on {user_net.facts['data']}, and is pruned on {description}")
    return user_net.net, train, test, description


def open_run(
    folder: Path,
    name: str,
    experiment: Experiment,
    options: RunOptions,
    reporter,
    user_net=None,
    methods=(),
):
    """The controller.Run of a folder, with its data loaded; `user_net` is the net to start from,
    `methods` are those of the rows that will be made.

    Raises UserError, before the folder is touched where a method cannot reach the target.
    """
    from controller import Run, make_data_split

    device = select_device(options.device)
    net, train, test, description = load_images_for_run(
        experiment, options, device, reporter.say, user_net
    )
    check_target(net, methods, experiment.target, options.round_to)
    schedule = SCHEDULES[options.schedule]
    split_seed = split_seed_for(user_net, options.seed)
    data = make_data_split(train, test, split_seed, max_images=schedule.max_images)
    settings = settings_for(
        experiment,
        schedule,
        options.seed,
        pruning_rate=options.pruning_rate,
        baseline_epochs=options.baseline_epochs,
        final_epochs=options.final_epochs,
        train_images=len(data.all),
    )
    return Run(
        folder,
        settings,
        {
            "experiment": name,
            "schedule": str(options.schedule),
            "data": description,
            "source": None if user_net is None else user_net.source,
        },
        data.to(device),
        reporter,
        is_fresh=options.fresh,
        round_to=options.round_to,
    )


def announce(run, reporter, methods) -> None:
    """Say how many epochs the rows that are not there yet may take."""
    from controller import BATCH_SIZE

    methods = [method for method in methods if not run.find_row(method)]
    images = len(run.data.train)
    epochs = estimate_epochs(
        run.settings,
        methods,
        images,
        trains_baseline=not begins_with_user_net(run) and not run.find_row("baseline"),
        finished_methods=[
            row["method"] for row in run.results["rows"] if row["method"] != "baseline"
        ],
    )
    reporter.plan(epochs, images // BATCH_SIZE)
    if epochs < 0.5:
        return
    final = ""
    final_trainings = len([method for method in methods if method != "static"])
    if final_trainings:
        final = f", {final_trainings} x {run.settings.final.epochs} of them final training"
    reporter.say(
        f"{run.folder.path}: up to about {describe_epochs(epochs)}{final}; stop it when you like, "
        "the same command goes on"
    )


@contextmanager
def resumable(reporter):
    """Shows the work of a run. Where it is stopped, the user learns that it goes on."""
    try:
        with reporter:
            yield
    except Stopped as stopped:
        stopped.advice = "; the run goes on where it was with the same command (without --fresh)"
        raise


def build_untrained(experiment: Experiment, run):
    """The untrained net of an experiment, for the data of a run (its own, or the user's)."""
    import torch

    from controller import seed_for

    torch.manual_seed(seed_for(run.settings.seed, "net"))
    has_own_images = run.results["data"] != experiment.data
    # Of MNIST and CIFAR the classes are known; `smoke` takes so few images that one may be missing.
    classes = run.data.all.classes if has_own_images else experiment.classes
    return build_net(experiment, classes=classes, size=run.data.all.size)


def finish_run(run) -> None:
    """Show what came of a run."""
    show_results(run.results)
    warn_of_lost_nets(run)
    print_line(
        f"{run.folder.path / 'results.json'} has the results; "
        f"{format_duration(run.results['seconds'])} in all; for pictures: "
        f"python wtp.py report {shlex.quote(str(run.folder.path))}"
    )


# ---- opening a run: the user's own files -------------------------------------------------------

KEEP_ADVICE = "give another --output"
FORCE_ADVICE = "--force overwrites it"


def check_output(
    path: Path,
    *,
    advice: str = KEEP_ADVICE,
    advice_on_folder: str = KEEP_ADVICE,
    run_folder: Path | None = None,
    may_replace: bool = False,
) -> None:
    """Raise UserError (status 2) unless a new file can be written at `path`.

    Refused are an existing file, unless `may_replace`; a folder; and in a run folder the names of
    the run's own files. Run folders are `run_folder`, and any folder with a results.json. The
    message ends with `advice` if a file exists already, with `advice_on_folder` if the folder is
    read-only.
    """
    from controller import ROWS, RUN_FILES
    from models import UserError, refuse_existing

    own_names = (*(f"{row}.pt" for row in ROWS), *RUN_FILES, "lock")
    parent = path.absolute().parent
    is_in_run = run_folder is not None and parent == run_folder.absolute()
    is_in_run = is_in_run or (path.parent / "results.json").exists()
    if is_in_run and path.name in own_names:
        # No --force: the run would write over the user's copy, or the user over the run's net.
        raise UserError(f"{path} is a run's own file; {KEEP_ADVICE}", 2)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it", 2)
    if not (may_replace and path.is_file()):
        refuse_existing(path, advice)
    if not parent.is_dir():
        problem = f"there is no folder {path.parent}; make it first"
        if parent.exists():
            problem = f"{path.parent} is a file, not a folder"
        raise UserError(f"cannot write {path}: {problem}", 2)
    if not os.access(parent, os.W_OK):
        raise UserError(f"cannot write {path}: its folder is read-only; {advice_on_folder}", 2)


def check_checkpoint_output(
    path: Path, run_folder: Path, *, may_replace: bool, source: Path | None = None
) -> None:
    """`check_output` of a checkpoint, which must not look like an export, nor take the place of the
    `source` that it is made from."""
    from models import UserError, has_export_ending

    if source is not None and path.exists() and path.samefile(source):
        raise UserError(f"{path} is the net that is to be pruned; {KEEP_ADVICE}", 2)
    advice = f"{KEEP_ADVICE}, or {FORCE_ADVICE}"
    check_output(path, advice=advice, run_folder=run_folder, may_replace=may_replace)
    if has_export_ending(path):
        raise UserError(
            f"{path} would be a checkpoint under an export's ending; call it NAME.pt", 2
        )
    if path.suffix.lower() == ".safetensors":
        raise UserError(f"{path}: checkpoints are no .safetensors files; call it NAME.pt", 2)


def is_delivered(
    folder: Path, row: str, output: Path, options: RunOptions, *, source: str | None, data: str
) -> bool:
    """Whether this command was completed before: the row is finished, and `output` is a copy of its
    net.

    `source` describes the user's net; None where the run trains its own. `data` describes the
    images that the command would read. Only these two are compared with the run in the folder;
    `open_run` raises UserError if it is another run in any other way.
    """
    import filecmp

    from controller import kind_of_data, read_results

    checkpoint = folder / f"{row}.pt"
    if options.fresh or not output.is_file() or not checkpoint.is_file():
        return False
    if output.samefile(checkpoint) or not filecmp.cmp(output, checkpoint, shallow=False):
        return False
    results = read_results(folder, missing_ok=True)
    if results is None or results["source"] != source:
        return False
    if kind_of_data(results["data"]) != kind_of_data(data):
        return False
    return any(finished_row["method"] == row for finished_row in results["rows"])


def show_delivered(run, output: Path) -> None:
    """Show the table of a run that had nothing left to do."""
    show_results(run.results)
    print_line(f"nothing is left to do: {output} is the net that this command made")


def deliver(checkpoint: Path, output: Path, *, may_replace: bool) -> None:
    """Copy a finished checkpoint to where the user wants it; not over a file that came there
    meanwhile, unless it may replace it. Raises UserError."""
    import shutil

    from models import UserError, is_intact, temporary_path, write_atomically

    if not is_intact(checkpoint):
        raise UserError(
            f"{checkpoint} is gone or damaged; --fresh makes it anew, and all rows beside it"
        )
    advice = f"the net is in {checkpoint}; the same command with another --output copies it"
    check_output(output, advice=advice, advice_on_folder=advice, may_replace=may_replace)
    write_atomically(
        output,
        lambda temporary: shutil.copyfile(checkpoint, temporary),
        temporary_path(output),
        f"; the net is in {checkpoint}",
    )


# ---- commands: reproduce and train -------------------------------------------------------------


@app.command()
def reproduce(
    experiment: Annotated[str, typer.Argument(help="without it: the list of them")] = "",
    method: Annotated[
        list[MethodName] | None, typer.Option(help="the rows; default: uniform, lstm, sep")
    ] = None,
    schedule: ScheduleOption = ScheduleName.published,
    baseline: Annotated[
        Path | None, typer.Option(help="a checkpoint to start from, instead of training one")
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            **SHARE,
            help="share of the MACs to remove, in place of the experiment's own",
        ),
    ] = None,
    final_epochs: FinalEpochs = None,
    round_to: RoundTo = None,
    data_dir: DataDir = None,
    out: Out = Path("runs"),
    device: Device = "auto",
    seed: Seed = 0,
    fresh: Fresh = False,
    is_timed: Annotated[
        bool, typer.Option("--time", help="without an experiment: how long each takes here")
    ] = False,
):
    """All rows of an experiment's table."""
    has_options = any((method, baseline, target, final_epochs, round_to, data_dir, seed, fresh))
    has_options = has_options or schedule != ScheduleName.published or out != Path("runs")
    has_options = has_options or (device != "auto" and not is_timed)
    check_experiment_is_named(experiment, has_options=has_options, is_timed=is_timed)
    if not experiment:
        show_experiments(select_device(device) if is_timed else None)
        return
    user_net = load_user_net(baseline) if baseline else None
    data_dir = find_data_dir(data_dir, user_net.facts if user_net else {}, experiment)
    options = RunOptions(
        schedule=schedule,
        data_dir=data_dir,
        out=out,
        device=device,
        seed=seed,
        fresh=fresh,
        final_epochs=final_epochs,
        round_to=round_to,
    )
    methods = order_methods(method or DEFAULT_METHODS)
    run_experiment(experiment, methods, options, user_net, target)


def check_experiment_is_named(name: str, *, has_options: bool, is_timed: bool) -> None:
    """Raise UserError (status 2) where options of a run have no experiment, or --time has one."""
    from models import UserError

    if not name and has_options:
        names = ", ".join(EXPERIMENTS)
        raise UserError(
            f"name an experiment: {names}; `reproduce` alone lists them, and with --time how "
            "long each takes",
            2,
        )
    if name and is_timed:
        raise UserError("--time is for the list of experiments: reproduce --time", 2)


def order_methods(methods) -> list[str]:
    """The methods in the order of the work."""
    from controller import METHODS

    return [method for method in METHODS if method in methods]


def list_rows_to_make(methods) -> list[str]:
    """The rows that `methods` need, in the order of the work: `static` is made of `sep`'s net."""
    return order_methods([*methods, "sep"] if "static" in methods else methods)


def run_experiment(
    name: str, methods: list[str], options: RunOptions, user_net, target: float | None
) -> None:
    """Make the rows of an experiment and show them, at another `target` if that is given.

    Raises UserError.
    """
    from controller import check_source, is_image_folder

    experiment = find_experiment(name)
    if user_net is not None:
        check_is_unpruned(user_net, name)
    if target is not None:
        experiment = replace(experiment, target=target)
    # The size of a user's own images is not known before they are read.
    if not is_image_folder(options.data_dir):
        check_target(build_net(experiment), methods, experiment.target, options.round_to)
    folder = folder_of_experiment(name, target, options, user_net)
    if user_net is not None and not options.fresh:
        check_source(folder, user_net.source)  # before images are read
        use_reading_of_run(user_net, folder)
    if methods == ["uniform"] and experiment.target is None:
        check_uniform_has_cut(folder, options)
    reporter = ScreenReporter()
    run = open_run(folder, name, experiment, options, reporter, user_net, methods)
    announce(run, reporter, list_rows_to_make(methods))
    with resumable(reporter):
        if user_net is not None:
            run.make_baseline(user_net.net, is_trained=True)
        else:
            run.make_baseline(build_untrained(experiment, run))
        warn_of_guessing(run, reporter)
        for method in methods:
            run.make_row(method, run.goal_for(method))
    finish_run(run)


def folder_of_experiment(
    name: str, target: float | None, options: RunOptions, user_net: UserNet | None
) -> Path:
    """The run folder of an experiment; it says what was asked for beyond the defaults."""
    if target is not None:
        name += f"-target{target:g}"
    folder_name = options.folder_name(name + own_images_suffix(options.data_dir))
    if user_net is not None:
        folder_name += f"-from-{user_net.path.stem}"
    if options.round_to:
        folder_name += f"-round{options.round_to}"
    return options.out / folder_name


def check_is_unpruned(user_net: UserNet, name: str) -> None:
    """Raise UserError unless a checkpoint is the unpruned net of that experiment."""
    from models import UserError, default_widths

    net = user_net.net
    arch = EXPERIMENTS[name].arch
    if (net.arch, net.structure) != (arch, default_widths(arch)):
        raise UserError(
            f"{user_net.path} is a {net.arch} of widths {net.structure}, not the whole {arch} of "
            f"{name}; `prune` takes any net",
            2,
        )


def check_uniform_has_cut(folder: Path, options: RunOptions) -> None:
    """Raise UserError unless the folder has a pruned row, whose cut `uniform` can take."""
    from controller import read_results
    from models import UserError

    results = None if options.fresh else read_results(folder, missing_ok=True)
    rows = results["rows"] if results else []
    if not any(row["method"] != "baseline" for row in rows):
        raise UserError("uniform needs a cut to land on; give --target, or add --method lstm", 2)


def show_experiments(device) -> None:
    """The experiments and, with a device, about how long all rows of each take there."""
    columns = ["experiment", "net", "cut"]
    title = "cut: the paper's"
    if device is not None:
        columns += SCHEDULES
        title = f"time for all rows on {device}, about, by a few steps just timed; {title}"
    table = make_table(title, columns)
    table.columns[1].justify = "left"
    for column in table.columns:
        column.no_wrap = True
    durations = {name: [] for name in EXPERIMENTS}
    if device is not None:
        durations = measure_durations(device)
    for name, experiment in EXPERIMENTS.items():
        cut = f"{experiment.target:.1%}" if experiment.target else "–"
        table.add_row(name, experiment.arch, cut, *map(format_duration, durations[name]))
    make_console().print(table)
    if device is None:
        print_note("reproduce --time measures about how long each takes here")


def measure_durations(device) -> dict[str, list[float]]:
    """Of each experiment about how many seconds all rows take, by each schedule: a few steps of
    each net are timed for it."""
    from controller import VALIDATION_SHARE, measure_training_speed

    print_note(f"timing a few training steps of each net on {device}; this takes about a minute")
    images_per_second = {}
    durations = {}
    for name, experiment in EXPERIMENTS.items():
        arch = experiment.arch
        if arch not in images_per_second:
            images_per_second[arch] = measure_training_speed(build_net(experiment), device)
        durations[name] = []
        for schedule in SCHEDULES.values():
            most = min(experiment.train_images, schedule.max_images or experiment.train_images)
            images = int((1 - VALIDATION_SHARE) * most)
            settings = settings_for(experiment, schedule, 0)
            epochs = estimate_epochs(settings, order_methods(DEFAULT_METHODS), images)
            # ours: half, for nets get smaller on the way and searches mostly end earlier
            # (measured on MNIST).
            durations[name].append(epochs * images / images_per_second[arch] / 2)
    return durations


@app.command()
def train(
    experiment: Annotated[
        str, typer.Argument(help="where net and images come from; with --arch the images only")
    ] = "",
    arch: Annotated[
        str | None,
        typer.Option(
            help="another net: lenet5, vgg11, 13, 16 or 19, resnet18, 34, 50 or 101, or a CIFAR "
            "ResNet of depth 6n + 2, as resnet20; without an experiment for images of your own"
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="pixels of a side that photographs are brought to; default: 224 for resnet18, 34, "
            "50 and 101, else 32, for lenet5 28",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="the checkpoint; default: baseline.pt in the run folder")
    ] = None,
    schedule: Annotated[
        ScheduleName,
        typer.Option(
            help="200 epochs with published or full, but 20 for mnist, digits and, without an "
            "experiment, lenet5; 20 with fast; smoke: a test"
        ),
    ] = ScheduleName.published,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="of the training, in place of the schedule's own")
    ] = None,
    data_dir: DataDir = None,
    out: Out = Path("runs"),
    device: Device = "auto",
    seed: Seed = 0,
    fresh: Fresh = False,
    force: Annotated[bool, typer.Option("--force", help="overwrite the output")] = False,
):
    """A baseline alone, to a checkpoint: an experiment's, or any net on any images."""
    data_dir = find_data_dir(data_dir, {}, experiment)
    options = RunOptions(
        schedule=schedule,
        data_dir=data_dir,
        out=out,
        device=device,
        seed=seed,
        fresh=fresh,
        baseline_epochs=epochs,
        force=force,
    )
    name, chosen = choose_training(experiment, arch, size, data_dir)
    train_baseline(name, chosen, options, output, size)


def choose_training(
    name: str, arch: str | None, size: int | None, data_dir: Path
) -> tuple[str, Experiment]:
    """(name of the run, what is trained on which images). Raises UserError."""
    from controller import check_is_no_image_folder, is_image_folder, suggest_image_folder
    from models import LARGE_RESNETS, UserError, default_widths

    if not name and not arch:
        names = ", ".join(EXPERIMENTS)
        raise UserError(f"name an experiment, {names}, or a net: --arch resnet20", 2)
    if arch:
        default_widths(arch)  # raises where the name is unknown
    if not name and not is_image_folder(data_dir):
        check_is_no_image_folder(data_dir)
        hint = suggest_image_folder(data_dir)
        if not data_dir.is_dir():
            hint = f"; there is no folder {data_dir}"
        raise UserError(
            f"--arch {arch} alone is for images of your own: --data-dir FOLDER, with "
            f"train/CLASS/images and test/CLASS/images{hint}; or name an experiment for its "
            f"images, as in `train vgg-cifar10 --arch {arch}`",
            2,
        )
    run_name = name
    if name:
        experiment = find_experiment(name)
    else:
        # Images of the user's own: gray ones for a LeNet-5, else RGB.
        experiment = EXPERIMENTS["mnist" if arch == "lenet5" else "resnet56-cifar10"]
    if arch:
        experiment = replace(experiment, arch=arch)
        run_name = f"{arch}-{experiment.data}" if name else arch
        for other_name, other in EXPERIMENTS.items():
            # It may be an experiment itself: then it is that one's baseline.
            if name and (other.arch, other.data) == (arch, experiment.data):
                run_name, experiment = other_name, other
    if size is not None or (arch in LARGE_RESNETS and is_image_folder(data_dir)):
        experiment = replace(experiment, size=size or LARGE_SIZE)
    return run_name, experiment


def train_baseline(
    name: str, experiment: Experiment, options: RunOptions, output: Path | None, size: int | None
) -> None:
    """Train the baseline of an experiment, and copy it to `output`; `size` is what the user asked
    for. Raises UserError."""
    from controller import describe_data

    folder = options.out / options.folder_name(name + own_images_suffix(options.data_dir))
    data = describe_data(experiment.data, options.data_dir)
    is_done = output is not None and is_delivered(
        folder, "baseline", output, options, source=None, data=data
    )
    if output and not is_done:
        check_checkpoint_output(output, folder, may_replace=options.force)
    reporter = ScreenReporter()
    run = open_run(folder, name, experiment, options, reporter)
    if is_done:
        show_delivered(run, output)
        return
    say_where_size_is_unused(size, run.data.all, reporter.say)
    announce(run, reporter, [])
    with resumable(reporter):
        run.make_baseline(build_untrained(experiment, run))
    warn_of_guessing(run, reporter)
    checkpoint = run.folder.checkpoint_path("baseline")
    if output:
        deliver(checkpoint, output, may_replace=options.force)
    finish_run(run)
    print_line(f"wrote {output}" if output else f"the baseline is {checkpoint}")


# ---- commands: prune ---------------------------------------------------------------------------


@app.command()
def prune(
    ckpt: Checkpoint,
    rate: Rate = None,
    method: Annotated[
        list[MethodName] | None,
        typer.Option(
            help="lstm, the default, removes channels; sep chooses kernels by the image, static "
            "makes its net plain; uniform, random: to compare with"
        ),
    ] = None,
    static: Annotated[
        bool,
        typer.Option(
            "--static",
            help="with sep: a plain small net, of the mean of its groups of kernels",
        ),
    ] = False,
    target: Target = None,
    round_to: RoundTo = None,
    schedule: PruneScheduleOption = None,
    final_epochs: FinalEpochs = None,
    output: Annotated[
        Path | None, typer.Option(help="default: CKPT with -pruned in its name")
    ] = None,
    data_dir: DataDir = None,
    size: PhotographSize = None,
    activation: Activation = None,
    out: Out = Path("runs"),
    device: Device = "auto",
    seed: Seed = 0,
    fresh: Fresh = False,
    force: Annotated[
        bool, typer.Option("--force", help="overwrite the output; prune a net that only guesses")
    ] = False,
):
    """A smaller net from your own checkpoint."""
    row = choose_method(method, is_static=static, target=target)
    user_net = load_user_net(ckpt, photograph_size=size, activation=activation)
    data_dir = find_data_dir(data_dir, user_net.facts)
    if schedule is None:
        schedule = ScheduleName.published if target is None else ScheduleName.fast
    options = RunOptions(
        schedule=schedule,
        data_dir=data_dir,
        out=out,
        device=device,
        seed=seed,
        fresh=fresh,
        pruning_rate=rate,
        final_epochs=final_epochs,
        round_to=round_to,
        force=force,
    )
    output = output or ckpt.with_name(f"{ckpt.stem}-pruned.pt")
    prune_user_net(user_net, row, target, options, output)


def choose_method(methods, *, is_static: bool, target: float | None) -> str:
    """The row that `prune` makes. Raises UserError (status 2) where the options do not agree."""
    from models import UserError

    if methods and len(methods) > 1:
        raise UserError("prune makes one net; give one --method", 2)
    method = str(methods[0]) if methods else "lstm"
    if is_static and method not in ("sep", "static"):
        raise UserError(
            f"--static makes a plain net of a gated one; {method} has no gates, add --method sep", 2
        )
    if method == "uniform" and target is None:
        raise UserError("uniform needs a cut to land on; give --target", 2)
    return "static" if is_static else method


def prune_user_net(user_net: UserNet, row: str, target, options: RunOptions, output: Path) -> None:
    """Prune a user's net into `output`. Raises UserError."""
    from models import UserError

    if user_net.net.gates is not None:
        raise UserError(
            f"{user_net.path} is soft-pruned already; prune its baseline, or a net without gates", 2
        )
    experiment = replace(find_experiment_for(user_net, options.data_dir), target=target)
    folder = folder_of_prune(user_net, row, target, options)
    is_done = check_prune(user_net, row, experiment, options, folder, output)
    reporter = ScreenReporter()
    name = f"prune {user_net.path.name}"
    run = open_run(folder, name, experiment, options, reporter, user_net, [row])
    if is_done:
        show_delivered(run, output)
        return
    if target is None and options.schedule == "published":
        reporter.say(
            "without --target the papers' schedule runs, as far as its reward rises; with a "
            "target, as --target 0.5, the default is the quicker schedule fast"
        )
    announce(run, reporter, list_rows_to_make([row]))
    with resumable(reporter):
        run.make_baseline(user_net.net, is_trained=True)
        check_is_no_guess(
            user_net,
            run.find_row("baseline")["validation_accuracy"],
            reporter.say,
            is_forced=options.force,
            what_force_does="prune it all the same",
        )
        run.make_row(row, run.goal_for(row))
    # Where `sep` is pruned, `lstm`'s search may have run for it. A run of `prune` makes no other
    # row, which would need the weights of that search.
    run.folder.remove_pool("lstm")
    # Before anything is printed: standard output may be closed, or on a full disk.
    deliver(run.folder.checkpoint_path(row), output, may_replace=options.force)
    finish_run(run)
    print_line(f"wrote {output}")


def check_prune(
    user_net: UserNet,
    row: str,
    experiment: Experiment,
    options: RunOptions,
    folder: Path,
    output: Path,
) -> bool:
    """Refuse what can be refused before images are read, which may take minutes. Returns whether
    this command was completed before: then `output` has its net. Raises UserError.

    A net whose reading this run has chosen already becomes that reading.
    """
    from controller import check_source, describe_data

    if not user_net.is_ambiguous:
        check_target(user_net.net, [row], experiment.target, options.round_to)
    if not options.fresh:
        use_reading_of_run(user_net, folder)
    data = describe_data(experiment.data, options.data_dir)
    is_done = is_delivered(folder, row, output, options, source=user_net.source, data=data)
    # An output that exists is refused before a folder of another checkpoint.
    if not is_done:
        check_checkpoint_output(output, folder, may_replace=options.force, source=user_net.path)
    if not options.fresh:
        check_source(folder, user_net.source)
    return is_done


def folder_of_prune(user_net: UserNet, row: str, target, options: RunOptions) -> Path:
    """The run folder of a prune; it says what was asked for beyond the defaults."""
    method = "sep" if row == "static" else row
    name = f"prune-{user_net.path.stem}-{method}"
    if target is not None:
        name += f"-target{target:g}"
    if options.pruning_rate not in (None, SCHEDULES[options.schedule].pruning_rate):
        name += f"-rate{options.pruning_rate:g}"
    if options.round_to:
        name += f"-round{options.round_to:g}"
    if user_net.photograph_size is not None:
        name += f"-size{user_net.photograph_size}"
    if user_net.activation is not None:
        name += f"-{user_net.activation}"
    return options.out / options.folder_name(name + own_images_suffix(options.data_dir))


# ---- commands: evaluate ------------------------------------------------------------------------


@app.command()
def evaluate(
    ckpt: Checkpoint,
    data_dir: DataDir = None,
    size: PhotographSize = None,
    activation: Activation = None,
    device: Device = "auto",
):
    """Accuracy, MACs, parameters, size, latency of a checkpoint."""
    user_net = load_user_net(ckpt, photograph_size=size, activation=activation)
    data_dir = find_data_dir(data_dir, user_net.facts)
    experiment = find_experiment_for(user_net, data_dir)
    torch_device = select_device(device)
    test, description = load_test_images(user_net, experiment, data_dir, torch_device, print_note)
    say_where_size_is_unused(user_net.photograph_size, test, print_note)
    say_what_is_read(user_net, test, description)
    evaluate_net(user_net, test, description)


def evaluate_net(user_net: UserNet, test, description: str) -> None:
    """Measure a net on its test images, and show the measures beside its baseline's."""
    import sep
    from controller import is_near_guessing, measure_accuracy

    net = to_channels_last(user_net.net, test.device)
    with sep.record_usage(net) as usage:
        accuracy = measure_accuracy(net, test, in_float32=True)
    if is_near_guessing(accuracy, net.classes):
        print_note(f"{accuracy:.2%} is hardly more than guessing: {WHY_A_NET_GUESSES}")
    baseline_net = build_untrained_baseline(user_net, test.device)
    baseline = collect_baseline_measures(user_net.facts, baseline_net, len(test), description)
    own = count_costs(net) | {"test_accuracy": accuracy}
    print_note(
        f"{accuracy:.2%} of the test images right; now measuring the latency of 1 and of 128 "
        "images, which takes minutes for a large net"
    )
    own_latencies, baseline_latencies = compare_latencies(net, baseline_net, test)
    own |= own_latencies
    baseline |= baseline_latencies
    gated = ", gated" if net.gates else ""
    title = f"{user_net.path}: {net.arch}{gated}, on {description}, {len(test):,} test images"
    make_console().print(evaluation_table(title, own, baseline))
    if test.device.type == "cpu":
        print_line(describe_tuning(own, baseline))
    if net.gates is not None:
        print_line(describe_usage(net, usage))
    layers = [prunable.layer_name for prunable in net.prunable]
    baseline_widths = baseline_net.widths if baseline_net else None
    print_line(f"widths: {describe_widths(layers, baseline_widths, net.structure)}")


def say_what_is_read(user_net: UserNet, test, description: str) -> None:
    """Tell the user which images are read."""
    from controller import OWN_IMAGES

    # The name of images of one's own begins with "images in".
    is_own = description.startswith(OWN_IMAGES)
    test_images = description if is_own else f"images of {description}"
    note = f"measuring on {len(test):,} test {test_images}"
    if user_net.facts.get("data") not in (None, description):
        note += f"; the net was trained on {user_net.facts['data']}"
    print_note(note)


def to_channels_last(net, device):
    import torch

    return net.to(device).to(memory_format=torch.channels_last)


def build_untrained_baseline(user_net: UserNet, device):
    """An untrained net as the baseline of a pruned one; None where the facts do not name it."""
    from models import UserError, build_like

    baseline = user_net.facts.get("baseline") or {}
    try:
        return to_channels_last(build_like(user_net.net, baseline["widths"]), device)
    except (UserError, KeyError, TypeError):
        return None


def collect_baseline_measures(
    facts: dict, baseline_net, test_images: int, description: str
) -> dict:
    """What the facts of a pruned net say of its baseline; with a `baseline_net` also how many bytes
    the baseline's weights take.

    A test accuracy that was measured on other images is left out, and the user is told so.
    """
    baseline = dict(facts.get("baseline") or {})
    has_same_images = (facts.get("data"), facts.get("test_images")) == (description, test_images)
    if "test_accuracy" in baseline and not has_same_images:
        del baseline["test_accuracy"]
        print_note(
            "the baseline's accuracy is not shown: it was measured on other test images, "
            f"{facts.get('test_images')} of {facts.get('data')}"
        )
    if baseline_net is not None:
        baseline["bytes"] = count_costs(baseline_net)["bytes"]
    return baseline


def count_costs(net) -> dict:
    """MACs, parameters, and the bytes of the state dict in a file."""
    import io

    import torch

    import models
    import sep

    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    return {
        "macs": sep.count_macs(net),
        "params": models.count_parameters(net),
        "bytes": file.tell(),
    }


def compare_latencies(net, baseline_net, images) -> tuple[dict, dict]:
    """The seconds that a net takes, and those of its baseline: none where `baseline_net` is None.

    All nets are measured in turns, so that a busy moment of the machine does not meet one alone.
    """
    import sep
    from controller import measure_latencies

    nets = [net] if baseline_net is None else [net, baseline_net]
    tuned_nets = [sep.tune(each) for each in nets] if images.device.type == "cpu" else []
    seconds = measure_latencies(nets + tuned_nets, images, 1)
    latencies = {
        "latency_1": seconds[: len(nets)],
        "latency_1_tuned": seconds[len(nets) :],
        "latency_128": measure_latencies(nets, images, 128),
    }
    own = {name: each[0] for name, each in latencies.items() if each}
    baseline = {name: each[1] for name, each in latencies.items() if len(each) > 1}
    return own, baseline


def evaluation_table(title: str, own: dict, baseline: dict):
    """A line per measure; beside the baseline's, where it is known."""
    lines = (  # name, key, unit, format
        ("test accuracy", "test_accuracy", 1, "{:.2%}"),
        ("MACs", "macs", 1e6, "{:.3f} M"),
        ("parameters", "params", 1, "{:,.0f}"),
        ("bytes of the weights", "bytes", 1, "{:,.0f}"),
        ("latency, batch 1", "latency_1", 1e-3, "{:.2f} ms"),
        ("latency, batch 1, tuned", "latency_1_tuned", 1e-3, "{:.2f} ms"),
        ("latency, batch 128", "latency_128", 1e-3, "{:.2f} ms"),
    )
    columns = ("", "baseline", "this net", "ratio") if baseline else ("", "this net")
    table = make_table(title, columns)
    for name, key, unit, pattern in lines:
        if key not in own:
            continue
        value, known = own[key], baseline.get(key)
        shown_value = pattern.format(value / unit)
        if not baseline:
            table.add_row(name, shown_value)
        elif known:
            table.add_row(name, pattern.format(known / unit), shown_value, f"{value / known:.3f}")
        else:
            table.add_row(name, "", shown_value, "")
    return table


def describe_tuning(own: dict, baseline: dict) -> str:
    """What `tuned` means in the table, and what it gives."""
    line = "tuned: by sep.tune, for one image at a time"
    if "latency_1" in baseline:
        ratio = own["latency_1_tuned"] / baseline["latency_1"]
        line += f"; this takes {ratio:.2f} of the baseline's time in plain PyTorch"
    return line


def describe_usage(net, usage) -> str:
    """Per gated layer how many of its kernels serve no image, some, and all of them, and how many
    of its groups are in use."""
    layers = []
    for prunable, layer_usage in zip(net.prunable, usage):
        if layer_usage is None:
            continue
        never, sometimes, always = layer_usage.count_kernels()
        layers.append(
            f"{prunable.layer_name} {never}/{sometimes}/{always} ({layer_usage.groups_in_use})"
        )
    return f"kernels used for no image / some / all (groups in use): {', '.join(layers)}"


# ---- commands: report and export ---------------------------------------------------------------


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="a run folder, or its results.json")],
    output: Annotated[
        Path | None,
        typer.Option(help="the pictures: NAME.svg, .png or .pdf; default: report.svg in RUN"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the output")] = False,
):
    """The tables of a run again, and its pictures (these need matplotlib)."""
    from controller import read_results, read_usage
    from models import UserError

    folder = run.parent if run.name == "results.json" else run
    if not (folder / "results.json").is_file():
        reason = "it has no results.json" if folder.is_dir() else "there is no such folder"
        raise UserError(
            f"{run} is no run folder: {reason}; `reproduce` and `prune` name theirs at the end",
            2,
        )
    if output is not None:
        if output.suffix.lower() not in PICTURE_ENDINGS:
            raise UserError(f"{output}: the ending says the format, .svg, .png or .pdf", 2)
        check_output(output, advice=f"{KEEP_ADVICE}, or {FORCE_ADVICE}", may_replace=force)
    hint = (
        "; move that file away, and give the run's command again: finished rows come back from "
        "their checkpoints"
    )
    results = read_results(folder, hint=hint)
    show_results(results)
    if not results["rows"]:
        print_note("so there is no picture yet")
        return
    output = output or folder / "report.svg"
    draw_report(results, output, read_usage(folder, print_note))
    print_line(f"wrote {output}")


@app.command()
def export(
    ckpt: Checkpoint,
    file: Annotated[Path, typer.Argument(help="NAME.pt2 (torch.export) or NAME.onnx")],
    static: Annotated[
        bool,
        typer.Option(
            "--static",
            help="of a gated net: a plain small one, of the mean of its groups of kernels",
        ),
    ] = False,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="pixels of an image's side; default: those it was trained with"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="overwrite FILE; export a net that only guesses")
    ] = False,
    activation: Activation = None,
    data_dir: DataDir = None,
    device: Device = "auto",
):
    """The net for use without this project.

    It reads images in [0, 1], normalisation included, any batch size.
    """
    import models

    user_net = load_user_net(ckpt, activation=activation)
    if user_net.readings:
        # The reading of a foreign net may have to be found on images. If these are photographs,
        # they are brought to the size of the exported net.
        user_net.photograph_size = size
    data_dir = find_data_dir(data_dir, user_net.facts)
    check_export(user_net, file, is_static=static, may_replace=force)
    net, mean, std = prepare_export(user_net, data_dir, device, size, is_static=static)
    if user_net.accuracy is not None:
        check_is_no_guess(
            user_net,
            user_net.accuracy,
            print_note,
            is_forced=force,
            what_force_does="export it all the same",
        )
    # Without --size: a net from a state dict may have taken the size of the images just read.
    size = size or net.size
    difference = models.export_net(net, file, mean, std, size, may_replace=force)
    if net.gates is not None:
        print_line(
            "a gated net: the file computes every kernel and masks them; --static makes a small "
            "net of it"
        )
    original = "the plain net" if static else describe_exported(user_net)
    print_line(
        f"wrote {file}: images (batch, {net.channels}, {size}, {size}) in [0, 1] to logits "
        f"(batch, {net.classes}); run and compared with {original}: largest difference "
        f"{difference:.0e} of the largest logit"
    )


def describe_exported(user_net: UserNet) -> str:
    """The file of an exported net, and how it is read where that is not in it."""
    if not user_net.readings:
        return str(user_net.path)
    return f"{user_net.path}, read as {user_net.net.architecture.in_words()}"


def check_export(user_net: UserNet, file: Path, *, is_static: bool, may_replace: bool) -> None:
    """Raise UserError (status 2) where the call of `export` cannot be right."""
    from models import UserError, has_export_ending

    if not has_export_ending(file):
        raise UserError(f"{file}: the ending says the format, .pt2 (torch.export) or .onnx", 2)
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file in it", 2)
    if is_static and user_net.net.gates is None:
        raise UserError(f"{user_net.path} has no gates: it is plain already, leave out --static", 2)
    check_output(
        file, advice=FORCE_ADVICE, advice_on_folder="name another file", may_replace=may_replace
    )


def prepare_export(
    user_net: UserNet, data_dir: Path, device: str, size: int | None, *, is_static: bool
):
    """(net, mean, std) to export. Images are read only for the recovery of a static net, or where
    the file does not tell all three. Raises UserError."""
    from controller import stored_normalisation
    from models import UserError, check_image_size

    net = user_net.net
    device = select_device(device)
    stored = stored_normalisation(net, user_net.facts)
    if stored is not None and not is_static and not user_net.is_ambiguous:
        return net, *stored
    if is_static:
        check_image_size(net, size or net.size)  # before the recovery
    try:
        experiment = find_experiment_for(user_net, data_dir)
        train, _, _ = load_images_and_choose_reading(
            user_net, experiment, data_dir, device, print_note
        )
        net = user_net.net  # images may have told what the weights did not
    except UserError as error:
        purpose = "a recovery" if is_static else "finding out what its weights do not tell"
        raise UserError(f"{error} (export reads images for {purpose})", error.status) from error
    if is_static:
        net = make_static_for_export(net.to(device), train)
    return net, train.mean, train.std


def make_static_for_export(gated, train):
    """A plain small net of a gated one, with the recovery of `fast` where that helps.

    ours: the gated net is the teacher, because the baseline is not at hand.
    """
    import torch

    from controller import (
        BATCH_SIZE,
        Teacher,
        TrainingPlan,
        fit,
        make_optimizer,
        make_static,
        measure_accuracy,
    )

    schedule = SCHEDULES["fast"]
    steps = max(1, min(schedule.recovery_steps, len(train) // BATCH_SIZE))
    plan = TrainingPlan(1, schedule.lr, is_one_cycle=True, max_steps=steps)
    print_note(
        f"reads {len(train):,} training images, to see how often each group of kernels is chosen, "
        "and to compare: up to some minutes on a CPU"
    )
    gated_accuracy = measure_accuracy(gated, train)
    plain = make_static(gated, train)
    recovered = deepcopy(plain).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(recovered, plan.lr)
    teacher = Teacher(gated, train, 0)
    for _ in fit(recovered, train, plan, optimizer=optimizer, seed=0, teacher=teacher):
        pass
    before = measure_accuracy(plain, train)
    after = measure_accuracy(recovered, train)
    left_out = "" if after > before else "; so the recovery is left out"
    print_line(
        f"accuracy on the training images: {gated_accuracy:.2%} with gates, {before:.2%} without, "
        f"{after:.2%} after {steps} steps of recovery{left_out}"
    )
    return recovered if after > before else plain


# ---- errors ------------------------------------------------------------------------------------


class Stopped(BaseException):
    """Ctrl-C or SIGTERM, by its number; `advice` is set where a run can go on."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number
        self.advice = ""


def stop(number, frame):
    """The handler of both signals."""
    for stop_signal in STOP_SIGNALS:
        # One is enough: the next would cut the farewell short.
        signal.signal(stop_signal, signal.SIG_IGN)
    while frame:
        # During an import nothing can be lost yet, so the process ends at once. An exception might
        # have to pass through C++ code that cannot handle it.
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            exit_at_once(number, frame)
        frame = frame.f_back
    raise Stopped(number)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for a wrong call, 1 for what failed, 130 after
    Ctrl-C, 143 after SIGTERM."""
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, stop)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, StringIO())
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Characters that the terminal cannot show become "?".
            stream.reconfigure(errors="replace")
    try:
        if arguments is None:
            arguments = [expand_home(argument) for argument in sys.argv[1:]]
        return app(arguments or ["--help"], standalone_mode=False) or 0
    except Stopped as stopped:
        print_last_line(f"stopped{stopped.advice}")
        return 128 + stopped.number
    except Exception as error:
        message, status = explain(error)
        print_last_line(f"wtp: {message}")
        return status


def expand_home(argument: str) -> str:
    """Replace the ~ in an argument like --out=~/runs by the user's home; shells leave it there."""
    option, equals, value = argument.partition("=")
    if option.startswith("--") and value.startswith("~"):
        return f"{option}{equals}{os.path.expanduser(value)}"
    return argument


def print_last_line(text: str) -> None:
    """Print to standard error. If nobody reads that any more, as when Ctrl-C has ended `tee`, the
    text is lost, and only the exit status tells what happened."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = None  # else Python fails to flush it at its end, and changes the exit status


def first_line_of(error: Exception) -> str:
    """PyTorch's messages about a GPU go on with general advice."""
    return str(error).partition("\n")[0]


def is_package_to_install(name: str) -> bool:
    """Whether a missing module is a package that pip installs. If a part of a package is missing, a
    file of the user's may have its name; a part of Python itself comes with Python."""
    is_own = name in ("models", "sep", "controller")
    return bool(name) and "." not in name and name not in sys.stdlib_module_names and not is_own


def explain(error: Exception) -> tuple[str, int]:
    """(one line, exit status) for what a user can cause; any other error is raised again."""
    if hasattr(error, "format_message"):  # Typer's own: a wrong call
        message = error.format_message()
        context = getattr(error, "ctx", None)
        command = f" {context.info_name}" if context is not None and context.parent else ""
        return " ".join(message.split()).rstrip(".") + f"; see python wtp.py{command} --help", 2
    if isinstance(error, ModuleNotFoundError) and is_package_to_install(error.name or ""):
        return f"{error.name} is missing; pip install -r requirements.txt", 1
    if isinstance(error, RuntimeError) and "operator torchvision::" in str(error):
        return (
            "torch and torchvision here are of different builds; make a new environment, and there "
            "pip install -r requirements.txt"
        ), 1
    # Here, not above: models.py imports torch, which may be the module that is missing.
    try:
        from models import UserError
    except Exception as import_error:
        # models.py cannot be imported either, for example because a library of CUDA is missing. If
        # the first error was about an import, it names the cause best.
        first_error = error if isinstance(error, ImportError | OSError) else import_error
        reason = " ".join(str(first_error).split())
        return f"PyTorch cannot be loaded: {reason}; pip install -r requirements.txt", 1

    if isinstance(error, UserError):
        return str(error), error.status
    if isinstance(error, OSError):
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE):
            return f"cannot write the output: {error.strerror}", 1  # of a stream: files have names
        return " ".join(str(error).split()), 1
    if isinstance(error, MemoryError):
        return "out of memory", 1
    if isinstance(error, RuntimeError):  # as PyTorch's
        from controller import is_gpu_error, is_out_of_memory

        if is_out_of_memory(error):
            return "out of memory", 1
        if is_gpu_error(error):
            reason = first_line_of(error)
            return f"the GPU fails: {reason}; its memory may be full; --device cpu needs no GPU", 1
    raise error


if __name__ == "__main__":
    sys.exit(main())
