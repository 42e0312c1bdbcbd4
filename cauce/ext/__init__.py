"""What fits Cauce into other things: none of it is needed to run, and nothing below imports it."""
