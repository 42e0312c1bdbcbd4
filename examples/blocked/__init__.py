"""What happens when a service blocks: three in processes of their own, one is stopped, and one that asks them all."""
