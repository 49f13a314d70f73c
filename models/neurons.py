"""The neurons, SpikingJelly's and one more; each starts from rest at every call. `parts.py` has their names.

One of your own is a class with `FromRest` before a neuron of SpikingJelly. The parameters of its constructor have the
names of the options (`tau`, `v_threshold`, `v_reset`, `digits`) that it has.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from spikingjelly.activation_based import neuron, surrogate
from spikingjelly.activation_based.base import MemoryModule
from torch import Tensor

from models.kernels.compiled import is_exactly
from models.kernels.fused_lif import Dynamics, Numbers
from parts import DIGITS, FEW_SPIKES_RANGE, TAU, V_RESET, V_THRESHOLD

SURROGATE = surrogate.ATan(2.0)
"""The surrogate gradient of a spike: `1 / (1 + (pi (H - threshold))^2)`."""

State = dict[str, Any]
"""What a neuron keeps from one spike step to the next, by name: at least the membrane potential `v`."""


class FromRest(MemoryModule):
    """What makes a neuron of SpikingJelly one of these: whatever it keeps is of one call, and at least float32.

    Threads may therefore share a network. SpikingJelly's fused kernels expect a state in float32, whereas the state
    that a neuron of SpikingJelly keeps by itself would have the type of its input, even bfloat16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Input currents `[S,...]` to spikes `[S,...]`."""
        return self._run("m", x, self.rest())[0]

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One spike step, for networks whose next input depends on their output.

        Input currents `[...]` and the state before, which is `rest()` at the first step, to spikes `[...]` and the
        state after.
        """
        return self._run("s", x, state)

    def rest(self) -> State:
        """The state in which a call begins."""
        return copy.deepcopy(self._memories_rv)

    def _run(self, step_mode: str, x: Tensor, state: State) -> tuple[Tensor, State]:
        of_call = copy.copy(self)  # with the same parameters
        of_call._memories = dict(state)
        of_call.step_mode = step_mode
        spikes = super(FromRest, of_call).forward(x.to(torch.promote_types(x.dtype, torch.float32)))
        if getattr(self, "store_v_seq", False):
            object.__setattr__(self, "v_seq", of_call.v_seq)
        return spikes.to(x.dtype), of_call._memories


class LIF(FromRest, neuron.LIFNode):
    """Leaky integrate-and-fire, the paper's neuron: `H = V + (X - V) / tau`, spike `[H >= v_threshold]`.

    After a spike, V is `v_reset`; with None, it is `H - v_threshold`. Otherwise it is H. (For another `v_reset` than 0,
    V decays to that value.) The other attributes of SpikingJelly's neuron are obeyed, too.
    """

    def __init__(self, tau: float = TAU, v_threshold: float = V_THRESHOLD, v_reset: float | None = V_RESET):
        super().__init__(tau, True, v_threshold, v_reset, SURROGATE, step_mode="m")


class IF(FromRest, neuron.IFNode):
    """Integrate-and-fire, a neuron that does not leak: `H = V + X`; otherwise as `LIF`."""

    def __init__(self, v_threshold: float = V_THRESHOLD, v_reset: float | None = V_RESET):
        super().__init__(v_threshold, v_reset, SURROGATE, step_mode="m")


class PLIF(FromRest, neuron.ParametricLIFNode):
    """`LIF` whose time constant is learned, one for each layer (arXiv 2007.05785): `1 / tau = sigmoid(w)`.

    `tau` is its initial value.
    """

    def __init__(self, tau: float = TAU, v_threshold: float = V_THRESHOLD, v_reset: float | None = V_RESET):
        super().__init__(tau, True, v_threshold, v_reset, SURROGATE, step_mode="m")


class _Rounded(torch.autograd.Function):
    """Numbers rounded to multiples of a weight, half of it upwards, and clipped, with the gradient of the clipping."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, last: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.most = FEW_SPIKES_RANGE - last
        return (x / last).add_(0.5).clamp_(0, ctx.most / last + 0.5).floor_().mul_(last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * ((x >= 0) & (x <= ctx.most)), None


class FewSpikes(FromRest, neuron.SimpleBaseNode):
    """Few-spikes neuron (arXiv 2002.00860): answers a current with spikes that are the binary digits of a number.

    Its potential begins at the current X plus half the weight of the last digit. At each of `digits` time steps it
    fires if the potential is at least the weight of that step's digit, `2^(1-i)` for i = 0, 1, ..., which is then
    subtracted. A layer of weights that receives a spike weighs it likewise. So what it receives in all is X, rounded,
    from 0 to less than FEW_SPIKES_RANGE; that number is the output here. Its gradient is that of the clipping.

    The time steps are within a spike step of the network, in which nothing but spikes and their weights passes between
    layers; the neuron keeps nothing from one spike step to the next, so networks have one.
    """

    def __init__(self, digits: int = DIGITS):
        super().__init__(surrogate_function=SURROGATE, step_mode="m")
        self.digits = digits

    @property
    def last(self) -> float:
        """The weight of the last digit, of which the numbers are multiples."""
        return FEW_SPIKES_RANGE / 2**self.digits

    def single_step_forward(self, x: Tensor) -> Tensor:
        """Currents `[...]` of a spike step to the numbers that are sent, `[...]`."""
        sent: Tensor = _Rounded.apply(x, self.last)
        return sent

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """All spike steps at once, of which none depends on another: `[S,...]` to `[S,...]`."""
        return self.single_step_forward(x_seq)

    def binary_spikes(self, numbers: Tensor) -> Tensor:
        """The spikes that send `numbers [...]`: 0 or 1, `[digits,...]`, the digit that weighs most first."""
        whole = (numbers / self.last).round().long()
        places = torch.arange(self.digits - 1, -1, -1, device=numbers.device).view(-1, *numbers.dim() * (1,))
        return (whole >> places & 1).to(numbers.dtype)


Neuron = Callable[[], FromRest]
"""Makes the neurons of a layer. Every network takes one; it is `LIF` unless it is told otherwise."""

OWN = (LIF, IF, PLIF, FewSpikes)
"""The neurons of this module: each computes every element of its input by itself."""


def dynamics_of(layer: FromRest) -> Dynamics | Numbers | None:
    """What the compiled kernels need to know of a neuron; None for one that they do not compute.

    They compute `FewSpikes`, and `LIF`, `IF` and `PLIF` with any time constant and threshold, with a hard reset to 0
    and the paper's surrogate gradient. Others run as they are.
    """
    if is_exactly(layer, FewSpikes):
        last = cast(FewSpikes, layer).last
        return Numbers(last, FEW_SPIKES_RANGE - last)
    if not is_exactly(layer, LIF, IF, PLIF):
        return None
    own: Any = layer  # one of these three
    values = (own.v_threshold, own.v_reset, getattr(own, "tau", TAU))
    if not all(isinstance(value, int | float) for value in values):  # learned, or a reset that is not hard
        return None
    gradient, modes = own.surrogate_function, (getattr(own, "decay_input", True), own.detach_reset, own.store_v_seq)
    if not is_exactly(gradient, surrogate.ATan) or (gradient.alpha, gradient.spiking) != (2, True):
        return None
    if own.v_reset != 0 or modes != (True, False, False):
        return None
    if isinstance(own, IF):
        return Dynamics(gain=1.0, leak=0.0, threshold=own.v_threshold)
    return Dynamics(own.w.sigmoid() if isinstance(own, PLIF) else 1 / own.tau, threshold=own.v_threshold)
