"""Where targets come from: a teacher that runs now, its cache on disk, several teachers as one; the N-best."""
