"""`unite-fast check-cluster`: whether the hosts of a training can work together, and how fast."""
