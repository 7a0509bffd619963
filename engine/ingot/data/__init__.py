"""Rows on their way to a batch: sources -> conversation -> splits -> template -> loader."""
