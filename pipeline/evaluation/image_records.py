"""Records of the metrics of generated images: which can be computed, and their values by the protocols."""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from datasets import ImageData
from errors import UserError
from parts import SAMPLE_METRICS, find_part
from pipeline.evaluation.loaders import LOADERS, FeatureNetwork
from pipeline.evaluation.protocols import PER_CLASS, Features, Metric, Values, real_images
from pipeline.evaluation.records import context, make_record
from pipeline.options.sections import RECONSTRUCTED, EvaluationOptions
from pipeline.runtime.device import Machine
from pipeline.runtime.processes import from_rank_0, is_rank_0

GENERATED_METRICS: dict[str, Metric] = {name: find_part(SAMPLE_METRICS, name) for name in SAMPLE_METRICS}


class Evaluation:
    """The available metrics of generated images, determined before any image is drawn.

    Args:
        options: which metrics, the reference split, and the feature networks' weights. Where no metrics are named, all
            that are available are computed, and a line, by `say`, tells which are not.
        data: the real images, and what feature networks are trained on.
        machine: where the feature networks run.
        seed: of KID's subsets.
        num_samples: number of generated images; None: as many as the metrics need.

    Of several processes, rank 0 alone has the networks and computes the metrics. Raises UserError if a metric that is
    named cannot be computed.
    """

    def __init__(
        self,
        options: EvaluationOptions,
        data: ImageData,
        machine: Machine,
        seed: int,
        num_samples: int | None = None,
        say: Callable[[str], None] = print,
    ):
        self.options, self.data, self.machine = options, data, machine
        self.seed, self.num_samples = seed, num_samples
        self.networks: dict[str, FeatureNetwork[Any] | UserError] = {}
        self._check_splits()
        of_all = [name for name, metric in GENERATED_METRICS.items() if not metric.by_name]
        named = of_all if options.metrics is None else options.metrics
        self.of_samples = [name for name in GENERATED_METRICS if name in named]
        wanted = [name for name in GENERATED_METRICS if {name, RECONSTRUCTED + name} & set(named)]
        obstacles = from_rank_0(lambda: {name: self._obstacle(name) for name in wanted})
        self.metrics = {name: GENERATED_METRICS[name] for name in wanted if not obstacles[name]}
        for obstacle in filter(None, dict.fromkeys(obstacles.values())):
            missing = f"no {', '.join(name for name in wanted if obstacles[name] == obstacle)}: {obstacle}"
            if options.metrics is not None:
                raise UserError(missing)
            say(missing)

    @property
    def images_needed(self) -> int:
        """The number of generated images that the metrics need; 0 if there is none to compute."""
        return max((self.metrics[name].generated for name in self.of_samples if name in self.metrics), default=0)

    @property
    def reconstructed(self) -> str:
        """The split that is reconstructed."""
        return "held_out" if self.options.reference == "held_out" else "test"

    def _check_splits(self) -> None:
        """Raise UserError if the split that is reconstructed is empty, or not that of a metric that is named."""
        if not len(real_images(self.data, self.reconstructed)):
            raise UserError("--reference held_out: no images are held out; a training with --held_out N sets N aside")
        for name, metric in GENERATED_METRICS.items():
            floor = RECONSTRUCTED + name
            if floor in (self.options.metrics or ()) and metric.split not in (None, self.reconstructed):
                raise UserError(f"--metrics {floor} is of the {metric.split} split: leave out --reference held_out")

    def _obstacle(self, name: str) -> str | None:
        """Why a metric cannot be computed; None if it can."""
        metric = GENERATED_METRICS[name]
        drawn = metric.generated if self.num_samples is None else self.num_samples
        if name not in self.of_samples:
            drawn = len(real_images(self.data, self.reconstructed))
        real = len(real_images(self.data, metric.split or self.options.reference))
        try:
            for side, count in (("generated", drawn), ("real", real)):
                self._check(metric, side, count)
            self._load(metric.network)
        except UserError as error:
            return str(error)
        return None

    def _check(self, metric: Metric, side: str, count: int) -> None:
        """Raise UserError if a metric cannot be computed of so many images, "generated" or "real"."""
        named = self.options.metrics is not None
        protocol, least = getattr(metric, side), metric.least(side)
        if least <= count < protocol and not named:
            raise UserError(
                f"the protocol has {protocol} {side} images, not {count}: name the metric to compute it of fewer"
            )
        least = least if named else protocol
        if count < least:
            enough = f"{least} or more" + (f", {protocol} as its protocol has" if protocol > least else "")
            raise UserError(f"this needs at least {least} {side} images, not {count}: give {enough}")

    def _load(self, name: str) -> FeatureNetwork[Any]:
        """The feature network of this name; loaded once. Raises the same UserError each time if it is not available."""
        if name not in self.networks:
            try:
                self.networks[name] = LOADERS[name](self.options, self.data, self.machine)
            except UserError as error:
                self.networks[name] = error
        network = self.networks[name]
        if isinstance(network, UserError):
            raise network
        return network

    def compute(
        self,
        images: Tensor,
        drawn: str,
        sampling: dict[str, Any] | None = None,
        metrics: Collection[str] | None = None,
        whole: bool = False,
        labels: Tensor | None = None,
    ) -> list[dict]:
        """Metric records of generated `images`, uint8 `[N,C,H,W]`, of which `drawn` says where they are from.

        Of the available metrics of samples, or of those in `metrics`, for which there are enough images; empty in
        processes other than rank 0. `sampling` are the settings of a model's samples. With `whole`, all images are
        used, however many the protocol has. `labels` as in `Features`.
        """
        computed = {name: metric for name, metric in self.metrics.items() if len(images) >= metric.least("generated")}
        chosen = [
            metric
            for name, metric in computed.items()
            if is_rank_0() and name in (self.of_samples if metrics is None else metrics)
        ]
        shared: dict[tuple, Features] = {}  # by metrics of the same network and images
        records = []
        for metric in chosen:
            first = None if whole or metric.at_least else metric.generated
            split = metric.split or self.options.reference
            key = metric.network, first, split
            if key not in shared:
                source = self._load(metric.network)
                shared[key] = Features(source, images[:first], self.data, split, metric.first_real, self.seed, labels)
            values = metric.values(shared[key])
            records += [self._record(metric, name, value, shared[key]) for name, value in values.items()]
        origin = {"drawn": drawn} | ({} if sampling is None else {"sampling": sampling})
        return [record | origin for record in records]

    def _record(self, metric: Metric, name: str, value: float, features: Features) -> dict:
        protocol = ", ".join(filter(None, (features.source.protocol, metric.protocol)))
        counts: dict[str, Any] = {"real": features.real_count, "generated": len(features.images)}
        marked = metric.marked(name, **counts)
        if marked != name:
            protocol += f", of fewer images than its {metric.generated} generated and at least {metric.real} real"
        about: dict[str, Any] = {"split": features.split, "seed": self.seed, "network": features.source.digest}
        record = make_record(marked, value, protocol, data=self.data, **counts, **about)
        if per_class := self._per_class(name, features):
            record["per_class"] = per_class
        return record

    def _per_class(self, name: str, features: Features) -> Values:
        """A metric of each class, by the class's name, where it has one and there are enough images of the class."""
        if name not in PER_CLASS or features.labels is None:
            return {}
        names = self.data.class_names or ()
        values = {each: PER_CLASS[name](features, label) for label, each in enumerate(names)}
        return {each: value for each, value in values.items() if value is not None}


def evaluate_images(
    images: Tensor,
    data: ImageData,
    options: EvaluationOptions,
    machine: Machine,
    seed: int,
    drawn: str,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Metric records of images uint8 `[N,C,H,W]` from anywhere, `drawn` says where; the rest as in `Evaluation`."""
    evaluation = Evaluation(options, data, machine, seed, len(images), say)
    return [{**record, **context(machine)} for record in evaluation.compute(images, drawn)]
