"""Soft pruning (SEP, IEEE TIP 2021): gates that switch kernels off, image by image. In this order:

the gate              squeeze-and-excitation, a choice of channels, batch norm of the chosen ones
gated nets            putting gates on, what they use, what they cost, making a gated net plain
loading               any checkpoint as a net, plain or gated
fast single images    `tune`: a copy of a net that is quick at one image at a time on a CPU

Nothing is removed: all C filters of a layer keep their weights. The k of them that its gate scores
highest for an image take part in the forward and backward pass of that image. What the paper does
not give (the gate's inner size, how it starts) is marked `ours`.
"""

import time
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise, product
from operator import attrgetter
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

import models
from models import Net, PrunableLayer, UserError

# ours: the bottleneck of a gate is C_in / 16 as in SENet, but at least 4.
REDUCTION = 16
SMALLEST_BOTTLENECK = 4
# ours: a fresh gate's logits lie in [-1, 1], in the order of the channels' importance.
INITIAL_LOGIT_RANGE = 1.0
# ours: kernels are gathered in multiples of 8, so that few distinct shapes occur.
GATHER_MULTIPLE = 8
# ours: where more than three quarters of the channels are used, gathering them does not pay.
GATHER_LIMIT = 0.75


# ---- the gate ----------------------------------------------------------------------------------


def bottleneck_width(inputs: int) -> int:
    return max(SMALLEST_BOTTLENECK, inputs // REDUCTION)


class SEGate(nn.Module):
    """Selects k of `outputs` channels from the mean of each of the `inputs` channels that the layer
    reads (TIP 2021)."""

    def __init__(self, inputs: int, outputs: int, k: int):
        super().__init__()
        self.k = k
        hidden = bottleneck_width(inputs)
        self.squeeze = nn.Linear(inputs, hidden)
        self.excite = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)
        # Scales are sigmoid(logits) over these: 1 for a fresh gate.
        self.register_buffer("initial_scale", torch.full((outputs,), 0.5))
        self.usage: Usage | None = None  # while `record_usage` lasts

    @torch.no_grad()
    def prefer(self, importance: torch.Tensor) -> None:
        """Prefer channels by `importance` (C,), as hard pruning would; scales stay as they are."""
        scale = torch.sigmoid(self.excite.bias) / self.initial_scale
        # Of each channel: 0 for the least important one, C - 1 for the most important one.
        rank = importance.argsort().argsort().float()
        position = 2 * rank / max(1, len(rank) - 1) - 1  # in [-1, 1]
        self.excite.bias.copy_(INITIAL_LOGIT_RANGE * position)
        self.initial_scale.copy_(torch.sigmoid(self.excite.bias) / scale)

    @property
    def preferred_channels(self) -> torch.Tensor:
        """The k channels (ascending indices) that the gate prefers before it sees an image."""
        return self.excite.bias.detach().topk(self.k).indices.sort().values

    @property
    def macs(self) -> int:
        return self.squeeze.weight.numel() + self.excite.weight.numel()

    def channel_scales(self, channel_means: torch.Tensor, input_channels=None) -> torch.Tensor:
        """Scale of every channel per image, 0 where not selected: (B, C_in') -> (B, C).

        `channel_means` are those of the `input_channels`, of all of them if that is None.
        """
        hidden = torch.relu(models.run_layer(self.squeeze, channel_means, input_channels))
        logits = self.excite(hidden)
        selected = logits.topk(self.k, 1).indices
        mask = torch.zeros_like(logits).scatter_(1, selected, 1.0)
        scales = torch.sigmoid(logits) / self.initial_scale * mask
        # ours: the selected scales average 1. Without this a gate can turn all its channels down
        # together, below those that it never selects. These get no gradient, so choices would flip
        # to kernels that were never trained.
        scales = scales * (self.k / scales.sum(1, keepdim=True))
        if self.usage is not None:
            self.usage.add(mask, scales)
        return scales

    def forward(self, x, input_channels, layer, norm, prunable: PrunableLayer):
        """scales * activation(norm(layer(x))), pooled where the net pools.

        x (B, C_in', H, W) holds the `input_channels` of what the layer reads. Returns y
        (B, C', H', W') and the indices of its channels, None for all.
        """
        # The choice must not depend on bfloat16's three digits.
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.squeeze.weight.dtype
            if x.dim() == 4:
                # Permuted: else the gradient comes back channels-first, and adding it to the
                # layer's takes three times as long as the layer.
                channel_means = x.permute(0, 2, 3, 1).mean((1, 2), dtype=dtype)
            else:
                channel_means = x.to(dtype)
            scales = self.channel_scales(channel_means, input_channels)
        output_channels = None
        if gathers_kernels(x):
            output_channels = channels_to_gather(scales != 0)
        if output_channels is not None:
            scales = scales.index_select(1, output_channels)
        y = models.run_layer(layer, x, input_channels, output_channels)
        if norm is not None:
            y = masked_batch_norm(y, scales.detach(), norm, output_channels)
        y = models.pool_and_activate(y, prunable)
        places = [1] * (y.dim() - 2)
        return y * scales.reshape(*scales.shape, *places).to(y.dtype), output_channels


