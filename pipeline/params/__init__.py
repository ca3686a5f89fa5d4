"""The settings of a row: their table, and their values for one row. Imports no torch."""
