"""Benchmarks: what they run on, how they time, what they check, and how results become tables.

python -m pytest bench -q               verify, time, print the tables (--full: every case;
                                        --record: store the results)
python -m bench.report --write          put the newest stored tables into README.md and docs/
"""
