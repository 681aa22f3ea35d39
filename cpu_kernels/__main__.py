"""``python -m cpu_kernels``: builds the library, where it is looked for."""

from cpu_kernels.build import main

main()
