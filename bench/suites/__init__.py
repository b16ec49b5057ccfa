"""What each suite compares, on what, and how it verifies that first. A suite has

cases(full)         a short list, or every case; str(case) names one
names(case)         the contestants that a case times, if it times any
measuring(every)    a context: measure(case) gives the record of one of these cases, JSON with
                    `seconds` by contestant and round, and `not_run` by contestant with the reason

The suite `gpu` is run by bench/gpu.py and has steps instead.
"""
