"""Where targets come from: a teacher that runs beside the student."""
