"""Drawing images with a trained model, and writing them to the run folder."""

from functools import partial

from torch import Tensor

from pipeline.runtime.processes import from_writer
from pipeline.sampling.batches import read_samples, write_samples, write_single_files
from pipeline.sampling.generators import CodeDiffusion, Generator
from pipeline.sampling.grids import save_png
from pipeline.session import Session


def draw(session: Session, generator: Generator, count: int, reuse: bool = False) -> Tensor:
    """Draw `count` images, uint8 `[N,C,H,W]`, and write them; with a denoiser, also how the first came about.

    With `reuse`, the images of an earlier call are returned if they were drawn with the same settings.
    """
    folder = session.run.samples
    settings = generator.settings | {"drawn": generator.drawn, "weights": session.networks.digest()}
    images = from_writer(partial(read_samples, folder, settings, count)) if reuse else None
    if images is not None:
        print(f"the {count} images are those in {folder / 'images.npz'}, which were drawn with the same settings")
    else:
        if isinstance(generator, CodeDiffusion):
            save_png(folder / "trajectory.png", generator.trajectory())
        images = generator.draw(range(count))
        write_samples(folder, images, settings)
    if session.options.sampling.png:
        write_single_files(folder / "png", images)
    return images
