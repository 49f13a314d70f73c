"""What happens between the command line and the mathematics: training, sampling, evaluation, and the run folder."""
