"""Many networks in one job: the file that names them (`file`), and what they give together (`results`)."""
