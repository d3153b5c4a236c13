"""The methods that learn masks; each has one function `learn`, named in learner/job.py."""
