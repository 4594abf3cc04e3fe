"""Several processes: process groups, launch by torchrun, sharding strategy, signals and the watchdog."""
