"""Where people train: what the trainers that know nothing of this package tell it."""
