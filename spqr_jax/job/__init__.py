"""The whole way of a model: calibrate, solve, hand over, block by block."""
