"""The samples of a run: drawn with its model, or found in its folder, and written there."""

from functools import partial

from torch import Tensor

from pipeline.runtime.processes import from_rank_0
from pipeline.sampling.grids import grid, save_png
from pipeline.sampling.image_models import CodeDiffusion, ImageModel
from pipeline.sampling.sample_files import read_samples, write_samples, write_single_files
from pipeline.session import Session


def draw_samples(session: Session, model: ImageModel, count: int, reuse: bool = False) -> Tensor:
    """Draw `count` images, uint8 `[N,C,H,W]`, and write them; with a denoiser, also the trajectory of the first.

    If classes are requested, the samples cycle through them. With `reuse`, the images of an earlier call are
    returned if they were drawn with the same settings.
    """
    folder = session.run.samples
    settings = model.record | {"drawn": model.drawn, "weights": session.networks.digest()}
    settings |= {"checkpoint": session.evaluated} if session.evaluated else {}
    images = from_rank_0(partial(read_samples, folder, settings, count)) if reuse else None
    if images is not None:
        print(f"the {count} images are those in {folder / 'images.npz'}, which were drawn with the same settings")
    else:
        classes: list[str] = []
        if isinstance(model, CodeDiffusion):
            moments = model.trajectory()
            save_png(folder / "trajectory.png", grid(moments.flatten(0, 1), moments.shape[1]))
            classes = [model.name_of(label) for label in model.settings.labels]
        images = model.draw_images(range(count))
        write_samples(folder, images, settings, classes)
    if session.options.drawing.png:
        write_single_files(folder / "png", images)
    return images
