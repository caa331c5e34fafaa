"""Check a config on this machine before hours are spent: models, data, disk, memory, one step, time.

python stages/doctor.py configs/shapes/stage1.yaml run.dir=runs/demo/stage1
python stages/doctor.py configs/stage2.yaml configs/encoder/eva_g.yaml configs/llm/opt_2.7b.yaml \\
    configs/data/coco.yaml stage2.init_from=runs/s1/adapter run.dir=runs/s2 --processes 16

Takes what stages/stage1.py or stage2.py would be given and reports of every check "ok",
"warning" or "FAILED" with the fix. Exit code 2 if one failed. The run folder is left as it is.
"""

import argparse
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from qformer.config import ConfigError, Stage1Config, Stage2Config, load_config, named_stage
from qformer.config.help import HelpFormatter, describe_schema
from qformer.doctor.report import FAILED, OK, Finding, shown, write_json
from qformer.environment import prepare_environment


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, epilog=describe_schema(Stage1Config, Stage2Config)
    )
    parser.add_argument("config", nargs="+", help="YAML files and key=value overrides of a stage's config")
    parser.add_argument("--processes", type=int, default=1, help="processes that the run will have (1)")
    parser.add_argument("--sample", type=int, default=256, help="records that are read of each split (256)")
    parser.add_argument("--quick", action="store_true", help="load no weights and make no step: seconds, not minutes")
    parser.add_argument("--json", type=Path, help="write the findings to this file")
    args = parser.parse_intermixed_args(argv)
    if min(args.processes, args.sample) < 1:
        parser.error("--processes and --sample must be at least 1")
    quiet = logging.StreamHandler()
    quiet.setLevel(logging.ERROR)  # what else is worth saying is in the findings
    logging.basicConfig(handlers=[quiet], force=True)

    try:
        config = load_config(_schema(named_stage(args.config)), args.config)  # without torch: a mistake is said at once
    except ConfigError as error:
        results: Iterable[Finding] = [Finding("config", FAILED, str(error))]
    else:
        prepare_environment()
        from qformer.doctor.examine import examine

        results = examine(config, processes=args.processes, sample=args.sample, trial=not args.quick)
    findings = list(shown(results, Console(width=None if sys.stdout.isatty() else 120)))
    if args.json:
        write_json(args.json, findings)
    failed = sum(finding.status == FAILED for finding in findings)
    warned = sum(finding.status not in (FAILED, OK) for finding in findings)
    print(f"{len(findings)} checks: {failed} failed, {warned} warned" if failed or warned else "all is well")
    if failed:
        raise SystemExit(2)


def _schema(stage: str | None) -> Any:
    schemas: dict[str, Any] = {schema.stage: schema for schema in (Stage1Config, Stage2Config)}
    if stage is not None and stage not in schemas:
        prepare_environment()
        from qformer.build import STAGES  # a stage that was added

        schemas = {name: schema for name, (schema, _) in STAGES.items()}
    if stage not in schemas:
        raise ConfigError(
            f"stage: {stage!r} is not one of {', '.join(schemas)}; name configs/stage1.yaml or stage=stage1"
        )
    return schemas[stage]


if __name__ == "__main__":
    main()
