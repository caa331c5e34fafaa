"""Sound instead of pictures: log-mel frames are the features, and stage 1 learns which words a sound has.

    python examples/audio/train.py WAVS CAPTIONS.json OUT [key=value ...]     # WAVS: .wav files, 16 kHz, one channel
    python examples/audio/train.py --toy OUT [key=value ...]       # 200 synthesised tones: 15 s of one core, 19 of 20

CAPTIONS.json holds {"name without .wav": "caption" or ["caption", ...], ...}. A sound of s seconds becomes a file of
float[25 s, 64], a frame every 40 ms; encoder.loader=features hands frames to the Q-Former under a mask, so that sounds
of any length train together. A frozen audio encoder's outputs would come in the same way, and see more. The last tenth
is held out: the script ends with the share of those whose own caption is the likeliest of all (chance: 1 in 9).
"""

import argparse
import json
import wave
from pathlib import Path

import numpy as np
import torch
from transformers import BertTokenizer
from transformers.audio_utils import mel_filter_bank

import qformer
from qformer.stages import stage1

RATE, WINDOW, HOP, MELS = 16_000, 640, 640, 64
MODEL = ["encoder.loader=features", f"encoder.width={MELS}", "qformer.layers=2", "qformer.width=64", "qformer.heads=4",
         "qformer.ffn_width=128", "qformer.queries=4", "qformer.contrastive_width=32", "qformer.dropout=0"]  # fmt: skip
TRAINING = ["train.max_steps=100", "train.global_batch_size=32", "train.micro_batch_size=32", "data.workers=0",
            "train.validate_every_steps=100", "train.checkpoint_every_steps=100", "optim.lr=2e-3",
            "optim.warmup_steps=10"]  # fmt: skip
PITCHES, WAYS = {"low": 200, "middle": 500, "high": 1200}, {"rises": 1.5, "stays": 1.0, "falls": 0.66}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="synthesise tones and captions first")
    parser.add_argument("paths", nargs="+", help="WAVS CAPTIONS.json OUT, or with --toy only OUT; then key=value ...")
    args = parser.parse_intermixed_args(argv)
    names, overrides = [p for p in args.paths if "=" not in p], [p for p in args.paths if "=" in p]
    if len(names) != (1 if args.toy else 3):
        parser.error("expected WAVS CAPTIONS.json OUT, or --toy OUT")
    out = Path(names[-1]).resolve()
    (out / "features").mkdir(parents=True, exist_ok=True)
    sounds, table = synthesise(out / "wavs") if args.toy else map(Path, names[:2])
    records = []
    for name, caption in sorted(json.loads(table.read_text()).items()):
        np.save(out / f"features/{name}.npy", log_mel(sounds / f"{name}.wav"))
        records.append({"image": f"features/{name}.npy", "caption": caption})
    held_out, train = records[::10], [record for i, record in enumerate(records) if i % 10]
    for split, chosen in (("train", train), ("validation", held_out)):
        (out / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chosen))
    save_tokenizer(out / "tokenizer", [str(record["caption"]) for record in records])
    stage1.main(["stage=stage1", *MODEL, f"qformer.tokenizer={out / 'tokenizer'}", *TRAINING, *overrides,
                 f"data.train=[{out / 'train.jsonl'}]", f"data.validation=[{out / 'validation.jsonl'}]",
                 f"run.dir={out / 'stage1'}"])  # fmt: skip

    model = qformer.load(out / "stage1/adapter")
    captions = sorted({str(record["caption"]) for record in records})
    queries = model.embed_image([str(out / record["image"]) for record in held_out])
    likeliest = (queries @ model.embed_text(captions).T).amax(1).argmax(1)
    right = sum(captions[i] == str(record["caption"]) for i, record in zip(likeliest, held_out, strict=True))
    print(f"{right} of {len(held_out)} sounds held out have their own caption first of {len(captions)}")


def log_mel(path: Path) -> np.ndarray:
    """A sound's log-mel frames: float32[25 a second, MELS], 0 to about 1 as Whisper scales them."""
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
            raise SystemExit(f"{path}: expected {RATE} Hz, one channel, 16 bits; ffmpeg -i IN -ar {RATE} -ac 1 OUT.wav")
        samples = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16) / 32768
    spectrum = torch.stft(samples, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs() ** 2
    bank = mel_filter_bank(WINDOW // 2 + 1, MELS, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    mel = (spectrum.T @ torch.tensor(bank, dtype=torch.float32)).clamp(min=1e-10).log10()
    return ((mel.maximum(mel.max() - 8) + 4) / 4).numpy()


def save_tokenizer(folder: Path, captions: list[str]) -> None:
    """BERT's tokenizer with the words of the captions for a vocabulary; bert-base-uncased would do as well."""
    words = dict.fromkeys(word for caption in captions for word in caption.lower().split())
    BertTokenizer(
        vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    ).save_pretrained(folder)


def synthesise(folder: Path, count: int = 200) -> tuple[Path, Path]:
    """Tones of half a second to one and a half, with overtones and noise, and what one hears in them."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for i in range(count):
        rng = np.random.default_rng(i)
        pitch, way = rng.choice(list(PITCHES)), rng.choice(list(WAYS))
        seconds = rng.uniform(0.5, 1.5)
        hertz = PITCHES[pitch] * rng.uniform(0.9, 1.1) * np.linspace(1, WAYS[way], int(seconds * RATE))
        phase = 2 * np.pi * np.cumsum(hertz) / RATE
        tone = np.sin(phase) + rng.uniform(0, 0.5) * np.sin(2 * phase) + 0.05 * rng.standard_normal(len(phase))
        with wave.open(str(folder / f"{i:03d}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((tone * 10_000).astype(np.int16).tobytes())
        captions[f"{i:03d}"] = f"a {pitch} tone that {way}"
    (folder / "captions.json").write_text(json.dumps(captions, indent=1))
    return folder, folder / "captions.json"


if __name__ == "__main__":
    main()
