"""Operations worked out by hand and by brute force, for single layers and for the two networks."""

import copy
import itertools

import pytest
import torch
from helpers import as_modules
from torch import nn

from datasets import ImageData
from diffusion.absorbing import AbsorbingDiffusion
from metrics.energy import Operations, count_layers, firing_rates, of_weights, picojoules_per_access
from models import SDID, VQSVAE, ResidualSDID, reference
from models.neurons import LIF, FewSpikes
from pipeline.evaluation.model_records import energy_records
from pipeline.runtime.device import Machine
from pipeline.sampling.image_models import CodeDiffusion
from pipeline.sampling.settings import Settings

STEPS = 4


def count(*arguments, **options):
    """The sum over layers."""
    return sum(count_layers(*arguments, **options).values(), Operations())


def synaptic(operations):
    """What is counted of synapses, without neurons and memory."""
    return operations.macs, operations.acs, operations.dense_macs


def two_layers(second, neuron=LIF):
    """A convolution that passes half the pixels on to the first of two channels, neurons, a second layer; two steps."""
    first = nn.Conv2d(1, 2, 3, padding=1)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
        first.weight[0, 0, 1, 1] = 0.5
    return nn.Sequential(first, nn.Unflatten(0, (2, -1)), neuron(), nn.Flatten(0, 1), *second).eval()


