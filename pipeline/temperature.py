"""The choice of a sampling temperature on training images that no training has seen, never on the test split."""

from dataclasses import replace
from pathlib import Path

from datasets import ImageData
from errors import UserError
from metrics.fad import FEATURES, fad_features
from metrics.frechet import feature_statistics, frechet_distance
from pipeline.distributed import from_writer, is_writer
from pipeline.feature_networks import fad_network, reference_features
from pipeline.generators import CodeDiffusion
from pipeline.run_folder import RunFolder, write_json

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
IMAGES = 500  # drawn at each, from the same noise, so that they differ by the temperature alone


def check_held_out(data: ImageData) -> None:
    """Raise UserError where too few images are held out to choose a temperature on."""
    if len(data.held_out) <= FEATURES:
        fewest = f"more than {FEATURES} images that no training sees, not {len(data.held_out)}"
        raise UserError(f"--temperature auto needs {fewest}: train with --held_out 1000, or choose a temperature")


def choose_temperature(generator: CodeDiffusion, data: ImageData, fad_weights: Path | None, run: RunFolder) -> float:
    """Of TEMPERATURES the one whose samples are nearest to the held-out images, by the Fréchet autoencoder distance.

    Writes all distances to temperature.json. Raises UserError where too few images are held out.
    """
    check_held_out(data)
    if is_writer():
        network, origin, _ = fad_network(data, fad_weights, generator.machine)
        held_out = reference_features(network, fad_features, data.held_out, f"{data.name}-held_out")
        reference = feature_statistics(held_out)
    distances = {}
    for temperature in TEMPERATURES:
        images = replace(generator, temperature=temperature).draw(range(IMAGES))
        if is_writer():
            distances[temperature] = frechet_distance(*feature_statistics(fad_features(images, network)), *reference)
            print(f"temperature {temperature:g}: distance to held-out images {distances[temperature]:.2f}", flush=True)
    best = from_writer(lambda: min(distances, key=distances.get))
    if is_writer():
        count = len(data.held_out)
        protocol = f"Fréchet autoencoder distance ({origin}) of {IMAGES} samples to {count} held-out images"
        content = {"temperature": best, "distances": distances, "protocol": protocol}
        write_json(run.path / "temperature.json", content)
    return best
