"""What `--stage` runs, in order: train the autoencoder, train the denoiser, sample or inpaint, evaluate."""

import torch

from errors import UserError
from pipeline.evaluation.evaluate import check_evaluation, evaluate
from pipeline.evaluation.temperature import with_temperature
from pipeline.sampling.batches import GRID_IMAGES
from pipeline.sampling.draw import draw
from pipeline.sampling.grids import GREY, grid, save_png
from pipeline.sampling.masks import hidden_pixels
from pipeline.session import Session
from pipeline.training.train import begin, check, train_autoencoder, train_denoiser

INPAINTED_IMAGES = 16
COMPLETIONS = 4  # of each image


def execute(session: Session) -> None:
    """Run the stages that were asked for; stop after one that ran out of time."""
    o = session.options.run
    trains = o.stage in ("all", "vqsvae", "sdid") and not o.checkpoint
    if trains and not train(session):
        print(f"--max_minutes {o.max_minutes:g} are over: saved; {session.run.resume_hint}")
        return
    if o.stage == "sample":
        sample(session)
    if o.stage == "inpaint":
        inpaint(session)
    if o.stage in ("all", "evaluate"):
        evaluate(session)
    print(f"\nthe run is in {session.run.path}:")
    for path in session.run.contents():
        print(f"  {path}")


def train(session: Session) -> bool:
    """Train the stages that were asked for; False if one ran out of time."""
    stage = session.options.run.stage
    check(session)
    if stage == "all":
        check_evaluation(session)
    begin(session)
    if stage in ("all", "vqsvae") and not train_autoencoder(session):
        return False
    return stage == "vqsvae" or not session.has_codes or train_denoiser(session)


def sample(session: Session) -> None:
    """Draw images and write them."""
    model = with_temperature(session, session.load_model())
    draw(session, model, session.options.sampling.num_samples or GRID_IMAGES)


def inpaint(session: Session) -> None:
    """Inpaint the hidden part of test images, each COMPLETIONS times, and write one image that shows all of them."""
    o = session.options
    if not session.has_codes:
        raise UserError(f"--stage inpaint: {o.autoencoder.model} has no codes to keep; snn-vq-vae and vq-vae have")
    model = with_temperature(session, session.load_model())
    images = session.data.test[: o.sampling.num_samples or INPAINTED_IMAGES]
    hidden = hidden_pixels(o.sampling.mask, *images.shape[2:])
    completed = model.inpaint(images.repeat(COMPLETIONS, 1, 1, 1), hidden)
    rows = torch.cat((images, torch.where(hidden, GREY, images).byte(), completed))
    save_png(session.run.samples / "inpainted.png", grid(rows, len(images)))
