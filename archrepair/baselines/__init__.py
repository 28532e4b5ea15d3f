"""Other people's repairs, and the controls a user would try first, under one interface: see `experiments.METHODS` for their names."""
