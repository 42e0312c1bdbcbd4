"""The shop: small services that show each pattern in the way a team would write it."""
