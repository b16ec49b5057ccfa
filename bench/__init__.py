"""Benchmarks: what they run on, how they time, what they check, and how results become tables.

python -m pytest bench -q               verify, time, print the tables (--full: every case;
                                        --record: store the results)
python -m bench.gpu                     the same on a GPU, which `make gpu` calls
python -m tests.pages --write           put the newest stored results into README.md and docs/

suites/         what each compares;  test_*.py, gpu.py run them;  compare.py: two commits
workloads.py    tokens and SAEs;  peers.py: who steers them;  exactness.py: who is right
timing.py       rounds;  heap.py: bytes;  machine.py: on what
tables/         results as Markdown;  plots.py: as SVG;  report.py stores and finds them
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""Of the checkout: nothing here is installed."""
