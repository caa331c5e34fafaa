"""Stage 1: teach a Q-Former which text belongs to which image (ITC, ITM, ITG), with a frozen encoder.

    accelerate launch stages/stage1.py configs/stage1.yaml configs/encoder/eva_g.yaml \\
        configs/data/coco.yaml run.dir=runs/s1
"""

from qformer.config import Stage1Config, parse_arguments
from qformer.environment import prepare_environment


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(Stage1Config, __doc__, argv)
    # Only now what imports torch: a mistake in the config is reported at once.
    prepare_environment()
    from qformer.build import build_dataset, build_stage1
    from qformer.launch import configure_logging, reported_errors, start_accelerator
    from qformer.training import fit

    with reported_errors():
        accelerator = start_accelerator(config)
        configure_logging(accelerator.is_main_process)

        model = build_stage1(config)  # frozen encoder; trainable: feature norm, Q-Former, three heads
        train = build_dataset(config.data, model.encoder, "train", config.train.seed)
        validation = build_dataset(config.data, model.encoder, "validation", 0) if config.data.validation else None

        fit(model, train, validation, config=config, accelerator=accelerator)  # leaves run.dir/adapter


if __name__ == "__main__":
    main()
