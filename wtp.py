#!/usr/bin/env python3
"""Where to prune: an LSTM decides which layers of a CNN lose channels (IJCAI 2018; SEP, IEEE TIP 2021).

    python wtp.py reproduce mnist            every row of an experiment's table
    python wtp.py train mnist                the baseline alone
    python wtp.py prune --rate 0.2 net.pt    a smaller net from your own checkpoint
    python wtp.py evaluate net.pt            accuracy, MACs, parameters, size, latency
    python wtp.py export net.pt net.onnx     for use without this project, .pt2 or .onnx
    python wtp.py report RUN                 the tables again, and report.svg

Here: the table of experiments and schedules, the commands, what they show. PyTorch is imported inside the commands, so
that --help is quick.
"""
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # a Ctrl-C while the rest is imported gets one line, too
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: (os.write(2, b"stopped\n"), os._exit(128 + n)))

try:
    import typer
except ImportError:
    sys.exit("wtp: typer is missing; pip install -r requirements.txt")

# ---- experiments --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """What is pruned, on which data, how long; the defaults are the CIFAR numbers."""

    arch: str
    data: str
    classes: int = 10
    channels: int = 3
    size: int = 32
    crop: int = 4  # pixels (script)
    flip: bool = True  # (script)
    target: float | None = None  # the cut to reach (the published one); None: as far as the published reward goes
    recovery: int = 30  # epochs of a candidate (paper)
    final: int = 250  # epochs of the final training (paper)
    baseline: int = 200  # ours: no source gives the baseline's training
    baseline_lr: float = 0.1  # ours
    cycle_final: int = 20  # ours: epochs of a final training in one cycle (see SCHEDULES), and its peak
    cycle_lr: float = 0.005
    images: int = 50_000  # that train


# ours: MNIST is neither cropped nor flipped (a mirrored digit is another sign), as the papers say nothing of it
GRAY = dict(channels=1, size=28, crop=0, flip=False, baseline_lr=0.05, cycle_final=10, cycle_lr=0.02)
EXPERIMENTS = {
    "mnist": Experiment("lenet5", "mnist", **GRAY, images=60_000, recovery=10, final=100, baseline=20),  # 10, 100: paper
    "vgg-cifar10": Experiment("vgg19", "cifar10", target=0.701, cycle_lr=0.01),  # 70.1 %: IJCAI 2018
    "vgg16-cifar10": Experiment("vgg16", "cifar10", target=0.701, cycle_lr=0.01),
    "vgg-cifar100": Experiment("vgg19", "cifar100", classes=100, target=0.701, cycle_lr=0.01),
    "resnet56-cifar10": Experiment("resnet56", "cifar10", target=0.475),  # 47.5 %: IJCAI 2018
    "resnet56-cifar100": Experiment("resnet56", "cifar100", classes=100, target=0.475),
    "digits": Experiment("lenet5", "digits", **GRAY, images=6_000, recovery=10, final=100, baseline=20),
}


@dataclass(frozen=True)
class Schedule:
    """How much is spent; `published` is the papers' and the default, the others state their differences."""

    rate: float = 0.2  # R_prune (paper)
    lr: float = 0.001  # of recoveries and final training (script)
    cycle: bool = False  # one cycle up to it (final training: to the experiment's own peak); False: a fixed learning rate (script)
    temperature: float | None = None  # of the final training's distillation; None: the papers' MSE
    parents: int = 5  # (paper)
    patience: int = 10  # LSTM epochs without a better network (paper)
    candidates: int | None = None  # of a search for a target that learns from all of them; None: the papers' rules
    recovery: int | None = None  # epochs of a candidate; None: the experiment's
    steps: int | None = None  # instead: of a candidate's recovery, about
    final: int | None = None  # epochs; None: the experiment's
    baseline: int | None = None
    images: int | None = None  # training images at most; as many test images


SCHEDULES = {
    "published": Schedule(),
    # measured on ResNet-56 at a cut of 47.5 %: 25, 100 and 400 steps at 0.02 put six structures in one order; four epochs of final training
    # end at 89.5 / 89.6 % of the validation images with the papers' MSE up to 0.1 / 0.03, at 89.8 % with temperature 4 up to 0.02 or 0.006
    # (the lower one, for gradients grow with a teacher's logits); LeNet-5, ten epochs: 98.7 % with MSE up to 0.05, 98.8 % with temperature 4 up to 0.02;
    # twelve epochs on ResNet-56 end alike with 0.005, 0.01 and 0.02; twenty epochs end `uniform` 0.2 points of the test images above ten; temperature 2
    # is better than 4 from a baseline of 50 epochs and worse from a public checkpoint
    "fast": Schedule(lr=0.02, cycle=True, temperature=4.0, parents=3, patience=3, candidates=60, steps=50, baseline=20),
    "smoke": Schedule(lr=0.1, cycle=True, temperature=4.0, parents=2, patience=2, candidates=4, recovery=1, final=1, baseline=6, images=3000),
}
ROWS = ("lstm", "sep", "static", "random", "uniform")  # the order of the work: `static` comes from `sep`, `uniform` lands where `lstm` landed

Name = StrEnum("Name", list(SCHEDULES))
Method = StrEnum("Method", ["uniform", "lstm", "sep", "static", "random"])


def epochs_for(steps: int, images: int) -> int:
    """How many epochs of the images that do not validate come nearest to so many steps."""
    from controller import BATCH, VALIDATION

    return max(1, round(steps * BATCH / ((1 - VALIDATION) * images)))


def settings_of(experiment: Experiment, schedule: Schedule, seed: int, *, rate: float | None = None):
    """The numbers of a run: the experiment's, where the schedule does not say otherwise."""
    from controller import Plan, Settings

    e, s = experiment, schedule
    short = epochs_for(s.steps, e.images) if s.steps else s.recovery or e.recovery
    return Settings(baseline=Plan(s.baseline or e.baseline, e.baseline_lr, True), recovery=Plan(short, s.lr, s.cycle, s.steps),
                    final=Plan(s.final or (e.cycle_final if s.cycle else e.final), e.cycle_lr if s.cycle else s.lr, s.cycle, temperature=s.temperature),
                    rate=rate or s.rate, target=e.target, parents=s.parents, patience=s.patience, candidates=s.candidates, seed=seed)


