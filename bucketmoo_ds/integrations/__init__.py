"""Where people train: what other libraries have to know of ours."""
