"""How good samples are: distances to real images, nearest images, schedules."""
