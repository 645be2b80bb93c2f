"""Soft pruning (squeeze-excitation pruning, SEP; IEEE TIP 2021): gates that
choose kernels, image by image. In this order:

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
image are set to 0. Of a single image `tune` computes the chosen ones only. Kernels and the channels
that they put out have the same indices. What the paper does not give is marked `ours`.
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

# ours: the most groups of a layer. Each group learns only from the images that choose it: with
# more groups these would be too few.
MAX_GROUPS = 8
# ours: a layer gets no gate where more than this share of its k kernels would be always on: the
# gate would have little to choose.
MAX_ALWAYS_ON_SHARE = 0.75
# ours: the clusters that k-means finds depend on its start, so it starts a few times, and the best
# ones are kept. After some twenty iterations they move little.
CLUSTERING_RESTARTS = 4
CLUSTERING_ITERATIONS = 25
# ours: k-means reads at most MAX_CLUSTERED_NUMBERS / inputs images, for with thousands of inputs it
# would take long; but at least MIN_CLUSTERED_IMAGES, where there are so many.
MAX_CLUSTERED_NUMBERS = 5_000_000
MIN_CLUSTERED_IMAGES = 500
# ours: an input whose deviation is less than this share of the largest one is left out of the
# clustering. Else it would count as much as that one, though it is hardly more than noise.
MIN_DEVIATION_SHARE = 1e-3


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
    """Chooses a group of kernels for each image, runs the layer with its norm, activation and
    pooling, and sets to 0 what is not chosen (TIP 2021).

    The paper scores every kernel, and multiplies with the scores. ours: a gate scores groups, and
    multiplies with nothing. Groups begin as copies of the kernels that hard pruning keeps, so at
    first all choices compute the same, and they diverge in the training. Gates that score single
    kernels ended below hard pruning in one run (RESULTS.md, section 6).

    The layer and its norm are not part of the gate: so their weights keep their names.
    """

    def __init__(self, input_count: int, size: GateSize):
        """`input_count`: how many numbers `squeeze` gives."""
        super().__init__()
        self.size = size
        # Its name is that of squeeze-and-excitation; here it gives a score for each group. Its
        # weights are random until `add_gates` or a checkpoint fills them. ours: they are never
        # trained, for argmax has no gradient.
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

    def score_groups(self, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """The scores (B, groups) of each image; x is what the layer reads."""
        # Not in autocast's bfloat16: it has three digits, and rounding would change many choices.
        with torch.autocast(x.device.type, enabled=False):
            squeezed = squeeze(x, is_linear=isinstance(layer, nn.Linear))
            return self.excite(squeezed.to(self.excite.weight.dtype))

    def choose_groups(self, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """The group (B,) of each image, that with the largest score; x is what the layer reads."""
        return self.score_groups(x, layer).argmax(1)

    def choose_kernels(self, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """(B, C): 1 for the kernels that are chosen for an image, else 0. Within `record_usage` the
        choices are counted."""
        chosen_groups = self.choose_groups(x, layer)
        if self.usage is not None:
            self.usage.add(chosen_groups)
        return self.masks.index_select(0, chosen_groups)

    def forward(self, x, layer: nn.Module, norm, prunable: PrunableLayer) -> torch.Tensor:
        """activation(norm(layer(x))), pooled where the net pools, and 0 where a kernel is not
        chosen for an image: (B, C_in, H, W) -> (B, C, H', W'), of a linear layer -> (B, C)."""
        mask = self.choose_kernels(x, layer)  # (B, C)
        masked_norm = None if norm is None else partial(masked_batch_norm, mask=mask, norm=norm)
        y = models.finish_layer(models.run_layer(layer, x), masked_norm, prunable)
        # Masked at the end, because a norm or an activation may turn 0 into another value.
        if y.dim() == 4:
            mask = mask[:, :, None, None]
        return y * mask.to(y.dtype)


# ---- the gate: its clusters --------------------------------------------------------------------


def max_clustered_images(input_count: int) -> int:
    """The most images that k-means reads for a gate with so many inputs."""
    return max(MIN_CLUSTERED_IMAGES, MAX_CLUSTERED_NUMBERS // input_count)


@torch.no_grad()
def fit_gate(squeezed: torch.Tensor, group_count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ours: (weight (groups, inputs), bias (groups,)), float64, of a gate that sends each image to
    the nearest of its clusters.

    squeezed (N, inputs) is what the gate reads of N images; it takes the first
    `max_clustered_images` of them. K-means finds the clusters after every input is standardised.
    """
    squeezed = squeezed[: max_clustered_images(squeezed.shape[1])].double()
    # A trial may be diverging: its numbers must not stop the run here.
    squeezed = squeezed.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    mean = squeezed.mean(0)
    deviation = squeezed.std(0, correction=0)
    is_kept = deviation > MIN_DEVIATION_SHARE * deviation.max()
    # Divided by infinity, an input that is left out is 0 in every point, and its weight is 0.
    deviation = torch.where(is_kept, deviation, torch.inf)
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
    """The centres (count, D) after k-means' iterations: each goes to the mean of its points.

    It ends early where no centre moves any more.
    """
    for _ in range(CLUSTERING_ITERATIONS):
        nearest = torch.cdist(points, centres).argmin(1)
        is_member = F.one_hot(nearest, len(centres)).to(points.dtype)  # (N, count)
        sizes = is_member.sum(0)[:, None]
        means = is_member.T @ points / sizes.clamp_min(1)
        # A centre without points stays where it is.
        moved_centres = torch.where(sizes > 0, means, centres)
        if torch.equal(moved_centres, centres):
            break
        centres = moved_centres
    return centres


