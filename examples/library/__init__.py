"""A library whose members were declared four times in ten years, and are all read by the code of today."""
