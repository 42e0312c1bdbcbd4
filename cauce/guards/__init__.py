"""What stands between a caller and a service that is in trouble: one small file each."""