class Usage:
    """What a gate chose for the images that it saw."""

    def __init__(self, channels: int, device):
        self.images = 0
        self.selections = torch.zeros(channels, device=device)  # images that chose each channel
        self.scale_sums = torch.zeros(channels, device=device)
        self.choices = set()  # the sum of its channels' random numbers stands for each
        numbers = torch.randint(-(2**62), 2**62, (channels,), generator=torch.Generator())
        self.numbers = numbers.to(device)

    def add(self, mask: torch.Tensor, scales: torch.Tensor) -> None:
        """The choices for a batch: mask (B, C) of 0 and 1, scales (B, C)."""
        self.images += len(mask)
        self.selections += mask.sum(0)
        self.scale_sums += scales.sum(0)
        self.choices.update((mask.long() * self.numbers).sum(1).tolist())

    def count_kernels(self) -> tuple[int, int, int]:
        """How many kernels serve no image, some of them, and all."""
        never = int((self.selections == 0).sum())
        always = int((self.selections == self.images).sum())
        return never, len(self.selections) - never - always, always


def gathers_kernels(x) -> bool:
    """Whether a batch x (B, ...) is computed by the kernels that it uses alone, or by all."""
    if x.is_cuda:  # it would wait for the GPU to count the kernels
        return False
    if torch.compiler.is_exporting():  # a program has fixed shapes
        return False
    return len(x) > 1  # for one image it seldom pays; `tune` measures where it does


def channels_to_gather(is_used: torch.Tensor) -> torch.Tensor | None:
    """The channels (ascending indices) that some image of the batch uses, (B, C) -> (C',).

    Filled up to a multiple of GATHER_MULTIPLE; None where nearly all are used.
    """
    is_used = is_used.any(0)
    used = max(1, int(is_used.sum()))
    count = models.round_up(used, GATHER_MULTIPLE)
    if count > GATHER_LIMIT * len(is_used):
        return None
    return is_used.float().topk(count).indices.sort().values


def masked_batch_norm(y, scales, norm: nn.BatchNorm2d, channels) -> torch.Tensor:
    """Batch norm whose statistics count only the images that use a channel.

    y (B, C', H, W) or (B, C'); scales (B, C'), 0 where an image excludes a channel; `channels` are
    the C' of `norm` that y holds, None for all. Excluded channels take no part, forward or
    backward.
    """
    if channels is None and not norm.training:
        return norm(y)
    index = slice(None) if channels is None else channels
    if y.dim() == 2:
        return masked_batch_norm(y[..., None, None], scales, norm, index)[..., 0, 0]
    if norm.training:
        return train_masked_batch_norm(y, scales, norm, index)
    mean, var = norm.running_mean[index], norm.running_var[index]
    return F.batch_norm(y, mean, var, norm.weight[index], norm.bias[index], eps=norm.eps)


def train_masked_batch_norm(y, scales, norm: nn.BatchNorm2d, index) -> torch.Tensor:
    """`masked_batch_norm` by the batch's own statistics, which update the running ones.

    `index` selects the C' channels of `norm` that y holds.
    """
    gamma, beta = norm.weight[index], norm.bias[index]
    old_mean, old_var = norm.running_mean[index], norm.running_var[index]
    mask = (scales != 0).float()
    images = mask.sum(0)  # (C',) that use a channel
    places = y.shape[2] * y.shape[3]
    all_choose_alike = not y.is_cuda and bool(((images == 0) | (images == len(y))).all())
    if all_choose_alike:
        new_mean, new_var = old_mean.clone(), old_var.clone()
        out = F.batch_norm(y, new_mean, new_var, gamma, beta, True, norm.momentum, norm.eps)
    else:
        count = (images * places).clamp_min(1)
        mean, var = masked_statistics(y, mask, places, count)
        with torch.no_grad():
            unbiased_var = var * count / (count - 1).clamp_min(1)
            new_mean = old_mean.lerp(mean, norm.momentum)
            new_var = old_var.lerp(unbiased_var, norm.momentum)
        factor = gamma * (var + norm.eps).rsqrt()
        shift = beta - mean * factor
        out = torch.addcmul(shift[:, None, None], y, factor[:, None, None]).to(y.dtype)
    with torch.no_grad():
        has_variance = images * places > 1
        norm.running_mean[index] = torch.where(has_variance, new_mean, old_mean)
        norm.running_var[index] = torch.where(has_variance, new_var, old_var)
        norm.num_batches_tracked += 1
    return out


