"""Soft pruning (SEP, IEEE TIP 2021): gates that choose kernels, image by image. In this order:

the gate              a choice among groups of kernels; its clusters; batch norm of chosen kernels
gated nets            where gates have room, putting them on, what they choose, what they cost;
                      made plain again (`to_static`)
loading               any checkpoint as a net, plain or gated
fast single images    `tune`: a copy of a net that is quick at one image at a time on a CPU

A gated layer may have kernels that are always on. The others stand after them in groups of one size
(these are not the groups of a grouped convolution):

    always on | group 0 | group 1 | ...

The gate of the layer reads what the layer reads, and chooses one group for each image. The
always-on kernels and that group are k kernels. k is the layer's number in net.structure; its number
in net.widths counts all kernels. In a batch all kernels are computed, and those not chosen for an
image are set to 0. Of a single image `tune` computes the chosen ones only. What the paper does not
give is marked `ours`.
"""

from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import torch
from torch import nn
from torch.nn import functional as F

import models
from models import Net, PrunableLayer, UserError

# ours: the most groups of a layer. Each group learns from the images that choose it alone: with
# more groups these would be too few.
MAX_GROUPS = 8
# ours: a layer gets no gate where more than this share of its k kernels would be always on: the
# gate would have little to choose.
MAX_ALWAYS_ON_SHARE = 0.75
# ours: the clusters that k-means finds depend on its start, so it starts a few times, and the best
# ones are kept. After some twenty iterations they move little.
CLUSTERING_RESTARTS = 4
CLUSTERING_ITERATIONS = 25
# ours: k-means reads no more numbers (images times inputs) than this, for with thousands of inputs
# it would take long; but never fewer images than MIN_CLUSTERED_IMAGES.
MAX_CLUSTERED_NUMBERS = 5_000_000
MIN_CLUSTERED_IMAGES = 500


# ---- the gate ----------------------------------------------------------------------------------


def squeeze(x: torch.Tensor, *, is_linear: bool) -> torch.Tensor:
    """What a gate reads of its layer's input x: of a convolution the mean of each channel,
    (B, C_in, H, W) -> (B, C_in); of a linear layer every input, -> (B, features)."""
    if is_linear:
        return x.flatten(1)
    return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float))


@dataclass(frozen=True)
class GateSize:
    """The numbers of kernels of a gated layer."""

    always_on_count: int
    group_size: int
    group_count: int

    @property
    def k(self) -> int:
        """The kernels that work for an image: those that are always on, and one group."""
        return self.always_on_count + self.group_size

    @property
    def width(self) -> int:
        """All kernels of the layer."""
        return self.always_on_count + self.group_count * self.group_size

    @property
    def always_on_share(self) -> float:
        """The share of the k kernels that are always on, in [0, 1)."""
        return self.always_on_count / self.k


