"""`make gpu-check`: build, tests, sanitizer, instruction counts and timings on a machine with a GPU."""