def masked_statistics(y, mask, places: int, count):
    """(mean, biased variance), each (C',), of y (B, C', H, W) over the images with mask (B, C') 1.

    `count` (C',) is how many numbers that are: images times places.
    """
    mean = (mask * y.mean((2, 3), dtype=torch.float)).sum(0) * places / count
    squares = torch.linalg.vector_norm(y, dim=(2, 3), dtype=torch.float).square()  # (B, C')
    var = ((mask * squares).sum(0) / count - mean.square()).clamp_min(0)
    return mean, var


# ---- gated nets --------------------------------------------------------------------------------


def gates_of(net: Net) -> list[SEGate | None]:
    """The gate of each prunable layer, None where there is none."""
    return list(net.gates) if net.gates is not None else [None] * len(net.widths)


def input_channels_of(net: Net, index: int) -> int:
    """The number of channels (of a linear layer: not of inputs) that a prunable layer reads."""
    name = net.prunable[index].layer_name
    for prunable, width in zip(net.prunable, net.widths):
        if prunable.next_layer_name == name:
            return width
    return net.get_submodule(name).weight.shape[1]


def attach_gates(net: Net, ks) -> None:
    """Put fresh gates on `net`, in place: one that selects k channels for every k of `ks`.

    A layer with k = None, or with a gate already, stays as it is. Raises UserError where a k is no
    number of channels.
    """
    if not isinstance(ks, list | tuple) or len(ks) != len(net.widths):
        raise UserError(f"a {net.arch} of {len(net.widths)} prunable layers has no gates {ks}")
    if net.gates is None:
        net.gates = nn.ModuleList([None] * len(net.widths))
    device = next(net.parameters()).device
    for i, (prunable, width, k) in enumerate(zip(net.prunable, net.widths, ks)):
        if k is None or net.gates[i] is not None:
            continue
        if type(k) is not int or not 1 <= k <= width:
            raise UserError(f"a gate of {prunable.layer_name} keeps {k} of {width} channels")
        net.gates[i] = SEGate(input_channels_of(net, i), width, k).to(device)


def preferred_channels(net: Net) -> list[torch.Tensor]:
    """Per prunable layer the channels (ascending indices) at work before an image is seen."""
    return [
        torch.arange(width) if gate is None else gate.preferred_channels
        for gate, width in zip(gates_of(net), net.widths)
    ]


def add_gates(net: Net, structure) -> Net:
    """Soft pruning (TIP 2021): a new net of the same weights whose gates keep `structure`.

    A layer gets its gate when it is first pruned. The gate begins with hard pruning's choice, and
    the filters that read the layer are compensated like those of a hard-pruned net.
    """
    net = deepcopy(net)
    previous_channels = preferred_channels(net)
    importance = models.channel_importance(net, previous_channels)
    attach_gates(net, [k if k < width else None for k, width in zip(structure, net.widths)])
    for gate, k, scores, previous in zip(net.gates, structure, importance, previous_channels):
        if gate is not None and k < len(previous):
            # Channels that were excluded before stay behind the others.
            scores[previous] += scores.max() + 1
            gate.prefer(scores)
            gate.k = k
    models.compensate(net, preferred_channels(net), previous_channels)
    return net