def lively(network, *inputs):
    """A network in evaluation mode, some of whose neurons fire in each layer."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 2.0)
            nn.init.constant_(module.bias, 0.5)
    with torch.no_grad():
        for _ in range(30):  # until the running statistics are those of the inputs
            network(*inputs)
    return network.eval()


def exact(network):
    """In float64: layers without hooks are computed in another order."""
    return copy.deepcopy(network).double()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def autoencoder(images):
    torch.manual_seed(0)
    return lively(VQSVAE(channels=1, codebook_size=10, embedding_dim=6, spike_steps=STEPS, hidden_channels=5), images)


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 11, (3, 3, 3), generator=generator), torch.tensor([9, 4, 1])


@pytest.fixture(scope="module")
def denoiser(tokens):
    torch.manual_seed(0)
    return lively(SDID(codebook_size=10, spike_steps=STEPS, denoiser_channels=4), *tokens)


@pytest.mark.parametrize(
    ("second", "acs", "dense"),
    [
        # the spike in a corner meets 2x2 outputs of each of 3 channels; in all, a row of 4 is seen 3 + 3 + 4 times
        ([nn.Conv2d(2, 3, 3, padding=1)], 2 * 3 * 4, 2 * 3 * 10 * 10),
        ([nn.Flatten(), nn.Linear(32, 5)], 2 * 5, 32 * 5),
        ([nn.Flatten(), nn.Unflatten(0, (2, -1)), nn.Linear(32, 5, bias=False)], 2 * 5, 32 * 5),  # [S,N,C]
    ],
    ids=["convolution", "linear", "linear_over_steps"],
)
def test_two_layers_by_hand(second, acs, dense):
    network = two_layers(second)
    image = torch.full((1, 1, 4, 4), 0.25)
    image[0, 0, 0, 0] = 5.0  # current 2.5, potential 1.25: fires at both steps, and no other neuron does

    def call():
        return network(image.repeat(2, 1, 1, 1))

    operations = count(network, call, images=1, spike_steps=2)
    first = 1 * 2 * 10 * 10
    assert synaptic(operations) == (2 * first, acs, first + dense)
    assert operations.energy == pytest.approx(4.6 * 2 * first + 0.9 * acs)
    assert operations.dense_energy == pytest.approx(4.6 * (first + dense))
    assert firing_rates(network, call) == {"2": 1 / 32}


def test_neurons_and_memory_by_hand():
    """All memories are small, so that an access is 10 pJ; the image and its spikes are those of the test above."""
    network = two_layers([nn.Conv2d(2, 3, 3, padding=1)])
    image = torch.full((1, 1, 4, 4), 0.25)
    image[0, 0, 0, 0] = 5.0
    first, neurons, second = count_layers(network, lambda: network(image.repeat(2, 1, 1, 1)), 1, 2).values()
    assert (first.updates, neurons.updates, second.updates) == (0, 2 * 32, 0)
    assert (first.spikes, neurons.spikes, second.spikes) == (0, 0, 2)
    assert neurons.neuron_energy == pytest.approx(4.6 * 2 * 32)
    assert first.memory == 10 * (2 * 16 + 3 * 2 * 200), "each pixel; of each operation a weight, and its sum twice"
    assert neurons.memory == 10 * (2 * 2 * 32 + 2), "each potential twice; two spikes"
    assert second.memory == 10 * (2 + 3 * 24), "two spikes"
    assert (first.dense_memory, neurons.dense_memory) == (10 * (2 * 200 + 32), 0), "once, not at both steps"
    assert second.dense_memory == 10 * (2 * 600 + 48)


def test_an_access_costs_more_in_a_larger_memory():
    sizes = {1: 10, 2**11: 10, 5 * 2**10: 15, 2**13: 20, 2**18: 100, 2**24: 100}  # words of 4 bytes
    assert {words: picojoules_per_access(words) for words in sizes} == pytest.approx(sizes)
    layer = nn.Conv2d(128, 64, 1).eval()  # 8,192 weights
    spikes = torch.zeros(1, 128, 2, 2)
    spikes[0, 5, 1, 1] = 1
    assert count(layer, lambda: layer(spikes), 1).memory == 10 + 64 * (20 + 2 * 10)
    assert count(layer, lambda: layer(spikes), 1).dense_memory == 4 * 128 * 64 * (10 + 20) + 4 * 64 * 10


def test_each_digit_of_a_number_that_is_1_is_an_accumulate():
    """Operations by hand; two images."""
    network = two_layers([nn.Conv2d(2, 3, 3, padding=1)], FewSpikes)
    image = torch.zeros(2, 1, 4, 4)
    image[0, 0, 0, 0], image[1, 0, 0, 0], image[0, 0, 1, 1] = 2.6, 0.9, 100.0  # currents 1.3, 0.45, 50
    first = 1 * 2 * 10 * 10
    operations = count(network, lambda: network(image), images=2)
    assert operations.acs * 2 == 3 * ((2 + 1) * 4 + 4 * 9), "0101, 0010 and 1111"
    assert (operations.macs, operations.dense_macs) == (first, first + 2 * 3 * 10 * 10)
    assert operations.updates == 4 * 32, "one at each digit"
    assert firing_rates(network, lambda: network(image)) == {"2": 7 / (4 * 2 * 2 * 16)}
    assert count(network, lambda: network(image - 0.1), images=2).acs > 0


def test_layers_with_other_digits_are_counted_by_their_own():
    """A coarse layer, which comes first, sends 1.0 and then a finer one 0.25, and a binary one fires."""
    network = nn.Sequential(
        *(nn.Conv2d(1, 1, 1), FewSpikes(2), nn.Conv2d(1, 1, 1), FewSpikes(4), nn.Conv2d(1, 1, 1), LIF())
    ).eval()
    for layer, bias in zip(list(network)[::2], (1.1, 0.25, 3.0), strict=True):
        nn.init.constant_(layer.weight, 1e-3)
        nn.init.constant_(layer.bias, bias)
    image = torch.full((1, 1, 1, 1), 0.3)
    layers = count_layers(network, lambda: network(image), images=1)
    assert [(each.macs, each.acs) for each in list(layers.values())[::2]] == [(1, 0), (0, 1), (0, 1)]
    assert firing_rates(network, lambda: network(image)) == {"1": 1 / 2, "3": 1 / 4, "5": 1.0}


def test_transposed_convolution_by_hand():
    """Stride 2 to 6x6: input (i,j) reaches rows 2i-1..2i+1, columns 2j-1..2j+1 of those that there are."""
    layer = nn.ConvTranspose2d(1, 4, 3, stride=2, padding=1, output_padding=1)
    spikes = torch.zeros(1, 1, 3, 3)
    spikes[0, 0, 0, 0] = spikes[0, 0, 1, 0] = spikes[0, 0, 2, 2] = 1
    assert synaptic(count(layer.eval(), lambda: layer(spikes), 1)) == (0, 4 * (2 * 2 + 3 * 2 + 3 * 3), 4 * 8 * 8)


@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
@pytest.mark.parametrize(("stride", "kernel", "padding"), [(1, 3, 1), (2, 3, 1), (1, 1, 0), (2, 4, 1), (1, 3, 0)])
def test_borders_by_brute_force(transposed, stride, kernel, padding):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(3, 5, kernel, stride=stride, padding=padding).eval()
    spikes = (torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    height, width = layer(spikes).shape[2:]
    uses = torch.zeros(6, 7)  # of the weights from one input to one output channel, by the place of the input
    for i, j, di, dj in itertools.product(range(6), range(7), range(kernel), range(kernel)):
        if transposed:  # output = stride * input + tap - padding
            out = [stride * at + tap - padding for at, tap in ((i, di), (j, dj))]
        else:  # input = stride * output + tap - padding
            out = [(at - tap + padding) / stride for at, tap in ((i, di), (j, dj))]
        uses[i, j] += out[0] in range(height) and out[1] in range(width)
    acs = 5 * (spikes * uses).sum().item() / 2
    dense = 3 * 5 * uses.sum().item()
    assert synaptic(count(layer, lambda: layer(spikes), 2)) == (0, acs, dense)
    assert synaptic(count(layer, lambda: layer(spikes + 0.5), 2)) == (dense, 0, dense)


def test_a_network_without_spikes_is_all_macs():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4)).eval()
    nn.init.constant_(network[0].bias, 2.0)
    assert synaptic(count(network, lambda: network(torch.rand(5, 1, 3, 3)), 5)) == (18 + 72, 0, 18 + 72)
    assert firing_rates(network, lambda: network(torch.rand(5, 1, 3, 3))) == {}


def test_autoencoder_by_formula(autoencoder, images):
    """Three weights, stride 2, padding 1: n outputs (or inputs, transposed) in a row use 3 n - 1; stride 1: 3 n - 2."""
    encoding = count(autoencoder, lambda: autoencoder.encode(images), 3, STEPS)
    first = 5 * (3 * 6 - 1) ** 2
    assert encoding.dense_macs == first + 5 * 10 * (3 * 3 - 1) ** 2 + 10 * 6 * 3**2
    assert encoding.macs == STEPS * first
    codes = autoencoder.encode(images)
    decoding = count(autoencoder, lambda: autoencoder.decode(codes), 3, STEPS)
    generator = 6 * 6 * 3**2
    layers = (6 * 10 * (3 * 3 - 1) ** 2, 10 * 5 * (3 * 6 - 1) ** 2, 5 * 1 * (3 * 12 - 2) ** 2)
    assert decoding.dense_macs == generator + sum(layers)
    assert decoding.macs == STEPS * generator
    assert 0 < encoding.acs < STEPS * encoding.dense_macs
    assert 0 < decoding.acs < STEPS * decoding.dense_macs


def test_denoiser_by_formula(denoiser, tokens):
    denoiser = exact(denoiser)
    one_pass = count(denoiser, lambda: denoiser(*tokens), 3, STEPS)
    pairs = ((2, 4), (4, 8), (8, 16), (16, 32), (32, 16), (20, 10))
    assert one_pass.dense_macs == sum(a * b for a, b in pairs) * 7**2
    assert one_pass.macs == STEPS * 2 * 4 * 7**2
    parts = [count(part, lambda: denoiser(*tokens), 3, STEPS) for part in denoiser.children()]
    assert sum(part.acs for part in parts) == pytest.approx(one_pass.acs)
    assert parts[-1].macs == 0 < parts[-1].acs  # the last layer sees spikes, at each step


def test_without_borders_operations_follow_the_firing_rate(autoencoder, images):
    autoencoder, images = exact(autoencoder), images.double()
    rate = firing_rates(autoencoder, lambda: autoencoder.encode(images))["encoder.snn_convs.5"]
    last = count(autoencoder.encoder.snn_convs[6], lambda: autoencoder.encode(images), 3, STEPS)
    assert 0 < rate < 1
    assert last.acs == pytest.approx(rate * STEPS * last.dense_macs)


def test_firing_rates_are_of_the_layers_that_ran(autoencoder, images):
    autoencoder, images = exact(autoencoder), images.double()
    rates = firing_rates(autoencoder, lambda: autoencoder.encode(images))
    assert list(rates) == ["encoder.snn_convs.2", "encoder.snn_convs.5", "encoder.snn_convs.8"]
    assert rates["encoder.snn_convs.8"] == pytest.approx(autoencoder.encoder(images - 0.5).mean().item())


def test_firing_rates_of_several_runs_are_their_mean(autoencoder, images):
    def rates(*batches):
        return firing_rates(autoencoder, lambda: [autoencoder.encode(batch) for batch in batches])

    name = "encoder.snn_convs.2"
    dark = 0 * images
    assert rates(images)[name] != rates(dark)[name]
    assert rates(images, dark)[name] == pytest.approx((rates(images)[name] + rates(dark)[name]) / 2)


def test_per_image_is_the_mean_over_images(denoiser, tokens):
    denoiser = exact(denoiser)

    def one(i):
        return count(denoiser, lambda: denoiser(tokens[0][i : i + 1], tokens[1][i : i + 1]), 1, STEPS)

    mean = (1 / 3) * (one(0) + one(1) + one(2))
    together = count(denoiser, lambda: denoiser(*tokens), 3, STEPS)
    assert together.acs == pytest.approx(mean.acs)
    assert together.energy == pytest.approx(mean.energy)
    assert together.dense_energy == pytest.approx(mean.dense_energy)


def test_a_whole_sample_is_so_many_passes(denoiser, tokens):
    diffusion = AbsorbingDiffusion(codebook_size=10, num_timesteps=9)
    noise = diffusion.noise(seed=0, samples=range(3), grid=(3, 3))
    one_pass = count(denoiser, lambda: denoiser(*tokens), 3, STEPS)
    sample = count(denoiser, lambda: reference.sample(denoiser, *noise, 10), 3, STEPS)
    assert sample.macs == (9 * one_pass).macs
    assert sample.dense_macs == (9 * one_pass).dense_macs
    assert 0 < sample.acs != (9 * one_pass).acs  # spikes are those of the inputs that occur


# ---- a sample, along the schedule of its timesteps ----


def test_without_spikes_one_hot_input_is_looked_up(denoiser, tokens, autoencoder):
    """Tokens, prototypes and labels: no operation of a network without spikes; with spikes, they are counted."""
    network, (numbers, t) = residual_denoiser(), tokens
    told = torch.tensor([[0, 1], [1, 0], [2, 1]])
    layers = count_layers(network, lambda: network(numbers, t, told), 3, network.spike_steps)
    embedded = {"embed", "prototypes.embed", "labels.embed"}
    assert embedded <= layers.keys()
    assert {name for name, counted in of_weights(layers).items() if not counted.dense_macs} == embedded
    assert all(layers[name].acs > 0 for name in embedded)
    block, head = 16 * 9 * 9, 16 * 10 * 9  # mixing; the other layers
    total = sum(counted.dense_macs for counted in layers.values())
    assert total == block + 2 * (16 * 32 * 9) + head
    plain = count_layers(denoiser, lambda: denoiser(*tokens), 3, STEPS)
    assert all(counted.dense_macs > 0 for counted in plain.values() if not counted.updates), (
        "tokens as plain numbers are multiplied"
    )


def residual_denoiser():
    """With prototypes and labels that make a difference."""
    torch.manual_seed(0)
    shape = {"denoiser_channels": 16, "denoiser_blocks": 1, "prototypes": 4, "classes": 2, "grid": (3, 3)}
    denoiser = ResidualSDID(codebook_size=10, spike_steps=2, **shape)
    denoiser.prototypes.grids.copy_(torch.randint(0, 10, (4, 3, 3)))
    denoiser.labels.counts.copy_(torch.tensor([[1, 0], [5, 1], [0, 2], [1, 3]]))
    for condition in (denoiser.prototypes, denoiser.labels):
        torch.nn.init.normal_(condition.embed.weight)
    return denoiser.eval()


def generator_of(autoencoder, denoiser, **settings):
    machine = Machine(torch.device("cpu"), bf16=False)
    return CodeDiffusion(autoencoder, denoiser, (3, 3), machine, seed=7, settings=Settings(**settings))


SETTINGS = [
    ({}, [9, 8, 7, 6, 5, 4, 3, 2, 1]),
    ({"sample_steps": 4, "temperature": 2.0}, [9, 7, 5, 3]),  # 9 - (9 j // 4)
    ({"sample_steps": 4, "reveal_order": "spread", "final_temperature": 0.3}, [9, 8, 7, 4]),  # 9 - max(j, 9 j^2 // 16)
]


@pytest.mark.parametrize(("settings", "timesteps"), SETTINGS, ids=["every", "some", "spread"])
@pytest.mark.parametrize("kind", ["sdid", "residual"])
def test_a_sample_is_counted_along_its_trajectory(kind, settings, timesteps, autoencoder, denoiser, images):
    network = denoiser if kind == "sdid" else residual_denoiser()
    generator = generator_of(autoencoder, network, **settings)
    autoencoder, network, cost = generator.autoencoder, generator.denoiser, generator.cost(images)
    diffusion, steps = AbsorbingDiffusion(10, 9), network.spike_steps
    noise = diffusion.noise(7, range(3), (3, 3), settings.get("sample_steps"), settings.get("reveal_order", "random"))
    condition = network.conditions.of_samples(7, range(3))
    temperatures = {"final_temperature": settings.get("final_temperature"), "condition": condition}
    codes = diffusion.sample(network.logits_at, noise, settings.get("temperature", 1.0), **temperatures)
    expected, passes = Operations(), 0
    for i, t in itertools.product(range(3), timesteps):
        before = torch.where(noise.reveal_times[i : i + 1] > t, codes[i : i + 1], 10)
        told = () if condition is None else (condition[i : i + 1],)
        one = count(network, lambda: network(before, torch.tensor([t]), *told), 1, steps)  # noqa: B023 (called at once)
        expected, passes = expected + (1 / 3) * one, passes + 1
    decoding = count(autoencoder, lambda: autoencoder.decode(codes), 3, STEPS)
    assert 3 * len(timesteps) == passes
    for name, operations in {"sample": expected + decoding, "decode": decoding}.items():
        for kind_of in ("macs", "acs", "dense_macs"):
            assert getattr(cost.operations[name], kind_of) == pytest.approx(getattr(operations, kind_of), rel=1e-9)
    mean = (1 / len(timesteps)) * expected
    assert cost.operations["denoiser_pass"].energy == pytest.approx(mean.energy, rel=1e-9)
    assert cost.operations["denoiser_pass"].dense_energy == pytest.approx(mean.dense_energy, rel=1e-9)


def test_guidance_takes_a_second_pass_without_the_label(autoencoder, images):
    guided = generator_of(autoencoder, residual_denoiser(), sample_steps=4, guidance=1.0)
    told = guided.condition_of(range(3))
    passes = guided._passes(torch.zeros(3, 3, 3), guided.diffusion.noise(7, range(3), (3, 3), 4), range(3))
    assert len(passes) == 8 and all(torch.equal(condition, told) for _, _, condition in passes[::2])
    assert all(condition.tolist() == [[number, -1] for number in told[:, 0]] for _, _, condition in passes[1::2])
    for (tokens, t, _), (again, same, _) in zip(passes[::2], passes[1::2], strict=True):
        assert torch.equal(tokens, again) and torch.equal(t, same)
    cost = guided.cost(images)
    expected = 8 * cost.operations["denoiser_pass"].energy + cost.operations["decode"].energy
    assert cost.operations["sample"].energy == pytest.approx(expected)
    assert cost.passes == 8


def test_firing_rates_are_those_of_the_trajectory(autoencoder, denoiser, images):
    """The mean over the passes, of which the first sees masks alone and the last one mask."""
    generator = generator_of(autoencoder, denoiser, sample_steps=3)
    denoiser = generator.denoiser
    rates = {key: value for key, value in generator.cost(images).firing_rates.items() if key.startswith("denoiser")}
    codes, noise = generator._draw_codes(range(3))
    diffusion, each = generator.diffusion, []
    for t in (9, 6, 3):
        tokens = diffusion.trajectory(codes, noise, t + 1)
        with as_modules(denoiser):
            each.append(firing_rates(denoiser, lambda: denoiser(tokens, torch.full((3,), t))))  # noqa: B023
    assert (diffusion.trajectory(codes, noise, 10) == diffusion.mask_token).all()
    for name, rate in rates.items():
        assert rate == pytest.approx(sum(rates[name.removeprefix("denoiser_pass: ")] for rates in each) / 3)


def test_energy_metrics_say_what_was_counted(autoencoder, denoiser, images):
    generator = generator_of(autoencoder, denoiser, sample_steps=4, temperature=0.5)
    uint8 = (images * 255).byte()
    data = ImageData("own", train=uint8, test=uint8, held_out=uint8[:0])
    records = {record["name"]: record for record in energy_records(generator, data, seed=7)}
    sample, encoding = records["energy_sample"], records["energy_encode"]
    assert sample["passes"] == sample["sampling"]["sample_steps"] == 4 and "sampling" not in encoding
    assert sample["drawn"] == generator.drawn == "temperature 0.5, 4 timesteps"
    assert (sample["num_generated"], sample["num_real"]) == (3, 0)
    assert (encoding["num_generated"], encoding["num_real"]) == (0, 3)
    parts = 4 * records["energy_denoiser_pass"]["value"] + records["energy_decode"]["value"]
    assert sample["value"] == pytest.approx(parts)
    neurons, memory, dense_memory = (
        records[f"energy_sample_{of}"]["value"] for of in ("neurons", "memory", "memory_without_spikes")
    )
    assert neurons == pytest.approx(4.6 * sample["updates"] / 1e6) and memory > sample["value"] and dense_memory > 0
    dense = {name: records[f"energy_{name}_without_spikes"]["value"] for name in ("sample", "denoiser_pass", "decode")}
    assert dense["sample"] == pytest.approx(4 * dense["denoiser_pass"] + dense["decode"])
    changed = generator.asked(final_temperature=0.3, sample_steps=None, reveal_order="spread")
    assert changed.drawn == "temperature 0.5 changing to 0.3, all timesteps, spread order"


def test_counting_changes_nothing(autoencoder, images):
    before = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    codes = autoencoder.encode(images)
    count(autoencoder, lambda: autoencoder.encode(images), 3, STEPS)
    with pytest.raises(ZeroDivisionError):
        count(autoencoder, lambda: 1 / 0, 3, STEPS)
    assert not any(module._forward_hooks for module in autoencoder.modules())
    assert not any(module.training for module in autoencoder.modules())
    assert all(torch.equal(value, before[name]) for name, value in autoencoder.state_dict().items())
    assert torch.equal(autoencoder.encode(images), codes)


@pytest.mark.parametrize(
    "context", [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)], ids=["inference", "autocast"]
)
def test_modes_of_the_caller_do_not_change_the_count(context):
    spikes = torch.ones(2, 300, 3, 3)  # 2,700 operations for an output: no bfloat16 is exactly that
    layer = nn.Conv2d(300, 7, 3, padding=1).eval()
    with context:
        assert synaptic(count(layer, lambda: layer(spikes), 2)) == (0, 300 * 7 * 49, 300 * 7 * 49)


def test_misuse_is_refused(autoencoder, denoiser, images, tokens):
    codes = autoencoder.encode(images)
    calls = [
        (autoencoder, lambda: autoencoder.encode(images)),
        (autoencoder, lambda: autoencoder.decode(codes)),
        (denoiser, lambda: denoiser(*tokens)),
    ]
    for network, call in calls:
        with pytest.raises(ValueError, match="5 images"):
            count(network, call, 5, STEPS)
        network.train()
        with pytest.raises(ValueError, match="evaluation"):
            count(network, call, 3, STEPS)
        network.eval()
    with pytest.raises(ValueError, match="no neuron"):
        firing_rates(denoiser, lambda: None)
