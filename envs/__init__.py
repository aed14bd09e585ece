"""Tasks to run the package on; installed as ``layeredrl_torchrl.envs``."""