# ---- what the user sees -------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__.split("\n\n")[0])


def console(stderr: bool = False):
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, emoji=False, width=None if terminal else 120, soft_wrap=not terminal)


SILENCE = 10  # seconds of an epoch until a run says how long it may take


class Screen:
    """Shows a run on standard error: a bar with the time left on a terminal, one plain line per epoch elsewhere."""

    def __init__(self):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console, self.planned, self.full, self.part, self.warm, self.measured = console(stderr=True), 0.0, 1, 1.0, False, False
        self.bars = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]},"),
                             TimeElapsedColumn(), TextColumn("gone, left"), TimeRemainingColumn(), console=self.console, transient=True,
                             disable=not self.console.is_terminal)
        self.run = self.bars.add_task("the run", unit="epochs", total=None)
        self.task, self.epochs, self.done = self.run, 0, 0

    def __enter__(self):
        self.bars.start()
        return self

    def __exit__(self, *_):
        self.bars.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def plan(self, epochs: float, steps: int) -> None:
        """The run may take so many epochs, of so many steps each."""
        self.planned, self.full = epochs, max(1, steps)
        self.bars.update(self.run, total=epochs)

    def stage(self, title: str, epochs: int, start: int) -> None:
        if self.task != self.run:
            self.bars.remove_task(self.task)
        self.task, self.epochs, self.done = self.bars.add_task(title, unit="steps", total=None), epochs, start
        if start:
            self.say(f"{title}: goes on after epoch {start} of {epochs}")

    def steps(self, steps):
        self.part = len(steps) / self.full
        self.bars.update(self.task, total=self.epochs * len(steps), completed=self.done * len(steps))
        began = time.monotonic()
        for n, step in enumerate(steps, 1):
            yield step
            self.bars.advance(self.task)
            if (gone := time.monotonic() - began) > SILENCE:
                self.estimate(gone / n * len(steps))
        self.done += 1

    def epoch(self, title: str, epoch: int, epochs: int, loss: float, accuracy: float | None, seconds: float) -> None:
        self.bars.advance(self.run, self.part)
        found = "" if accuracy is None else f", validation accuracy {accuracy:.2%}"
        if not self.console.is_terminal:
            self.say(f"{title}: epoch {epoch + 1}/{epochs}, loss {loss:.4f}{found}, {seconds:.1f} s an epoch")
        if self.warm or self.part > 0.9:  # the first of several short trainings has more to do than the others
            self.estimate(seconds)
        self.warm = True

    def estimate(self, seconds: float) -> None:
        """Say once how long the run may take, by what an epoch takes."""
        if not self.measured:
            self.measured = True
            took = f"{seconds:.1f} s for this epoch" if self.part > 0.9 else f"{seconds:.1f} s for {self.part:.0%} of an epoch"
            self.say(f"{took}: {span(self.planned * seconds / self.part)} for all, less as the nets get smaller")


def span(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{int(unit == 'h')}f} {unit}"
    return f"{seconds:.0f} s"


def in_order(results: dict) -> list[dict]:
    order = ["baseline", "uniform", "random", "lstm", "sep", "static"]
    return sorted(results["rows"], key=lambda row: order.index(row["method"]))


def layers_of(results: dict) -> list:
    """The names of the prunable layers; their numbers in a run begun before names were kept."""
    return [str(name) for name in results.get("layers") or range(1, len(results["rows"][0]["widths"]) + 1)]


def show_results(results: dict, out) -> None:
    """The table of a run, a row per method; below, what is left of each layer and how often each search pruned it."""
    from rich.table import Table
    from rich.text import Text

    rows = in_order(results)
    read = f" ({results['test_images']:,} test images)" if "test_images" in results else ""
    title = f"{{experiment}}, {{schedule}} schedule, data {{data}}{read}, seed {{seed}}, {{device}}".format_map(results)
    table = Table(title=Text(title), title_justify="left", padding=(0, int(out.width > 75)))  # a Text, for a user's [name] is no markup
    for name in ("method", "test accuracy", "validation", "MACs", "cut", "parameters", "time"):
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")  # nothing is cut off where the terminal is narrow
    for r in rows:
        table.add_row(r["method"], f"{r['test_accuracy']:.2%}", f"{r['validation_accuracy']:.2%}", f"{r['macs'] / 1e6:.3f} M", f"{r['cut']:.1%}",
                      f"{r['params']:,}", span(r["seconds"]))
    out.print(table)
    say = lambda text: out.print(text, markup=False)
    if results["schedule"] == "smoke":
        say("smoke: a test of the machinery; these accuracies are no result")
    if not rows:
        say("no row is finished yet")
    if len(rows) > 1:
        say("validation: of what the search chose, before its final training")
    for r in rows[1:]:
        few = len(r["widths"]) <= 8
        kept = [f"{name} " * few + f"{k}/{w}" for name, k, w in zip(layers_of(results), r["widths"], rows[0]["widths"], strict=True)]
        say(f"{r['method']} keeps " + (", " if few else " ").join(kept))
    done, tried = {r["method"] for r in rows}, {m: len(log) for m, log in results["search"].items()}
    if "sep" in done and tried.get("sep") == 2 and tried.get("lstm", 0) > 2:
        say("sep has the scheme of lstm's search; its time includes that search")
    if "static" in done:
        say("static begins with sep's net; its time includes sep's")
    for method, log in results["search"].items():
        if method != "uniform" and len(log) > 2:
            what, *halves = habits(log)
            few = f"; {what} each layer: {{}} (first half), {{}} (second half)".format(*(" ".join(f"{v:.0%}" for v in half) for half in halves))
            ended = method in done or (method == "lstm" and "sep" in done and tried.get("sep") == 2)
            say(f"{method} tried {len(log) - 1} candidates{'' if ended else ' so far'}{few if len(rows[0]['widths']) <= 8 else ''}")
    for method, told in results.get("rounded", {}).items():
        say(f"{method}, widths at multiples of {results['round_to']}: {told['before']} -> {told['after']}")
    target = results["settings"]["target"]
    for r in rows[1:]:
        if target and r["cut"] < target - 0.005:  # `uniform` lands within half a point
            say(f"{r['method']} did not reach the target: a cut of {r['cut']:.1%}, not {target:.1%}; its search found nothing smaller")
        elif r["cut"] == 0 and r["method"] != "uniform":
            say(f"{r['method']} kept the whole net: by the reward, nothing smaller was better")


