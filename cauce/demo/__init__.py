"""The demo: what one registration in a web form sets in motion. `cauce demo` plays it."""
