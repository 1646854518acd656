"""What ``against_trl.py`` compares; imported inside the environment that it makes."""
