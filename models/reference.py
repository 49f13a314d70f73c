"""The method, written as its equations, one spike step after another (arXiv 2308.10187).

Read it from top to bottom beside the paper; numbers of equations are those of the table in docs/method.md. Nothing here
is fast. The networks compute the same functions with less work (`models/spiking.py`), and are tested against these.
Functions take trained networks or layers of these, and arrays; ablations of the spike generator are not among them.

Letters: S spike steps, N images, C channels, HxW pixels, hxw tokens, K codes with embeddings of D numbers, and T = h w
timesteps. Spike steps and timesteps are unrelated.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.neurons import FromRest
from models.quantizer import SpikingQuantizer
from models.residual_sdid import HEADS, MixingBlock, ResidualSDID
from models.residual_svae import ConvolutionBlock
from models.sdid import SDID
from models.spiking import Firing, SpikingStack
from models.unet_sdid import UNetSDID
from models.vq_autoencoder import VQOutput
from models.vq_svae import VQSVAE
from parts import FILTER_TAU, MEMBRANE_DECAY

# ---- neurons and layers ----


def neurons(layer: FromRest, currents: Tensor) -> Tensor:
    """(1) `H = V + (X - V) / tau`, spike `s = [H >= threshold]`, `V = H (1 - s)`, from rest: `[S,...]` to `[S,...]`.

    SpikingJelly's neuron computes a spike step; its surrogate gradient is `ds/dH = 1 / (1 + (pi (H - threshold))^2)`.
    """
    state, spikes = layer.rest(), []
    for x in currents:  # [...]
        spike, state = layer.step(x, state)
        spikes.append(spike)
    return torch.stack(spikes)


def stepwise(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of weights at each spike step: `[S,N,C,H,W]` to `[S,N,C',H',W']`."""
    return torch.stack([layer(each) for each in x])


def block(conv: nn.Module, norm: nn.BatchNorm2d, neuron: FromRest, x: Tensor) -> Tensor:
    """(2) Convolution, batch norm, neurons: `[S,N,C,H,W]` to spikes `[S,N,C',H',W']`.

    The statistics of a training batch are over all images and spike steps.
    """
    currents = stepwise(conv, x)  # [S,N,C',H',W']
    normalised = norm(currents.flatten(0, 1)).view_as(currents)
    return neurons(neuron, normalised)


def blocks(stack: SpikingStack, x: Tensor) -> Tensor:
    """The blocks of a stack, one after another: `[S,N,C,H,W]` to spikes `[S,N,C',H',W']`."""
    for conv, norm, neuron in stack.blocks:
        x = block(conv, norm, neuron, x)
    return x


def at_each_step(x: Tensor, spike_steps: int) -> Tensor:
    """Direct coding: the same input at each spike step, `[N,...]` to `[S,N,...]`."""
    return torch.stack([x] * spike_steps)


# ---- readouts of spikes ----


def firing_rate(spikes: Tensor) -> Tensor:
    """(3) `1/S sum_i s_i`: `[S,...]` to `[...]`."""
    return spikes.sum(0) / len(spikes)


def membrane_potential(spikes: Tensor) -> Tensor:
    """(4) `sum_i 0.8^(S-1-i) s_i`: `[S,...]` to `[...]`. The powers are rounded to float32, as in the release."""
    powers = torch.tensor(MEMBRANE_DECAY, dtype=torch.float32) ** torch.arange(len(spikes) - 1, -1, -1)  # [S]
    return torch.stack([power * spike for power, spike in zip(powers.tolist(), spikes, strict=True)]).sum(0)


def postsynaptic_potential(spikes: Tensor) -> Tensor:
    """(5) `u_i = u_(i-1) + (s_i - u_(i-1)) / 2`, from 0: `[S,...]` to `[S,...]`."""
    u, potentials = torch.zeros_like(spikes[0]), []
    for spike in spikes:
        u = u + (spike - u) / FILTER_TAU
        potentials.append(u)
    return torch.stack(potentials)


# ---- stage 1: the autoencoder ----


def encoder(model: VQSVAE, images: Tensor) -> Tensor:
    """(6) Images `[N,C,H,W]` in [0,1], shifted by -1/2, to the encoder's spikes `[S,N,D,h,w]`."""
    return blocks(model.encoder.snn_convs, at_each_step(images - 0.5, model.spike_steps))


def readout(quantizer: SpikingQuantizer, spikes: Tensor) -> Tensor:
    """(7) `r = (1 - alpha) membrane potential + alpha firing rate`: spikes `[S,N,D,h,w]` to `[N,D,h,w]`."""
    alpha = quantizer.alpha
    return (1 - alpha) * membrane_potential(spikes) + alpha * firing_rate(spikes)


def nearest(quantizer: SpikingQuantizer, r: Tensor) -> Tensor:
    """(8) `k = argmin_j |r - e_j|^2` at each position: `[N,D,h,w]` to codes `[N,h,w]`."""
    embeddings = quantizer.embeddings.weight[:, :, None, None]  # [K,D,1,1]
    return torch.stack([(each - embeddings).square().sum(1).argmin(0) for each in r])  # of [D,h,w]: [K,h,w] to [h,w]


