"""Measures Cauce beside what others would do with the same disk: `python -m benchmarks append`.

Each file here whose name begins with a letter is one benchmark. It has `GOALS`, the ratios it finds and what each must
reach, and `measure(run)`, which finds them. `contenders/` holds who is measured.
"""
