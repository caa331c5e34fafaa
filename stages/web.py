"""A page in the browser: captions, questions, matching and search with trained adapters.

python stages/web.py runs/demo/stage1 runs/demo/opt
python stages/web.py runs/demo/stage1 runs/demo/opt --folder ~/Pictures    # search them by words
python stages/web.py runs/s2/adapter --host 0.0.0.0 --port 8000            # others may use it

Adapters of stage 2 write captions and answers, those of stage 1 match and search: name both of a
run. It needs pip install 'qformer[web]', listens on this machine alone unless told otherwise, and
loads nothing from other hosts (docs/web.md).
"""

import argparse
import os
from pathlib import Path

from qformer.config.help import HelpFormatter
from qformer.environment import prepare_environment

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "qformer")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="run folders, adapter folders or hub ids")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 = all (127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="0 = any that is free (7860)")
    parser.add_argument("--folder", type=Path, metavar="PICTURES", help="pictures to search by words")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where their embeddings are kept (~/.cache/qformer)")
    parser.add_argument(
        "--data-folder", type=Path, metavar="FOLDER", help="keep uploads there, an hour; default: a temporary folder"
    )
    parser.add_argument("--max-upload-mb", type=float, default=32, help="largest upload, in million bytes (32)")
    parser.add_argument("--max-megapixels", type=float, default=50, help="largest image, in million pixels (50)")
    parser.add_argument("--max-video-s", type=float, default=60, help="longest video, in seconds (60)")
    parser.add_argument("--frames", type=int, help="frames that are read of a video (8)")
    parser.add_argument("--device", help="where to run, e.g. cpu or cuda:1 (default: an accelerator if there is one)")
    args = parser.parse_args(argv)
    # Only now what imports torch.
    prepare_environment()
    from qformer.launch import configure_logging, reported_errors

    configure_logging(is_main_process=True)
    with reported_errors():
        from qformer.web.server import Address, serve
        from qformer.web.uploads import Limits

        serve(
            args.adapters,
            Address(args.host, args.port, args.data_folder),
            Limits(args.max_upload_mb, args.max_megapixels, args.max_video_s),
            folder=args.folder,
            cache=args.cache.expanduser(),
            device=args.device,
            frames=args.frames,
        )


if __name__ == "__main__":
    main()