def embed(quantizer: SpikingQuantizer, codes: Tensor) -> Tensor:
    """`e_k`: codes `[N,h,w]` to embeddings `[N,D,h,w]`."""
    return quantizer.embeddings.weight[codes].movedim(3, 1)  # [N,h,w,D] -> [N,D,h,w]


def spike_generator(quantizer: SpikingQuantizer, q: Tensor) -> Tensor:
    """(9) The adaptive spike generator, a block that sees `q` at each spike step: `[N,D,h,w]` to `[S,N,D,h,w]`."""
    return blocks(quantizer.poisson, at_each_step(q, quantizer.spike_steps))


def decoder(model: VQSVAE, spikes: Tensor) -> Tensor:
    """(10) `y = tanh(membrane potential of the last layer)`: spikes `[S,N,D,h,w]` to `[N,C,H,W]` in (-1,1)."""
    hidden = blocks(model.decoder.snn_convs, spikes)
    currents = stepwise(model.decoder.head, hidden)  # [S,N,C,H,W]
    return torch.tanh(membrane_potential(currents))


def encode(model: VQSVAE, images: Tensor) -> Tensor:
    """(6) to (8): images `[N,C,H,W]` in [0,1] to codes `[N,h,w]`."""
    return nearest(model.vq_layer, readout(model.vq_layer, encoder(model, images)))


def decode(model: VQSVAE, codes: Tensor) -> Tensor:
    """(9), (10): codes `[N,h,w]` to images `[N,C,H,W]` in [0,1]."""
    return (decoder(model, spike_generator(model.vq_layer, embed(model.vq_layer, codes))) + 0.5).clamp(0, 1)


def quantizer_term(ours: Tensor, theirs: Tensor) -> Tensor:
    """(11) `|a - stop(b)|^2 + 1/4 |stop(a) - b|^2`, means over the elements."""
    return (ours - theirs.detach()).square().mean() + (ours.detach() - theirs).square().mean() / 4


def reconstruct(model: VQSVAE, images: Tensor, variance: float = 1.0) -> VQOutput:
    """(12) Reconstructions and loss: (11) of embeddings and readout, (11) of the PSPs of both spikes, and the error.

    Images are `[N,C,H,W]` in [0,1]; `variance`, that of the training pixels, divides the error.
    """
    s = encoder(model, images)  # [S,N,D,h,w]
    r = readout(model.vq_layer, s)  # [N,D,h,w]
    codes = nearest(model.vq_layer, r)  # [N,h,w]
    e = embed(model.vq_layer, codes)  # [N,D,h,w]
    q = r + (e - r).detach()  # straight through
    g = spike_generator(model.vq_layer, q)  # [S,N,D,h,w]
    y = decoder(model, g)  # [N,C,H,W]
    quantized = quantizer_term(e, r) + quantizer_term(postsynaptic_potential(g), postsynaptic_potential(s))
    mse = (y - (images - 0.5)).square().mean()
    return VQOutput((y + 0.5).clamp(0, 1), codes, quantized + mse / variance, quantized, mse)


# ---- stage 2: absorbing diffusion over the codes ----


def corrupt(codes: Tensor, t: Tensor, uniforms: Tensor, mask_token: int) -> Tensor:
    """(13) `q(x_t | x_0)`: each token of `codes [N,h,w]` is the mask with probability t/T; `t [N]` in 1..T.

    `uniforms [N,h,w]` in [0,1) decide it.
    """
    masked = uniforms < (t / codes[0].numel()).view(-1, 1, 1)
    return torch.where(masked, mask_token, codes)


def sdid(network: SDID, tokens: Tensor, t: Tensor) -> Tensor:
    """(14) The paper's denoiser: tokens `[N,h,w]` in 0..K and timesteps `t [N]` to logits `[N,K,h,w]`."""
    planes = torch.stack((tokens, t.view(-1, 1, 1).expand_as(tokens)), 1)  # [N,2,h,w], plain numbers
    x = first = blocks(network.conv1, at_each_step(planes.to(network.head.weight), network.spike_steps))  # [S,N,C,h,w]
    for stack in (network.conv2, network.conv3, network.conv4, network.conv5):
        x = blocks(stack, x)
    both = torch.cat((x, first), 2)  # [S,N,5C,h,w]
    return firing_rate(stepwise(network.head, both))  # mean over the steps of [S,N,K,h,w]


