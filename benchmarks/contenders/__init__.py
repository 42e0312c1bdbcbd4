"""Who is measured. Each file says what it does, and that it does it as well as it can be done that way."""
