"""The kernel of `mosaic_gpu`, by phases. Loading its modules, but for `plan`, loads Mosaic GPU.

| module | what it holds |
|---|---|
| plan | sizes and cuts, all static; no Mosaic |
| thread | where a thread stands: warp, lane, tile, steps, addresses |
| fetch | a step's words, from device memory into registers |
| activations | x to shared memory, as operand B, with the sums of its blocks |
| outliers | the sparse part |
| decode | words to operand A, scales and zero points |
| steps | the loops over a warp's steps, for few rows of x and for many |
| reduce | the sum over warps and over a cluster, and the output |
"""
