"""What the command line shows. Results go to stdout, progress to stderr."""
