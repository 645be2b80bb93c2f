"""Soft pruning (SEP, IEEE TIP 2021): gates that choose kernels, image by image. In this order:

the gate              a choice among groups of kernels; batch norm of the chosen ones
gated nets            where gates have room, putting them on, what they choose and cost, `to_static`
loading               any checkpoint as a net, plain or gated
fast single images    `tune`: a copy of a net that is quick at one image at a time on a CPU

A gated layer has kernels that are always on, and behind them groups of kernels, all groups of one
size. Its gate reads what the layer reads, and chooses one group for each image. The always-on
kernels and that group are k kernels, as many as the structure says. Only these take part in the
forward and backward pass of that image. What the paper does not give is marked `ours`.
"""

from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn

import models
from models import Net, PrunableLayer, UserError

# ours: a layer gets at most so many groups. More learn from too few images each (RESULTS.md).
MAX_GROUPS = 8
# ours: a gate must have a choice to make: a layer has none if more of its kernels are always on.
MAX_ALWAYS_ON_SHARE = 0.75
# ours: of the clustering that gates begin with.
CLUSTERING_TRIALS = 4
CLUSTERING_STEPS = 25


# ---- the gate ----------------------------------------------------------------------------------


def squeeze(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """What a gate reads of the input x of its layer: the mean of each channel, (B, C_in), or all
    inputs of a linear layer, (B, features)."""
    if isinstance(layer, nn.Linear):
        return x.flatten(1)
    return x.mean((2, 3), dtype=torch.float if x.dtype == torch.bfloat16 else None)


class SEGate(nn.Module):
    """Chooses one of the `groups` of a layer's kernels for each image (TIP 2021).

    The paper scores every kernel. ours: a gate scores groups. Groups begin as copies of the kernels
    that hard pruning keeps, so no choice can do harm at first, and they part in the training. Gates
    that score single kernels lose accuracy, or end at one choice for all images (RESULTS.md).
    """

    def __init__(self, inputs: int, k: int, always_on: int, groups: int):
        """`inputs` is the number of values that `squeeze` gives."""
        super().__init__()
        self.k = k
        self.always_on = always_on
        self.groups = groups
        # ours: a choice passes no gradient on, so the scores stay as `fit_scores` finds them.
        self.excite = nn.Linear(inputs, groups).requires_grad_(False)
        masks = torch.stack([self.mask_of_group(group) for group in range(groups)])
        self.register_buffer("masks", masks, persistent=False)  # (groups, C)
        self.usage: Usage | None = None  # while `record_usage` lasts

    @property
    def group_size(self) -> int:
        return self.k - self.always_on

    @property
    def width(self) -> int:
        """All kernels of the layer."""
        return self.always_on + self.groups * self.group_size

    @property
    def always_on_share(self) -> float:
        """Of the kernels that work for an image, in [0, 1)."""
        return self.always_on / self.k

    def channels_of_group(self, group: int) -> torch.Tensor:
        """The k channels (ascending indices) at work for an image that gets this group."""
        start = self.always_on + group * self.group_size
        return torch.cat(
            [torch.arange(self.always_on), torch.arange(start, start + self.group_size)]
        )

    def mask_of_group(self, group: int) -> torch.Tensor:
        return torch.zeros(self.width).index_fill(0, self.channels_of_group(group), 1.0)

    @torch.no_grad()
    def fit_scores(self, squeezed: torch.Tensor) -> None:
        """ours: give each group a cluster of images. squeezed (N, inputs), of N images.

        The score of a group falls with the distance of an image from the centre of its cluster,
        where every input counts in its own standard deviations.
        """
        squeezed = squeezed.double()
        mean, deviation = squeezed.mean(0), squeezed.std(0)
        # An input that never changes says nothing.
        deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.inf)
        centres = find_clusters((squeezed - mean) / deviation, self.groups)
        # |z - c|^2 is smallest where 2 c z - |c|^2 is largest.
        weight = 2 * centres / deviation
        self.excite.weight.copy_(weight)
        self.excite.bias.copy_(-centres.square().sum(1) - weight @ mean)

    def choose_groups(self, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """The group (B,) of each image; x is what the layer reads."""
        # The choice must not depend on bfloat16's three digits.
        with torch.autocast(x.device.type, enabled=False):
            squeezed = squeeze(x, layer).to(self.excite.weight.dtype)
            return self.excite(squeezed).argmax(1)

    def forward(self, x, layer: nn.Module, norm, prunable: PrunableLayer) -> torch.Tensor:
        """activation(norm(layer(x))), pooled where the net pools: (B, C, H, W), where the kernels
        that are not chosen for an image give 0. x (B, C_in, H, W)."""
        mask = self.masks.index_select(0, self.choose_groups(x, layer))  # (B, C)
        if self.usage is not None:
            self.usage.add(mask)
        y = models.run_layer(layer, x)
        if norm is not None:
            y = masked_batch_norm(y, mask, norm)
        y = models.pool_and_activate(y, prunable)
        places = [1] * (y.dim() - 2)
        return y * mask.reshape(*mask.shape, *places).to(y.dtype)


@torch.no_grad()
def find_clusters(points: torch.Tensor, count: int) -> torch.Tensor:
    """The centres (count, D) of clusters of points (N, D), by k-means (Lloyd 1982).

    It begins from some of the points, a few times over; the trial whose points are nearest to
    their centres counts. The same points give the same centres.
    """
    generator = torch.Generator().manual_seed(0)
    best_distance, best_centres = torch.inf, None
    for _ in range(CLUSTERING_TRIALS):
        order = torch.randperm(len(points), generator=generator)
        first = order[torch.arange(count) % len(points)]
        centres = points[first.to(points.device)]
        for _ in range(CLUSTERING_STEPS):
            nearest = torch.cdist(points, centres).argmin(1)
            members = torch.nn.functional.one_hot(nearest, len(centres)).to(
                points.dtype
            )  # (N, count)
            sizes = members.sum(0)
            means = members.T @ points / sizes.clamp_min(1)[:, None]
            centres = torch.where(sizes[:, None] > 0, means, centres)
        distance = torch.cdist(points, centres).min(1).values.square().mean()
        if distance < best_distance:
            best_distance, best_centres = distance, centres
    return best_centres


class Usage:
    """What a gate chose for the images that it saw."""

    def __init__(self, channels: int, device):
        self.images = 0
        self.selections = torch.zeros(channels, device=device)  # images that chose each channel
        self.choices = set()  # the sum of its channels' random numbers stands for each
        numbers = torch.randint(-(2**62), 2**62, (channels,), generator=torch.Generator())
        self.numbers = numbers.to(device)

    def add(self, mask: torch.Tensor) -> None:
        """The choices for a batch: mask (B, C) of 0 and 1."""
        self.images += len(mask)
        self.selections += mask.sum(0)
        self.choices.update((mask.long() * self.numbers).sum(1).tolist())

    def count_kernels(self) -> tuple[int, int, int]:
        """How many kernels serve no image, some of them, and all."""
        never = int((self.selections == 0).sum())
        always = int((self.selections == self.images).sum())
        return never, len(self.selections) - never - always, always


def masked_batch_norm(y, mask, norm) -> torch.Tensor:
    """Batch norm whose statistics count only the images that use a channel.

    y (B, C, H, W) or (B, C); mask (B, C), 0 where an image excludes a channel. Excluded channels
    take no part, forward or backward.
    """
    if not norm.training:
        return norm(y)
    if y.dim() == 2:
        return masked_batch_norm(y[..., None, None], mask, norm)[..., 0, 0]
    images = mask.sum(0)  # (C,) that use a channel
    places = y.shape[2] * y.shape[3]
    count = (images * places).clamp_min(1)
    mean, var = masked_statistics(y, mask, places, count)
    with torch.no_grad():
        has_variance = images * places > 1
        unbiased_var = var * count / (count - 1).clamp_min(1)
        new_mean = norm.running_mean.lerp(mean, norm.momentum)
        new_var = norm.running_var.lerp(unbiased_var, norm.momentum)
        norm.running_mean.copy_(torch.where(has_variance, new_mean, norm.running_mean))
        norm.running_var.copy_(torch.where(has_variance, new_var, norm.running_var))
        norm.num_batches_tracked += 1
    factor = norm.weight * (var + norm.eps).rsqrt()
    shift = norm.bias - mean * factor
    return torch.addcmul(shift[:, None, None], y, factor[:, None, None]).to(y.dtype)


def masked_statistics(y, mask, places: int, count):
    """(mean, biased variance), each (C,), of y (B, C, H, W) over the images with mask (B, C) 1.

    `count` (C,) is how many numbers that are: images times places.
    """
    mean = (mask * y.mean((2, 3), dtype=torch.float)).sum(0) * places / count
    squares = torch.linalg.vector_norm(y, dim=(2, 3), dtype=torch.float).square()  # (B, C)
    var = ((mask * squares).sum(0) / count - mean.square()).clamp_min(0)
    return mean, var


# ---- gated nets --------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateSize:
    """How many kernels a gated layer has always on, and how many groups besides."""

    always_on: int
    groups: int


def largest_gate(width: int, k: int) -> GateSize | None:
    """The gate with the most to choose from, in a layer that keeps k of `width` kernels.

    No layer gets more kernels than it had before pruning. None where there is too little room.
    """
    groups = min(MAX_GROUPS, width // k)
    if groups >= 2:
        return GateSize(0, groups)
    always_on = 2 * k - width
    if always_on > MAX_ALWAYS_ON_SHARE * k:
        return None
    return GateSize(always_on, 2)


def largest_gates(widths, structure) -> list[GateSize | None]:
    """`largest_gate` of each prunable layer: `widths` before pruning, `structure` after it."""
    return [largest_gate(width, k) for width, k in zip(widths, structure)]


def gates_of(net: Net) -> list[SEGate | None]:
    """The gate of each prunable layer, None where there is none."""
    return list(net.gates) if net.gates is not None else [None] * len(net.widths)


def attach_gates(net: Net, gate_sizes) -> None:
    """Put fresh gates on `net`, in place: a GateSize for each prunable layer, None for no gate.

    The layers have the kernels of all groups already.
    """
    device = next(net.parameters()).device
    gates = []
    for prunable, width, size in zip(net.prunable, net.widths, gate_sizes, strict=True):
        if size is None:
            gates.append(None)
            continue
        inputs = net.get_submodule(prunable.layer_name).weight.shape[1]
        k = size.always_on + (width - size.always_on) // size.groups
        gates.append(SEGate(inputs, k, size.always_on, size.groups).to(device))
    net.gates = nn.ModuleList(gates)


@torch.no_grad()
def add_gates(net: Net, gate_sizes, batches) -> Net:
    """Soft pruning (TIP 2021): a new net that computes what the plain `net` does, with gates.

    All groups of a layer begin as copies of the kernels that are not always on. `gate_sizes` holds
    a GateSize, or None, for each prunable layer. The gates divide the images in `batches`, each
    (B, C, H, W), normalised, among their groups.
    """
    squeezed = collect_squeezed(net, gate_sizes, batches)
    kept_channels = [
        torch.arange(width) if size is None else repeat_groups(importance, size)
        for width, importance, size in zip(net.widths, models.channel_importance(net), gate_sizes)
    ]
    gated = models.remove_channels(net, kept_channels).to(memory_format=torch.channels_last)
    attach_gates(gated, gate_sizes)
    for prunable, gate in zip(net.prunable, gates_of(gated)):
        if gate is None:
            continue
        # Of the copies that a gate reads, the chosen ones alone are not 0.
        values = squeezed[prunable.layer_name]
        gate_of_plain = SEGate(values.shape[1], gate.k, gate.always_on, gate.groups)
        gate_of_plain.to(values.device).fit_scores(values)
        weight = gate_of_plain.excite.weight
        for i, before in enumerate(net.prunable):
            if before.next_layer_name == prunable.layer_name:
                by_channel = models.group_by_input_channel(weight, net.widths[i])
                weight = by_channel[:, kept_channels[i]].flatten(1)
        gate.excite.weight.copy_(weight)
        gate.excite.bias.copy_(gate_of_plain.excite.bias)
    return gated


def prune_softly(net: Net, structure, batches) -> Net:
    """A new net of that structure with all gates that have room: models.prune_channels, then
    `add_gates`."""
    gate_sizes = largest_gates(net.widths, structure)
    return add_gates(models.prune_channels(net, structure), gate_sizes, batches)


def repeat_groups(importance: torch.Tensor, size: GateSize) -> torch.Tensor:
    """The kernels of a plain layer as a gated one has them: first those that are always on, the
    most important ones, then the others, once for each group. `importance` (C,)."""
    by_importance = importance.argsort(descending=True, stable=True)
    always_on, others = by_importance[: size.always_on], by_importance[size.always_on :]
    return torch.cat([always_on, others.repeat(size.groups)])


def collect_squeezed(net: Net, gate_sizes, batches) -> dict[str, torch.Tensor]:
    """What gates on the plain `net` would read, (N, inputs) by the names of their layers."""
    collected = {
        prunable.layer_name: []
        for prunable, size in zip(net.prunable, gate_sizes)
        if size is not None
    }

    def collect_input_of(name):
        def collect(layer, inputs):
            collected[name].append(squeeze(inputs[0], layer).float())

        return collect

    net.eval()
    hooks = [
        net.get_submodule(name).register_forward_pre_hook(collect_input_of(name))
        for name in collected
    ]
    try:
        for x in batches:
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in collected.items()}


@contextmanager
def record_usage(net: Net):
    """Within it, per prunable layer the Usage of its gate, None where there is none."""
    gates = gates_of(net)
    for gate in filter(None, gates):
        gate.usage = Usage(gate.width, gate.excite.weight.device)
    try:
        yield [None if gate is None else gate.usage for gate in gates]
    finally:
        for gate in filter(None, gates):
            gate.usage = None


@torch.no_grad()
def measure_usage(net: Net, batches) -> list[Usage | None]:
    """What `record_usage` says after the images in `batches`, each (B, C, H, W), normalised."""
    net.eval()
    with record_usage(net) as usage:
        for x in batches:
            net(x)
    return usage


@torch.no_grad()
def to_static(net: Net, batches) -> Net:
    """ours: a gated net as a plain small one: of each gated layer the always-on kernels stay, and
    the group that is chosen most often on `batches`, each (B, C, H, W)."""
    usage = measure_usage(net, batches)
    kept_channels = []
    for width, gate, layer_usage in zip(net.widths, gates_of(net), usage):
        if gate is None:
            kept_channels.append(torch.arange(width))
            continue
        images_of_group = (gate.masks * layer_usage.selections).sum(1)
        kept_channels.append(gate.channels_of_group(int(images_of_group.argmax())))
    return models.remove_channels(net, kept_channels)


def count_macs(net: Net, structure=None) -> int:
    """The MACs of a net for one image, those of its gates included.

    For a `structure` those of the plain `net` pruned to it, with all gates that have room. Kernels
    that are not chosen cost nothing, nor do the next layer's kernels, or a gate's weights, on their
    channels.
    """
    gates = gates_of(net) if structure is None else largest_gates(net.widths, structure)
    structure = structure or net.structure
    macs = models.count_macs(net, structure)
    for i, gate in enumerate(gates):
        if gate is not None:
            macs += count_gate_macs(net, structure, i, gate.groups)
    return macs


def count_gate_macs(net: Net, structure, index: int, groups: int) -> int:
    """The MACs of a gate of `groups` groups on a prunable layer of `net`, at that structure."""
    name = net.prunable[index].layer_name
    inputs = net.get_submodule(name).weight.shape[1]
    for before, width, k in zip(net.prunable, net.widths, structure):
        if before.next_layer_name == name:
            inputs = inputs * k // width
    return inputs * groups


# ---- loading -----------------------------------------------------------------------------------


def load(path) -> tuple[Net, dict]:
    """(net, facts) of a checkpoint or of anybody's state dict, gates included; on the CPU.

    Raises UserError, naming the file.
    """
    net, checkpoint = load_checkpoint(path)
    return net, checkpoint["facts"]


def load_checkpoint(path) -> tuple[Net, dict]:
    """(net, what models.read_checkpoint says). Raises UserError, naming the file.

    Of a stranger's state dict the net is the likeliest of all `readings`.
    """
    checkpoint = models.read_checkpoint(path)
    try:
        net = models.build_from_checkpoint(checkpoint)
        if checkpoint["gates"] is not None:
            attach_gates(net, read_gate_sizes(net, checkpoint["gates"]))
        models.load_weights(net, checkpoint["state"])
    except UserError as error:
        raise UserError(f"{path}: {error}", error.status) from error
    except Exception as error:  # sizes beyond reason, tensors of odd kinds
        name = checkpoint["architecture"].get("name")
        raise UserError(
            f"{path}: its weights do not fit a {name} of the widths it names"
        ) from error
    return net, checkpoint


def read_gate_sizes(net: Net, gates: list) -> list[GateSize | None]:
    """The GateSize of each prunable layer from what a checkpoint says of its gates: None, or how
    many kernels `k` work for an image, and which share of these is always on.

    Raises UserError where that cannot be.
    """
    if len(gates) != len(net.widths):
        raise UserError(
            f"its gates are {len(gates)}, but a {net.arch} has {len(net.widths)} prunable layers"
        )
    sizes = []
    for prunable, width, gate in zip(net.prunable, net.widths, gates):
        if gate is None:
            sizes.append(None)
            continue
        name = prunable.layer_name
        if not isinstance(gate, dict) or gate.keys() != {"k", "always_on_share"}:
            raise UserError(f"the gate of {name} does not say its k and its always_on_share")
        k, share = gate["k"], gate["always_on_share"]
        if type(k) is not int or not 1 <= k <= width:
            raise UserError(f"the gate of {name} keeps {k} of {width} kernels")
        if type(share) not in (int, float) or not 0 <= share <= 1:
            raise UserError(f"the gate of {name} has an always-on share of {share}, not in [0, 1]")
        always_on = round(share * k)
        groups, rest = divmod(width - always_on, k - always_on) if always_on < k else (0, width)
        if rest or groups < 2:
            raise UserError(
                f"the gate of {name} does not fit {width} kernels: {k} of them for an image, "
                f"{always_on} always on, leave no groups of one size"
            )
        sizes.append(GateSize(always_on, groups))
    return sizes


# ---- fast single images ------------------------------------------------------------------------
#
# One image at a time, starting an operator takes as long as many a layer's arithmetic. So here
# layers are no modules (a module's call costs as much as a small operator). Kernels are gathered
# once for each pair of groups, of the layer before and of their own, and kept.


@dataclass(frozen=True, eq=False)
class Choice:
    """The group that a gate chose for an image, and its channels (ascending indices)."""

    group: int
    channels: torch.Tensor


class GatheringLayer:
    """A convolution or linear layer for inference on one image, between the channels at work."""

    def __init__(self, layer: nn.Conv2d | nn.Linear):
        self.weight = layer.weight.detach()
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.is_linear = isinstance(layer, nn.Linear)
        if not self.is_linear:
            self.stride, self.padding = layer.stride, layer.padding
        # (weight, bias) by the groups (of the layer before, its own), None where there is no gate.
        self.gathered = {}

    def __call__(self, x, input_choice: Choice | None = None, choice: Choice | None = None):
        """(1, C_in', H, W) -> (1, C', H', W'); of a linear layer (1, C_in', ...) -> (1, C')."""
        groups = (input_choice and input_choice.group, choice and choice.group)
        if groups not in self.gathered:
            self.gathered[groups] = self.gather(x, input_choice, choice)
        weight, bias = self.gathered[groups]
        if self.is_linear:
            return torch.addmv(bias, weight, x.flatten())[None]
        return torch.conv2d(x, weight, bias, self.stride, self.padding)

    def gather(self, x, input_choice, choice):
        """(weight, bias) between the chosen channels, in the layout in which they run fastest."""
        weight, bias = self.weight, self.bias
        if choice is not None:
            weight = weight.index_select(0, choice.channels)
            bias = None if bias is None else bias.index_select(0, choice.channels)
        if input_choice is not None:
            features = x.numel() if self.is_linear else x.shape[1]
            channels = weight.shape[1] * len(input_choice.channels) // features
            weight = models.group_by_input_channel(weight, channels)[:, input_choice.channels]
            weight = weight.reshape(len(weight), -1, *self.weight.shape[2:])
        if not self.is_linear:
            weight = weight.contiguous(memory_format=torch.channels_last)
        return weight, bias


class PlainRunner:
    """A prunable layer without a gate, on one image."""

    def __init__(self, layer: GatheringLayer, prunable: PrunableLayer):
        self.layer = layer
        self.prunable = prunable

    def __call__(self, x, input_choice: Choice | None):
        """As Net.run_prunable, for a batch of one."""
        return models.pool_and_activate(self.layer(x, input_choice), self.prunable), None


class GatedRunner:
    """A prunable layer with its gate, on one image: it runs the chosen kernels alone."""

    def __init__(self, layer: GatheringLayer, prunable: PrunableLayer, gate: SEGate):
        self.layer = layer
        self.prunable = prunable
        self.choices = [
            Choice(group, gate.channels_of_group(group)) for group in range(gate.groups)
        ]
        self.bias = gate.excite.bias.detach()
        self.weight = gate.excite.weight.detach()
        self.gathered = {None: self.weight}  # by the group of the layer before

    def __call__(self, x, input_choice: Choice | None):
        """As Net.run_prunable, for a batch of one."""
        squeezed = x.flatten() if self.layer.is_linear else x.mean((2, 3))[0]
        weight = self.weight_between(len(squeezed), input_choice)
        choice = self.choices[int(torch.addmv(self.bias, weight, squeezed).argmax())]
        y = self.layer(x, input_choice, choice)
        return models.pool_and_activate(y, self.prunable, inplace=True), choice

    def weight_between(self, features: int, input_choice: Choice | None) -> torch.Tensor:
        """The gate's weight (groups, features) on the channels that the layer before chose."""
        group = input_choice and input_choice.group
        if group not in self.gathered:
            channels = self.weight.shape[1] * len(input_choice.channels) // features
            by_channel = models.group_by_input_channel(self.weight, channels)
            self.gathered[group] = by_channel[:, input_choice.channels].flatten(1)
        return self.gathered[group]


def return_unchanged(x):
    return x


def make_single_image_net(net: Net) -> Net:
    """A net without batch norms as it runs on single images: the same weights, no modules."""
    shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    net = deepcopy(net, shared)
    gates = gates_of(net)
    net.gates = None
    for name, module in list(net.named_modules()):
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.Identity):
            continue
        is_identity = isinstance(module, nn.Identity)
        parent_name, _, own_name = name.rpartition(".")
        parent = net.get_submodule(parent_name)
        delattr(parent, own_name)
        setattr(parent, own_name, return_unchanged if is_identity else GatheringLayer(module))
    net.layer_runners = [
        make_runner(attrgetter(prunable.layer_name)(net), prunable, gate)
        for prunable, gate in zip(net.prunable, gates)
    ]
    return net


