"""All checks of a config, one after the other."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from qformer.doctor import checks
from qformer.doctor.checks import Case, Verdict, attempt
from qformer.doctor.report import FAILED, WARNING, Finding
from qformer.doctor.trial import try_steps


def examine(config: Any, *, processes: int = 1, sample: int = 256, trial: bool = True) -> Iterator[Finding]:
    """Check a config on this machine; findings come one by one, the cheap ones first.

    A check that builds on one that failed is not made, and says so. Beside a probe file in `run.dir`, removed at once,
    nothing is written.

    Args:
        processes: how many the run will have.
        sample: records that are read of each split.
        trial: load the weights and make a few steps.
    """
    case = Case(config, processes, sample)
    failed: set[str] = set()
    for name, check, needs in _plan(case):
        if missing := [n for n in needs if n in failed]:
            finding = Finding(name, WARNING, f"not checked, for it needs: {', '.join(missing)}")
            failed.add(name)
        else:
            finding = attempt(name, check, case)
            if finding.status == FAILED:
                failed.add(name)
        yield finding
    if not trial:
        return
    if failed - {"validation", "run folder", "disk"}:
        yield Finding("step", WARNING, f"not tried, for these failed: {', '.join(sorted(failed))}")
        return
    yield from try_steps(case)


def _plan(case: Case) -> Iterator[tuple[str, Callable[[Case], Verdict], tuple[str, ...]]]:
    """Name, check and the checks it needs."""
    models = ["encoder"]
    yield "steps", checks.check_steps, ()
    yield "run folder", checks.check_run_folder, ()
    yield "device", checks.check_device, ()
    yield "encoder", checks.check_encoder, ()
    if "llm" in case.config.frozen():
        yield "language model", checks.check_language_model, ()
        models.append("language model")
    if case.needs_tokenizer:
        yield "tokenizer", checks.check_tokenizer, ()
        models.append("tokenizer")
    yield "data", partial(checks.check_data, split="train"), ()
    yield "captions", checks.check_captions, ("data", *models[1:])
    if case.config.data.validation:
        yield "validation", partial(checks.check_data, split="validation"), ()
    yield "trainable part", checks.check_beginning, tuple(models)
    yield "disk", checks.check_disk, ("trainable part",)
    yield "models in memory", checks.check_static_memory, ("device", "trainable part")
