"""What programs show at a terminal: messages, tables, progress. Commands, scripts and benchmarks share it."""