# ---- the gate: batch norm of chosen kernels ----------------------------------------------------


def masked_batch_norm(y, mask, norm) -> torch.Tensor:
    """Batch norm whose statistics count, in training, only the images that use a channel.

    y (B, C, H, W) or (B, C); mask (B, C) float32, 1 where an image uses a channel, else 0. Channels
    that an image does not use are normalised, too: the caller sets them to 0. In evaluation mode
    the mask has no effect.
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
    # None means the mean over all batches so far, as in nn.BatchNorm. (A channel that the first
    # batches do not use keeps a share of its initial values.)
    if momentum is None:
        momentum = 1 / float(norm.num_batches_tracked)
    is_updated = value_count > 1
    unbiased_var = var * value_count / (value_count - 1).clamp_min(1)
    for running, of_batch in ((norm.running_mean, mean), (norm.running_var, unbiased_var)):
        updated = running.lerp(of_batch.to(running.dtype), momentum)
        running.copy_(torch.where(is_updated, updated, running))


# ---- gated nets --------------------------------------------------------------------------------


def choose_gate_size(baseline_width: int, k: int) -> GateSize | None:
    """The gate of a layer that had `baseline_width` kernels before pruning, of which k are to work
    for an image. With the gate it has no more kernels than that, and fewer if they do not divide
    into whole groups.

    If there is room for two groups of k kernels, there are as many groups as have room, at most
    MAX_GROUPS, and no kernel is always on. Else there are two smaller groups, and the rest of the k
    kernels is always on. None if that rest is more than MAX_ALWAYS_ON_SHARE of k.
    """
    group_count = min(MAX_GROUPS, baseline_width // k)
    if group_count >= 2:
        return GateSize(0, k, group_count)
    # baseline_width = always_on_count + 2 * group_size, and k = always_on_count + group_size.
    always_on_count = 2 * k - baseline_width
    if always_on_count > MAX_ALWAYS_ON_SHARE * k:
        return None
    return GateSize(always_on_count, k - always_on_count, 2)


def choose_gate_sizes(baseline_widths, structure) -> list[GateSize | None]:
    """`choose_gate_size` of each prunable layer: its width before pruning and its k after it."""
    return [choose_gate_size(width, k) for width, k in zip(baseline_widths, structure)]


def gates_of(net: Net) -> list[SEGate | None]:
    """The gate of each prunable layer, None where there is none."""
    return list(net.gates) if net.gates is not None else [None] * len(net.widths)


def attach_gates(net: Net, gate_sizes) -> None:
    """Put fresh gates on a plain `net`, in place: a GateSize for each prunable layer, None for no
    gate. The layers have the kernels of all groups already. If all are None, nothing changes.
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

    `gate_sizes` holds a GateSize, or None, for each prunable layer. Its k has to be the width of
    that layer in `net`. The gated layer is wider: kernels that are not always on come once for each
    group. In evaluation mode both nets compute the same at first.

    The gates' clusters are found on the images in `batches`, each (B, C, H, W), normalised, on the
    net's device. Of many images only the first ones count, so shuffle them. The copy is in training
    mode, and `net` is left in evaluation mode.
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
        gate.excite.weight.copy_(repeat_input_weights(weight, net, index, source_channels))
        gate.excite.bias.copy_(bias)
    return gated


