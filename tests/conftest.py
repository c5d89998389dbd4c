"""Fixtures that every test may ask for."""

pytest_plugins = ["tests.helpers.runs", "tests.helpers.s3", "tests.helpers.cluster"]
