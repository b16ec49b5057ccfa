"""Steering in serving engines, which run the tokens of many requests together."""
