"""`python -m emendo`, and `accelerate launch -m emendo`."""

from emendo.cli import main

if __name__ == "__main__":
    main()
