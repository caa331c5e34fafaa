"""Stage 2: teach the Q-Former to speak to a frozen language model, from captions alone.

    accelerate launch stages/stage2.py configs/stage2.yaml configs/encoder/eva_g.yaml \\
        configs/llm/opt_2.7b.yaml configs/data/coco.yaml \\
        stage2.init_from=runs/s1/adapter run.dir=runs/s2
"""

from qformer.config import Stage2Config, parse_arguments
from qformer.environment import prepare_environment


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(Stage2Config, __doc__, argv)
    # Only now what imports torch: a mistake in the config is reported at once.
    prepare_environment()
    from qformer.build import build_dataset, build_stage2
    from qformer.launch import configure_logging, reported_errors, start_accelerator
    from qformer.training import fit

    with reported_errors():
        accelerator = start_accelerator(config)
        configure_logging(accelerator.is_main_process)

        model = build_stage2(config)  # frozen encoder and LLM; trainable: feature norm, Q-Former, projection
        data, question = config.data, model.vqa_prompt
        train = build_dataset(data, model.encoder, "train", config.train.seed, vqa_prompt=question)
        validation = None
        if data.validation:
            validation = build_dataset(data, model.encoder, "validation", 0, vqa_prompt=question)

        fit(model, train, validation, config=config, accelerator=accelerator)  # leaves run.dir/adapter


if __name__ == "__main__":
    main()
