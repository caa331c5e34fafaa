"""Write what the frozen encoder makes of every image to disk, so that training never asks it again.

    python stages/cache_features.py configs/encoder/eva_g.yaml configs/data/coco.yaml \\
        data.features=cache/coco_eva_g
    accelerate launch stages/cache_features.py configs/stage1.yaml ... --dtype int8

Takes the config of either stage, of which encoder.*, data.* and train.seed are read, and writes the
images of data.train and data.validation. The same command goes on where it was stopped, with any
number of processes. Then train with the same data.features=FOLDER and, unless there are --crops,
data.augment=false.
Feature files of your own (configs/encoder/features.yaml) become a cache in the same way.
"""

import argparse
import logging
import sys
import time
from datetime import timedelta
from typing import Any

from rich.progress import track

from qformer.config import ConfigError, Stage1Config, load_config, named_stage
from qformer.config.help import HelpFormatter, describe_schema
from qformer.environment import prepare_environment
from qformer.messages import print_error

logger = logging.getLogger("qformer")

READ = ("encoder", "data")  # of a stage's config; the rest may lack values


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        epilog=describe_schema(Stage1Config, sections=("data", "encoder")),
    )
    parser.add_argument("config", nargs="+", help="YAML files and key=value overrides of a stage's config")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "int8"), default="bfloat16",
                        help="of what is stored; int8 with a scale a token"
                        )  # fmt: skip
    parser.add_argument("--crops", type=int, default=0, help="random crops of each image beside the whole one")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures or crops that the encoder sees at a time")
    parser.add_argument("--shard-mb", type=float, default=256, help="size of a shard; one is in memory at a time")
    args = parser.parse_intermixed_args(argv)
    config = _config(args.config)
    # Only now what imports torch: a mistake in the config is reported at once.
    prepare_environment()
    from qformer.build import build_cache_writer
    from qformer.launch import configure_logging, reported_errors, start_accelerator

    with reported_errors():
        accelerator = start_accelerator(config)
        configure_logging(accelerator.is_main_process)
        rank, world = accelerator.process_index, accelerator.num_processes

        writer, encoder = build_cache_writer(
            config, dtype=args.dtype, crops=args.crops, shard_bytes=args.shard_mb * 1e6
        )
        encoder.to(accelerator.device)
        if accelerator.is_main_process:
            logger.info(writer.describe())
            writer.begin()
        accelerator.wait_for_everyone()

        start, done, share = time.monotonic(), 0, writer.share(rank, world)
        reported_at = start
        batches = writer.write(
            encoder, accelerator.device, batch_size=args.batch_size, workers=config.data.workers, rank=rank, world=world
        )
        shown = track(_counted(batches), "caching", total=share, disable=rank > 0 or not sys.stderr.isatty())
        for done, _ in enumerate(shown, start=1):
            now = time.monotonic()
            if now - reported_at > 30 and not sys.stderr.isatty():
                left = timedelta(seconds=round((now - start) / done * (share - done)))
                logger.info("%d of %d images of this process, %.3g a second, %s left", done, share,
                            done / (now - start), left)  # fmt: skip
                reported_at = now

        summary = writer.finish()
    if summary is None:
        logger.info("this process is through, others are not")
        return
    seconds = time.monotonic() - start
    print(f"{config.data.features}: {summary.pictures} images, {summary.size_bytes / 1e9:.3g} GB; "
          f"{done} by this process in {seconds:.1f} s; {len(summary.broken)} broken")  # fmt: skip
    for image_id, reason in list(summary.broken.items())[:5]:
        print(f"  broken: {image_id}: {reason}", file=sys.stderr)


def _counted(batches):
    """One item an image, as they come a batch at a time."""
    for count in batches:
        yield from range(count)


def _config(arguments: list[str]) -> Any:
    try:
        if named_stage(arguments) in (None, Stage1Config.stage):  # any stage's config will do
            return load_config(Stage1Config, arguments, needed=READ)
        from qformer.build import STAGES

        stage = named_stage(arguments)
        if stage not in STAGES:
            raise ConfigError(f"stage: {stage!r} is not one of {', '.join(STAGES)}")
        return load_config(STAGES[stage][0], arguments, needed=READ)
    except ConfigError as error:
        print_error(f"config error: {error}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