class SEGate(nn.Module):
    """Runs a layer by its always-on kernels and one of its groups of kernels, chosen for each image
    (TIP 2021).

    The paper scores every kernel, and multiplies with the scores. ours: a gate scores groups, and
    multiplies with nothing. Groups begin as copies of the kernels that hard pruning keeps, so at
    first all choices compute the same, and they part in the training. Gates that score single
    kernels ended below hard pruning in one run (RESULTS.md, section 6).

    The layer and its norm are not part of the gate: so their weights keep their names.
    """

    def __init__(self, input_count: int, size: GateSize):
        """`input_count`: how many numbers `squeeze` gives."""
        super().__init__()
        self.size = size
        # Random until `add_gates` or a checkpoint fills them. ours: they are never trained, for
        # argmax has no gradient.
        self.excite = nn.Linear(input_count, size.group_count).requires_grad_(False)
        masks = torch.stack([self.mask_of_group(group) for group in range(size.group_count)])
        # (groups, C). Not in checkpoints, for they follow from `size`.
        self.register_buffer("masks", masks, persistent=False)
        self.usage: Usage | None = None  # set within `record_usage` alone

    @property
    def k(self) -> int:
        """The kernels that work for an image."""
        return self.size.k

    def describe(self) -> dict:
        """What a checkpoint says of it; `read_gate_size` reads that."""
        return {"k": self.size.k, "always_on_share": self.size.always_on_share}

    def channels_of_group(self, group: int) -> torch.Tensor:
        """The k channels (ascending indices) at work for an image that gets this group."""
        start = self.size.always_on_count + group * self.size.group_size
        always_on = torch.arange(self.size.always_on_count)
        return torch.cat([always_on, torch.arange(start, start + self.size.group_size)])

    def mask_of_group(self, group: int) -> torch.Tensor:
        """(C,): 1 for the channels of a group, else 0."""
        return torch.zeros(self.size.width).index_fill(0, self.channels_of_group(group), 1.0)

    def choose_groups(self, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """The group (B,) of each image; x is what the layer reads."""
        # Not in autocast's bfloat16: it has three digits, and rounding would change many choices.
        with torch.autocast(x.device.type, enabled=False):
            squeezed = squeeze(x, is_linear=isinstance(layer, nn.Linear))
            return self.excite(squeezed.to(self.excite.weight.dtype)).argmax(1)

    def forward(self, x, layer: nn.Module, norm, prunable: PrunableLayer) -> torch.Tensor:
        """activation(norm(layer(x))), pooled where the net pools, and 0 where a kernel is not
        chosen for an image: (B, C_in, H, W) -> (B, C, H', W'), of a linear layer -> (B, C)."""
        chosen_groups = self.choose_groups(x, layer)
        if self.usage is not None:
            self.usage.add(chosen_groups)
        mask = self.masks.index_select(0, chosen_groups)  # (B, C)
        masked_norm = None if norm is None else partial(masked_batch_norm, mask=mask, norm=norm)
        y = models.finish_layer(models.run_layer(layer, x), masked_norm, prunable)
        # Masked after norm and activation, because these turn 0 into other values.
        ones = [1] * (y.dim() - 2)
        return y * mask.reshape(*mask.shape, *ones).to(y.dtype)


# ---- the gate: its clusters --------------------------------------------------------------------


def count_clustered_images(inputs: int) -> int:
    """The most images that k-means reads for a gate with so many inputs."""
    return max(MIN_CLUSTERED_IMAGES, MAX_CLUSTERED_NUMBERS // inputs)


@torch.no_grad()
def fit_gate(squeezed: torch.Tensor, group_count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ours: (weight (groups, inputs), bias (groups,)), float64, of a gate that sends each image to
    the nearest of its clusters.

    squeezed (N, inputs) is what the gate reads of N images; it takes the first
    `count_clustered_images` of them. K-means finds the clusters after every input is standardised.
    """
    image_count = count_clustered_images(squeezed.shape[1])
    squeezed = squeezed[:image_count].double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    mean = squeezed.mean(0)
    deviation = squeezed.std(0, correction=0)
    # ours: an input that varies 1,000 times less than the most variable one is left out. Else it
    # would count as much as that one, though it is hardly more than noise. An infinite deviation
    # makes its part of each point 0, and its weight.
    deviation = torch.where(deviation > 1e-3 * deviation.max(), deviation, torch.inf)
    centres = find_clusters((squeezed - mean) / deviation, group_count)
    # The nearest centre c of a point z has the smallest |z - c|^2, and so the largest
    # 2 c z - |c|^2. With (squeezed - mean) / deviation as z, this is linear in `squeezed`:
    weight = 2 * centres / deviation
    bias = -centres.square().sum(1) - weight @ mean
    return weight, bias


@torch.no_grad()
def find_clusters(points: torch.Tensor, count: int) -> torch.Tensor:
    """The centres (count, D) of clusters of points (N, D), by k-means (Lloyd 1982).

    It begins at some of the points, a few times over, and keeps the centres that lie nearest to
    the points. The same points give the same centres.
    """
    generator = torch.Generator().manual_seed(0)
    best_distance, best_centres = torch.inf, None
    for _ in range(CLUSTERING_RESTARTS):
        order = torch.randperm(len(points), generator=generator)
        # With fewer points than clusters, points serve several times.
        start_indices = order[torch.arange(count) % len(points)].to(points.device)
        centres = move_centres(points, points[start_indices])
        distance = torch.cdist(points, centres).min(1).values.square().mean()
        if distance < best_distance:
            best_distance, best_centres = distance, centres
    return best_centres


def move_centres(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The centres (count, D) after k-means' iterations: each goes to the mean of its points."""
    for _ in range(CLUSTERING_ITERATIONS):
        nearest = torch.cdist(points, centres).argmin(1)
        is_member = F.one_hot(nearest, len(centres)).to(points.dtype)  # (N, count)
        sizes = is_member.sum(0)[:, None]
        means = is_member.T @ points / sizes.clamp_min(1)
        # A centre without points stays where it is.
        centres = torch.where(sizes > 0, means, centres)
    return centres


# ---- the gate: batch norm of chosen kernels ----------------------------------------------------


def masked_batch_norm(y, mask, norm) -> torch.Tensor:
    """Batch norm whose statistics count only the images that use a channel.

    y (B, C, H, W) or (B, C); mask (B, C) float32, 1 where an image uses a channel, else 0. Entries
    with 0 count nowhere, but they are not 0 afterwards: the caller masks them.
    """
    if not norm.training:
        return norm(y)
    if y.dim() == 2:
        return masked_batch_norm(y[..., None, None], mask, norm)[..., 0, 0]
    mean, var = masked_statistics(y, mask)
    with torch.no_grad():
        value_count = mask.sum(0) * y.shape[2] * y.shape[3]  # (C,)
        update_running_statistics(norm, mean, var, value_count)
    factor = norm.weight * (var + norm.eps).rsqrt()
    shift = norm.bias - mean * factor
    return torch.addcmul(shift[:, None, None], y, factor[:, None, None]).to(y.dtype)


def masked_statistics(y, mask):
    """(mean, biased variance), each (C,) and in float32 at least, of y (B, C, H, W) over the images
    that use a channel; 0 for a channel that none uses. mask (B, C): 1 where an image uses it."""
    dtype = torch.promote_types(y.dtype, torch.float)
    pixels = y.shape[2] * y.shape[3]
    image_count = mask.sum(0).clamp_min(1)
    mean = (mask * y.mean((2, 3), dtype=dtype)).sum(0) / image_count
    # The square of the vector norm is the sum of squares. It makes no copy of y in float32.
    squares = torch.linalg.vector_norm(y, dim=(2, 3), dtype=dtype).square()  # (B, C)
    mean_square = (mask * squares).sum(0) / (image_count * pixels)
    return mean, (mean_square - mean.square()).clamp_min(0)


def update_running_statistics(norm, mean, var, value_count) -> None:
    """What nn.BatchNorm does in training, for the channels that have more than one value: one value
    has no variance. mean (C,) and the biased variance `var` (C,) are of value_count (C,) values."""
    norm.num_batches_tracked += 1
    momentum = norm.momentum
    # A cumulative average, as torch.optim.swa_utils.update_bn takes. A channel that no image of the
    # first batches uses keeps a part of its first values.
    if momentum is None:
        momentum = 1 / float(norm.num_batches_tracked)
    is_updated = value_count > 1
    unbiased_var = var * value_count / (value_count - 1).clamp_min(1)
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased_var)):
        moved = running.lerp(new.to(running.dtype), momentum)
        running.copy_(torch.where(is_updated, moved, running))


# ---- gated nets --------------------------------------------------------------------------------


def choose_gate_size(width: int, k: int) -> GateSize | None:
    """The gate of a layer that had `width` kernels before pruning, of which k are to work for an
    image. With the gate it may have fewer kernels: what fills no whole group is left out.

    If there is room for two groups of k kernels, there are as many groups as have room, at most
    MAX_GROUPS, and no kernel is always on. Else there are two smaller groups, and the kernels that
    these lack of k are always on. None if those are more than MAX_ALWAYS_ON_SHARE of k.
    """
    group_count = min(MAX_GROUPS, width // k)
    if group_count >= 2:
        return GateSize(0, k, group_count)
    always_on_count = 2 * k - width  # as always_on_count + 2 (k - always_on_count) = width
    if always_on_count > MAX_ALWAYS_ON_SHARE * k:
        return None
    return GateSize(always_on_count, k - always_on_count, 2)


def choose_gate_sizes(widths, structure) -> list[GateSize | None]:
    """`choose_gate_size` of each prunable layer: `widths` before pruning, `structure` after it."""
    return [choose_gate_size(width, k) for width, k in zip(widths, structure)]


def gates_of(net: Net) -> list[SEGate | None]:
    """The gate of each prunable layer, None where there is none."""
    return list(net.gates) if net.gates is not None else [None] * len(net.widths)


def attach_gates(net: Net, gate_sizes) -> None:
    """Put fresh gates on `net`, in place: a GateSize for each prunable layer, None for no gate.

    The layers have the kernels of all groups already. A net without any gate stays a plain one.
    """
    if not any(gate_sizes):
        return
    device = next(net.parameters()).device
    gates = []
    for prunable, size in zip(net.prunable, gate_sizes, strict=True):
        if size is None:
            gates.append(None)
            continue
        input_count = net.get_submodule(prunable.layer_name).weight.shape[1]
        gates.append(SEGate(input_count, size).to(device))
    net.gates = nn.ModuleList(gates)


def index_of_previous_layer(net: Net, index: int) -> int | None:
    """The index of the prunable layer whose output the prunable layer `index` reads; None where it
    reads something else, as the image or a sum of blocks."""
    name = net.prunable[index].layer_name
    for i, prunable in enumerate(net.prunable):
        if prunable.next_layer_name == name:
            return i
    return None


@torch.no_grad()
def add_gates(net: Net, gate_sizes, batches) -> Net:
    """Soft pruning (TIP 2021): a gated copy of a plain net that is pruned already.

    `gate_sizes` holds a GateSize, or None, for each prunable layer, and its k is the width of that
    layer in `net`. The gated layer is wider: kernels that are not always on come once for each
    group. In evaluation mode both nets compute the same at first.

    The gates' clusters are found on the images in `batches`, each (B, C, H, W), normalised. Of many
    images only the first ones count, so shuffle them. The copy is in training mode, and `net` is
    left in evaluation mode.
    """
    gated_layers = [
        prunable.layer_name for prunable, size in zip(net.prunable, gate_sizes) if size is not None
    ]
    squeezed = collect_squeezed(net, gated_layers, batches)
    importance = models.channel_importance(net)
    source_channels = [
        torch.arange(width) if size is None else list_source_kernels(scores, size)
        for width, scores, size in zip(net.widths, importance, gate_sizes)
    ]
    # remove_channels takes the listed channels; one that is listed several times is copied.
    gated = models.remove_channels(net, source_channels).to(memory_format=torch.channels_last)
    attach_gates(gated, gate_sizes)
    for index, gate in enumerate(gates_of(gated)):
        if gate is None:
            continue
        weight, bias = fit_gate(squeezed[net.prunable[index].layer_name], gate.size.group_count)
        gate.excite.weight.copy_(repeat_for_copies(weight, net, index, source_channels))
        gate.excite.bias.copy_(bias)
    return gated


def repeat_for_copies(weight: torch.Tensor, net: Net, index: int, source_channels) -> torch.Tensor:
    """The weight (groups, inputs) of a gate on the prunable layer `index`, as it reads the gated
    copy of `net`.

    There a channel of the layer before comes once for each of that layer's groups: source_channels
    has, for each layer, the channel of `net` that each channel copies. All copies but one are 0 for
    an image, so every copy gets the weight.
    """
    previous = index_of_previous_layer(net, index)
    if previous is None:
        return weight
    return models.select_input_channels(weight, net.widths[previous], source_channels[previous])


def list_source_kernels(importance: torch.Tensor, size: GateSize) -> torch.Tensor:
    """Which kernel of a plain layer each kernel of the gated one copies: the most important ones
    are always on, then come the others, once for each group. `importance` (C,)."""
    by_importance = importance.argsort(descending=True, stable=True)
    always_on = by_importance[: size.always_on_count]
    others = by_importance[size.always_on_count :]
    return torch.cat([always_on, others.repeat(size.group_count)])


@torch.no_grad()
def collect_squeezed(net: Net, layer_names, batches) -> dict[str, torch.Tensor]:
    """What gates on these layers of the plain `net` would read, (N, inputs) by the layers' names.

    Of many images it keeps the first ones, as many as `fit_gate` takes or a few more. Leaves `net`
    in evaluation mode.
    """
    collected = {name: [] for name in layer_names}

    def collect_input_of(name):
        def collect(layer, inputs):
            squeezed = squeeze(inputs[0], is_linear=isinstance(layer, nn.Linear)).float()
            if sum(map(len, collected[name])) < count_clustered_images(squeezed.shape[1]):
                collected[name].append(squeezed)

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


def prune_softly(net: Net, structure, batches) -> Net:
    """A new net of that structure with all gates that have room: models.prune_channels, then
    `add_gates`. For tests and measurements: a run trains the pruned net before it adds gates."""
    gate_sizes = choose_gate_sizes(net.widths, structure)
    return add_gates(models.prune_channels(net, structure), gate_sizes, batches)


# ---- gated nets: what gates choose -------------------------------------------------------------


class Usage:
    """How often a gate chose each of its groups."""

    def __init__(self, gate: SEGate):
        self.masks = gate.masks
        device = gate.masks.device
        self.image_counts = torch.zeros(len(gate.masks), dtype=torch.long, device=device)

    def add(self, groups: torch.Tensor) -> None:
        """The groups (B,) of a batch's images."""
        self.image_counts += groups.bincount(minlength=len(self.image_counts))

    @property
    def image_count(self) -> int:
        return int(self.image_counts.sum())

    @property
    def groups_in_use(self) -> int:
        return int((self.image_counts > 0).sum())

    @property
    def share_of_group(self) -> torch.Tensor:
        """(groups,): the share of the images that each group serves, in [0, 1]."""
        return self.image_counts.double() / self.image_count

    @property
    def share_of_kernel(self) -> torch.Tensor:
        """(C,): the share of the images that each kernel serves, in [0, 1]."""
        return (self.image_counts.double() @ self.masks.double()) / self.image_count

    def count_kernels(self) -> tuple[int, int, int]:
        """How many kernels serve no image, some of them, and all."""
        in_use = self.image_counts > 0
        serves_some = self.masks[in_use].amax(0) > 0
        serves_all = self.masks[in_use].amin(0) > 0
        never = int((~serves_some).sum())
        always = int(serves_all.sum())
        return never, len(serves_all) - never - always, always


@contextmanager
def record_usage(net: Net):
    """Within `with record_usage(net) as usage:` count which groups the gates choose for every image
    that `net` reads. `usage` has a Usage for each prunable layer, None where there is no gate."""
    gates = gates_of(net)
    for gate in filter(None, gates):
        gate.usage = Usage(gate)
    try:
        yield [None if gate is None else gate.usage for gate in gates]
    finally:
        for gate in filter(None, gates):
            gate.usage = None


@torch.no_grad()
def measure_usage(net: Net, batches) -> list[Usage | None]:
    """What `record_usage` says of the images in `batches`, each (B, C, H, W), normalised. Leaves
    `net` in evaluation mode."""
    net.eval()
    with record_usage(net) as usage:
        for x in batches:
            net(x)
    return usage


# ---- gated nets: what gates cost ---------------------------------------------------------------


def count_macs(net: Net, structure=None) -> int:
    """The MACs of a net for one image, those of its gates included.

    With a `structure`: those that the plain `net` would have, pruned to it, with a gate in every
    layer that has room; a run may put on fewer. Only chosen kernels count and, in the next layer
    and its gate, only the weights on their channels: so `tune` runs it on one image, where a batch
    computes more.
    """
    if structure is None:
        structure = net.structure
        gate_sizes = [None if gate is None else gate.size for gate in gates_of(net)]
    else:
        gate_sizes = choose_gate_sizes(net.widths, structure)
    macs = models.count_macs(net, structure)
    for i, size in enumerate(gate_sizes):
        if size is not None:
            macs += count_gate_macs(net, structure, i, size.group_count)
    return macs


def count_gate_macs(net: Net, structure, index: int, outputs: int) -> int:
    """The MACs of the linear layer of a gate on the prunable layer `index` of a net with that
    structure. It has so many `outputs`, one for each group."""
    inputs = net.get_submodule(net.prunable[index].layer_name).weight.shape[1]
    previous = index_of_previous_layer(net, index)
    if previous is not None:
        # The gate reads only the chosen kernels of the layer before.
        inputs = inputs * structure[previous] // net.widths[previous]
    return inputs * outputs


# ---- gated nets: made plain --------------------------------------------------------------------


@torch.no_grad()
def to_static(net: Net, batches) -> Net:
    """ours: a gated net as a plain small one: of each gated layer the always-on kernels stay, and
    the mean of the groups, where a group counts by how many images choose it.

    The images come in `batches`, each (B, C, H, W), normalised; ValueError if a gated net gets
    none. Groups began as copies of one another, and nets that part from one point can be averaged
    (Wortsman et al. 2022, "Model soups"). Each group has learnt from its own images alone, so to
    keep one of them would lose what the others have learnt. The plain net is in training mode, and
    `net` is left in evaluation mode.
    """
    usage = measure_usage(net, batches)
    if any(layer_usage is not None and not layer_usage.image_count for layer_usage in usage):
        raise ValueError("to_static needs at least one image")
    every_channel = [torch.arange(width) for width in net.widths]
    plain = models.remove_channels(net, every_channel)  # a copy without gates
    for index, (gate, layer_usage) in enumerate(zip(gates_of(net), usage)):
        if gate is None:
            continue
        plain = average_groups(plain, index, gate, layer_usage.share_of_group)
    return plain


def average_groups(net: Net, index: int, gate: SEGate, share_of_group: torch.Tensor) -> Net:
    """`net` without gates, and with one group of kernels in the prunable layer `index`: the mean of
    the groups that its `gate` chooses from, weighted by share_of_group (groups,).

    The whole net is taken once with each group, and these nets are averaged. So the kernels are
    averaged, their norm, and the weights of the next layer that read them. All other weights are
    the same in each of these nets, and stay as they are, up to rounding.
    """
    nets, shares = [], []
    for group, share in enumerate(share_of_group.tolist()):
        if share == 0:
            continue
        kept_channels = [torch.arange(width) for width in net.widths]
        kept_channels[index] = gate.channels_of_group(group)
        nets.append(models.remove_channels(net, kept_channels))
        shares.append(share)
    states = [each.state_dict() for each in nets]
    mean = nets[0]
    for name, value in mean.state_dict().items():
        if value.is_floating_point():
            value.copy_(sum(share * state[name] for share, state in zip(shares, states)))
    return mean


# ---- loading -----------------------------------------------------------------------------------


def load(path) -> tuple[Net, dict]:
    """(net, facts) of a checkpoint or of anybody's state dict, gates included; on the CPU. The
    facts are plain values that the checkpoint has beside the weights, as the accuracy or the data.

    Raises UserError, naming the file.
    """
    net, checkpoint = load_checkpoint(path)
    return net, checkpoint["facts"]


def load_checkpoint(path) -> tuple[Net, dict]:
    """(net, what models.read_checkpoint says). Raises UserError, naming the file.

    A foreign state dict, which this tool has not written, may be several nets:
    checkpoint["readings"] has all of them, and the net is the likeliest.
    """
    checkpoint = models.read_checkpoint(path)
    try:
        net = models.build_from_checkpoint(checkpoint)
        if checkpoint["gates"] is not None:
            attach_gates(net, read_gate_sizes(net, checkpoint["gates"]))
        models.load_weights(net, checkpoint["state"])
        models.check_is_finite(checkpoint["state"])
    except UserError as error:
        raise UserError(f"{path}: {error}", error.status) from error
    except Exception as error:  # sizes beyond reason, tensors of odd kinds
        name = checkpoint["architecture"].get("name")
        raise UserError(
            f"{path}: its weights do not fit a {name} of the widths it names"
        ) from error
    return net, checkpoint


def read_gate_sizes(net: Net, entries: list) -> list[GateSize | None]:
    """The GateSize of each prunable layer, None where it has no gate.

    `entries` are what a checkpoint says of each: None, or how many kernels `k` work for an image,
    and which share of these is always on. Raises UserError where that cannot be.
    """
    if len(entries) != len(net.widths):
        raise UserError(
            f"its gates are {len(entries)}, but a {net.arch} has {len(net.widths)} prunable layers"
        )
    sizes = []
    for prunable, width, entry in zip(net.prunable, net.widths, entries):
        if entry is None:
            sizes.append(None)
            continue
        try:
            sizes.append(read_gate_size(entry, width))
        except UserError as error:
            raise UserError(
                f"the gate of {prunable.layer_name} {error}; make the net anew from its baseline, "
                "by prune --method sep"
            ) from error
    return sizes


def read_gate_size(entry, width: int) -> GateSize:
    """`read_gate_sizes` of one layer, of `width` kernels. Raises UserError with the end of a
    sentence that begins with the gate's name."""
    if not isinstance(entry, dict) or not entry.keys() >= {"k", "always_on_share"}:
        raise UserError("does not say its k and its always_on_share")
    k = entry["k"]
    share = entry["always_on_share"]
    if type(k) is not int or not 1 <= k <= width:
        raise UserError(f"has a k of {k!r}, not a whole number from 1 to {width}")
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise UserError(f"has an always-on share of {share!r}, not a number in [0, 1]")
    always_on_count = round(share * k)
    group_size = k - always_on_count
    # Where all k are always on, no kernels are left for groups: that is refused below.
    group_count = (width - always_on_count) // max(1, group_size)
    size = GateSize(always_on_count, group_size, group_count)
    if size.width != width or group_count < 2:
        raise UserError(
            f"does not fit {width} kernels: {k} of them for an image, {always_on_count} always on, "
            "leave no two groups or more of one size"
        )
    return size


# ---- fast single images ------------------------------------------------------------------------
#
# For one image the start of an operator takes as long as the arithmetic of a small layer. So here
# convolutions and linear layers are no modules, for a module's call costs as much as a small
# operator.
#
# A Gathering... holds the weights of a layer or norm. It gathers those of the kernels at work once
# for each group, or pair of groups, that it depends on, and keeps them. A LayerRunner is a whole
# prunable layer with its norm and activation, a GatedRunner is one with a gate. Net.run_prunable
# calls them, and passes on which group each layer chose.
#
# In shapes, C_in' and C' are the channels at work: without a gate, all.


# eq=False: groups are keys of dicts, so they are compared by identity. The == that dataclass would
# make compares tensors, which gives no single truth value.
@dataclass(frozen=True, eq=False)
class KernelGroup:
    """One of the groups that a gate chooses from."""

    channels: torch.Tensor  # (k,), ascending: the kernels that run when this group is chosen
    layer_width: int  # all kernels of the gated layer


class GatheringLayer:
    """A convolution or linear layer for inference on one image, which reads and computes only the
    channels at work."""

    is_linear: bool

    def __init__(self, layer: nn.Conv2d | nn.Linear):
        self.weight = layer.weight.detach()
        self.bias = None if layer.bias is None else layer.bias.detach()
        # (group of the layer before, own group) -> (weight, bias); a group is None where there is
        # no gate.
        self.gathered = {}

    def __call__(self, x, previous: KernelGroup | None = None, own: KernelGroup | None = None):
        """(1, C_in', H, W) -> (1, C', H', W'); of a linear layer (1, C_in', ...) -> (1, C').

        `previous` is the group that the layer before chose, `own` that of this layer.
        """
        if (previous, own) not in self.gathered:
            self.gathered[previous, own] = self.gather(previous, own)
        return self.run(x, *self.gathered[previous, own])

    def run(self, x, weight, bias):
        raise NotImplementedError

    def gather(self, previous: KernelGroup | None, own: KernelGroup | None):
        """(weight, bias) of the channels at work alone."""
        weight, bias = self.weight, self.bias
        if own is not None:
            weight = weight.index_select(0, own.channels)
            bias = None if bias is None else bias.index_select(0, own.channels)
        if previous is not None:
            weight = models.select_input_channels(weight, previous.layer_width, previous.channels)
        return weight, bias


class GatheringConvolution(GatheringLayer):
    is_linear = False

    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer)
        self.stride, self.padding = layer.stride, layer.padding

    def run(self, x, weight, bias):
        return torch.conv2d(x, weight, bias, self.stride, self.padding)

    def gather(self, previous: KernelGroup | None, own: KernelGroup | None):
        weight, bias = super().gather(previous, own)
        # In this layout convolutions run fastest.
        return weight.contiguous(memory_format=torch.channels_last), bias


class GatheringLinear(GatheringLayer):
    is_linear = True

    def run(self, x, weight, bias):
        return torch.addmv(bias, weight, x.flatten())[None]


class GatheringNorm:
    """A batch norm after an activation or pooling, for inference on one image, of the channels at
    work. Others are folded into their layers before."""

    def __init__(self, norm: nn.BatchNorm2d):
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - scale * norm.running_mean
        # (scale, shift), each (C', 1, 1), by the group that the layer chose; None: all channels.
        self.gathered = {None: [each.detach()[:, None, None] for each in (scale, shift)]}

    def __call__(self, y, own: KernelGroup | None = None):
        """(1, C', H, W) -> the same shape. `own` is the group that the layer chose."""
        if own not in self.gathered:
            self.gathered[own] = [each[own.channels] for each in self.gathered[None]]
        scale, shift = self.gathered[own]
        return y * scale + shift


class LayerRunner:
    """A prunable layer with its norm and activation, on one image. It has no gate: all kernels
    run."""

    def __init__(self, layer: GatheringLayer, norm: GatheringNorm | None, prunable: PrunableLayer):
        self.layer = layer
        self.norm = norm
        self.prunable = prunable

    def __call__(self, x, previous: KernelGroup | None):
        """As Net.run_prunable: x (1, C_in', H, W) -> (y (1, C', H', W'), the group that was chosen
        or None). `previous` is the group that the layer before chose."""
        chosen = self.choose_group(x, previous)
        norm = None if self.norm is None else partial(self.norm, own=chosen)
        y = self.layer(x, previous, chosen)
        return models.finish_layer(y, norm, self.prunable, inplace=True), chosen

    def choose_group(self, x, previous: KernelGroup | None) -> KernelGroup | None:
        return None


class GatedRunner(LayerRunner):
    """A prunable layer with its gate, on one image: it runs only the chosen kernels."""

    def __init__(self, layer, norm, prunable, gate: SEGate):
        super().__init__(layer, norm, prunable)
        self.kernel_groups = [
            KernelGroup(gate.channels_of_group(group), gate.size.width)
            for group in range(gate.size.group_count)
        ]
        self.gate_bias = gate.excite.bias.detach()
        self.gate_weight = gate.excite.weight.detach()
        # Group of the layer before -> the part of gate_weight that reads its channels.
        self.gathered_weights = {None: self.gate_weight}

    def choose_group(self, x, previous: KernelGroup | None) -> KernelGroup:
        squeezed = squeeze(x, is_linear=self.layer.is_linear)[0].to(self.gate_bias.dtype)
        scores = torch.addmv(self.gate_bias, self.gather_gate_weight(previous), squeezed)
        return self.kernel_groups[int(scores.argmax())]

    def gather_gate_weight(self, previous: KernelGroup | None) -> torch.Tensor:
        """The gate's weight (groups, inputs') on the channels at work."""
        if previous not in self.gathered_weights:
            self.gathered_weights[previous] = models.select_input_channels(
                self.gate_weight, previous.layer_width, previous.channels
            )
        return self.gathered_weights[previous]


def return_unchanged(x):
    """Stands in for nn.Identity, whose call as a module takes longer."""
    return x


def make_single_image_net(net: Net) -> Net:
    """A copy of `net` for single images: its convolutions and linear layers are no modules any
    more. `net` comes from models.fold_batch_norms, and its tensors are shared."""
    # deepcopy takes what it finds in this dict, its memo, for copies that it has made already: so
    # the new net holds the very tensors of `net`.
    shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    net = deepcopy(net, shared)
    gates = gates_of(net)
    net.gates = None
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Identity):
            runner = return_unchanged
        elif isinstance(module, nn.Conv2d):
            runner = GatheringConvolution(module)
        elif isinstance(module, nn.Linear):
            runner = GatheringLinear(module)
        else:
            continue
        parent_name, _, own_name = name.rpartition(".")
        parent = net.get_submodule(parent_name)
        # A module must go before something else can take its name.
        delattr(parent, own_name)
        setattr(parent, own_name, runner)
    net.layer_runners = []
    for prunable, gate in zip(net.prunable, gates):
        layer = attrgetter(prunable.layer_name)(net)
        # norm_name is None where fold_batch_norms has folded the norm.
        norm = GatheringNorm(net.get_submodule(prunable.norm_name)) if prunable.norm_name else None
        if gate is None:
            net.layer_runners.append(LayerRunner(layer, norm, prunable))
        else:
            net.layer_runners.append(GatedRunner(layer, norm, prunable, gate))
    return net


class TunedNet:
    """A net for inference alone on a CPU, as `tune` makes it: normalised images (B, C, H, W) ->
    logits (B, classes). It is no nn.Module: it cannot be moved, cast or trained.

    A gate rounds differently for one image and for a batch. So an image between two clusters may
    get another group there.
    """

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
    """A copy of `net` that is quick at one image at a time on this CPU: it runs only the kernels
    that its gates choose. Raises UserError where `net` is none of this tool, or on a GPU."""
    if not isinstance(net, Net):
        raise UserError(f"tune needs a net of this tool, not a {type(net).__name__}")
    if next(net.parameters()).device.type != "cpu":
        raise UserError("tune needs a net on the CPU: net.cpu()")
    return TunedNet(net)
