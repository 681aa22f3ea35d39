"""The parts of the check on a device (accelerator_check.py). Each module has `measure(report, small)`."""
