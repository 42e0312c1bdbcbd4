"""The demo: a user registers on a web form, and a mail arrives. `cauce demo` runs it."""
