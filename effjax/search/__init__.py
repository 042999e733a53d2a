"""Searches that methods share: integer programs with budgets."""
