"""Sources of targets: a running teacher, a target cache on disk, the average of several teachers, the N-best."""
