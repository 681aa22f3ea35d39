"""Meeting a size target: what each weight's error costs, and a plan of bits and outliers."""