def habits(log) -> tuple[str, list, list]:
    """What a search did to each layer: (what the shares are, those of its first half, those of its second half)."""
    start, tried = log[0]["structure"], log[1:]
    walks = all(c["parent"] == start for c in tried)  # then a scheme says little: nearly every layer loses something
    share = lambda c: [1 - k / w for k, w in zip(c["structure"], start)] if walks else c["scheme"]
    halves = tried[: len(tried) // 2], tried[len(tried) // 2 :]
    return "mean share removed of" if walks else "how often it pruned", *([sum(v) / len(half) for v in zip(*map(share, half))] for half in halves)


KEPT, GONE, OTHER, MARK = "#0072b2", "#808080", "#009e73", "#d55e00"  # Okabe and Ito's colours: told apart by colour-blind eyes


def bar(share: float, width: int, colour: str = KEPT):
    """A bar of `width` characters, to an eighth of a character."""
    from rich.text import Text

    full, part = divmod(round(share * width * 8), 8)
    return Text("█" * full + " ▏▎▍▌▋▊▉"[part] * (part > 0), colour) + Text("·" * (width - full - (part > 0)), GONE)


def show_layers(results: dict, rows: list, out) -> None:
    """Per layer what each row keeps, as bars, and what the search of `lstm`, or else of another, did to it."""
    from rich.table import Table

    method = next((m for m in ("lstm", "sep", "random") if len(results["search"].get(m, ())) > 2), None)
    what, early, late = habits(results["search"][method]) if method else ("", (), ())
    table = Table(title="channels kept in each layer" + (f"; right: {what} it, {method}'s search, early and late" if method else ""), title_justify="left")
    for name in ("layer", "width", *(r["method"] for r in rows[1:]), *(("early", "late") if method else ())):
        table.add_column(name, justify="right" if name in ("width", "early", "late") else "left")
    for i, (name, width) in enumerate(zip(layers_of(results), rows[0]["widths"], strict=True)):
        kept = [bar(r["widths"][i] / width, max(8, 48 // len(rows))) + f" {r['widths'][i]}" for r in rows[1:]]
        table.add_row(name, str(width), *kept, *(f"{half[i]:.0%}" for half in (early, late) if method))
    out.print(table)


def show_candidates(results: dict, rows: list, out, width: int = 72, height: int = 14) -> None:
    """Validation accuracy against the cut of every candidate of every search; where all cut alike, in the order they were tried."""
    from rich.text import Text

    for method, log in results["search"].items():
        tried, chosen = log[1:], next((r["widths"] for r in rows if r["method"] == method), None)
        if method == "uniform" or len(tried) < 2:
            continue
        alike = max(c["cut"] for c in tried) - min(c["cut"] for c in tried) < 0.02
        points = [(n if alike else c["cut"], c["validation_accuracy"], c) for n, c in enumerate(tried, 1)]
        pool = sorted(tried, key=lambda c: -c["reward"])[: results["settings"]["parents"]]
        is_chosen = lambda c, widths=chosen: list(c["structure"]) == widths
        (left, right), (lowest, high) = ((min(v), max(v)) for v in list(zip(*points))[:2])
        low = min(sorted(p[1] for p in points)[len(points) // 10], *(c["validation_accuracy"] for c in pool))  # few bad ones would press the others together
        grid = [[(" ", "")] * width for _ in range(height)]
        for x, y, c in sorted(points, key=lambda p: (is_chosen(p[2]), p[2] in pool)):  # the marked ones last, on top
            column, line = (x - left) / ((right - left) or 1) * (width - 1), min(1, (high - y) / ((high - low) or 1)) * (height - 1)
            grid[round(line)][round(column)] = ("◆", MARK) if is_chosen(c) else ("o", KEPT) if c in pool else ("•", GONE)
        known = "◆ chosen, " * any(map(is_chosen, tried))
        out.print(Text(f"{method}: validation accuracy of each candidate; {known}o among the {len(pool)} largest rewards, • the others"
                       + f"; {sum(p[1] < low for p in points)} lower ones at the bottom" * (lowest < low)))
        for n, line in enumerate(grid):
            label = f"{high - n / (height - 1) * (high - low):8.2%} " if n % 4 == 0 or n == height - 1 else " " * 9
            out.print(Text(label + "│") + Text.assemble(*line), no_wrap=True)
        ends = (f"candidate {left}", f"{right}") if alike else (f"cut {left:.1%}", f"{right:.1%}")
        out.print(Text(" " * 9 + "└" + "─" * width + "\n" + " " * 10 + ends[0] + ends[1].rjust(width - len(ends[0]))))


def show_curves(results: dict, out) -> None:
    """The loss, and where there is one the validation accuracy, over the epochs of the baseline's and each row's final training."""
    import math

    from rich.text import Text

    for method, curve in results.get("curves", {}).items():
        for what, n, text in (("loss", 0, "{:.4f}"), ("validation accuracy", 1, "{:.2%}")):
            values = [p[n] for p in curve if p[n] is not None and math.isfinite(p[n])]
            if len(values) < 2:
                continue
            shown = [values[n * (len(values) - 1) // min(59, len(values) - 1)] for n in range(min(60, len(values)))]
            low, high = min(values), max(values)
            line = "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / ((high - low) or 1))] for v in shown)
            ends = [text.format(v) for v in (values[0], values[-1])]
            out.print(Text(f"{f'{method}, {what}':<29} {ends[0]:>8} ") + Text(line, OTHER) + Text(f" {ends[1]}, {len(values)} epochs"))


def draw(results: dict, path: Path) -> None:
    """report.svg: the tables and pictures of a run, in a fixed-width font that every machine has."""
    import io
    import re

    from rich.console import Console
    from rich.terminal_theme import DEFAULT_TERMINAL_THEME

    from models import write_text

    out = Console(record=True, file=io.StringIO(), width=112, highlight=False, emoji=False, force_terminal=True, color_system="truecolor", legacy_windows=False)
    show_results(results, out)
    rows = in_order(results)
    for show in (show_layers, show_candidates) if len(rows) > 1 else ():
        out.print()
        show(results, rows, out)
    out.print()
    show_curves(results, out)
    out.print()  # the picture's edge would cut into the last line
    svg = out.export_svg(title="{experiment}, {schedule}".format_map(results), theme=DEFAULT_TERMINAL_THEME, unique_id="report")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    write_text(path, svg.replace("Fira Code, monospace", "Menlo, DejaVu Sans Mono, Consolas, monospace"))


# ---- commands -----------------------------------------------------------------------------------------------------------


def share(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value} is not between 0 and 1")
    return value


DataDir = Annotated[Path, typer.Option(help="where the data is, or is downloaded to")]
Out = Annotated[Path, typer.Option(help="where run folders are made")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto")]
Seed = Annotated[int, typer.Option(min=0, help="of everything random")]
Fresh = Annotated[bool, typer.Option("--fresh", help="start over instead of going on")]
Effort = Annotated[Name, typer.Option(help="published: the papers' numbers; fast: a verdict in minutes to hours on a CPU; smoke: a test")]
Rate = Annotated[float, typer.Option(callback=share, help="share of a chosen layer's channels that one step removes")]
RoundTo = Annotated[int | None, typer.Option(min=1, help="keep widths at multiples of this, as machines like them")]
Target = Annotated[float | None, typer.Option(callback=share, help="share of the MACs to remove; default: as far as the papers' reward goes")]


def experiment_of(name: str) -> Experiment:
    from models import Failure

    if name not in EXPERIMENTS:
        raise Failure(f"unknown experiment '{name}'; there are {', '.join(EXPERIMENTS)}", 2)
    return EXPERIMENTS[name]


def on(data_dir: Path) -> str:
    """What a run folder's name says of the data, where they are the user's own."""
    from controller import is_own

    return f"-on-{data_dir.absolute().name}" if is_own(data_dir) else ""


def device_of(name: str):
    import torch

    from models import Failure

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError
        torch.zeros(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # streams and graphs are the current device's
    except Exception as e:
        raise Failure(f"device '{name}' cannot be used here; try cpu or auto", 2) from e
    return device


def epochs_of(settings, methods, images: int, baseline: bool = True, landed: bool = False) -> float:
    """How many epochs of so many training images the rows of `methods` may take; `landed`: another row says what to cut.

    ours: under the papers' rules rewards grow for about ten LSTM epochs; `uniform` then takes about ten steps.
    """
    from controller import BATCH, VALIDATION

    recovery = settings.recovery.epochs * min(1, (settings.recovery.steps or images) * BATCH / images)
    final = settings.final.epochs / (1 - VALIDATION)  # on all images
    total, count = baseline * settings.baseline.epochs, settings.candidates
    for method in methods:
        if method == "static":
            total += recovery
            continue
        if method == "uniform":
            tries = 1 if settings.guided(settings.target) else 10
        elif method == "sep" and count and landed:
            tries = 1  # `lstm`'s search serves it
        else:
            tries = count if count and (settings.target or landed) else (settings.patience + 10) * settings.parents
        total, landed = total + tries * recovery + final, True
    return total


def data_for(net, facts: dict, e: Experiment, data_dir: Path, where, say, seed: int = 0):
    """(training, test, what it is) for the user's net: checked against it, normalised as it is used to, on the device. Raises Failure."""
    from controller import load_data, statistics_of
    from models import Failure

    try:
        train, test, what = load_data(e.data, data_dir, crop=e.crop, flip=e.flip)
    except Failure as failure:
        guess = f"; a net of {net.channels} x {net.size} x {net.size} images of {net.classes} classes is taken to be for {e.data}"
        raise Failure(f"{failure}{guess if facts.get('data') is None else ''}", failure.status) from failure
    fits(net, facts, train, what)
    train, test, (mean, std) = train.to(where), test.to(where), told(net, facts)
    if mean is None:
        say("how the net's images were normalised is not known: tries the usual ways on the validation images")
        text, mean, std = statistics_of(net.to(where), train, seed)
        say(text)
    return train.normalised(mean, std), test.normalised(mean, std), what


def check_target(net, methods, target, round_to: int | None) -> None:
    """Refuse a target that `net` cannot reach, with that --round-to, before anything is trained."""
    from controller import METHODS, check_reach

    for method in methods:
        cost = METHODS["sep" if method == "static" else method][1]
        check_reach(net.widths, lambda w, cost=cost: 1 - cost(net, w) / cost(net, net.widths), target, round_to or 1)


def begin(folder: Path, name: str, schedule: str, settings, *, data_dir, device, fresh, e: Experiment, given=None, source=None, methods=(), round_to=None):
    """The run of a folder with its data loaded, and the screen that shows it; `given` are the user's net and its facts."""
    import torch

    from controller import BATCH, Run, load_data, stream

    where, screen = device_of(device), Screen()
    if given:
        train, test, what = data_for(*given, e, data_dir, where, screen.say, settings.seed)
        if (before := given[1].get("data")) not in (None, what):
            screen.say(f"the net was trained on {before}, and is pruned on {what}")
    else:
        train, test, what = load_data(e.data, data_dir, crop=e.crop, flip=e.flip)
    if limit := SCHEDULES[schedule].images:
        few = lambda images: images.part(torch.randperm(len(images), generator=torch.Generator().manual_seed(stream("few")))[:limit])
        train, test = few(train), few(test)
    if steps := SCHEDULES[schedule].steps:  # of the data at hand
        settings = replace(settings, recovery=replace(settings.recovery, epochs=epochs_for(steps, len(train))))
    head = dict(experiment=name, schedule=str(schedule), data=what, source=source)
    seen = given[1].get("split", given[1].get("seed")) if given and given[1].get("data") == what else None  # what validated a baseline validates again
    run = Run(folder, settings, head, train.to(where), test.to(where), screen, fresh, round_to, seen if isinstance(seen, int) else None)
    Stopped.hint = "; the run goes on where it was with the same command (without --fresh)"
    methods = [m for m in methods if not run.row(m)]
    count = len(run.train)
    screen.plan(epochs_of(settings, methods, count, not (run.row("baseline") or given), len(run.results["rows"]) > 1), count // BATCH)
    finals = len([m for m in methods if m != "static"])
    final = f", {finals} x {settings.final.epochs} of them final training" if finals else ""
    if screen.planned >= 0.5:
        screen.say(f"{folder}: up to about {screen.planned:,.0f} epochs{final}; stop it when you like, the same command goes on")
    return run, screen


def fits(net, facts: dict, images, what: str) -> None:
    """Raise Failure where a net cannot read the images or tell their classes apart; a stranger's takes the images' size."""
    from models import Failure, like

    size, channels = images.pixels.shape[2:]  # load_data takes square images alone
    if not facts and net.arch != "lenet5":
        net.size = like(net, net.widths, size).size  # the other nets average over places, and a state dict does not tell the images' size
    if (size, channels) != (net.size, net.channels) or images.classes != net.classes:
        raise Failure(f"the net reads {net.channels} x {net.size} x {net.size} images of {net.classes} classes; "
                      f"{what} has {channels} x {size} x {size} images of {images.classes} classes")
    known = facts.get("names")
    if images.names and known and isinstance(known, list) and known != images.names:
        others = [str(n) for n in (*images.names, *known) if n not in images.names or n not in known]
        raise Failure(f"{what}: not the classes that the net was trained on ({', '.join(others[:10])} in one of the two alone)")


def fresh_net(e: Experiment, run):
    """The untrained net of an experiment, for the data of a run (its own, or the user's)."""
    import torch

    from controller import stream
    from models import build

    torch.manual_seed(stream(run.settings.seed, "net"))
    own = run.results["data"] != e.data
    return build(e.arch, classes=run.all.classes if own else e.classes, channels=e.channels, size=run.all.pixels.shape[1])


def show_run(results: dict, folder: Path) -> None:
    """The tables of a run, and its report.svg. Raises Failure where its results.json was edited to what cannot be shown."""
    from models import Failure

    try:
        show_results(results, console())
        draw(results, folder / "report.svg")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise Failure(f"{folder / 'results.json'} is damaged ({type(e).__name__}: {e})") from e


def finish(run) -> None:
    show_run(run.results, run.folder)
    console().print(f"{run.folder / 'results.json'}, report.svg; {span(run.results['seconds'])} in all", markup=False)


@app.command()
def reproduce(
    experiment: Annotated[str, typer.Argument(help="without it: the list of them")] = "",
    method: Annotated[list[Method] | None, typer.Option(help="the rows; default: uniform, lstm, sep")] = None,
    schedule: Effort = Name.published,
    baseline: Annotated[Path | None, typer.Option(help="a checkpoint to start from, instead of training one")] = None,
    round_to: RoundTo = None,
    data_dir: DataDir = Path("data"),
    out: Out = Path("runs"),
    device: Device = "auto",
    seed: Seed = 0,
    fresh: Fresh = False,
):
    """All rows of an experiment's table."""
    import sep
    from controller import read_results
    from models import Failure, build, default_widths

    if not experiment:
        if method or baseline or round_to or fresh:
            raise Failure(f"name an experiment: {', '.join(EXPERIMENTS)}; without any option, `reproduce` tells how long each takes", 2)
        return show_experiments(device_of(device))
    e = experiment_of(experiment)
    given = sep.load(baseline) if baseline else None
    if given and (given[0].arch, given[0].structure) != (e.arch, default_widths(e.arch)):
        raise Failure(f"{baseline} is a {given[0].arch} of widths {given[0].structure}, not the whole {e.arch} of {experiment}; `prune` takes any net", 2)
    settings = settings_of(e, SCHEDULES[schedule], seed)
    rows = [r for r in ROWS if r in (method or ("uniform", "lstm", "sep"))]
    check_target(build(e.arch, classes=e.classes, channels=e.channels, size=e.size), rows, settings.target, round_to)
    more = (f"-from-{baseline.stem}" if baseline else "") + (f"-round{round_to}" if round_to else "")
    folder = out / f"{experiment}{on(data_dir)}-{schedule}-s{seed}{more}"
    landed = lambda rows: next((r["cut"] for m in ROWS for r in rows if r["method"] == m), None)  # all rows of a table are compared at one cut
    known = None if fresh else read_results(folder, missing_ok=True)
    if rows == ["uniform"] and settings.target is None and landed(known["rows"] if known else []) is None:
        raise Failure("uniform needs a cut to land on; add --method lstm", 2)
    run, screen = begin(folder, experiment, schedule, settings, data_dir=data_dir, device=device, fresh=fresh, e=e, given=given,
                        source=digest(baseline) if baseline else None,
                        methods=dict.fromkeys(m for row in rows for m in (("sep", row) if row == "static" else (row,))), round_to=round_to)
    with screen:
        teacher = run.baseline(given=given[0]) if given else run.baseline(fresh=fresh_net(e, run))
        for row in rows:
            cut = landed(run.results["rows"])
            run.method(row, teacher, settings.target if settings.target and (row != "uniform" or cut is None) else cut)
    finish(run)


def show_experiments(device) -> None:
    """The experiments, and about how long all rows of each take here: a few steps of each net are timed for it."""
    from rich.table import Table

    from controller import VALIDATION, speed
    from models import build

    console(stderr=True).print(f"times a few steps of each net on {device}, about a minute", markup=False)
    table = Table(title=f"time for all rows on {device}, about, by a few steps just timed", title_justify="left")
    for name in ("experiment", "net", "paper's cut", *SCHEDULES):
        table.add_column(name, justify="left" if name in ("experiment", "net") else "right", no_wrap=True)
    pace = {}
    for name, e in EXPERIMENTS.items():
        net = build(e.arch, classes=e.classes, channels=e.channels, size=e.size)
        pace[e.arch] = pace.get(e.arch) or speed(net, device)
        counts = [int((1 - VALIDATION) * min(e.images, s.images or e.images)) for s in SCHEDULES.values()]
        epochs = (epochs_of(settings_of(e, s, 0), ("uniform", "lstm", "sep"), n) * n for s, n in zip(SCHEDULES.values(), counts))
        # ours: half, for nets get smaller on the way and searches mostly end earlier (measured on MNIST)
        table.add_row(name, e.arch, f"{e.target:.1%}" if e.target else "–", *(span(n / pace[e.arch] / 2) for n in epochs))
    console().print(table)


@app.command()
def train(
    experiment: str,
    output: Annotated[Path | None, typer.Option(help="the checkpoint; default: baseline.pt in the run folder")] = None,
    schedule: Effort = Name.published,
    data_dir: DataDir = Path("data"),
    out: Out = Path("runs"),
    device: Device = "auto",
    seed: Seed = 0,
    fresh: Fresh = False,
):
    """The baseline of an experiment alone, to a checkpoint."""
    e = experiment_of(experiment)
    settings = settings_of(e, SCHEDULES[schedule], seed)
    folder = out / f"{experiment}{on(data_dir)}-{schedule}-s{seed}"
    free(output, folder=folder)
    run, screen = begin(folder, experiment, schedule, settings, data_dir=data_dir, device=device, fresh=fresh, e=e)
    with screen:
        run.baseline(fresh=fresh_net(e, run))
    if output:
        deliver(run.folder / "baseline.pt", output)
    finish(run)
    console().print(f"wrote {output}" if output else f"the baseline is {run.folder / 'baseline.pt'}", markup=False)


def free(output: Path | None, hint: str = "give another --output", checkpoint: bool = True, folder: Path | None = None) -> None:
    """Refuse an output that would overwrite a file, or be taken for a run's own: in `folder`, where a run will work, or in another's."""
    from controller import FILES, NETS
    from models import Failure

    own = *(f"{m}.pt" for m in NETS), *FILES, "lock"
    if output and output.name in own and (output.absolute().parent == (folder and folder.absolute()) or (output.parent / "results.json").exists()):
        raise Failure(f"{output} is a run's own file; {hint}", 2)
    if output and os.path.lexists(output):  # a dangling link, too
        raise Failure(f"{output} exists already and is kept; {hint}", 2)
    if output and checkpoint and output.suffix in (".pt2", ".onnx"):
        raise Failure(f"{output} would be a checkpoint under an export's ending; call it NAME.pt", 2)
    if output and not output.absolute().parent.is_dir():
        raise Failure(f"cannot write {output}: there is no folder {output.parent}", 2)
    if output and not os.access(output.absolute().parent, os.W_OK):
        raise Failure(f"cannot write {output}: its folder is read-only", 2)


def deliver(made: Path, output: Path) -> None:
    """Copy a finished checkpoint to where the user wants it; never over a file that came there meanwhile."""
    import shutil

    from models import Failure, part_of, replaced, sound

    if not sound(made):
        raise Failure(f"{made} is gone or damaged; --fresh makes it anew, and all rows beside it")
    free(output)
    replaced(output, lambda part: shutil.copyfile(made, part), part_of(output), f"; the net is in {made}")


def data_of(net, facts: dict, data_dir: Path) -> Experiment:
    """The experiment whose data a net is for: what its checkpoint says, else the data set with its input and classes; of those of its kind."""
    from controller import OWN, is_own
    from models import Failure

    own = is_own(data_dir)
    if not own and str(facts.get("data")).startswith(OWN):
        raise Failure(f"the net was trained on {facts['data']}; name that folder, wherever it is now, with --data-dir", 2)
    fitting = [e for e in EXPERIMENTS.values() if e.channels == net.channels and (own or e.classes == net.classes)]
    if not fitting:
        raise Failure(f"no data set here has {net.channels} channel{'s' * (net.channels > 1)} and {net.classes} classes; "
                      "--data-dir can name a folder with train/CLASS and test/CLASS")
    family = lambda arch: arch.rstrip("0123456789")
    return max(fitting, key=lambda e: (e.data == facts.get("data"), family(e.arch) == family(net.arch)))


def told(net, facts: dict):
    """(mean, std) that a net's checkpoint says its images were normalised with, or (None, None)."""
    found = facts.get("mean"), facts.get("std")
    known = all(isinstance(v, list) and len(v) == net.channels and all(isinstance(x, float) for x in v) for v in found)
    return found if known and min(found[1]) > 0 else (None, None)


def digest(path: Path) -> str:
    """Name and content of a file: another file is another run."""
    import hashlib

    return f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


@app.command()
def prune(
    ckpt: Path,
    rate: Rate = 0.2,
    method: Annotated[list[Method] | None, typer.Option(
        help="lstm, the default, removes channels; sep switches them off per image; uniform, random: to compare with")] = None,
    static: Annotated[bool, typer.Option("--static", help="with sep: a plain small net of the kernels that the gates choose most often")] = False,
    target: Target = None,
    round_to: RoundTo = None,
    schedule: Effort = Name.published,
    output: Annotated[Path | None, typer.Option(help="default: CKPT with -pruned in its name")] = None,
    data_dir: DataDir = Path("data"),
    out: Out = Path("runs"),
    device: Device = "auto",
    seed: Seed = 0,
    fresh: Fresh = False,
):
    """A smaller net from your own checkpoint."""
    import sep
    from models import Failure

    if method and len(method) > 1:
        raise Failure("prune makes one net; give one --method", 2)
    method = (method or [Method.lstm])[0]
    if static and method not in (Method.sep, Method.static):
        raise Failure(f"--static makes a plain net of a gated one; {method} has no gates, add --method sep", 2)
    row, method = (Method.static, Method.sep) if static or method == Method.static else (method, method)
    if method == Method.uniform and target is None:
        raise Failure("uniform needs a cut to land on; give --target", 2)
    net, facts = sep.load(ckpt)
    output = output or ckpt.with_name(f"{ckpt.stem}-pruned.pt")
    if net.gates is not None:
        raise Failure(f"{ckpt} is soft-pruned already; prune its baseline, or a net without gates", 2)
    e = replace(data_of(net, facts, data_dir), target=target)
    settings = settings_of(e, SCHEDULES[schedule], seed, rate=rate)
    check_target(net, [method], target, round_to)
    asked = dict(target=target, rate=rate if rate != SCHEDULES[schedule].rate else None, round=round_to)
    asked = "".join(f"-{name}{value:g}" for name, value in asked.items() if value)
    folder = out / f"prune-{ckpt.stem}-{method}{asked}{on(data_dir)}-{schedule}-s{seed}"
    free(output, folder=folder)
    run, screen = begin(folder, f"prune {ckpt.name}", schedule, settings, data_dir=data_dir, device=device, fresh=fresh, e=e,
                        given=(net, facts), source=digest(ckpt), methods=dict.fromkeys([method, row]), round_to=round_to)
    with screen:
        run.method(row.value, run.baseline(given=net), settings.target)
    finish(run)
    deliver(run.folder / f"{row}.pt", output)
    console().print(f"wrote {output}", markup=False)


@app.command()
def evaluate(ckpt: Path, data_dir: DataDir = Path("data"), device: Device = "auto"):
    """Accuracy, MACs, parameters, size, latency of a checkpoint."""
    import io

    import torch
    from rich.table import Table
    from rich.text import Text

    import models
    import sep
    from controller import accuracy, latency, tuned

    net, facts = sep.load(ckpt)
    say = lambda text: console(stderr=True).print(text, markup=False)
    e, where = data_of(net, facts, data_dir), device_of(device)
    test, what = data_for(net, facts, e, data_dir, where, say)[1:]
    say(f"reads {len(test):,} test images of {what}" + (f"; it was trained on {facts['data']}" if facts.get("data") not in (None, what) else ""))
    net, base = net.to(where).to(memory_format=torch.channels_last), dict(facts.get("baseline") or {})
    if (facts.get("data"), facts.get("test_images")) != (what, len(test)):
        base.pop("test_accuracy", None)  # measured on other images
    with sep.counting(net) as counts:
        right = accuracy(net, test, exact=True)
    ours = dict(test_accuracy=right, macs=sep.macs(net), params=models.parameters(net), bytes=ckpt.stat().st_size)
    try:
        whole = models.like(net, base["widths"]).to(where).to(memory_format=torch.channels_last)
        torch.save(whole.state_dict(), file := io.BytesIO())
        base["bytes"] = file.tell()
    except (models.Failure, KeyError, TypeError):
        whole = None
    chosen = {p.layer: used[0] for p, used in zip(net.prunable, counts) if used is not None}
    skips = []
    for numbers, n in (*([(base, whole)] if whole else []), (ours, net)):
        numbers |= {batch: latency(n, test, batch) for batch in (1, 128)}
        if where.type == "cpu":
            fast = tuned(n, test)
            numbers["tuned"], skips = latency(fast, test, 1), fast.skips
    table = Table(title=Text(f"{ckpt}: {net.arch}{', gated' if net.gates else ''}, on {what}, {len(test):,} test images"), title_justify="left")
    for name in ("", "baseline", "this net", "ratio") if base else ("", "this net"):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    count = lambda v: f"{v:,}"
    milliseconds = lambda v: f"{v * 1e3:.2f} ms"
    lines = {"test accuracy": ("test_accuracy", lambda v: f"{v:.2%}"), "MACs": ("macs", lambda v: f"{v / 1e6:.3f} M"), "parameters": ("params", count),
             "bytes on disk": ("bytes", count), "latency, batch 1": (1, milliseconds), "latency, batch 1, tuned": ("tuned", milliseconds),
             "latency, batch 128": (128, milliseconds)}
    for name, (key, text) in lines.items():
        if key not in ours:
            continue
        known = base.get(key)
        beside = [text(known) if known else "", f"{ours[key] / known:.3f}" if known else ""]
        table.add_row(name, *([beside[0], text(ours[key]), beside[1]] if base else [text(ours[key])]))
    console().print(table)
    full = list(whole.widths) if whole else list(net.widths)
    if where.type == "cpu":
        said = "tuned: by sep.tune, for one image at a time"
        if whole:
            said += f", {ours['tuned'] / base[1]:.2f} of what the baseline takes untuned"
        if skips:
            others = "" if all(skips) else ", the others mask them"
            said += f"; {sum(skips)} of {len(skips)} gates skip the kernels they exclude{others}, whichever is faster here"
            said += "; export --static makes a plain net of it"
        console().print(said, markup=False)
    if chosen:
        counts = {name: (int((n == 0).sum()), int(((n > 0) & (n < len(test))).sum()), int((n == len(test)).sum())) for name, n in chosen.items()}
        console().print("kernels used for no image / some / all: " + ", ".join(f"{k} {a}/{b}/{c}" for k, (a, b, c) in counts.items()), markup=False)
    console().print("widths: " + " ".join(str(k) if k == w else f"{k}/{w}" for k, w in zip(net.structure, full)), markup=False)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run folder, or its results.json")]):
    """The tables of a run again, and report.svg with the pictures."""
    from controller import read_results
    from models import Failure

    folder = run.parent if run.name == "results.json" else run
    if not (folder / "results.json").is_file():
        raise Failure(f"{run} is no run folder: it has no results.json", 2)
    show_run(read_results(folder, hint=""), folder)
    console().print(f"wrote {folder / 'report.svg'}", markup=False)


@app.command()
def export(
    ckpt: Path,
    file: Annotated[Path, typer.Argument(help="NAME.pt2 (torch.export) or NAME.onnx")],
    static: Annotated[bool, typer.Option("--static", help="of a gated net: a plain small one, of the kernels chosen most often")] = False,
    size: Annotated[int | None, typer.Option(min=1, help="pixels of an image's side; default: those it was trained with")] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite FILE")] = False,
    data_dir: DataDir = Path("data"),
    device: Device = "auto",
):
    """The net for use without this project.

    It reads images in [0, 1], normalisation included, any batch size.
    """
    import models
    import sep

    net, facts = sep.load(ckpt)
    if file.suffix.lower() not in (".pt2", ".onnx"):
        raise models.Failure(f"{file}: the ending says the format, .pt2 (torch.export) or .onnx", 2)
    if file.is_dir():
        raise models.Failure(f"{file} is a folder", 2)
    if static and net.gates is None:
        raise models.Failure(f"{ckpt} has no gates: it is plain already, leave out --static", 2)
    free(None if force and os.path.lexists(file) else file, "--force overwrites it", checkpoint=False)
    say = lambda text: console().print(text, markup=False)
    (mean, std), where = told(net, facts), device_of(device)
    if static:
        models.check_size(net, size or net.size)  # before the recovery
    if static or mean is None:
        try:
            train = data_for(net, facts, data_of(net, facts, data_dir), data_dir, where, say)[0]
        except models.Failure as e:
            why = "a recovery" if static else f"finding out how {ckpt}'s images were normalised"
            raise models.Failure(f"{e}; the images are for {why}", e.status) from e
        mean, std = train.mean, train.std
    if static:
        net = made_static(net.to(where), train, say)
    difference = models.export(net, file, mean, std, size or net.size, ready=lambda: free(None if force else file, "--force overwrites it", checkpoint=False))
    if net.gates is not None:
        say("a gated net: the file computes every kernel and masks them; --static makes a small net of it")
    say(f"wrote {file}: images (batch, {net.channels}, {size or net.size}, {size or net.size}) in [0, 1] to logits (batch, {net.classes}); "
        f"run and compared with {'the plain net' if static else ckpt}: largest difference {difference:.0e} of the largest logit")


def made_static(gated, train, say):
    """A plain small net of a gated one, with the recovery of `fast` where that helps; ours: the gated net is the teacher, for the baseline is
    not at hand."""
    from copy import deepcopy

    import torch

    from controller import BATCH, Plan, Teacher, accuracy, chunks, fit, sgd
    from sep import harden

    say(f"reads {len(train):,} training images, to choose kernels by them and to compare: up to some minutes on a CPU")
    plain, s = harden(gated, (train.batch(i) for i in chunks(train))), SCHEDULES["fast"]
    net = deepcopy(plain).to(memory_format=torch.channels_last)
    plan = Plan(1, s.lr, True, max(1, min(s.steps, len(train) // BATCH)))
    before = accuracy(gated, train), accuracy(plain, train)
    for _ in fit(net, train, plan, optimizer=sgd(net, plan.lr), seed=0, teacher=Teacher(gated, train, 0)):
        pass
    after = accuracy(net, train)
    left = ", which are left out" if after <= before[1] else ""
    say(f"of the training images right: {before[0]:.2%} with gates, {before[1]:.2%} without, {after:.2%} after {plan.steps} steps of recovery{left}")
    return plain if left else net


# ---- errors -------------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """Ctrl-C or SIGTERM."""

    hint = ""  # what `begin` adds once there is a run to go on with


def stop(number, frame):
    for again in (signal.SIGINT, signal.SIGTERM):  # one is enough: the next would cut the farewell short
        signal.signal(again, signal.SIG_IGN)
    while frame:  # where something is still imported nothing is lost yet, and C++ code may stand in between that knows no exception
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"stopped{Stopped.hint}\n".encode())
            os._exit(128 + number)
        frame = frame.f_back
    raise Stopped(number)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for a wrong call, 1 for what failed, 130 after Ctrl-C, 143 after SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    for file in (sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")  # where letters cannot be encoded, "?" comes for them
    try:
        return app(arguments or sys.argv[1:] or ["--help"], standalone_mode=False) or 0
    except Stopped as e:
        print(f"stopped{Stopped.hint}", file=sys.stderr)
        return 128 + e.args[0]
    except Exception as e:
        message, status = explain(e)
        print(f"wtp: {message}", file=sys.stderr)
        return status


def explain(e: Exception) -> tuple[str, int]:
    """(one line, exit status) for whatever went wrong."""
    if hasattr(e, "format_message"):  # Typer's own: a wrong call
        return " ".join(e.format_message().replace("Value error, ", "").split()).rstrip(".") + "; see --help", 2
    if hasattr(e, "status"):  # models.Failure
        return str(e), e.status
    if isinstance(e, ModuleNotFoundError) and e.name in ("torch", "torchvision", "rich"):
        return f"{e.name} is missing; pip install -r requirements.txt", 1
    if isinstance(e, OSError):
        return " ".join(str(e).split()), 1
    if isinstance(e, MemoryError) or "out of memory" in str(e) or "can't allocate memory" in str(e):
        return "out of memory", 1
    raise e


if __name__ == "__main__":
    sys.exit(main())