def cross_entropy(logits: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """(15) `-sum log p(x_0 | x_t)` over the masked tokens of each image: `[N,K,h,w]` and `[N,h,w]` to `[N]`."""
    log_p = logits.log_softmax(1).gather(1, codes[:, None])[:, 0]  # [N,h,w]
    return -(log_p * mask).sum((1, 2))


def diffusion_loss(network: SDID, codes: Tensor, t: Tensor, mask: Tensor, kind: str = "reweighted_elbo") -> Tensor:
    """(16) `(1 - t/T) CE / (T ln 2)`, or for "elbo" `T/t CE / (T ln 2)`: mean over the images, bits per token.

    The noise of `codes [N,h,w]` are timesteps `t [N]` and, bool `[N,h,w]`, which tokens are masked.
    """
    total = codes[0].numel()
    logits = sdid(network, torch.where(mask, network.codebook_size, codes), t)  # [N,K,h,w]
    ce = cross_entropy(logits, codes, mask)  # [N]
    weighted = {"reweighted_elbo": (1 - t / total) * ce, "elbo": ce / t * total}[kind]
    return weighted.mean() / (total * math.log(2))


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    reveal_times: Tensor,
    uniforms: Tensor,
    codebook_size: int,
    temperature: float = 1.0,
) -> Tensor:
    """(17) The reverse process, at every timestep T..1: codes `[N,h,w]`.

    A token that is masked at t is revealed with probability 1/t, hence at a time uniform on 1..T, which `reveal_times
    [N,h,w]` has drawn. It is drawn from `softmax(logits / temperature)`, by inverting the cumulative sum at `uniforms
    [N,h,w]`; `predict` maps the tokens before this timestep and `t [N]` to logits `[N,K,h,w]`.
    """
    tokens = torch.full_like(reveal_times, codebook_size)
    for t in range(tokens[0].numel(), 0, -1):
        logits = predict(tokens, torch.full((len(tokens),), t, device=tokens.device))
        cumulative = (logits.double() / temperature).softmax(1).cumsum(1)  # [N,K,h,w]
        drawn = (cumulative < uniforms[:, None]).sum(1).clamp_max(codebook_size - 1)  # [N,h,w]
        tokens = torch.where(reveal_times == t, drawn, tokens)
    return tokens


# ---- not of the paper: the residual denoiser and the U-Net ----


def firing(layer: Firing, x: Tensor) -> Tensor:
    """Batch norm and neurons: currents `[S,N,C,h,w]` to spikes `[S,N,C,h,w]`."""
    return block(nn.Identity(), layer.norm, layer.lif, x)


def mixing_block(layer: MixingBlock, x: Tensor) -> Tensor:
    """Currents `[S,N,C,h,w]` plus those of its two branches: a matrix for each group of channels, then an MLP."""
    grouped = firing(layer.fire_positions, x).flatten(3).unflatten(2, (HEADS, -1))  # [S,N,HEADS,C/HEADS,h*w]
    matrices = layer.mix.weight.view(HEADS, grouped.shape[-1], -1)  # [HEADS,h*w,h*w]
    x = x + torch.stack([torch.einsum("gpq,ngcq->ngcp", matrices, each) for each in grouped]).view_as(x)
    hidden = stepwise(layer.expand, firing(layer.fire_channels, x))  # [S,N,2C,h,w]
    return x + stepwise(layer.project, firing(layer.fire_hidden, hidden))


def mixing_blocks(layers: nn.Sequential, x: Tensor) -> Tensor:
    """One after the other, on currents `[S,N,C,h,w]`."""
    for layer in layers:
        x = mixing_block(cast(MixingBlock, layer), x)
    return x


def residual_sdid(network: ResidualSDID, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
    """Tokens `[N,h,w]` in 0..K and conditions `[N,J]` to logits `[N,K,h,w]`."""
    return patch_logits(network, mixing_blocks(network.blocks, patch_currents(network, tokens, condition)))


def patch_currents(network: ResidualSDID, tokens: Tensor, condition: Tensor | None) -> Tensor:
    """Tokens `[N,h,w]` and conditions `[N,J]` to currents `[S,N,C,h/patch,w/patch]`."""
    planes = F.one_hot(tokens, network.codebook_size + 1).movedim(3, 1).to(network.head.weight)  # [N,K+1,h,w]
    currents = network.embed(planes) + network.position  # [N,C,h/patch,w/patch]
    if condition is not None:
        currents = currents + network.conditions.currents(condition)
    return at_each_step(currents, network.spike_steps)


def patch_logits(network: ResidualSDID, x: Tensor) -> Tensor:
    """Currents `[S,N,C,h/patch,w/patch]` to logits `[N,K,h,w]`."""
    outputs = stepwise(network.head, firing(network.fire, x))  # [S,N,patch^2*K,...]
    return F.pixel_shuffle(firing_rate(outputs), network.patch)


def convolution_block(layer: ConvolutionBlock, x: Tensor) -> Tensor:
    """Currents `[S,N,C,h,w]` plus those of its branch of two convolutions."""
    hidden = stepwise(layer.first, firing(layer.fire_first, x))
    return x + stepwise(layer.second, firing(layer.fire_second, hidden))


def unet_sdid(network: UNetSDID, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
    """Tokens `[N,h,w]` in 0..K and conditions `[N,J]` to logits `[N,K,h,w]`."""
    fine = convolution_block(network.before, patch_currents(network, tokens, condition))
    coarse = stepwise(network.down, firing(network.fire_down, fine)) + network.coarse_position
    coarse = mixing_blocks(network.blocks, coarse)
    risen = F.pixel_shuffle(stepwise(network.up, firing(network.fire_up, coarse)), 2)
    return patch_logits(network, convolution_block(network.after, fine + risen))
