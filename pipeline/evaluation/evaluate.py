"""The evaluation of a run: draw images if needed, compute the metrics, write metrics.json."""

from errors import UserError, say_on_stderr
from parts import SAMPLE_METRICS
from pipeline.evaluation.image_records import Evaluation
from pipeline.evaluation.model_records import autoencoder_records, energy_records, floor_records, reconstructions
from pipeline.evaluation.records import write_records
from pipeline.evaluation.temperature import check_held_out, with_temperature
from pipeline.options.sections import METRICS
from pipeline.samples import draw_samples
from pipeline.sampling.sample_files import GRID_IMAGES
from pipeline.session import Session
from pipeline.start import announce_model


def evaluate(session: Session) -> None:
    """Compute the requested metrics and write them to metrics.json.

    Images are drawn only if one of these needs them, or at the end of a training. Metrics of the autoencoder alone need
    no denoiser.
    """
    o, run = session.options, session.run
    run.read_records()  # damage is reported now, not after the samples are drawn
    wanted = METRICS if o.evaluation.metrics is None else o.evaluation.metrics
    trained = o.run.stage == "all" and not o.run.checkpoint
    of_samples = trained or bool(set(wanted) & set(SAMPLE_METRICS))
    draws = of_samples or "energy" in wanted
    model = session.load_model(draws)
    if not trained:
        announce_model(session, model, data=session.data)
    evaluation = prepare_evaluation(session)
    model = with_temperature(session, model) if draws else model
    count = o.drawing.num_samples or evaluation.images_needed or GRID_IMAGES
    images = draw_samples(session, model, count, reuse=True) if of_samples else None
    # what all processes compute comes first, so that none waits for metrics of images, which rank 0 alone computes
    reconstructed = reconstructions(model, evaluation, wanted)
    records = autoencoder_records(model, reconstructed, evaluation, wanted)
    if "energy" in wanted:
        records += energy_records(model, session.data, o.run.seed)
    if reconstructed is not None:
        records = floor_records(reconstructed, evaluation) + records
    if images is not None:
        labels = model.labels_of(range(count))
        records = evaluation.compute(images, model.drawn, model.record, labels=labels) + records
    if change := session.data_change(session.data):
        say_on_stderr(f"warning: {change}")
        records = [record | {"data_change": change} for record in records]
    if session.evaluated:
        records = [record | {"checkpoint": session.evaluated} for record in records]
    write_records(run, records, session.machine, session.networks.digest())  # by one process


def prepare_evaluation(session: Session) -> Evaluation:
    """Raises UserError if a metric requested by name cannot be computed."""
    o = session.options
    if "codebook" in (o.evaluation.metrics or ()) and not session.has_codes:
        raise UserError(f"--metrics codebook: {o.autoencoder.model} has no codes")
    return Evaluation(o.evaluation, session.data, session.machine, o.run.seed, o.drawing.num_samples)


def check_evaluation(session: Session) -> None:
    """Raise UserError if the evaluation after training could not compute what was requested.

    Its networks are released, so that training has the memory.
    """
    if session.options.evaluation.metrics is not None:
        prepare_evaluation(session)
    if session.options.sampling.temperature == "auto" and session.has_codes:
        check_held_out(session.data)
