"""Command lines run one after the other in float64, and the losses of their training steps.

In one process by `perform`, in several by torchrun, which runs this file; its arguments are a file of jobs and a file
for the losses. In float64, what the order of sums changes is too little to make other spikes.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import main
from pipeline.runtime import processes
from pipeline.training import loop as training


def run(arguments, leap=None):
    """The losses of one command line; after `leap` steps an hour passes at once, on the last process's clock alone."""
    losses, take = [], training.Trainer._step

    def step(trainer, *batch):
        losses.append(take(trainer, *batch))
        return losses[-1]

    def clock():
        is_late = leap is not None and len(losses) >= leap and processes.rank() == processes.size() - 1
        return time.monotonic() + 3600 * is_late

    recorded = mock.patch.object(training.Trainer, "_step", step)
    leaping = mock.patch.object(training, "time", SimpleNamespace(monotonic=clock))
    with recorded, leaping, contextlib.suppress(SystemExit):
        main.main([str(argument) for argument in arguments])
    return [{name: value.item() for name, value in each.items()} for each in losses]


def perform(jobs):
    """The losses of each job, `(arguments, leap)`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    try:
        return [run(*job) for job in jobs]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


if __name__ == "__main__":
    jobs_file, losses_file = map(Path, sys.argv[1:])
    with processes.joined(), mock.patch.object(processes, "joined", contextlib.nullcontext):
        losses = perform(json.loads(jobs_file.read_text()))
        if processes.is_rank_0():
            losses_file.write_text(json.dumps(losses))
