"""The two trainings: the autoencoder on images, then the denoiser on their codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from datasets import digest
from errors import UserError, note
from models import FSVAE, VQAutoencoder
from models.code_order import code_order
from pipeline.checkpoints import load_weights, save_weights
from pipeline.lineage import Recorder, inherited
from pipeline.runtime.processes import from_rank_0
from pipeline.sampling.batches import encode_images
from pipeline.session import Session
from pipeline.training.loop import Batch, Place, Trainer
from pipeline.training.objectives import fsvae_trainer, sdid_trainer, some_held_out, vqsvae_trainer
from pipeline.training.schedules import Schedule

SORTING_IMAGES = 10_000  # whose codes show which codes are similar


def check(session: Session) -> None:
    """Check data, options and run folder before hours are spent. Raises UserError."""
    o, run = session.options, session.run
    if session.data.variance == 0:
        raise UserError("all training images are one uniform colour: there is nothing to learn")
    factor, (height, width) = o.autoencoder.downsampling, session.data.shape[1:]
    if height % factor or width % factor:
        raise UserError(f"images of {width}x{height} pixels: both sides must be multiples of --downsampling {factor}")
    if not session.has_codes and height != width:
        raise UserError(f"images of {width}x{height} pixels: {o.autoencoder.model} needs squares")
    run.read_log()
    session.check_results()
    _check_same_data(session)
    stage, size = o.run.stage, o.autoencoder.codebook_size
    if stage == "sdid" and not session.has_codes:
        raise UserError(f"--stage sdid: {o.autoencoder.model} draws from its own prior and has no second stage")
    if stage == "sdid" and (codes := session.load_vq_autoencoder().codebook_size) != size:
        path = session.networks.autoencoder_path
        raise UserError(f"{path} has {codes} codes: say so with --codebook_size {codes}")
    if session.has_codes:
        _check_denoiser(session)
    if stage == "all" and o.training.sort_codes:
        _check_renumbering(session)


def _check_same_data(session: Session) -> None:
    """Raise UserError if stage 2 would learn codes of other images than those that the autoencoder has seen."""
    is_transfer = session.networks.autoencoder_path != session.run.model
    if session.options.run.stage == "sdid" and not is_transfer and (change := session.data_change(session.data)):
        way = f"--start_from {session.run.path} with another --result_path"
        raise UserError(f"{change}; train on the images of stage 1, or, to train on others, begin a new run: {way}")


def begin(session: Session) -> None:
    """Record options and data in the run folder; copy the autoencoder of another run, if stage 2 uses it."""
    run, networks, data = session.run, session.networks, session.data
    session.recorded = {"image_shape": data.shape, "data": data.fingerprint, "class_names": data.class_names}
    resumes, stage = session.options.run.resume, session.options.run.stage
    if stage == "sdid" and not resumes and from_rank_0(run.unfinished_stage):
        note(f"stage 1 in {run.path} was stopped before its last epoch: stage 2 learns the codes that it has")
    lineage = from_rank_0(lambda: run.lineage if resumes else inherited(session))
    run.write_config(session.described() | session.recorded | {"lineage": lineage})
    if not resumes:
        run.remove_last()
    if networks.autoencoder_path != run.model:
        save_weights(run.model, from_rank_0(partial(load_weights, networks.autoencoder_path)))
        networks.autoencoder_path = run.model


def _check_denoiser(session: Session) -> None:
    """Raise UserError if stage 2 could not start; print a line if the denoiser has to be trained from scratch.

    Before stage 1 alone, too: the options of stage 2 are recorded then.
    """
    denoiser = session.networks.new_denoiser(session.code_grid, session.data)
    if session.options.run.stage == "vqsvae":
        return
    if session.last.get("stage") != "sdid" and not session.networks.begin_denoiser(denoiser):
        print(f"{session.options.run.start_from} has no denoiser: the new one is trained from scratch")


def _check_renumbering(session: Session) -> None:
    """Raise UserError if the denoiser of `--start_from` is to be trained further: it knows codes by their numbers."""
    start = session.networks.start
    if start and not session.options.run.new_denoiser and from_rank_0(start.denoiser.is_file):
        raise UserError(f"--sort_codes renumbers what the denoiser in {start.path} knows: add --new_denoiser")


def train_autoencoder(session: Session) -> bool:
    """Stage 1; False if it ran out of time before its last epoch."""
    if _has_stage_1(session):
        return True
    o, data, machine = session.options.training, session.data, session.machine
    model = session.networks.new_autoencoder(*data.shape[:2])
    if not session.last:  # a resumed training has its weights
        session.networks.begin_autoencoder(model)
    recorder = Recorder(session, "vae" if isinstance(model, FSVAE) else "vqsvae")
    place = Place(session.run, _schedule(session, o.epochs, o.lr), machine, recorder.update)
    machine.to_device(model)
    if isinstance(model, FSVAE):
        return _train(session, fsvae_trainer(model, data, place))
    finished = _train(session, vqsvae_trainer(model, data, place))
    if finished and o.sort_codes:
        trained = session.load_vq_autoencoder()
        codes = _encode(session, trained, data.train[:SORTING_IMAGES])
        trained.renumber(code_order(codes, trained.codebook_size))
        save_weights(session.run.model, trained.state_dict())
        recorder.update(weights_after=digest(trained.state_dict()))
    return finished


def _has_stage_1(session: Session) -> bool:
    """Whether a resumed run has finished stage 1: it is at stage 2, or it had only stage 1 to train."""
    alone = session.options.run.resume and not session.last and from_rank_0(session.run.model.is_file)
    return bool(alone) or session.last.get("stage") == "sdid"


def train_denoiser(session: Session) -> bool:
    """Stage 2, on the codes of the training images; False if it ran out of time before its last epoch."""
    o, machine, networks = session.options.training, session.machine, session.networks
    autoencoder = session.load_vq_autoencoder()
    data = session.data
    encode = partial(_encode, session, autoencoder)
    codes = encode(data.train)
    denoiser = machine.to_device(networks.new_denoiser(session.code_grid, data))
    if session.last.get("stage") == "sdid":  # a resumed training has weights, and conditions that are fitted
        with _refusing_others(session):
            denoiser.load_state_dict(session.last["model"])
        conditions = denoiser.conditions.of(codes, data.train_labels, codebook=autoencoder.vq_layer)
    else:
        networks.begin_denoiser(denoiser)
        conditions = networks.fit_conditions(denoiser, codes, data.train_labels, autoencoder)
    schedule = _schedule(session, o.diffusion_epochs, o.diffusion_lr or o.lr, o.fixed_norm)
    model = session.code_diffusion(autoencoder, denoiser)
    place = Place(session.run, schedule, machine, Recorder(session, "sdid").update)
    held_out = None
    if unseen := some_held_out(data):
        others = encode(unseen.images)
        held_out = _batch(others, denoiser.conditions.of(others, unseen.labels, codebook=autoencoder.vq_layer))
    return _train(session, sdid_trainer(denoiser, model, _batch(codes, conditions), held_out, o.loss, place))


def _encode(session: Session, autoencoder: VQAutoencoder, images: Tensor) -> Tensor:
    return encode_images(autoencoder, images, session.machine, session.options.drawing.eval_batch_size)


def _batch(codes: Tensor, conditions: Tensor | None) -> Batch:
    return (codes,) if conditions is None else (codes, conditions)


def _schedule(session: Session, epochs: int, lr: float, fixed_norm: float = 0.0) -> Schedule:
    o, run = session.options.training, session.options.run
    return Schedule(
        epochs,
        o.batch_size,
        lr,
        run.seed,
        run.max_minutes,
        run.save_every,
        lr_schedule=o.lr_schedule,
        ema_decay=o.ema_decay,
        fixed_norm=fixed_norm,
        int8_weights=o.int8_weights,
    )


def _train(session: Session, trainer: Trainer) -> bool:
    if session.last.get("stage") == trainer.name:
        with _refusing_others(session):
            trainer.restore(session.last)
    return trainer.train()


@contextmanager
def _refusing_others(session: Session) -> Iterator[None]:
    """Raise UserError if the state in last.pth is not that of the networks that config.json describes."""
    try:
        yield
    except UserError:  # a disk that is full is not a file that does not fit
        raise
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        advice = f"restore both, or resume with {session.program} if the network has changed since"
        raise UserError(f"{session.run.last} does not fit its config.json: {advice}") from error
