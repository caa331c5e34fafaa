"""Show runs in one HTML file: curves against chance, texts with images, speed, memory, warnings.

python stages/report.py runs/s1                          # writes runs/s1/report.html
python stages/report.py runs/a runs/b --out report.html  # two or more runs over each other

The file needs nothing outside itself. A run that still goes on, or was resumed, is shown up to its
last line; start it in the folder that the run was started in, so that its images can be read.
"""

import argparse
from pathlib import Path

from qformer.config.help import HelpFormatter
from qformer.environment import prepare_environment


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder: what run.dir was")
    parser.add_argument("--out", type=Path, help="the file to write (report.html, in the folder of a lone run)")
    parser.add_argument("--title", help="of the page (the names of the runs)")
    args = parser.parse_args(argv)
    prepare_environment()  # only now what may import torch
    from qformer.messages import print_error
    from qformer.report.page import Page
    from qformer.report.run import read_runs
    from qformer.report.sections import add_runs

    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
    try:
        runs = read_runs(args.runs)
        page = Page(args.title or " and ".join(run.name for run in runs))
        add_runs(page, runs)
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder; expected the file to write, as {out / 'report.html'}")
        page.write(out)
    except (ValueError, OSError) as error:
        print_error(f"error: {error}")
        raise SystemExit(2) from None
    print(f"report: {out}")


if __name__ == "__main__":
    main()
