"""Numbers of the paper's training that no loss curve would betray soon: optimiser, and what divides the loss."""

import pytest
import torch
from helpers import of_network

from datasets import load_dataset
from models.vq_autoencoder import VQAutoencoder
from pipeline.run_folder import RunFolder
from pipeline.runtime.device import Machine
from pipeline.training.loop import Place, Trainer
from pipeline.training.schedules import Schedule

CPU = Machine(torch.device("cpu"), bf16=False)


class Line(torch.nn.Module):
    """One weight, whose loss has the gradient that the example says."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))


def test_three_steps_of_the_optimiser_by_hand(tmp_path):
    """AdamW with betas 0.9 and 0.999, epsilon 1e-8 and weight decay 1e-3, as the paper's release has it."""
    model, lr, gradients = Line(), 0.1, [1.0, -3.0, 0.5]
    schedule = Schedule(epochs=1, batch_size=1, lr=lr, seed=0)
    place = Place(RunFolder(tmp_path), schedule, CPU)
    trainer = Trainer((1, "vqsvae"), model, (torch.ones(3),), lambda *_: {}, lambda *_: {}, place, tmp_path / "w.pth")
    expected, mean, square = 2.0, 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        trainer.losses = lambda network, _, batch, g=gradient: {"loss": (g * network.weight).sum()}
        trainer._step((torch.ones(1),), torch.Generator())
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        unbiased = mean / (1 - 0.9**step), square / (1 - 0.999**step)
        expected = expected * (1 - lr * 1e-3) - lr * unbiased[0] / (unbiased[1] ** 0.5 + 1e-8)
        assert model.weight.item() == pytest.approx(expected, rel=1e-9)


def test_all_parameters_are_trained_with_weight_decay(cli, small, tmp_path, monkeypatch):
    """Also alpha and the biases, in one group: part of the release."""
    seen = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda trainer: (seen.append(trainer), train(trainer))[1])
    assert cli(*small, "--epochs", 1, "--diffusion_epochs", 1, "--result_path", tmp_path).status == 0
    assert [trainer.name for trainer in seen] == ["vqsvae", "sdid"]
    for trainer in seen:
        (group,) = trainer.optimizer.param_groups
        assert {id(each) for each in group["params"]} == {id(each) for each in trainer.model.parameters()}
        assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.9, 0.999), 1e-3, 1e-8)


def test_the_reconstruction_loss_is_divided_by_the_variance_of_the_training_images(
    cli, small, grey, tmp_path, monkeypatch
):
    """Of the training images in [0,1], without those held out; the test split has another."""
    seen = []
    forward = VQAutoencoder.forward

    def noted(model, images, variance=1.0, generator=None):
        seen.append(variance)
        return forward(model, images, variance, generator)

    monkeypatch.setattr(VQAutoencoder, "forward", noted)
    options = ("--stage", "vqsvae", "--epochs", 1, "--held_out", 20, "--result_path", tmp_path)
    assert cli(*of_network(small), *options).status == 0
    data = load_dataset(grey[1], grey[3], held_out=20, image_size=grey[5])
    expected = (data.train.double() / 255).var(correction=0).item()
    others = [(split.double() / 255).var(correction=0).item() for split in (data.test, data.held_out)]
    assert seen and all(variance == pytest.approx(expected, rel=1e-9) for variance in seen)
    assert all(abs(other / expected - 1) > 1e-3 for other in others)
