"""Spiking-Diffusion: train, sample and evaluate from the command line.

python main.py --dataset_name MNIST                           train and evaluate
python main.py --resume result/MNIST/snn-vq-vae               continue a run
python main.py --checkpoint result/MNIST/snn-vq-vae           evaluate it again
python main.py --checkpoint pretrained/fmnist --stage sample  draw images
torchrun --nproc_per_node 4 main.py --dataset_name MNIST      with 4 processes

Several processes were tested on CPUs, and never tried on several GPUs.
"""

import os

from errors import reported
from pipeline.options.parser import build_parser
from pipeline.runtime.terminal import print_anywhere


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, then run what it asks for; a mistake is one line on stderr and exit status 2."""
    print_anywhere()
    with reported():
        if os.environ.get("WORLD_SIZE", "1") == "1":  # of several processes, only one may complain
            build_parser(__doc__).parse_args(arguments)
        from pipeline import program  # imports PyTorch, which takes seconds: a mistake is told before

        program.run(arguments, __doc__)


if __name__ == "__main__":
    main()