def repeat_input_weights(weight, net: Net, index: int, source_channels) -> torch.Tensor:
    """The weight (groups, inputs) of a gate, for a gated copy of the plain `net` that it was fitted
    on. The gate is that of the prunable layer `index`.

    In the copy, the layer before may have several copies of a channel; source_channels says, for
    each layer, which channel of `net` each of its channels copies. The gate's weight for a channel
    is repeated for each copy. For an image all copies but one are 0, so the sum is the same.
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

    Of many images it keeps the first ones, as many as `fit_gate` takes, and up to a batch more.
    Leaves `net` in evaluation mode.
    """
    collected = {name: [] for name in layer_names}

    def collect_input_of(name):
        def collect(layer, arguments):
            squeezed = squeeze(arguments[0], is_linear=isinstance(layer, nn.Linear)).float()
            if sum(map(len, collected[name])) < max_clustered_images(squeezed.shape[1]):
                collected[name].append(squeezed)

        return collect

    net.eval()  # in training `run_layer` may compute a convolution without calling its module
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
        self.images_per_group = torch.zeros(len(gate.masks), dtype=torch.long, device=device)

    def add(self, groups: torch.Tensor) -> None:
        """The groups (B,) of a batch's images."""
        self.images_per_group += groups.bincount(minlength=len(self.images_per_group))

    @property
    def image_count(self) -> int:
        return int(self.images_per_group.sum())

    @property
    def groups_in_use(self) -> int:
        return int((self.images_per_group > 0).sum())

    @property
    def share_of_group(self) -> torch.Tensor:
        """(groups,): the share of the images that each group serves, in [0, 1]."""
        return self.images_per_group.double() / self.image_count

    @property
    def share_of_kernel(self) -> torch.Tensor:
        """(C,): the share of the images that each kernel serves, in [0, 1]."""
        return (self.images_per_group.double() @ self.masks.double()) / self.image_count

    def count_kernels(self) -> tuple[int, int, int]:
        """(kernels that serve no image, kernels that serve some images but not all, kernels that
        serve all images)."""
        masks_in_use = self.masks[self.images_per_group > 0]
        unused_count = int((masks_in_use.amax(0) == 0).sum())
        always_used_count = int((masks_in_use.amin(0) > 0).sum())
        sometimes_used_count = self.masks.shape[1] - unused_count - always_used_count
        return unused_count, sometimes_used_count, always_used_count


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

    Counted is what `tune` computes: the chosen kernels and, in the next layer and its gate, the
    weights that read them. (A batch computes all kernels.)

    With a `structure` it is an estimate: `net` is plain and not pruned, and is imagined pruned to
    that structure, with a gate in every layer that has room. A run may put on fewer gates.
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


def count_gate_macs(net: Net, structure, index: int, group_count: int) -> int:
    """The MACs of a gate with so many groups, on the prunable layer `index` of a net with that
    structure."""
    input_count = net.get_submodule(net.prunable[index].layer_name).weight.shape[1]
    previous = index_of_previous_layer(net, index)
    if previous is not None:
        # The gate reads only the chosen kernels of the layer before.
        input_count = input_count // net.widths[previous] * structure[previous]
    return input_count * group_count


