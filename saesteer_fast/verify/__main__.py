"""The process that `verify` supervises: `python -m saesteer_fast.verify IMPL DEVICE STORE`."""

import sys
from functools import partial
from pathlib import Path

import torch

from . import smoke, steps, times

if __name__ == "__main__":
    impl, device, store = sys.argv[1:]
    if device != "cpu":
        torch.cuda.set_device(device)
    with torch.inference_mode():
        every = smoke.steps(impl, device) | times.steps(impl, device)
        steps.work(every, Path(store), partial(times.wait, device))
