"""Networks of the published experiments, written fresh or taken from well-kept libraries."""
