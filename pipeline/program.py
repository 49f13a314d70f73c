"""What the command line runs once its options have been read: the stages, and how a program ends before its time."""

import sys

import pipeline.runtime.threads  # noqa: F401  before torch
from errors import SIGPIPE, UserError, drop_output, say_on_stderr
from pipeline.options.configuration import Call, resolve
from pipeline.options.sections import TRAINING_STAGES
from pipeline.runtime import processes
from pipeline.runtime.device import choose_machine, keep_freed_memory
from pipeline.session import Session
from pipeline.stages import execute
from pipeline.training.interruption import Interrupted


def stop(message: str, status: int = 2) -> None:
    """End the program with one line on stderr; of several processes that end, the first has said why."""
    if processes.is_first_to_end():
        say_on_stderr(message)
    drop_output()
    sys.exit(status)


def resume_hint(call: Call | None) -> str:
    """What to do after an end before its time, in words: resume a training that has saved, else begin again."""
    again = "run the same command again"
    if call is None or call.options.run.stage not in TRAINING_STAGES or call.options.run.checkpoint:
        return again
    saved = call.run.last.is_file() or not processes.is_rank_0()  # others may not see the folder
    return call.run.resume_hint if saved else f"nothing was saved, {again}"


def run(arguments: list[str] | None, description: str) -> None:
    """Run the stages; a mistake of the user is one line on stderr and exit status 2."""
    call = None
    with processes.joined():
        try:
            with processes.in_contact(lambda: resume_hint(call)):
                call = processes.from_rank_0(lambda: resolve(arguments, description))
                keep_freed_memory()
                o = call.options.run
                machine = choose_machine(o.device, o.precision)
            with call.run, processes.in_contact(lambda: resume_hint(call)):
                execute(Session(call, machine))
        except UserError as error:
            stop(f"error: {error}")
        except Interrupted as interrupted:
            stop(str(interrupted), interrupted.status)
        except KeyboardInterrupt:
            stop(f"interrupted: {resume_hint(call)}", 130)
        except BrokenPipeError:
            stop(f"the output is closed: {resume_hint(call)}", 128 + SIGPIPE)
        except OSError as error:
            stop(f"error: {error}")
        except RuntimeError as error:
            if "out of memory" not in str(error) and "allocate memory" not in str(error):
                raise
            stop("error: out of memory: choose a smaller --batch_size, --eval_batch_size or network")
