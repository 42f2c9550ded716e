"""Mutation testing of the workspace: which small changes of the source tests notice."""
