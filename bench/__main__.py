"""`python -m bench report`, or the name of one section: see bench/RESULTS.md."""

from __future__ import annotations

import argparse

from bench import report
from bench.store import load


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", choices=["report", *report.SECTIONS])
    parser.add_argument(
        "--stored", action="store_true", help="show what bench/results holds, and run nothing"
    )
    arguments = parser.parse_args()
    if arguments.what == "report":
        for name in report.SECTIONS:
            if not arguments.stored:
                print(f"{name} ...", flush=True)
                report.collect(name)
        report.write()
        print(f"{report.DOCUMENT} written")
    else:
        name = arguments.what
        stored = load(name) if arguments.stored else report.collect(name)
        print(report.section(name).markdown(stored["data"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