def make_runner(layer: GatheringLayer, prunable: PrunableLayer, gate: SEGate | None):
    if gate is None:
        return PlainRunner(layer, prunable)
    return GatedRunner(layer, prunable, gate)


class TunedNet:
    """A net for inference alone on a CPU, as `tune` makes it: normalised images (B, C, H, W) ->
    logits (B, classes). It is no module: it has no other device, precision or weights."""

    def __init__(self, net: Net):
        folded = models.fold_batch_norms(net).to(memory_format=torch.channels_last)
        self.batch_net = folded.requires_grad_(False)
        self.single_net = make_single_image_net(self.batch_net)

    def eval(self):
        """As nn.Module.eval; a tuned net is always ready for inference."""
        return self

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return (self.single_net if len(x) == 1 else self.batch_net)(x)


@torch.no_grad()
def tune(net: Net) -> TunedNet:
    """A copy of `net` that is quick at one image at a time on this CPU: it runs the kernels that
    its gates choose alone. Raises UserError where `net` is none of this tool, or on a GPU."""
    if not isinstance(net, Net):
        raise UserError(f"tune needs a net of this tool, not a {type(net).__name__}")
    if next(net.parameters()).device.type != "cpu":
        raise UserError("tune needs a net on the CPU: net.cpu()")
    return TunedNet(net)
