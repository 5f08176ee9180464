"""Prints the folder of the configurations: for the host's ``--config-dir``."""

from nlm.integrations.fusion_bench import CONFIG_DIR

print(CONFIG_DIR)
