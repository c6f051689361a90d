"""What people look at: tables, plots and pages made from the figures of an evaluation."""
