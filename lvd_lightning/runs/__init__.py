"""A run is a directory: what it is made from, how its stages run and go on, what it reaches and shows."""
