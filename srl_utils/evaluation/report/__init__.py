"""The report of an evaluation: tables, figures, documents."""
