"""Soft pruning (SEP, IEEE TIP 2021): a squeeze-and-excitation gate per layer chooses, image by image, which kernels run.

Nothing is removed: all C filters of a layer keep their weights, and the k of them that a gate scores highest for an
image take part in that image's forward and backward pass. What the paper does not give (the gate's inner size, how it
starts) is marked `ours`.
"""
import time
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise, product
from operator import attrgetter
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

import models
from models import Net

REDUCTION, LEAST = 16, 4  # ours: the bottleneck of a gate is C_in / 16 as in SENet, at least 4
SPREAD = 1.0  # ours: a fresh gate's logits lie in [-SPREAD, SPREAD], in the order of importance
GRAIN = 8  # ours: kernels are gathered in multiples of 8, so that few distinct shapes occur


class Gate(nn.Module):
    """Chooses `keep` of `outputs` channels from the mean of each of the `inputs` channels that the layer reads."""

    def __init__(self, inputs: int, outputs: int, keep: int):
        super().__init__()
        self.keep = keep
        hidden = max(LEAST, inputs // REDUCTION)
        self.squeeze, self.excite = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)
        self.register_buffer("unit", torch.full((outputs,), 0.5))  # scales are s / unit
        self.used: torch.Tensor | None = None  # (2, C) for how many images each channel was chosen, and its scales' sum, where somebody counts

    @torch.no_grad()
    def start(self, importance: torch.Tensor) -> None:
        """Prefer channels by `importance` (C,), as hard pruning would, and leave the scales as they are: 1 for a fresh gate."""
        scale = torch.sigmoid(self.excite.bias) / self.unit
        rank = importance.argsort().argsort().float()
        self.excite.bias.copy_(SPREAD * (2 * rank / max(1, len(rank) - 1) - 1))
        self.unit.copy_(torch.sigmoid(self.excite.bias) / scale)

    @property
    def first_choice(self) -> torch.Tensor:
        """The `keep` channels (ascending indices) that the gate prefers before it sees an image."""
        return self.excite.bias.detach().topk(self.keep).indices.sort().values

    @property
    def macs(self) -> int:
        return self.squeeze.weight.numel() + self.excite.weight.numel()

    def scale(self, z: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """s * m: (B, C_in) means, of the channels `at` alone if there are such -> (B, C); 0 for an excluded channel, else its
        scale, which averages 1."""
        logits = self.excite(torch.relu(models.apply(self.squeeze, z, at)))
        mask = torch.zeros_like(logits).scatter_(1, logits.topk(self.keep, 1).indices, 1.0)
        s = torch.sigmoid(logits) / self.unit * mask
        # ours: over the mean of the chosen, so that a gate cannot turn all of its channels down together, below the excluded
        # ones, which no gradient moves: then choices flip to kernels that were never trained
        s = s * (self.keep / s.sum(1, keepdim=True))
        if self.used is not None:
            self.used += torch.stack([mask.sum(0), s.sum(0)])
        return s

    def forward(self, x, at, layer, norm, pool: bool):
        """(B, C_in', H, W) -> (B, C', H', W'), outputs: s * m * relu(norm(layer(x))), pooled where the net pools.

        x holds the channels `at` of what the layer reads, the result the channels `outputs` (indices; None: all).
        """
        with torch.autocast(x.device.type, enabled=False):  # the choice must not hang on bfloat16's three digits
            # permuted: else the gradient comes back channels-first, and to add it to the other one takes thrice the time of a layer
            kind = self.squeeze.weight.dtype
            scale = self.scale(x.permute(0, 2, 3, 1).mean((1, 2), dtype=kind) if x.dim() == 4 else x.to(kind), at)
        masks = x.is_cuda or torch.compiler.is_exporting() or len(x) == 1  # kernels gathered for one image alone seldom pay
        outputs = None if masks else gather(scale != 0)
        scale = scale if outputs is None else scale.index_select(1, outputs)
        y = models.apply(layer, x, at, outputs)
        if norm is not None:
            y = masked_norm(y, scale.detach(), norm, outputs)
        y = models.activate(y, pool)
        return y * scale.reshape(*scale.shape, *[1] * (y.dim() - 2)).to(y.dtype), outputs


class Single:
    """A prunable layer with its gate as it runs on one image on a CPU, to the same result by few and cheap operators: they take longer than
    many a layer."""

    def __init__(self, layer: models.Kernels, pool: bool, gate: Gate | None):
        self.layer, self.pool, self.gated, self.skip, self.share = layer, pool, gate is not None, False, None
        if gate is not None:
            self.keep, self.factor, self.even = gate.keep, 1 / gate.unit, torch.full_like(gate.unit[: gate.keep], 1 / gate.keep)
            self.squeeze, self.excite = ((m.bias.detach(), m.weight.detach()) for m in (gate.squeeze, gate.excite))
            self.ready(True)

    def ready(self, skip: bool) -> None:
        """From now on compute only the chosen kernels, or all of them, masked."""
        self.skip, self.read, self.last = skip, (None, self.squeeze[1]), (None,)  # and forget what the image before read and chose

    def __call__(self, x: torch.Tensor, at: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What Net.unit says of one image."""
        if not self.gated:
            return models.activate(self.layer(x, at), self.pool), None
        if at is not None and not self.skip:  # gathering inputs alone takes longer than computing them all
            x, at = x.new_zeros(1, self.squeeze[1].shape[1], *x.shape[2:]).index_copy_(1, at, x), None
        places = x.reshape(x.shape[1], -1)  # (C_in', H W)
        share, read, last = self.share, self.read, self.last  # looked up once: another thread may set them
        if share is None or len(share) != places.shape[1]:
            self.share = share = torch.full((places.shape[1],), 1 / places.shape[1], dtype=self.even.dtype)
        if read[0] is not at:
            self.read = read = at, self.squeeze[1].index_select(1, at)
        logits = torch.addmv(*self.excite, torch.addmv(self.squeeze[0], read[1], torch.mv(places, share)).relu_())
        picked = logits.topk(self.keep, sorted=False).indices
        if self.skip:
            chosen = sorted(picked.tolist())
            if chosen != last[0]:
                outputs = picked.sort().values
                self.last = last = chosen, outputs, self.factor.index_select(0, outputs)
            _, picked, factor = last  # the same tensor for the same choice: by it layers know the kernels gathered before
        else:
            factor = self.factor.index_select(0, picked)
        s = torch.sigmoid(logits.index_select(0, picked)).mul_(factor)
        s = s.div_(torch.dot(s, self.even))
        outputs, s = (picked, s) if self.skip else (None, torch.zeros_like(logits).index_copy_(0, picked, s))
        y = self.layer(x, at, outputs)
        y = (torch.max_pool2d(y, 2) if self.pool else y).relu_()
        return y.mul_(s if y.dim() == 2 else s.view(-1, 1, 1)), outputs


def gather(used: torch.Tensor) -> torch.Tensor | None:
    """The channels (ascending indices) that some image of the batch uses, filled up to whole grains; None: nearly all."""
    used = used.any(0)
    count = -(-max(1, int(used.sum())) // GRAIN) * GRAIN
    return used.float().topk(count).indices.sort().values if count <= 0.75 * len(used) else None


def masked_norm(y, scale, norm, outputs) -> torch.Tensor:
    """Batch norm whose statistics count only the images that use a channel: excluded ones take no part, forward or backward.

    y (B, C', H, W), scale (B, C'), 0 where an image excludes a channel; `outputs` are the C' channels of `norm` that y holds, None for all.
    """
    if outputs is None and not norm.training:
        return norm(y)
    pick = slice(None) if outputs is None else outputs
    gamma, beta, mean, var = (v[pick] for v in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    if not norm.training:
        return F.batch_norm(y, mean, var, gamma, beta, eps=norm.eps)
    mask = (scale != 0).float()
    images, place = mask.sum(0), y.shape[2] * y.shape[3]
    new = mean.clone(), var.clone()
    if not y.is_cuda and bool(((images == 0) | (images == len(y))).all()):  # all images choose alike: an ordinary batch norm
        out = F.batch_norm(y, *new, gamma, beta, True, norm.momentum, norm.eps)
    else:
        n = (images * place).clamp_min(1)
        batch_mean = (mask * y.mean((2, 3), dtype=torch.float)).sum(0) * place / n
        square = torch.linalg.vector_norm(y, dim=(2, 3), dtype=torch.float).square()  # (B, C')
        batch_var = ((mask * square).sum(0) / n - batch_mean.square()).clamp_min(0)
        with torch.no_grad():
            new = mean.lerp(batch_mean, norm.momentum), var.lerp(batch_var * n / (n - 1).clamp_min(1), norm.momentum)
        factor = gamma * (batch_var + norm.eps).rsqrt()
        shift = beta - batch_mean * factor
        out = torch.addcmul(shift[:, None, None], y, factor[:, None, None]).to(y.dtype)
    with torch.no_grad():
        norm.running_mean[pick], norm.running_var[pick] = (torch.where(images * place > 1, a, b) for a, b in zip(new, (mean, var)))
        norm.num_batches_tracked += 1
    return out


def same(y):
    return y


def alone(net: Net) -> Net:
    """A net without batch norms as it runs on single images: of the same weights, with layers that are no modules."""
    net = deepcopy(net, {id(v): v for v in (*net.parameters(), *net.buffers())})
    gates, net.gates = net.gates or [None] * len(net.prunable), None
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.Identity):
            holder, _, own = name.rpartition(".")
            delattr(net.get_submodule(holder), own)
            setattr(net.get_submodule(holder), own, same if isinstance(layer, nn.Identity) else models.Kernels(layer))
    net.quick = [Single(attrgetter(p.layer)(net), p.pool, g) for p, g in zip(net.prunable, gates)]
    return net


class Tuned:
    """A net for inference alone on a CPU, as `tune` makes it: images (B, C, H, W), normalised -> logits (B, classes). No module: it has no
    other device, precision or weights."""

    def __init__(self, net: Net):
        self.many = models.folded(net).to(memory_format=torch.channels_last).requires_grad_(False)  # reads batches
        self.one = alone(self.many)  # reads single images
        self.gated = [(s, p) for s, p in zip(self.one.quick, self.one.prunable) if s.gated]

    @property
    def skips(self) -> list[bool]:
        """Of each gate whether it skips the kernels that it excludes; else it masks them."""
        return [single.skip for single, _ in self.gated]

    def switch(self, skips) -> None:
        """Let gates skip or mask."""
        own = {p.layer for _, p in self.gated}
        for (single, p), skip in zip(self.gated, skips, strict=True):
            for m in (single, *(attrgetter(name)(self.one) for name in {p.layer, *({p.next} - own)})):
                m.ready(skip)

    def eval(self):
        return self

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return (self.one if len(x) == 1 else self.many)(x)


@torch.no_grad()
def tune(net: Net, x: torch.Tensor, rounds: int = 5) -> Tuned:
    """A copy of `net`, batch norms folded, that is quick at one image at a time on this CPU: a gate skips the kernels that it excludes
    where that is measured to be faster than masking them. x (N, C, H, W), N > 0, are such images. Raises Failure where they are not.

    What a layer takes hangs on its own gate and the one before (are its inputs gathered, too?): all four are measured, and the
    quickest of all combinations is found along the chain.
    """
    if not isinstance(net, Net):
        raise models.Failure(f"tune needs a net of this tool, not a {type(net).__name__}")
    kind = next(net.parameters()).dtype
    if not (isinstance(x, torch.Tensor) and x.dim() == 4 and len(x) and x.shape[1] == net.channels and (x.dtype, x.device.type) == (kind, "cpu")):
        raise models.Failure(f"tune needs images (N, {net.channels}, H, W), at least one, of {kind} on the CPU")
    fast = Tuned(net)
    if not fast.gated:
        return fast
    one, singles, count = fast.one, fast.one.quick, len(fast.gated)
    times, begins = [{} for _ in fast.gated], []  # (does the gate before skip, does this one): seconds until the next one begins
    timed = lambda single: lambda x, at: begins.append(time.perf_counter()) or single(x, at)
    one.quick = [timed(s) if s.gated else s for s in singles]
    for pair in list(product((True, False), repeat=2)) * 3:
        fast.switch([pair[i % 2] for i in range(count)])
        for n in range(rounds + 2):
            begins.clear()
            fast(x[n % len(x)][None])
            begins.append(time.perf_counter())
            for i, took in enumerate(b - a for a, b in pairwise(begins)):
                if n > 1:
                    times[i].setdefault((pair[(i - 1) % 2], pair[i % 2]), []).append(took)
    best = {True: (0.0, []), False: (0.0, [])}  # by what the last gate does: seconds so far, what each gate does
    for took in times:
        best = {skip: min((sum_ + median(took[before, skip]), [*skips, skip]) for before, (sum_, skips) in best.items()) for skip in best}
    fast.switch(min(best.values())[1])
    one.quick = singles
    return fast


def attach(net: Net, keeps) -> None:
    """Put gates on `net`, in place: one that keeps k channels for every k in `keeps`, none where k is None."""
    net.gates = net.gates if net.gates is not None else nn.ModuleList([None] * len(net.widths))
    for i, (p, width, k) in enumerate(zip(net.prunable, net.widths, keeps, strict=True)):
        if k is None or net.gates[i] is not None:
            continue
        if type(k) is not int or not 1 <= k <= width:
            raise models.Failure(f"a gate of {p.layer} keeps {k} of {width} channels")
        net.gates[i] = Gate(reads(net, i), width, k).to(next(net.parameters()).device)


def reads(net: Net, i: int) -> int:
    """The number of input channels of prunable layer i (a linear layer reads several numbers of each)."""
    name = net.prunable[i].layer
    before = [w for p, w in zip(net.prunable, net.widths) if p.next == name]
    return before[0] if before else net.get_submodule(name).weight.shape[1]


def soften(net: Net, structure) -> Net:
    """Soft pruning (TIP 2021): a new net of the same weights whose gates keep as many channels as `structure` says.

    A layer gets its gate when it is first pruned; the gate begins with hard pruning's choice, and the filters that read
    the layer are compensated like those of a hard-pruned net.
    """
    net = deepcopy(net)
    had = preferred(net)
    importance = models.importance(net, had)
    attach(net, [k if k < w else None for k, w in zip(structure, net.widths)])
    for gate, k, score, at_work in zip(net.gates, structure, importance, had):
        if gate is not None and k < len(at_work):
            score[at_work] += score.max() + 1  # who was excluded stays behind
            gate.start(score)
            gate.keep = k
    models.compensate(net, preferred(net), had)
    return net


def preferred(net: Net) -> list[torch.Tensor]:
    """Per prunable layer the channels (ascending indices) at work before an image is seen."""
    return [torch.arange(w) if g is None else g.first_choice for g, w in zip(net.gates or [None] * len(net.widths), net.widths)]


@contextmanager
def counting(net: Net):
    """While it lasts, per prunable layer (2, C): for how many images each channel was chosen, and the sum of its scales; None without a gate."""
    gates = [g for g in net.gates or () if g is not None]
    for gate in gates:
        gate.used = torch.zeros(2, len(gate.unit), device=gate.unit.device)
    try:
        yield [g.used if g is not None else None for g in net.gates or [None] * len(net.widths)]
    finally:
        for gate in gates:
            gate.used = None


@torch.no_grad()
def count(net: Net, batches) -> list[torch.Tensor | None]:
    """What `counting` says of the images in `batches`, each (B, C, H, W), normalised."""
    net.eval()
    with counting(net) as found:
        for x in batches:
            net(x)
    return found


@torch.no_grad()
def harden(net: Net, batches) -> Net:
    """ours: a gated net as a plain small one. The kernels that are chosen most often on `batches` stay, each with its mean scale."""
    counts, kept, net = count(net, batches), [], deepcopy(net)
    for p, width, k, gate, used in zip(net.prunable, net.widths, net.structure, net.gates, counts):
        if gate is None:
            kept.append(torch.arange(width))
            continue
        chosen, scales = used
        stay = (chosen + torch.sigmoid(gate.excite.bias)).topk(k).indices.sort().values.cpu()  # a tie goes to whom the gate prefers
        weight = net.get_submodule(p.next).weight
        factor = (scales / chosen.clamp_min(1)).repeat_interleave(weight.shape[1] // width)
        weight.mul_(factor.reshape(-1, *[1] * (weight.dim() - 2)))
        kept.append(stay)
    return models.remove(net, kept)


def macs(net: Net, structure=None) -> int:
    """models.macs with the gates counted: those that `net` has or, for a `structure`, a gate for every layer below its width.

    Excluded kernels cost nothing, nor do the next layer's kernels on excluded channels.
    """
    if structure is None:
        return models.macs(net) + sum(g.macs for g in net.gates or () if g is not None)
    gates = 0
    for i, (k, w) in enumerate(zip(structure, net.widths)):
        if k < w:
            inputs = reads(net, i)
            gates += max(LEAST, inputs // REDUCTION) * (inputs + w)
    return models.macs(net, structure) + gates


def load(path) -> tuple[Net, dict]:
    """The net in a checkpoint, gates and all, and the facts saved with it. Raises Failure."""
    checkpoint = models.read(path)
    return models.restore(checkpoint, path, attach), checkpoint["facts"]
