"""Tests of the fabric planner."""
