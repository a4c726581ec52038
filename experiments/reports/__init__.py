"""What is shown of the rows: tables, plots, the literature beside, the live display."""
