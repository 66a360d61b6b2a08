"""What users' programs, sanitizers, fuzzing and mutation found: small inputs with their right values, by subject, in the modules
of field_reports/, which this file collects (conftest.py)."""
