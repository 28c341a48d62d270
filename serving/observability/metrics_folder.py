"""The variable that names the folder of metrics, apart from what imports `prometheus_client`."""

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable by which `prometheus_client` adds up the metrics of several processes, also of ended ones, in
the files of a folder. It must be set before that package is imported."""
