"""Published experiments, run with emendo; part of the repository and not of the package."""
