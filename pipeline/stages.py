"""What `--stage` runs, in order: train the autoencoder, train the denoiser, sample or inpaint, evaluate."""

import torch

from errors import UserError
from pipeline.evaluation.evaluate import check_evaluation, evaluate
from pipeline.evaluation.temperature import with_temperature
from pipeline.options.sections import OWN, TRAINING_STAGES
from pipeline.runtime.processes import from_rank_0
from pipeline.samples import draw_samples
from pipeline.sampling.grids import GREY, grid, named_rows, save_png
from pipeline.sampling.image_models import CodeDiffusion
from pipeline.sampling.masks import hidden_pixels
from pipeline.sampling.sample_files import CLASS_IMAGES, GRID_IMAGES, INPAINTED
from pipeline.session import Session
from pipeline.start import announce_model, announce_training
from pipeline.training.train import begin, check, train_autoencoder, train_denoiser

INPAINTED_IMAGES = 16
COMPLETIONS = 4  # of each image


def execute(session: Session) -> None:
    """Run the requested stages; stop after one that ran out of time."""
    o = session.options.run
    trains = o.stage in TRAINING_STAGES and not o.checkpoint
    if trains and not train(session):
        print(f"--max_minutes {o.max_minutes:g} reached: saved; {session.run.resume_hint}")
        return
    if o.stage == "sample":
        sample(session)
    if o.stage == "inpaint":
        inpaint(session)
    if o.stage in ("all", "evaluate"):
        evaluate(session)
    if o.report and o.stage not in ("sample", "inpaint"):
        from pipeline.report.report import write_report  # here because the library needs none

        write_report([session], session.run.report)
    what = "run is" if session.run.path == session.networks.trained.path else "results are"
    print(f"\nthe {what} in {session.run.path}:")
    for path in session.run.contents():
        print(f"  {path}")


def train(session: Session) -> bool:
    """Train the requested stages; False if one ran out of time."""
    stage = session.options.run.stage
    check(session)
    announce_training(session)
    if stage == "all":
        check_evaluation(session)
    begin(session)
    if stage in ("all", "vqsvae") and not train_autoencoder(session):
        return False
    return stage == "vqsvae" or not session.has_codes or train_denoiser(session)


def sample(session: Session) -> None:
    """Draw images and write them; requested classes take turns."""
    model, count = with_temperature(session, session.load_model()), session.options.drawing.num_samples
    classes = len(model.settings.labels) if isinstance(model, CodeDiffusion) else 0
    if count is not None and count < classes:
        raise UserError(f"--num_samples {count} are too few for {classes} classes: say {classes} at least")
    count = count or CLASS_IMAGES * classes or GRID_IMAGES
    announce_model(session, model, f"{count:,}: {model.drawn}")
    draw_samples(session, model, count)


def inpaint(session: Session) -> None:
    """Inpaint the hidden part of test images and write one image that shows all of them.

    Each image is completed COMPLETIONS times, as its own class if that is known, or once as each of several classes.
    """
    o = session.options
    if not session.has_codes:
        raise UserError(f"--stage inpaint: {o.autoencoder.model} has no codes to keep; snn-vq-vae and vq-vae have")
    model = with_temperature(session, session.load_model())
    assert isinstance(model, CodeDiffusion)
    images = session.data.test[: o.drawing.num_samples or INPAINTED_IMAGES]
    hidden = from_rank_0(lambda: hidden_pixels(o.drawing.mask, *images.shape[2:]))
    drawn = model.drawn
    if own := _own_labels(session, model, len(images)):
        drawn += ", each as its own class"
        model, names = model.asked(own), ["own class"] * COMPLETIONS
    else:
        labels = model.settings.labels
        labels = labels if len(labels) > 1 else labels * COMPLETIONS
        names = [model.name_of(label) for label in labels]
        model = model.asked([label for label in labels for _ in images] or None)
    rows = len(names) or COMPLETIONS
    announce_model(session, model, f"{len(images)}, each completed {rows} times: {drawn}", session.data)
    completed = model.inpaint(images.repeat(rows, 1, 1, 1), hidden)
    shown = grid(torch.cat((images, torch.where(hidden, GREY, images).byte(), completed)), len(images))
    about = {"checkpoint": session.evaluated} if session.evaluated else {}
    save_png(session.run.samples / INPAINTED, named_rows(shown, ["", "", *names]) if names else shown, about)


def _own_labels(session: Session, model: CodeDiffusion, count: int) -> list[int | str]:
    """The classes of the first `count` test images, if each is to be completed as its own; else empty.

    They are names where the model has names: on other data than it was trained on, a class may have another number.
    """
    wanted, labels, class_names = session.options.sampling.labels, session.data.test_labels, session.data.class_names
    if wanted == (OWN,) and labels is None:
        raise UserError(f"--labels own: {session.data.name} has no labels; name classes, or leave --labels out")
    if labels is None or wanted not in ((OWN,), None) or (wanted is None and not model.has_labels):
        return []
    numbers = labels[:count].tolist()
    return [class_names[number] for number in numbers] if class_names and model.class_names else numbers
