"""The kernel of `mosaic_gpu`, by phases. Loading its modules, except `plan` and `estimate`, loads Mosaic GPU.

| module | what it holds |
|---|---|
| plan | sizes and cuts, all static |
| estimate | how long a cut may take, to choose one |
| thread | where a thread stands: warp, lane, tile, steps, addresses |
| fetch | a step's words, from device memory into registers |
| activations | x to shared memory, as operand B, with the sums of its blocks |
| outliers | outliers one by one, for up to 32 rows of x |
| scattered | outliers added to the weights, for more rows |
| decode | words to operand A, scales and zero points |
| steps | the loops over a warp's steps, for few rows of x and for many |
| reduce | the sum over warps and over a cluster, and the output |
"""
