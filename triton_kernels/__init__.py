"""The ops in Triton, for GPUs without the CUDA library and beside it.

Tested in Triton's interpreter and, for sm_80 and sm_90, as the PTX that Triton makes of it;
compiled for sm_100 and gfx942 too. Not yet run on a GPU, and its tiles not yet measured.

    launch.py      the ops: memory and launches
    dispatch.py    a launch without Triton's search for the compilation
    project.py     L0: p_f, and x' of the tokens that this settles
    count.py       L1, L2: how many latents beat each f that is still open
    add.py         x' of the tokens that had to be counted for; add_directions
    topk.py        encode: the k best of each share of the latents
    merge.py       encode: the k best of all shares, in order
    decode.py      decode
    preacts.py     the product that count and topk share
    configs.py     tile sizes, by architecture and shape
    tune.py        finds better ones, when asked

Importing this package imports neither Triton nor the kernels.
"""