# ---- gated nets: made plain --------------------------------------------------------------------


@torch.no_grad()
def to_static(net: Net, batches) -> Net:
    """ours: make a gated net plain. In each gated layer the always-on kernels stay, and the mean of
    the groups takes their place. A group counts by how many images choose it.

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
    states = [net_of_group.state_dict() for net_of_group in nets]
    mean_state = {
        name: sum(share * state[name] for share, state in zip(shares, states))
        for name, value in states[0].items()
        if value.is_floating_point()
    }
    nets[0].load_state_dict(mean_state, strict=False)  # the batch counters of norms stay
    return nets[0]


# ---- loading -----------------------------------------------------------------------------------


def load(path) -> tuple[Net, dict]:
    """(net, facts) of a checkpoint or of anybody's state dict, gates included; on the CPU. The
    facts are plain values that the checkpoint has beside the weights, as the accuracy or the data.

    Raises UserError, naming the file.
    """
    net, checkpoint = load_checkpoint(path)
    return net, checkpoint["facts"]


def load_checkpoint(path) -> tuple[Net, dict]:
    """(net, checkpoint): the checkpoint is what models.read_checkpoint returns, with the keys
    architecture, widths, gates, state and facts. Raises UserError, naming the file.

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
    except Exception as error:  # an edited file: huge sizes, sparse tensors and more
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
        problem = find_gate_problem(entry, width)
        if problem:
            raise UserError(
                f"the gate of {prunable.layer_name} {problem}; make the net anew from its "
                "baseline, by prune --method sep"
            )
        sizes.append(read_gate_size(entry, width))
    return sizes


def find_gate_problem(entry, width: int) -> str:
    """What is wrong with a checkpoint's entry for the gate of a layer of `width` kernels, as the
    end of a sentence; "" if nothing is."""
    if not isinstance(entry, dict) or not entry.keys() >= {"k", "always_on_share"}:
        return "does not say its k and its always_on_share"
    k, share = entry["k"], entry["always_on_share"]
    if type(k) is not int or not 1 <= k <= width:
        return f"has a k of {k!r}, not a whole number from 1 to {width}"
    if type(share) not in (int, float) or not 0 <= share <= 1:
        return f"has an always-on share of {share!r}, not a number in [0, 1]"
    size = read_gate_size(entry, width)
    if size.group_size == 0 or size.group_count < 2 or size.width != width:
        return (
            f"does not fit {width} kernels: {k} of them for an image, {size.always_on_count} "
            "always on, leave no two groups or more of one size"
        )
    return ""


def read_gate_size(entry: dict, width: int) -> GateSize:
    """The gate of a layer of `width` kernels, by a checkpoint's entry for it."""
    always_on_count = round(entry["always_on_share"] * entry["k"])
    group_size = entry["k"] - always_on_count
    group_count = (width - always_on_count) // group_size if group_size else 0
    return GateSize(always_on_count, group_size, group_count)


# ---- fast single images ------------------------------------------------------------------------
#
# For one image the call of an operator or module costs as much as the arithmetic of a small layer.
# So here convolutions and linear layers are no modules.
#
# A single image flows like this. The net's `forward` calls `run_prunable` for each prunable layer,
# and that calls the layer's runner: a LayerRunner or, with a gate, a GatedRunner. The runner
# chooses a group, runs the layer on the chosen kernels alone, and returns the output and the group.
# `forward` hands the group to the next layer, which reads only these channels.
#
# To take the weights of the chosen kernels out of a layer is slow. So a Gathering... layer or norm
# does it once for each group, or pair of groups, and keeps what it has taken.
#
# In shapes, C_in' and C' are the channels at work: without a gate, all.


