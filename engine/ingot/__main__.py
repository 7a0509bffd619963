"""`python -m ingot`, also what torchrun starts: `torchrun --nproc-per-node N -m ingot finetune RECIPE`."""

from ingot.cli import main

if __name__ == "__main__":
    main()
