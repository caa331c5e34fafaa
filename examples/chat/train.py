"""Your own language model with a chat template: pictures stand in the user's turn, answers are the assistant's.

    python examples/chat/train.py LLM RECORDS.jsonl OUT [key=value ...]      # LLM: a folder or hub id
    python examples/chat/train.py --toy OUT     # a random Llama with a ChatML template, made on the fly: 10 s

All that a model asks for is `llm.id` and, for a chat, `llm.chat=true`; the template, the token that ends a turn and the
width are read from its folder. The script prints a turn as the model gets it, trains stage 2, and holds a conversation.
The toy's language model never learnt a language: its loss falls, its words mean nothing.
"""

import argparse
import json
from pathlib import Path

import qformer
from qformer.stages import stage2

CHATML = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SMALL = [
    "train.max_steps=20", "train.global_batch_size=16", "train.micro_batch_size=16", "train.validate_every_steps=20",
    "train.checkpoint_every_steps=20", "optim.warmup_steps=5", "data.workers=0", "data.validation=[]",
    "llm.prompt=describe the picture", "llm.caption_max_new_tokens=12", "stage2.init_share=1",
]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="make the language model, pictures and captions first")
    parser.add_argument("paths", nargs="+", help="LLM RECORDS.jsonl OUT, or with --toy only OUT; then key=value ...")
    args = parser.parse_intermixed_args(argv)
    names, overrides = [p for p in args.paths if "=" not in p], [p for p in args.paths if "=" in p]
    if len(names) != (1 if args.toy else 3):
        parser.error("expected LLM RECORDS.jsonl OUT, or --toy OUT")
    out = Path(names[-1])
    llm, records = make_toy(out) if args.toy else (names[0], Path(names[1]))
    model = [f"llm.id={llm}", "llm.chat=true"]
    data = [f"data.train=[{records}]", f"run.dir={out / 'run'}"]
    stage2.main(["configs/shapes/stage2.yaml", *model, *SMALL, *data, *overrides])

    chatty = qformer.load(out / "run/adapter")
    before, after = chatty.model.llm.chat.split(["what is red?"])
    print(f"a turn: {before}[the picture's visual prompt]{after}")
    picture = str(records.parent / json.loads(records.open().readline())["image"])
    print("caption:", chatty.caption([picture])[0])
    history: list[tuple[str, str]] = []
    for question in ("what is red?", "where is it?"):
        history.append((question, chatty.answer([picture], question, history=history)[0]))
        print("question: {}\nanswer: {}".format(*history[-1]))


def make_toy(out: Path) -> tuple[str, Path]:
    """A Llama of two layers and random weights, with a tokenizer of the captions' words and ChatML; and 64 pictures."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from qformer.shapes.write import write_world

    write_world(out / "pictures", n_train=64, n_validation=0, n_questions=0)
    records = out / "pictures/train.jsonl"
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    texts = [caption for line in records.open() for caption in json.loads(line)["caption"]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(out / "llm")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        initializer_range=0.1,
    )).save_pretrained(out / "llm")  # fmt: skip
    return str(out / "llm"), records


if __name__ == "__main__":
    main()
