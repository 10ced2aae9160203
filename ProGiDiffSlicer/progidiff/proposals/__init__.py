"""What a run has proposed: masks, votes and ensembles, ranking without ground truth, and when to stop sampling."""
