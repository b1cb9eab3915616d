"""Lightning data modules, file readers and the solvers that generate data."""
