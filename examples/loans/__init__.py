"""The loans of a bank: its log, wished line by line of three domains that know which step may follow which."""
