"""`python -m custom_diffusion` is the command `custom-diffusion`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