@contextmanager
def record_usage(net: Net):
    """Within it, per prunable layer the Usage of its gate, None where there is none."""
    gates = [gate for gate in gates_of(net) if gate is not None]
    for gate in gates:
        scale = gate.initial_scale
        gate.usage = Usage(len(scale), scale.device)
    try:
        yield [None if gate is None else gate.usage for gate in gates_of(net)]
    finally:
        for gate in gates:
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
    """ours: a gated net as a plain small one.

    The kernels that are selected most often on `batches`, each (B, C, H, W), stay, each with its
    mean scale.
    """
    usage = measure_usage(net, batches)
    structure = net.structure
    net = deepcopy(net)
    kept_channels = []
    for i, (prunable, width, gate) in enumerate(zip(net.prunable, net.widths, gates_of(net))):
        if gate is None:
            kept_channels.append(torch.arange(width))
            continue
        selections, scale_sums = usage[i].selections, usage[i].scale_sums
        # A tie goes to the channel that the gate prefers.
        scores = selections + torch.sigmoid(gate.excite.bias)
        kept_channels.append(scores.topk(structure[i]).indices.sort().values.cpu())
        weight = net.get_submodule(prunable.next_layer_name).weight
        mean_scales = scale_sums / selections.clamp_min(1)
        factors = mean_scales.repeat_interleave(weight.shape[1] // width)
        weight.mul_(factors.reshape(-1, *[1] * (weight.dim() - 2)))
    return models.remove_channels(net, kept_channels)


def count_macs(net: Net, structure=None) -> int:
    """models.count_macs and the MACs of the gates.

    Counted are the gates that `net` has or, for a `structure`, one for every layer below its width.
    Excluded kernels cost nothing, nor do the next layer's kernels on excluded channels.
    """
    if structure is None:
        gates = [gate for gate in gates_of(net) if gate is not None]
        return models.count_macs(net) + sum(gate.macs for gate in gates)
    gate_macs = 0
    for i, (k, width) in enumerate(zip(structure, net.widths)):
        if k < width:
            inputs = input_channels_of(net, i)
            gate_macs += bottleneck_width(inputs) * (inputs + width)
    return models.count_macs(net, structure) + gate_macs


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
            attach_gates(net, checkpoint["gates"])
        models.load_weights(net, checkpoint["state"])
    except UserError as error:
        raise UserError(f"{path}: {error}", error.status) from error
    except Exception as error:  # sizes beyond reason, tensors of odd kinds
        name = checkpoint["architecture"].get("name")
        raise UserError(
            f"{path}: its weights do not fit a {name} of the widths it names"
        ) from error
    return net, checkpoint


# ---- fast single images ------------------------------------------------------------------------
#
# One image at a time, starting an operator takes as long as many a layer's arithmetic. So here
# layers are no modules (a module's call costs as much as a small operator), the gate has a third of
# the operators of SEGate, and kernels once gathered are used again while the choice stays the same.


@dataclass(slots=True, eq=False)
class GatheredKernels:
    """The kernels of a layer between some channels; None: all of them."""

    input_channels: torch.Tensor | None
    output_channels: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor | None
    has_fast_layout: bool


class GatheringLayer:
    """A convolution or linear layer for inference on one image: it gathers the kernels between
    the channels at work, and keeps them while these are the very same index tensors."""

    def __init__(self, layer: nn.Conv2d | nn.Linear):
        self.all_weights = layer.weight.detach()
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.is_linear = isinstance(layer, nn.Linear)
        if not self.is_linear:
            self.stride, self.padding = layer.stride, layer.padding
        self.reset(False)

    def reset(self, gathers: bool) -> None:
        """Forget the kernels kept. Those that are to be gathered from lie together in memory."""
        self.weight = self.all_weights.contiguous() if gathers else self.all_weights
        self.kept: GatheredKernels | None = None

    def __call__(self, x, input_channels=None, output_channels=None) -> torch.Tensor:
        """(1, C_in', H, W) -> (1, C', H', W'); of a linear layer (1, C_in', ...) -> (1, C')."""
        kept = self.kept  # looked up once: another thread may set it
        is_kept = (
            kept is not None
            and kept.input_channels is input_channels
            and kept.output_channels is output_channels
        )
        if not is_kept:
            features = x.numel() if self.is_linear else x.shape[1]
            weight, bias = models.select_weight_and_bias(
                self, features, input_channels, output_channels
            )
            kept = GatheredKernels(input_channels, output_channels, weight, bias, self.is_linear)
            self.kept = kept
            # The image in the layout of the kernels, this time: else they would be laid out anew.
            is_channels_last = x.dim() == 4 and weight is self.all_weights
            layout = torch.channels_last if is_channels_last else torch.contiguous_format
            x = x.contiguous(memory_format=layout)
        elif not kept.has_fast_layout:
            # Met again: from now on in the fastest layout, which takes as long as the gathering.
            kept.weight = kept.weight.contiguous(memory_format=torch.channels_last)
            kept.has_fast_layout = True
        if self.is_linear:
            return torch.addmv(kept.bias, kept.weight, x.flatten())[None]
        return torch.conv2d(x, kept.weight, kept.bias, self.stride, self.padding)


class PlainRunner:
    """A prunable layer without a gate, on one image."""

    def __init__(self, layer: GatheringLayer, prunable: PrunableLayer):
        self.layer = layer
        self.prunable = prunable

    def __call__(self, x, input_channels):
        """As Net.run_prunable, for a batch of one."""
        return models.pool_and_activate(self.layer(x, input_channels), self.prunable), None


class GatedRunner:
    """A prunable layer with its gate, on one image: SEGate.forward in few and cheap operators."""

    def __init__(self, layer: GatheringLayer, prunable: PrunableLayer, gate: SEGate):
        self.layer = layer
        self.prunable = prunable
        self.k = gate.k
        self.inverse_initial_scale = 1 / gate.initial_scale
        self.mean_of_k = torch.full_like(gate.initial_scale[: gate.k], 1 / gate.k)
        self.squeeze_bias = gate.squeeze.bias.detach()
        self.squeeze_weight = gate.squeeze.weight.detach()
        self.excite_bias = gate.excite.bias.detach()
        self.excite_weight = gate.excite.weight.detach()
        self.mean_of_places = None
        self.set_skipping(True)

    def set_skipping(self, is_skipping: bool) -> None:
        """From now on compute only the selected kernels; else all of them, masked."""
        self.is_skipping = is_skipping
        # Of the image before: (input channels, the squeeze's weights on them) and
        # (selected channels as a list, as a tensor, their inverse initial scales).
        self.kept_squeeze = (None, self.squeeze_weight)
        self.kept_choice = (None, None, None)

    def __call__(self, x, input_channels):
        """As Net.run_prunable, for a batch of one."""
        if input_channels is not None and not self.is_skipping:
            # Gathering the inputs alone takes longer than computing with all of them.
            all_inputs = x.new_zeros(1, self.squeeze_weight.shape[1], *x.shape[2:])
            x = all_inputs.index_copy_(1, input_channels, x)
            input_channels = None
        logits = self.score_channels(x, input_channels)
        selected = logits.topk(self.k, sorted=False).indices
        if self.is_skipping:
            selected, inverse_scale = self.reuse_choice(selected)
        else:
            inverse_scale = self.inverse_initial_scale.index_select(0, selected)
        scales = torch.sigmoid(logits.index_select(0, selected)).mul_(inverse_scale)
        scales = scales.div_(torch.dot(scales, self.mean_of_k))
        output_channels = selected if self.is_skipping else None
        if not self.is_skipping:
            scales = torch.zeros_like(logits).index_copy_(0, selected, scales)
        y = self.layer(x, input_channels, output_channels)
        y = models.pool_and_activate(y, self.prunable, inplace=True)
        if y.dim() == 4:
            scales = scales.view(-1, 1, 1)
        return y.mul_(scales), output_channels

    def score_channels(self, x, input_channels) -> torch.Tensor:
        """The gate's logits (C,) for an image (1, C_in', H, W)."""
        places = x.reshape(x.shape[1], -1)  # (C_in', H W)
        count = places.shape[1]
        mean_of_places = self.mean_of_places  # looked up once: another thread may set it
        if mean_of_places is None or len(mean_of_places) != count:
            mean_of_places = torch.full((count,), 1 / count, dtype=self.mean_of_k.dtype)
            self.mean_of_places = mean_of_places
        kept_channels, squeeze_weight = self.kept_squeeze
        if kept_channels is not input_channels:
            squeeze_weight = self.squeeze_weight.index_select(1, input_channels)
            self.kept_squeeze = (input_channels, squeeze_weight)
        means = torch.mv(places, mean_of_places)
        hidden = torch.addmv(self.squeeze_bias, squeeze_weight, means).relu_()
        return torch.addmv(self.excite_bias, self.excite_weight, hidden)

    def reuse_choice(self, selected: torch.Tensor):
        """(channels ascending, their inverse initial scales): the very same tensors for the same
        choice as before, by which layers know the kernels that they gathered."""
        channels = sorted(selected.tolist())
        kept_channels, ascending, inverse_scale = self.kept_choice
        if channels != kept_channels:
            ascending = selected.sort().values
            inverse_scale = self.inverse_initial_scale.index_select(0, ascending)
            self.kept_choice = (channels, ascending, inverse_scale)
        return ascending, inverse_scale


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
        self.gated_runners = [
            (runner, prunable)
            for runner, prunable in zip(self.single_net.layer_runners, self.single_net.prunable)
            if isinstance(runner, GatedRunner)
        ]

    @property
    def skipping_gates(self) -> list[bool]:
        """Of each gate whether it skips the kernels that it excludes; else it masks them."""
        return [runner.is_skipping for runner, _ in self.gated_runners]

    def set_skipping(self, skipping_gates) -> None:
        """Let each gate skip or mask."""
        gated_layers = {prunable.layer_name for _, prunable in self.gated_runners}
        for (runner, prunable), is_skipping in zip(self.gated_runners, skipping_gates, strict=True):
            runner.set_skipping(is_skipping)
            readers = {prunable.layer_name, prunable.next_layer_name}
            for name in readers:
                # A layer with a gate of its own is reset with that gate.
                if name == prunable.layer_name or name not in gated_layers:
                    attrgetter(name)(self.single_net).reset(is_skipping)

    def eval(self):
        """As nn.Module.eval; a tuned net is always ready for inference."""
        return self

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return (self.single_net if len(x) == 1 else self.batch_net)(x)


@torch.no_grad()
def tune(net: Net, x: torch.Tensor, rounds: int = 5) -> TunedNet:
    """A copy of `net` that is quick at one image at a time on this CPU.

    A gate skips the kernels that it excludes where that is measured to be faster than masking
    them. x (N, C, H, W), N > 0, are normalised images to measure on, each choice in three times
    `rounds` of them. Raises UserError where x are no images of the net.
    """
    check_tunable(net, x)
    tuned = TunedNet(net)
    if tuned.gated_runners:
        times = measure_gates(tuned, x, rounds)
        tuned.set_skipping(find_quickest_choice(times))
    return tuned


def check_tunable(net: Net, x: torch.Tensor) -> None:
    if not isinstance(net, Net):
        raise UserError(f"tune needs a net of this tool, not a {type(net).__name__}")
    dtype = next(net.parameters()).dtype
    is_batch = isinstance(x, torch.Tensor) and x.dim() == 4 and len(x) > 0
    if not is_batch or x.shape[1] != net.channels or (x.dtype, x.device.type) != (dtype, "cpu"):
        raise UserError(
            f"tune needs images (N, {net.channels}, H, W), at least one, of {dtype} on the CPU"
        )


def measure_gates(tuned: TunedNet, x: torch.Tensor, rounds: int) -> list[dict]:
    """Per gate {(whether the gate before skips, whether this one does): [seconds, ...]}.

    The seconds are those until the next gate begins. What a layer takes depends on its own gate
    and on the one before, for its inputs may be gathered, too. So all four pairs are measured, by
    letting every second gate do the same.
    """
    runners = tuned.single_net.layer_runners
    gates = len(tuned.gated_runners)
    times = [{} for _ in range(gates)]
    starts = []

    def record_start(runner):
        def run(x, input_channels):
            starts.append(time.perf_counter())
            return runner(x, input_channels)

        return run

    tuned.single_net.layer_runners = [
        record_start(runner) if isinstance(runner, GatedRunner) else runner for runner in runners
    ]
    warm_up = 2
    for pair in list(product((True, False), repeat=2)) * 3:
        tuned.set_skipping([pair[i % 2] for i in range(gates)])
        for n in range(rounds + warm_up):
            starts.clear()
            tuned(x[n % len(x)][None])
            starts.append(time.perf_counter())
            if n < warm_up:
                continue
            for i, (start, end) in enumerate(pairwise(starts)):
                key = (pair[(i - 1) % 2], pair[i % 2])
                times[i].setdefault(key, []).append(end - start)
    tuned.single_net.layer_runners = runners
    return times


def find_quickest_choice(times: list[dict]) -> list[bool]:
    """Of each gate whether it should skip, by the times of `measure_gates`: dynamic programming
    along the chain of gates."""
    # By what the last gate does: (seconds so far, what each gate does).
    best = {True: (0.0, []), False: (0.0, [])}
    for seconds in times:
        longer = {}
        for skips in (True, False):
            longer[skips] = min(
                (total + median(seconds[before, skips]), [*choice, skips])
                for before, (total, choice) in best.items()
            )
        best = longer
    return min(best.values())[1]
