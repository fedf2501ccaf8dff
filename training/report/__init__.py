"""Numbers in words, tables, plots and pictures. Imports nothing of ours."""