# eq=False: groups are keys of dicts, and are compared by identity. The == that dataclass would make
# compares tensors, and fails.
@dataclass(frozen=True, eq=False)
class KernelGroup:
    """One of the groups that a gate chooses from."""

    channels: torch.Tensor  # (k,), ascending: the kernels that run when this group is chosen
    layer_width: int  # all kernels of the gated layer


class GatheringLayer:
    """A convolution or linear layer for inference on one image, which reads and computes only the
    channels at work.

    A layer that is not prunable is called without its own group: the first convolution of a ResNet
    with x alone, its last layer with x and the group of the layer before.
    """

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
    work. (A norm right behind its layer has been folded into it, by `fold_batch_norms`.)"""

    def __init__(self, norm: nn.BatchNorm2d):
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - scale * norm.running_mean
        self.scale = scale.detach()[:, None, None]  # (C, 1, 1)
        self.shift = shift.detach()[:, None, None]
        # The group that the layer chose -> (scale, shift) of its channels; None: of all channels.
        self.gathered = {None: (self.scale, self.shift)}

    def __call__(self, y, own: KernelGroup | None = None):
        """(1, C', H, W) -> the same shape. `own` is the group that the layer chose."""
        if own not in self.gathered:
            self.gathered[own] = self.scale[own.channels], self.shift[own.channels]
        scale, shift = self.gathered[own]
        return y * scale + shift


class LayerRunner:
    """Runs a prunable layer with its norm, activation and pooling, on one image. This one has no
    gate, so all kernels run; GatedRunner chooses."""

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
        """The group whose kernels run; None: all kernels."""
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
    # deepcopy looks into this dict, from ids to copies, before it copies anything. Here each tensor
    # is its own copy, so the new net holds the very tensors of `net`.
    copies = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    net = deepcopy(net, copies)
    gates = gates_of(net)
    net.gates = None
    replace_layers(net)
    net.layer_runners = [
        make_layer_runner(net, prunable, gate) for prunable, gate in zip(net.prunable, gates)
    ]
    return net


def replace_layers(net: Net) -> None:
    """Put plain callables in the place of all convolutions, linear layers and identities."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Identity):
            replacement = return_unchanged
        elif isinstance(module, nn.Conv2d):
            replacement = GatheringConvolution(module)
        elif isinstance(module, nn.Linear):
            replacement = GatheringLinear(module)
        else:
            continue
        parent_name, _, own_name = name.rpartition(".")
        parent = net.get_submodule(parent_name)
        # A module must go before something else can take its name.
        delattr(parent, own_name)
        setattr(parent, own_name, replacement)


def make_layer_runner(net: Net, prunable: PrunableLayer, gate: SEGate | None) -> LayerRunner:
    """The runner of a prunable layer of a net that `replace_layers` has changed."""
    layer = attrgetter(prunable.layer_name)(net)
    norm = None  # there is none, or it is folded into the layer
    if prunable.norm_name:
        norm = GatheringNorm(net.get_submodule(prunable.norm_name))
    if gate is None:
        return LayerRunner(layer, norm, prunable)
    return GatedRunner(layer, norm, prunable, gate)


class TunedNet:
    """A net for inference alone on a CPU, as `tune` makes it: normalised images (B, C, H, W) ->
    logits (B, classes). It is no nn.Module: it cannot be moved, cast or trained.

    A gate rounds differently for one image and for a batch. So an image that is about as near to
    two clusters may get another group alone than in a batch.
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
            net = self.single_net if len(x) == 1 else self.batch_net
            return net(x)


@torch.no_grad()
def tune(net: Net) -> TunedNet:
    """A copy of `net` that is quick at one image at a time on this CPU: it runs only the kernels
    that its gates choose. Raises UserError where `net` is none of this tool, or on a GPU."""
    if not isinstance(net, Net):
        raise UserError(f"tune needs a net of this tool, not a {type(net).__name__}")
    if next(net.parameters()).device.type != "cpu":
        raise UserError("tune needs a net on the CPU: net.cpu()")
    return TunedNet(net)
