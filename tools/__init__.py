"""What is used to build, test and measure daxfs; not installed with it."""
